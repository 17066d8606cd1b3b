"""The table of rules that holds for one checkpoint, as a plan has resolved it: for people, and for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from shardmill.core.architectures import families, past_last_layer, runtime_heads, transposed_leaves
from shardmill.core.assemble import PARAMS_KEY, PARAMS_NAME
from shardmill.core.fused import FusedTable
from shardmill.core.plan import Plan
from shardmill.core.roles import ROLES
from shardmill.errors import show

_SHOWN: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedTable:
    """What the architecture and the recipe together say of a checkpoint."""

    model_types: tuple[str, ...]
    families: tuple[str, ...]
    """Empty for an unknown architecture: then the rules of names are all there is."""
    notes: tuple[str, ...]
    roles: tuple[str, ...]
    """Whose modules stay as they are by default."""
    roles_off: tuple[str, ...]
    roles_add: tuple[str, ...]
    """Patterns of the recipe."""
    expert_layouts: tuple[str, ...]
    """Of the fused expert stacks that are split."""
    heads: tuple[str, ...]
    """That exist at run time although no tensor may."""
    layers_past_last: tuple[int, ...]
    """For multi-token prediction."""
    transposed: tuple[str, ...]
    """Leaves whose weight is stored `[in, out]`."""
    fused: tuple[tuple[str, ...], ...]
    """Leaves of this checkpoint that one runtime layer merges, by row of the table."""

    @property
    def is_known(self) -> bool:
        """Whether the architecture has a row of its own."""
        return bool(self.families)


def resolve_table(plan: Plan) -> ResolvedTable:
    """Tell by which rules a plan was made."""
    recipe = plan.recipe
    config = json.loads(plan.config_text or "{}")
    rows = families(plan.model_types)
    off = recipe.architecture.roles_off if recipe.default_ignores else tuple(role.name for role in ROLES)
    return ResolvedTable(
        model_types=plan.model_types,
        families=tuple(row.family for row in rows),
        notes=(*(note for row in rows for note in row.notes), *_file_notes(plan)),
        roles=tuple(role.name for role in ROLES if role.name not in off),
        roles_off=off,
        roles_add=recipe.architecture.roles_add,
        expert_layouts=tuple(sorted({t.layout for shard in plan.shards for t in shard.tensors if t.layout})),
        heads=runtime_heads(plan.model_types, recipe.architecture.heads),
        layers_past_last=tuple(sorted(past_last_layer(config if isinstance(config, dict) else {}))),
        transposed=tuple(sorted(transposed_leaves(plan.model_types))),
        fused=_fused_here(plan, recipe.fused_table),
    )


def _file_notes(plan: Plan) -> Iterator[str]:
    if PARAMS_NAME in dict(plan.rewritten):
        yield f"{PARAMS_NAME} says the same as config.json, under `{PARAMS_KEY}`"


def _fused_here(plan: Plan, table: FusedTable) -> tuple[tuple[str, ...], ...]:
    leaves = {
        spec.name.removesuffix(".weight").rpartition(".")[2]
        for shard in plan.shards
        for spec, *_ in shard.tensors
        if spec.name.endswith(".weight")
    }
    present = (tuple(leaf for leaf in row.leaves if leaf in leaves) for row in table.rows)
    return tuple(dict.fromkeys(row for row in present if len(row) > 1))


def table_document(table: ResolvedTable) -> dict[str, Any]:
    """Describe a table for machines; the fields that a recipe's `architecture` has are called alike."""
    return {
        "known": table.is_known,
        "model_types": list(table.model_types),
        "families": list(table.families),
        "notes": list(table.notes),
        "roles": [{"name": role.name, "why": role.why, "on": role.name in table.roles} for role in ROLES],
        "roles_add": list(table.roles_add),
        "expert_layouts": list(table.expert_layouts),
        "heads": list(table.heads),
        "layers_past_last": list(table.layers_past_last),
        "transposed": list(table.transposed),
        "fused": [list(row) for row in table.fused],
    }


def render_table(table: ResolvedTable) -> Iterator[str]:
    """Write a table for a terminal."""
    types = ", ".join(show(name, 40) for name in table.model_types[:_SHOWN]) or "no model_type"
    if table.is_known:
        yield f"architecture  {'; '.join(table.families)} ({types})"
    else:
        yield f"architecture  unknown ({types}): decided by the names of modules alone; check the list of what is kept"
    yield from (f"              {note}" for note in table.notes)
    yield f"kept dense    {', '.join(table.roles) or 'nothing by default'}"
    if table.roles_off and table.roles:
        yield f"              not by this recipe: {', '.join(table.roles_off)}"
    if table.roles_add:
        yield f"              by this recipe: {', '.join(map(show, table.roles_add))}"
    if table.layers_past_last:
        yield f"              layers {', '.join(map(str, table.layers_past_last))} for multi-token prediction"
    yield f"merged        {'; '.join(' + '.join(row) for row in table.fused) or 'no layers'}"
    if table.expert_layouts:
        yield f"experts       fused stacks, stored by {', '.join(table.expert_layouts)}; split into one matrix each"
    yield f"heads         {', '.join(map(show, table.heads))} in `ignore`, whether there is a tensor or not"
