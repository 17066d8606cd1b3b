"""A solved budget as a recipe: groups whose patterns are disjoint, and a file of it that people may edit."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from shardmill.core.budget import Solution, takes_group_size
from shardmill.core.experts import parse_stack
from shardmill.core.matching import PatternSet, split_name
from shardmill.core.plan import Plan
from shardmill.core.recipe import Group, Recipe, recipe_to_json
from shardmill.core.scheme import PRESETS, Scheme, Search, scheme_to_json, with_group_size
from shardmill.core.summary import human_bytes
from shardmill.core.targets import disjoint_targets

MARK: Final = "# Solved for a budget of "
"""Begins every file that is written here."""
_DEFAULTS: Final = {
    "ignore": [],
    "default_ignores": True,
    "indivisible": "refuse",
    "partial_fused": False,
    "expert_layout": None,
}
_NAMES_SHOWN: Final = 6
_PLAIN_WIDTH: Final = 110


def recipe_of(solution: Solution, plan: Plan, base: Recipe) -> Recipe:
    """Write the choice down as a recipe: a group for each candidate that was chosen, named by disjoint expressions.

    Args:
        plan: of some candidate on the same checkpoint: it tells what else there is that no expression may match.
        base: everything but the groups.
    """
    chosen = solution.scheme_of
    used = sorted(set(chosen.values()))
    number = {candidate: position for position, candidate in enumerate(used)}
    modules = {module: number[candidate] for module, candidate in chosen.items()}
    others = dict.fromkeys((module for module in _others(plan) if module not in modules), len(used))
    targets = disjoint_targets({**modules, **others}, len(used) + 1)
    groups = []
    for position, candidate in enumerate(used):
        patterns = PatternSet(targets[position])
        for module, group in modules.items():
            if group == position:
                patterns.match(module)
        needless = frozenset(patterns.unmatched())  # names that only engines use
        kept = tuple(pattern for pattern in targets[position] if pattern not in needless)
        groups.append(Group(targets=kept, scheme=solution.schemes[candidate]))
    return replace(base, groups=tuple(groups))


def _others(plan: Plan) -> Iterator[str]:
    """Modules whose weight is a matrix or more, or a stack of them, whatever becomes of it."""
    for shard in plan.shards:
        for tensor in shard.tensors:
            stack = tensor.decode.stack if tensor.decode else parse_stack(tensor.spec.name, tensor.spec.shape)
            if stack is not None:
                experts = tensor.decode.experts if tensor.decode else tensor.spec.shape[0]
                yield from (module for expert in range(experts) for module in stack.modules(expert))
            elif len(tensor.spec.shape) > 1:
                yield split_name(tensor.spec.name)[0]


def differences(solution: Solution, plan: Plan) -> list[str]:
    """Modules to which a plan of the recipe gives another scheme than was chosen; none, if all is right."""
    used = sorted({*solution.picks})
    found = {
        unit.module: used[tensor.scheme] if 0 <= tensor.scheme < len(used) else None
        for shard in plan.shards
        for tensor in shard.tensors
        if tensor.scheme >= 0
        for unit in shard.units_of(tensor)
    }
    expected = solution.scheme_of
    wrong = [module for module, candidate in expected.items() if found.get(module) != candidate]
    return wrong + [module for module, number in found.items() if number is not None and module not in expected]


def size_line(solution: Solution) -> str:
    """The size that was reached, in the words of the summary."""
    quantized = f"{solution.quantized_bits_per_weight:.3f} of {solution.quantized_elements:,} quantized weights"
    return f"bits per weight: {solution.bits_per_weight:.3f} overall, {quantized}"


def render_solution(solution: Solution) -> Iterator[str]:
    """Tell people what was chosen, one line for each candidate."""
    yield f"budget {solution.budget}"
    yield size_line(solution)
    slack = (solution.cost - solution.bound) / solution.cost if solution.cost else 0.0
    yield f"summed error {solution.cost:.6g}, at most {slack:.2%} above the least that is possible"
    for candidate, scheme in enumerate(solution.schemes):
        yield f"  {scheme.label}: {_share(solution, candidate)}"


def _share(solution: Solution, candidate: int) -> str:
    """Weights, bytes and error of what has one scheme."""
    numbers = [n for n, pick in enumerate(solution.picks) if pick == candidate]
    weights = sum(solution.items[n].elements for n in numbers)
    size, cost = sum(solution.option(n).size for n in numbers), math.fsum(solution.option(n).cost for n in numbers)
    modules = sum(len(solution.items[n].modules) for n in numbers)
    part = cost / solution.cost if solution.cost else 0.0
    return f"{modules} modules, {weights:,} weights, {human_bytes(size)}, {part:.1%} of the error"


def solution_document(solution: Solution) -> dict[str, Any]:
    """Describe a choice for machines."""
    return {
        "budget": {"amount": solution.budget.amount, "unit": solution.budget.unit},
        "bits_per_weight": solution.bits_per_weight,
        "quantized_bits_per_weight": solution.quantized_bits_per_weight,
        "error": solution.cost,
        "error_bound": solution.bound,
        "candidates": [scheme.label for scheme in solution.schemes],
        "layers": [
            {
                "modules": list(item.modules),
                "scheme": solution.schemes[pick].label,
                "bytes": solution.option(n).size,
                "error": solution.option(n).cost,
            }
            for n, (item, pick) in enumerate(zip(solution.items, solution.picks, strict=True))
        ],
    }


def write_recipe(recipe: Recipe, solution: Solution) -> str:
    """Write a solved recipe as YAML with comments: what each group holds, how large it is and what error it leaves.

    `recipe.parse_recipe` of what a YAML reader makes of it gives the recipe again.
    """
    lines = [
        f"{MARK}{solution.budget}; {size_line(solution)}.",
        "# Targets of different groups match no module in common. Move one to another group to change its scheme.",
    ]
    used = sorted(set(solution.picks))
    lines.append("groups:")
    for group, candidate in zip(recipe.groups, used, strict=True):
        lines.append(f"  # {group.scheme.label}: {_share(solution, candidate)}")
        lines += [f"  #   {line}" for line in _largest(solution, candidate)]
        entry = _scheme_entry(group.scheme)
        first, *rest = [f"{name}: {_scalar(value)}" for name, value in entry.items()]
        lines += [f"  - {first}", *[f"    {line}" for line in rest], "    targets:"]
        lines += [f"      - {_scalar(target)}" for target in group.targets]
    told = recipe_to_json(recipe)
    lines += [
        f"{name}: {_scalar(value)}"
        for name, value in told.items()
        if name != "groups" and value != _DEFAULTS.get(name, ...)
    ]
    return "\n".join(lines) + "\n"


def _largest(solution: Solution, candidate: int) -> Iterator[str]:
    """The layers of a group, folded, with bytes and errors, those with the largest errors first."""
    rows: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for n, (item, pick) in enumerate(zip(solution.items, solution.picks, strict=True)):
        if pick == candidate:
            key = ", ".join(sorted({_leaf(module) for module in item.modules}))
            rows[key].append(solution.option(n))
    ordered = sorted(rows.items(), key=lambda row: (-math.fsum(cost for _, cost in row[1]), row[0]))
    for leaves, options in ordered[:_NAMES_SHOWN]:
        size, cost = sum(size for size, _ in options), math.fsum(cost for _, cost in options)
        name = "".join(c if c.isprintable() else "?" for c in leaves)[:_PLAIN_WIDTH]
        yield f"{len(options)} of {name}: {human_bytes(size)}, error {cost:.4g}"


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _scheme_entry(scheme: Scheme) -> dict[str, Any]:
    """A scheme as a group of a recipe file has it: by the name of its preset where it has one."""
    search = {} if scheme.search is None else {"search": _search_entry(scheme.search)}
    plain = replace(scheme, search=None)
    if plain.preset:
        return {"scheme": plain.preset, **search}
    size = scheme.weights.group_size
    for name, preset in PRESETS.items():
        if size and takes_group_size(preset) and replace(with_group_size(preset, size), preset=None) == plain:
            return {"scheme": name, "group_size": size, **search}
    return {"scheme": scheme_to_json(plain), **search}


def _search_entry(search: Search) -> dict[str, Any]:
    found = {name: value for name, value in search.to_json().items() if name != "importance"}
    return found | ({"importance_file": search.importance_file} if search.importance_file else {})


def _scalar(value: Any) -> str:
    """A value in YAML: text in single quotes, where nothing is an escape, all else as JSON, which YAML contains."""
    if isinstance(value, str) and value.isprintable() and value.isascii():
        return value if value.isidentifier() and value.upper() in PRESETS else "'" + value.replace("'", "''") + "'"
    return json.dumps(value)
