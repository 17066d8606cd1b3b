"""What the flow is asked: a pydantic form, and the one place where it becomes what the library takes.

Limits are schema constraints wherever JSON schema can say them, so that a server refuses a bad value when a run is
created; the rest is refused when the flow starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from shardmill.core.budget import DEFAULT_CANDIDATES, Wish, parse_budget, parse_candidates
from shardmill.core.limits import NAMES, Intake, Limits
from shardmill.core.markdown import plain
from shardmill.core.plan import PLAIN
from shardmill.core.recipe import Recipe, dequantizing, parse_recipe
from shardmill.core.scheme import PRESETS
from shardmill.errors import Problem, RecipeInvalid
from shardmill.orchestration.bench import Job
from shardmill.stages.pipeline import RunOptions
from shardmill.stages.plan import Locations

LOCATION_PATTERN: Final = r"^(?!.*://[^/]*@)(/|~|[A-Za-z][A-Za-z0-9+.-]*://)[^\x00-\x1f]*(?!\n)$"
"""An absolute path or a URL; no user name or password, since parameters are stored and shown in clear."""
_DEVICE_PATTERN: Final = r"^[a-z]+(:[0-9]+)?(,[a-z]+(:[0-9]+)?)*(?!\n)$"
_SCHEDULER_PATTERN: Final = r"^(tcp|tls)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}(?!\n)$"
_DEPLOYMENT_PATTERN: Final = r"^(?!quantize-batch/)[^/]+/[^/]+(?!\n)$"
"""A batch that started itself would wait for ever."""
_BUDGET_PATTERN: Final = r"^[0-9]+(\.[0-9]+)? ?(bpw|bpw-quantized|B|kB|MB|GB|TB)(?!\n)$"
_INPUT_SCALE_PATTERN: Final = (
    r"^(constant:[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?|donor:" + LOCATION_PATTERN[1:-1] + r")(?!\n)$"
)
_CHOICES: Final = (
    "group_size",
    "ignore",
    "default_ignores",
    "indivisible",
    "expert_layout",
    "partial_fused",
    "allow_nonfinite",
    "search",
    "dequantize",
    "importance",
    "input_scale",
)
"""Fields that a recipe replaces."""


def _known_scheme(name: str) -> str:
    if name not in PRESETS:
        raise ValueError(f"unknown scheme, known: {', '.join(PRESETS)}")
    return name


Location = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=LOCATION_PATTERN)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
SchemeName = Annotated[str, AfterValidator(_known_scheme), WithJsonSchema({"type": "string", "enum": list(PRESETS)})]


LimitName = Literal[
    "header_bytes",
    "header_tensors",
    "metadata_bytes",
    "index_bytes",
    "index_tensors",
    "index_shards",
    "json_bytes",
    "json_depth",
    "json_digits",
    "json_string_bytes",
    "name_bytes",
    "rank",
    "stack_experts",
]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, regex_engine="python-re")


class Choices(_Form):
    """How weights are quantized."""

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
    allow_nonfinite: bool = Field(
        default=False,
        description="Copy weights that hold NaN or Inf, and what engines fuse with them, instead of refusing the run. "
        "The source is read once more to find them.",
    )
    search: Literal["none", "mse"] = Field(
        default="none",
        description="How scales are chosen: from the extremes of what shares one (none), or by the least error of what "
        "is read back (mse), which takes longer.",
    )
    dequantize: bool = Field(
        default=False,
        description="Quantize nothing: write a plain BF16 checkpoint from one that is quantized. "
        "Leave scheme and all other choices at their defaults.",
    )
    importance: Location | None = Field(
        default=None,
        description="For search mse: a safetensors file with a float32 tensor for each module, by which errors in its "
        "input features are multiplied; none for all alike.",
    )
    input_scale: str | None = Field(
        default=None,
        max_length=4200,
        pattern=_INPUT_SCALE_PATTERN,
        description="For the scheme NVFP4, whose activations have a stored global scale: constant:V assumes that no "
        "activation exceeds V, a proxy for calibration that clips what does; donor:LOCATION takes the scales of a "
        "calibrated NVFP4 checkpoint of the same architecture. None for all other schemes.",
        examples=["constant:1000", "donor:s3://models/Qwen3-8B-NVFP4"],
    )
    recipe: dict[str, Any] | None = Field(
        default=None,
        description="A whole recipe as a recipe file holds it, for several schemes. "
        "It replaces the scheme and all choices above; leave those at their defaults.",
        examples=[{"groups": [{"targets": ["re:.*mlp.*"], "scheme": "NVFP4A16"}, {"scheme": "FP8_DYNAMIC"}]}],
    )

    @model_validator(mode="after")
    def _recipe_or_choices(self) -> Self:
        fields = type(self).model_fields
        changed = [
            name for name in _CHOICES if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]
        if self.recipe is not None and changed:
            raise ValueError(f"a recipe replaces {', '.join(changed)}: say it in the recipe, or leave the recipe out")
        others = [name for name in changed if name != "dequantize"]
        if self.dequantize and (others or self.scheme != fields["scheme"].default):
            raise ValueError("dequantize quantizes nothing: leave scheme and all other choices at their defaults")
        if self.importance is not None and self.search != "mse":
            raise ValueError("importance goes with search mse")
        is_told = self.input_scale is not None
        if self.recipe is None and PRESETS[self.scheme].needs_input_scale != is_told:
            raise ValueError("input_scale goes with the scheme NVFP4, which needs one, and with no other")
        return self

    @property
    def scheme_label(self) -> str:
        """The scheme in names for people and in destinations."""
        if self.dequantize:
            return PLAIN
        return self.scheme if self.recipe is None else "recipe"

    def to_recipe(self) -> Recipe:
        """The library's recipe.

        Raises:
            RecipeInvalid: the choices do not fit together.
        """
        if self.recipe is not None:
            return parse_recipe(self.recipe)
        if self.dequantize:
            return dequantizing()
        choices = {name: getattr(self, name) for name in _CHOICES if name != "importance"}
        if self.importance is not None:
            choices["search"] = {"kind": self.search, "importance_file": self.importance}
        return parse_recipe({"scheme": self.scheme} | choices)


class Work(_Form):
    """Where shards are worked on and kept; none of it changes bytes."""

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


class Trust(_Form):
    """What is taken in of a source that strangers made."""

    limits: dict[LimitName, int] = Field(
        default_factory=dict,
        max_length=len(NAMES),
        description="Limits that are raised, by name, such as header_bytes; a refusal names the limit that was met.",
        examples=[{"header_bytes": 50_000_000}],
    )
    allow_code: bool = Field(
        default=False, description="Copy code, pickles and dot files, too, and keep `auto_map` in configs."
    )

    @property
    def intake(self) -> Intake:
        """What the library is told.

        Raises:
            RecipeInvalid: a limit has no such value.
        """
        return Intake(limits=Limits.parse(self.limits), allow_code=self.allow_code)


class Places(_Form):
    """What is read, and what is written."""

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
    page: Location | None = Field(
        default=None,
        description="Where a page with pictures of the finished result is written: one HTML file that needs no "
        "network. Absolute path or URL; none for no page.",
        examples=["/models/reports/Qwen3-8B-FP8.html"],
    )


class Sizes(_Form):
    """A size instead of a scheme."""

    budget: str | None = Field(
        default=None,
        max_length=40,
        pattern=_BUDGET_PATTERN,
        description="Choose among candidates for each layer, so that the error is the least within a size: bits per "
        "weight of all tensors (4.5bpw), of quantized weights alone (4.5bpw-quantized), or bytes of all shards (12GB). "
        "The source is read once more to measure what candidates leave; none for the scheme.",
        examples=["4.5bpw"],
    )
    candidates: list[Pattern] = Field(
        default_factory=list,
        max_length=20,
        description="For a budget: presets to choose among, with another group size behind a colon, such as W4A16:64; "
        f"none for {', '.join(DEFAULT_CANDIDATES)}.",
    )


class QuantizeRequest(Trust, Work, Sizes, Choices, Places):
    """What is quantized, how, and where."""

    @model_validator(mode="after")
    def _budget_or_scheme(self) -> Self:
        if self.candidates and self.budget is None:
            raise ValueError("candidates go with a budget")
        is_chosen = self.scheme != type(self).model_fields["scheme"].default
        if self.budget is not None and (self.recipe is not None or self.dequantize or is_chosen):
            raise ValueError("a budget chooses schemes: leave scheme, recipe and dequantize at their defaults")
        return self

    @property
    def scheme_label(self) -> str:
        """As of `Choices`; the size where one is asked for."""
        return super().scheme_label if self.budget is None else self.budget.replace(" ", "")

    @property
    def wish(self) -> Wish | None:
        """What is asked for where a size is given instead of a scheme.

        Raises:
            RecipeInvalid: an unknown candidate, or no such size.
        """
        if self.budget is None:
            return None
        base = self.model_copy(update={"group_size": None}).to_recipe()
        search = base.groups[0].scheme.search
        candidates = parse_candidates(self.candidates or DEFAULT_CANDIDATES, self.group_size)
        found = tuple(replace(scheme, search=search) for scheme in candidates)
        return Wish(budget=parse_budget(self.budget), candidates=found, base=base)

    @property
    def label(self) -> str:
        """Name of the run for people: the checkpoint and the scheme."""
        name = self.source.rstrip("/").rpartition("/")[2].partition("@")[0]
        return f"{plain(name, 60)}-{self.scheme_label}"

    def to_job(self, run: str) -> Job:
        """What the tasks of the flow run `run` are told."""
        return Job(
            run=run,
            locations=self.locations,
            options=RunOptions(device=self.device, workers=self.workers, verify=self.verify),
            label=self.label,
        )

    @property
    def locations(self) -> Locations:
        """Where the run reads, writes and remembers."""
        return Locations(source=self.source, destination=self.destination, store=self.store or "", intake=self.intake)


class Batch(_Form):
    """Which checkpoints are looked at, and where their results go."""

    sources: list[Location] = Field(
        default_factory=list,
        max_length=1000,
        description="Checkpoints, or patterns of their locations: `*` stands for part of a folder's name.",
        examples=[["s3://models/incoming/*", "hf://Qwen/Qwen3-8B@main"]],
    )
    manifest: Location | None = Field(
        default=None,
        description="A YAML or JSON file with more of them: a list of locations, or of mappings with `source` and "
        "whatever is different for it (`destination`, `scheme`, `ignore`, …).",
        examples=["s3://models/nightly.yaml"],
    )
    destination: Location = Field(
        description="Where each result goes: {name} is the last part of its source, {path} all below the pattern's "
        "fixed part, {scheme} the scheme, {version} twelve digits that change whenever source or choices do.",
        examples=["s3://models/quantized/{name}-{scheme}-{version}"],
    )
    max_parallel: int = Field(default=2, ge=1, le=64, description="Checkpoints that are converted at a time.")
    min_age_minutes: int = Field(
        default=0, ge=0, le=100_000, description="Leave checkpoints with a younger file for a later batch."
    )
    deployment: str | None = Field(
        default=None,
        max_length=300,
        pattern=_DEPLOYMENT_PATTERN,
        description="Deployment that converts each checkpoint in a run of its own; none for the one of "
        "quantize-checkpoint that is called as the batch's own, such as cpu. A batch that was started without a "
        "deployment converts one after the other in its own process.",
        examples=["quantize-checkpoint/gpu"],
    )


class BatchRequest(Trust, Work, Choices, Batch):
    """Which checkpoints are converted if they are new or changed, how, and where to."""

    @model_validator(mode="after")
    def _something_to_look_at(self) -> Self:
        if not self.sources and self.manifest is None:
            raise ValueError("give sources or a manifest")
        return self

    @property
    def label(self) -> str:
        """Name of the run for people."""
        first = self.sources[0] if self.sources else self.manifest or ""
        more = len(self.sources) - 1 + (self.manifest is not None and bool(self.sources))
        return f"{plain(first.rpartition('://')[2], 60)}{f' and {more} more' if more else ''}-{self.scheme_label}"

    def request_for(self, source: str, destination: str, choices: Mapping[str, Any]) -> QuantizeRequest:
        """What a checkpoint of the batch is asked for.

        Args:
            choices: What is different for it; a recipe replaces what the batch chooses, and a choice its recipe.

        Raises:
            RecipeInvalid: a field that does not exist, or a value that does not fit; one problem for each.
        """
        if {"budget", "candidates"} & set(choices):
            message = "a batch takes no budget: whether a result is up to date is told by its recipe"
            raise RecipeInvalid([Problem(file=source, kind="batch-choice", message=message, way_out="give a recipe")])
        inherited = {*Choices.model_fields, *Work.model_fields, *Trust.model_fields}
        if "recipe" in choices:
            inherited -= {"scheme", *_CHOICES}
        elif {"scheme", *_CHOICES} & set(choices):
            inherited.discard("recipe")
        if "scheme" in choices:
            inherited.discard("input_scale")  # it goes with one scheme only
        fields = {name: getattr(self, name) for name in inherited} | dict(choices)
        try:
            return QuantizeRequest.model_validate(fields | {"source": source, "destination": destination})
        except ValidationError as error:
            raise RecipeInvalid(_problem(source, detail) for detail in error.errors()) from None


def _problem(source: str, detail: Mapping[str, Any]) -> Problem:
    message = f"{'.'.join(map(str, detail['loc'])) or 'request'}: {detail['msg']}"
    return Problem(file=source, kind="batch-choice", message=message, way_out="correct it")
