"""The command that makes a result again, from the recipe in its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from shardmill.core.input_scale import CONSTANT, DONOR
from shardmill.core.recipe import Recipe
from shardmill.core.scheme import PRESETS, Scheme, Search, with_group_size
from shardmill.core.shell import command_line

RECIPE_FILE = "recipe.json"


def run_command(recipe: Recipe, source: str, destination: str) -> str:
    """Write the command of a conversion; one that takes a file means the recipe as JSON.

    >>> from shardmill.core.recipe import uniform
    >>> run_command(uniform("W4A16", ["lm_head"]), "SRC", "DST")
    'shardmill run SRC DST --scheme W4A16 --ignore lm_head'
    """
    return command_line("shardmill", "run", source, destination, *(_flags(recipe) or ("--recipe", RECIPE_FILE)))


def _flags(recipe: Recipe) -> tuple[str, ...]:
    """Options that ask for exactly this recipe; none where only a file can."""
    group, *others = recipe.groups
    scheme = _scheme_flags(group.scheme)
    if others or group.targets != ("Linear",) or not scheme:
        return ()
    return (*scheme, *_choices(recipe))


def _scheme_flags(scheme: Scheme) -> tuple[str, ...]:
    if scheme.preset:
        return ("--scheme", scheme.preset, *_input_scale_flags(scheme), *_search_flags(scheme.search))
    size = scheme.weights.group_size
    plain = replace(scheme, search=None)
    for name, known in PRESETS.items() if size else ():
        args = known.weights
        if args.strategy == "group" and not args.is_mx and with_group_size(known, size or 0) == plain:
            return ("--scheme", name, "--group-size", str(size), *_search_flags(scheme.search))
    return ()


def _search_flags(search: Search | None) -> Iterator[str]:
    """How scales are searched; the place of a file with importance is told by no manifest."""
    if search is None:
        return
    yield from ("--search", "mse")
    if search.norm != Search().norm:
        yield from ("--search-norm", f"{search.norm:g}")
    if search.importance:
        yield from ("--importance", "IMPORTANCE")


def _input_scale_flags(scheme: Scheme) -> tuple[str, ...]:
    """Where input scales come from; the place of a donor is told by no manifest."""
    policy = scheme.input_scale
    if policy is None:
        return ()
    return ("--input-scale", f"{CONSTANT}:{policy.amax!r}" if policy.kind == CONSTANT else f"{DONOR}:DONOR")


def _choices(recipe: Recipe) -> Iterator[str]:
    for pattern in recipe.ignore:
        yield from ("--ignore", pattern)
    if not recipe.default_ignores:
        yield "--no-default-ignores"
    if recipe.indivisible != "refuse":
        yield from ("--indivisible", recipe.indivisible)
    if recipe.expert_layout is not None:
        yield from ("--expert-layout", recipe.expert_layout)
    if recipe.partial_fused:
        yield "--partial-fused"
    if recipe.allow_nonfinite:
        yield "--allow-nonfinite"
