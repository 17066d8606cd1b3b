"""The user's request: which modules are quantized how, and what is left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from shardmill.core.architectures import NO_OVERRIDES, Overrides
from shardmill.core.fused import TABLE, FusedTable
from shardmill.core.input_scale import SPELLINGS, parse_input_scale
from shardmill.core.matching import PatternSet
from shardmill.core.roles import ROLES
from shardmill.core.scheme import Scheme, Search, parse_scheme, parse_search, scheme_to_json, with_group_size
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
    architecture: Overrides = NO_OVERRIDES
    """What is changed of the table that holds for the architecture."""
    kv_cache: bool = False
    """Whether the written config tells engines to quantize their cache to FP8, with the scales of the source."""
    dequantize: bool = False
    """Whether every weight that is quantized already becomes BF16. Then nothing is quantized, and there is no group."""

    @property
    def fused_table(self) -> FusedTable:
        """Which modules engines merge, as this recipe has it."""
        return _fused_table(self.architecture.fused_add, self.architecture.fused_off)

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
        known = [role.name for role in ROLES]
        if unknown := [name for name in self.architecture.roles_off if name not in known]:
            raise _invalid(f"there is no role {show(unknown[0])}", f"known: {', '.join(known)}")
        for scheme in (group.scheme for group in self.groups):
            if scheme.needs_input_scale and scheme.input_scale is None:
                message = f"scheme {show(scheme.label)} stores a global scale of activations, which weights do not tell"
                raise _invalid(message, f"set input_scale to {SPELLINGS}, or take NVFP4A16")
        for patterns in (self.ignore, self.architecture.roles_add, *(group.targets for group in self.groups)):
            PatternSet(patterns)


@lru_cache(maxsize=64)
def _fused_table(added: tuple[tuple[str, ...], ...], dropped: tuple[tuple[str, ...], ...]) -> FusedTable:
    return FusedTable.build(added, dropped) if added or dropped else TABLE


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


def uniform(
    scheme: str | Mapping[str, Any] | Scheme,
    ignore: str | Sequence[str] = (),
    *,
    input_scale: str | None = None,
    **options: Any,
) -> Recipe:
    """Build a recipe with one scheme for every quantizable weight.

    Args:
        input_scale: where the global scale of activations comes from, for NVFP4; see `core.input_scale`.
    """
    parsed = scheme if isinstance(scheme, Scheme) else parse_scheme(scheme)
    if input_scale is not None:
        parsed = replace(parsed, input_scale=parse_input_scale(input_scale))
    return Recipe(groups=(Group(scheme=parsed),), ignore=_patterns(ignore, "ignore"), **options)


def with_search(recipe: Recipe, search: Search | None) -> Recipe:
    """Return a recipe whose groups all choose their scales like this.

    >>> with_search(uniform("W4A16"), Search()).groups[0].scheme.label
    'W4A16 mse'
    """
    groups = tuple(replace(group, scheme=replace(group.scheme, search=search)) for group in recipe.groups)
    return replace(recipe, groups=groups)


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
        "architecture",
        "kv_cache",
        "search",
        "input_scale",
        "dequantize",
    }
)
_OVERRIDES: Final = ("roles_off", "roles_add", "fused_add", "fused_off", "heads")


def parse_recipe(data: Any) -> Recipe:
    """Build a recipe from a mapping, as a recipe file holds it.

    Either `scheme` (with optional `group_size` and `targets`) or `groups`, a list of such mappings by priority.
    `search` holds for all groups without one of their own.

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
            "kv_cache",
            "dequantize",
        )
        if name in data
    }
    for name in ("default_ignores", "partial_fused", "allow_nonfinite", "kv_cache", "dequantize"):
        if not isinstance(options.get(name, True), bool):
            raise _invalid(f"{name} must be true or false, found {options[name]!r}")
    groups = tuple(_parse_group(entry, data.get("search"), data.get("input_scale")) for entry in entries)
    if data.get("input_scale") is not None and not any(group.scheme.needs_input_scale for group in groups):
        raise _invalid("input_scale goes with NVFP4, and no group has that scheme", "leave it out")
    return Recipe(
        groups=groups,
        ignore=_patterns(data.get("ignore") or (), "ignore"),
        architecture=_parse_overrides(data.get("architecture") or {}),
        **options,
    )


