"""What the flow is asked: a pydantic form, and the one place where it becomes what the library takes.

Limits are schema constraints wherever JSON schema can say them, so that a server refuses a bad value when a run is
created; the rest is refused when the flow starts.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator

from shardmill.core.recipe import Recipe, parse_recipe
from shardmill.core.scheme import PRESETS
from shardmill.orchestration.bench import Job
from shardmill.orchestration.names import plain
from shardmill.stages.pipeline import RunOptions
from shardmill.stages.plan import Locations

LOCATION_PATTERN: Final = r"^(?!.*://[^/]*@)(/|~|[A-Za-z][A-Za-z0-9+.-]*://)[^\x00-\x1f]*(?!\n)$"
"""An absolute path or a URL; no user name or password, since parameters are stored and shown in clear."""
_DEVICE_PATTERN: Final = r"^[a-z]+(:[0-9]+)?(,[a-z]+(:[0-9]+)?)*(?!\n)$"
_SCHEDULER_PATTERN: Final = r"^(tcp|tls)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}(?!\n)$"
_CHOICES: Final = ("group_size", "ignore", "default_ignores", "indivisible", "expert_layout", "partial_fused")
"""Fields that a recipe replaces."""


def _known_scheme(name: str) -> str:
    if name not in PRESETS:
        raise ValueError(f"unknown scheme, known: {', '.join(PRESETS)}")
    return name


Location = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=LOCATION_PATTERN)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
SchemeName = Annotated[str, AfterValidator(_known_scheme), WithJsonSchema({"type": "string", "enum": list(PRESETS)})]


class QuantizeRequest(BaseModel):
    """What is quantized, how, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True, regex_engine="python-re")

    source: Location = Field(
        description="Checkpoint to read: a folder with safetensors shards, config.json and tokenizer. "
        "Absolute path or URL.",
        examples=["/models/Qwen3-8B"],
    )
    destination: Location = Field(
        description="Where the result appears, whole, when it is finished: nothing or an empty folder. "
        "Absolute path or URL.",
        examples=["/models/Qwen3-8B-FP8"],
    )
    scheme: SchemeName = Field(default="FP8_DYNAMIC", description="How every quantizable weight is quantized.")
    group_size: int | None = Field(
        default=None, ge=1, le=65536, description="Consecutive input features per scale; none for the scheme's own."
    )
    ignore: list[Pattern] = Field(
        default_factory=list,
        max_length=1000,
        description="Modules that stay as they are: a name, or re: and a regular expression.",
        examples=[["lm_head", "re:.*router.*"]],
    )
    default_ignores: bool = Field(
        default=True, description="Leave embeddings, heads, routers and the other default roles as they are."
    )
    indivisible: Literal["refuse", "copy"] = Field(
        default="refuse",
        description="A weight whose width is no multiple of the group size: refuse the run, or copy the weight.",
    )
    expert_layout: Literal["rows", "columns", "interleaved"] | None = Field(
        default=None, description="How fused expert stacks store gate and up; none where the architecture tells."
    )
    partial_fused: bool = Field(
        default=False,
        description="Allow weights that engines fuse to be quantized in part, or with several schemes.",
    )
    recipe: dict[str, Any] | None = Field(
        default=None,
        description="A whole recipe as a recipe file holds it, for several schemes. "
        "It replaces the scheme and all choices above; leave those at their defaults.",
        examples=[{"groups": [{"targets": ["re:.*mlp.*"], "scheme": "NVFP4A16"}, {"scheme": "FP8_DYNAMIC"}]}],
    )
    store: Location | None = Field(
        default=None,
        description="Where finished shards are kept and found again; none for .shardmill beside the destination.",
    )
    device: str = Field(
        default="auto",
        max_length=1000,
        pattern=_DEVICE_PATTERN,
        description="Where shards are computed: auto, cpu, cuda, or a list such as cuda:0,cuda:1. "
        "Bytes do not depend on it.",
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Shards in work at a time on the CPU, whose cores share their row blocks; 0 chooses. "
        "Bytes do not depend on it.",
    )
    executor: Literal["threads", "dask"] = Field(
        default="threads",
        description="Where shards are worked on: threads of the flow's process, or the workers of a Dask cluster. "
        "Bytes do not depend on it.",
    )
    dask_scheduler: str | None = Field(
        default=None,
        max_length=300,
        pattern=_SCHEDULER_PATTERN,
        description="For the executor dask: address of a running scheduler, whose workers reach source and store; "
        "none for a cluster on this machine, one worker process per device, or as many as workers says on the CPU.",
        examples=["tcp://scheduler:8786"],
    )
    verify: Literal["fast", "full"] = Field(
        default="fast",
        description="How finished shards are checked: size, first and last 64 MB (fast), or every byte (full).",
    )

    @model_validator(mode="after")
    def _recipe_or_choices(self) -> Self:
        fields = type(self).model_fields
        changed = [
            name for name in _CHOICES if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]
        if self.recipe is not None and changed:
            raise ValueError(f"a recipe replaces {', '.join(changed)}: say it in the recipe, or leave the recipe out")
        return self

    @property
    def label(self) -> str:
        """Name of the run for people: the checkpoint and the scheme."""
        name = self.source.rstrip("/").rpartition("/")[2].partition("@")[0]
        return f"{plain(name, 60)}-{self.scheme if self.recipe is None else 'recipe'}"

    def to_recipe(self) -> Recipe:
        """The library's recipe.

        Raises:
            RecipeInvalid: the choices do not fit together.
        """
        if self.recipe is not None:
            return parse_recipe(self.recipe)
        choices = {name: getattr(self, name) for name in _CHOICES}
        return parse_recipe({"scheme": self.scheme} | choices)

    def to_job(self, run: str) -> Job:
        """What the tasks of the flow run `run` are told."""
        return Job(
            run=run,
            locations=Locations(source=self.source, destination=self.destination, store=self.store or ""),
            options=RunOptions(device=self.device, workers=self.workers, verify=self.verify),
            label=self.label,
        )
