"""What becomes of weights that hold NaN or Inf where a recipe allows them: they are copied, in sets that stay whole.

Engines build one layer from a fused set, and one from all experts below a module; they read all of its weights in one
format. So whatever shares a layer with a weight that is copied is copied as well, and no global scale is ever shared
with a weight that has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardmill.core.experts import STACK_PARENTS
from shardmill.core.fused import FusedTable, fused_sets
from shardmill.core.matching import split_name
from shardmill.core.plan import COPY, Plan
from shardmill.core.receipt import NonFinite
from shardmill.errors import NON_FINITE, Problem, show

_EXPERTS: Final = "experts"
VALUES_UNKNOWN: Final = (
    Problem(
        kind="values-unknown",
        message="weights that hold NaN or Inf will be copied; a run finds them by reading the source once more, so the"
        " output may be larger than planned here",
    ),
)
"""The warning of a plan whose recipe allows NaN and Inf, as long as nobody has looked for them."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is copied because of its values."""

    reasons: Mapping[str, str]
    """By name of the source tensor."""
    warnings: tuple[Problem, ...]
    """One for each tensor that holds NaN or Inf."""


def keep(plan: Plan, found: Iterable[NonFinite]) -> Kept:
    """Choose what is copied, from a plan that was made without looking at values and what was found there."""
    shards = {t.spec.name: shard.name for shard in plan.shards for t in shard.tensors if t.action != COPY}
    layers = _layers(shards, plan.recipe.fused_table)
    bad = {entry.tensor: entry for entry in found if entry.tensor in shards}
    reasons: dict[str, str] = {}
    warnings = []
    for name, entry in bad.items():
        values = f"{entry.count} values are NaN or Inf, the first at index {list(entry.first)}"
        others = [other for other in layers.get(name, ()) if other not in bad]
        reasons |= {other: f"copied with {show(name)}, which holds NaN or Inf" for other in others}
        more = f", and {len(others)} more of its layer with it" if others else ""
        warnings.append(
            Problem(
                file=shards[name], tensor=name, kind=NON_FINITE, message=f"{values}; it is copied unquantized{more}"
            )
        )
    reasons |= {name: f"{entry.count} values are NaN or Inf" for name, entry in bad.items()}
    return Kept(reasons, tuple(warnings))


def _expert_layer(parts: Sequence[str]) -> str | None:
    """The layer of experts that a tensor belongs to, by the components of its name."""
    if _EXPERTS in parts:
        return ".".join(parts[: parts.index(_EXPERTS) + 1])
    stacked = [n for n, part in enumerate(parts) if n and STACK_PARENTS.get(part) == parts[n - 1]]
    return ".".join([*parts[: stacked[0]], _EXPERTS]) if stacked else None


def _layers(names: Iterable[str], table: FusedTable) -> dict[str, tuple[str, ...]]:
    """Everything that engines build into one layer, by the name of each tensor in it."""
    by_module: dict[str, list[str]] = {}
    by_parent: dict[str, list[str]] = {}
    for name in names:
        module = split_name(name)[0]
        by_module.setdefault(module, []).append(name)
        parts = name.split(".")
        if (layer := _expert_layer(parts)) is not None:
            by_parent.setdefault(layer, []).append(name)
    groups = [tuple(group) for group in by_parent.values()]
    in_experts = {name for group in groups for name in group}
    for modules in fused_sets(by_module, table):
        group = tuple(name for module in modules for name in by_module[module] if name not in in_experts)
        groups.append(group)
    return {name: group for group in groups for name in group}