def _parse_overrides(data: Any) -> Overrides:
    """Build what a recipe changes of the architecture's table.

    Raises:
        RecipeInvalid: unknown field, or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise _invalid(f"architecture must be a mapping, found {type(data).__name__}")
    if unknown := sorted(set(map(str, data)) - set(_OVERRIDES)):
        raise _invalid(f"architecture has no {', '.join(map(show, unknown))}", f"known: {', '.join(_OVERRIDES)}")
    names = {name: _patterns(data.get(name) or (), name) for name in ("roles_off", "roles_add", "heads")}
    return Overrides(**names, fused_add=_parse_rows(data, "fused_add", 2), fused_off=_parse_rows(data, "fused_off", 1))


def _parse_rows(data: Mapping[str, Any], name: str, least: int) -> tuple[tuple[str, ...], ...]:
    """Rows of leaf names."""
    value = data.get(name) or ()
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise _invalid(f"{name} must be a list of lists of leaf names, found {value!r}"[:200])
    rows = tuple(_patterns(row, name) for row in value)
    if wrong := [row for row in rows if len(row) < least or any("." in leaf for leaf in row)]:
        raise _invalid(f"{name} holds {wrong[0]!r}, expected {least} or more leaf names without dots"[:200])
    return rows


_GROUP_FIELDS: Final = ("scheme", "targets", "group_size", "search", "input_scale")
_UNIFORM: Final = ("scheme", "group_size", "targets")


def _entries(data: Mapping[Any, Any]) -> Any:
    """What a recipe says of its groups; none where it dequantizes."""
    given = [name for name in ("groups", *_UNIFORM) if data.get(name)]
    if data.get("dequantize") is True and not given:
        return []
    if ("groups" in data) == ("scheme" in data):
        raise _invalid("give either `scheme` or `groups`")
    return data["groups"] if "groups" in data else [{k: data[k] for k in _UNIFORM if k in data}]


def _parse_group(entry: Any, search: Any, input_scale: Any) -> Group:
    if not isinstance(entry, Mapping) or "scheme" not in entry:
        raise _invalid("each group is a mapping with `scheme` and `targets`")
    unknown = sorted(set(map(str, entry)) - set(_GROUP_FIELDS))
    if unknown:
        known = f"known: {', '.join(_GROUP_FIELDS)}"
        raise _invalid(f"a group has unknown fields: {', '.join(map(show, unknown))}", known)
    scheme = parse_scheme(entry["scheme"])
    if entry.get("group_size") is not None:
        scheme = with_group_size(scheme, entry["group_size"])
    search = entry.get("search", search)
    if search is not None:
        scheme = replace(scheme, search=parse_search(search))
    if entry.get("input_scale") is not None:
        scheme = replace(scheme, input_scale=parse_input_scale(entry["input_scale"]))
    elif input_scale is not None and scheme.needs_input_scale and scheme.input_scale is None:
        scheme = replace(scheme, input_scale=parse_input_scale(input_scale))
    return Group(scheme=scheme, targets=_patterns(entry.get("targets") or ("Linear",), "targets"))


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """Describe a recipe; the inverse of `parse_recipe`.

    >>> parse_recipe(recipe_to_json(uniform("NVFP4A16"))) == uniform("NVFP4A16")
    True
    """
    changed = {name: value for name in _OVERRIDES if (value := _listed(getattr(recipe.architecture, name)))}
    later = {name: True for name in ("allow_nonfinite", "kv_cache", "dequantize") if getattr(recipe, name)}
    return {
        "groups": [{"targets": list(g.targets), "scheme": scheme_to_json(g.scheme)} for g in recipe.groups],
        "ignore": list(recipe.ignore),
        "default_ignores": recipe.default_ignores,
        "indivisible": recipe.indivisible,
        "partial_fused": recipe.partial_fused,
        "expert_layout": recipe.expert_layout,
        **({"architecture": changed} if changed else {}),
    } | later  # so manifests are as they were before those existed


def _listed(value: tuple[Any, ...]) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in value]
