"""The user's request: which modules are quantized how, and what is left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardmill.core.matching import PatternSet
from shardmill.core.scheme import Scheme, parse_scheme, scheme_to_json, with_group_size
from shardmill.errors import Problem, RecipeInvalid, show

EXPERT_LAYOUTS: Final = ("rows", "columns", "interleaved")
"""How a fused expert stack stores gate and up: stacked rows, halves of the transpose, alternating columns of it."""
INDIVISIBLE: Final = ("refuse", "copy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Modules that share a scheme; the order of groups is their priority."""

    targets: tuple[str, ...] = ("Linear",)
    scheme: Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Groups in order of priority, and what beats them.

    >>> uniform("FP8_DYNAMIC", ignore=["lm_head"]).groups[0].targets
    ('Linear',)
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    default_ignores: bool = True
    """Whether embeddings, heads, routers and the other default roles stay as they are."""
    indivisible: str = "refuse"
    """What happens to a weight whose width is no multiple of the group size: `refuse` the run or `copy` the weight."""
    partial_fused: bool = False
    """Whether a fused set may be quantized in part or with several schemes."""
    expert_layout: str | None = None
    """Layout of fused expert stacks, where the architecture does not tell."""
    allow_nonfinite: bool = False
    """Whether a weight that holds NaN or Inf is copied instead of refused, and with it what engines treat alike."""
    dequantize: bool = False
    """Whether every weight that is quantized already becomes BF16. Then nothing is quantized, and there is no group."""

    def __post_init__(self) -> None:
        if self.dequantize and (self.groups or self.ignore):
            raise _invalid("`dequantize` quantizes nothing", "leave out scheme, groups and ignore, or `dequantize`")
        if not self.groups and not self.dequantize:
            raise _invalid("a recipe needs at least one group or a scheme")
        if self.expert_layout not in (None, *EXPERT_LAYOUTS):
            raise _invalid(
                f"expert_layout must be one of {', '.join(EXPERT_LAYOUTS)}, found {show(str(self.expert_layout))}"
            )
        if self.indivisible not in INDIVISIBLE:
            raise _invalid(f"indivisible must be one of {', '.join(INDIVISIBLE)}, found {show(str(self.indivisible))}")
        for patterns in (self.ignore, *(group.targets for group in self.groups)):
            PatternSet(patterns)


def _invalid(message: str, way_out: str = "") -> RecipeInvalid:
    return RecipeInvalid([Problem(kind="recipe", message=message, way_out=way_out)])


def _patterns(value: Any, subject: str) -> tuple[str, ...]:
    """One string is one pattern; anything else must be a sequence of strings."""
    if isinstance(value, str):
        return (value,)
    if (
        isinstance(value, Mapping)
        or not isinstance(value, Sequence)
        or not all(isinstance(v, str) and v for v in value)
    ):
        raise _invalid(f"{subject} must be a pattern or a list of patterns, found {value!r}"[:200])
    return tuple(dict.fromkeys(value))


def dequantizing() -> Recipe:
    """The recipe that turns a quantized checkpoint into a plain one.

    >>> dequantizing().groups
    ()
    """
    return Recipe(groups=(), dequantize=True)


def uniform(scheme: str | Mapping[str, Any] | Scheme, ignore: str | Sequence[str] = (), **options: Any) -> Recipe:
    """Build a recipe with one scheme for every quantizable weight."""
    parsed = scheme if isinstance(scheme, Scheme) else parse_scheme(scheme)
    return Recipe(groups=(Group(scheme=parsed),), ignore=_patterns(ignore, "ignore"), **options)


_FIELDS: Final = frozenset(
    {
        "scheme",
        "group_size",
        "targets",
        "groups",
        "ignore",
        "default_ignores",
        "indivisible",
        "partial_fused",
        "expert_layout",
        "allow_nonfinite",
        "dequantize",
    }
)


def parse_recipe(data: Any) -> Recipe:
    """Build a recipe from a mapping, as a recipe file holds it.

    Either `scheme` (with optional `group_size` and `targets`) or `groups`, a list of such mappings by priority.

    Raises:
        RecipeInvalid: unknown field, wrong type, unknown or impossible scheme, invalid pattern.

    >>> parse_recipe({"scheme": "W4A16", "group_size": 64, "ignore": "lm_head"}).ignore
    ('lm_head',)
    """
    if not isinstance(data, Mapping):
        raise _invalid(f"a recipe is a mapping, found {type(data).__name__}")
    unknown = sorted(set(map(str, data)) - _FIELDS)
    if unknown:
        raise _invalid(f"unknown fields: {', '.join(map(show, unknown))}", f"known: {', '.join(sorted(_FIELDS))}")
    entries = _entries(data)
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise _invalid("groups must be a list")
    options = {
        name: data[name]
        for name in (
            "default_ignores",
            "indivisible",
            "partial_fused",
            "expert_layout",
            "allow_nonfinite",
            "dequantize",
        )
        if name in data
    }
    for name in ("default_ignores", "partial_fused", "allow_nonfinite", "dequantize"):
        if not isinstance(options.get(name, True), bool):
            raise _invalid(f"{name} must be true or false, found {options[name]!r}")
    return Recipe(
        groups=tuple(_parse_group(entry) for entry in entries),
        ignore=_patterns(data.get("ignore") or (), "ignore"),
        **options,
    )


_UNIFORM: Final = ("scheme", "group_size", "targets")


def _entries(data: Mapping[Any, Any]) -> Any:
    """What a recipe says of its groups; none where it dequantizes."""
    given = [name for name in ("groups", *_UNIFORM) if data.get(name)]
    if data.get("dequantize") is True and not given:
        return []
    if ("groups" in data) == ("scheme" in data):
        raise _invalid("give either `scheme` or `groups`")
    return data["groups"] if "groups" in data else [{k: data[k] for k in _UNIFORM if k in data}]


def _parse_group(entry: Any) -> Group:
    if not isinstance(entry, Mapping) or "scheme" not in entry:
        raise _invalid("each group is a mapping with `scheme` and `targets`")
    unknown = sorted(set(map(str, entry)) - {"scheme", "targets", "group_size"})
    if unknown:
        raise _invalid(
            f"a group has unknown fields: {', '.join(map(show, unknown))}", "known: scheme, targets, group_size"
        )
    scheme = parse_scheme(entry["scheme"])
    if entry.get("group_size") is not None:
        scheme = with_group_size(scheme, entry["group_size"])
    return Group(scheme=scheme, targets=_patterns(entry.get("targets") or ("Linear",), "targets"))


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """Describe a recipe; the inverse of `parse_recipe`.

    >>> parse_recipe(recipe_to_json(uniform("NVFP4A16"))) == uniform("NVFP4A16")
    True
    """
    later = {name: True for name in ("allow_nonfinite", "dequantize") if getattr(recipe, name)}
    return {
        "groups": [{"targets": list(g.targets), "scheme": scheme_to_json(g.scheme)} for g in recipe.groups],
        "ignore": list(recipe.ignore),
        "default_ignores": recipe.default_ignores,
        "indivisible": recipe.indivisible,
        "partial_fused": recipe.partial_fused,
        "expert_layout": recipe.expert_layout,
    } | later  # so manifests are as they were before those existed
