"""The one table of fused sets: modules that serving engines merge and that therefore share a global scale.

A fused set is made of modules with the same parent (the name before the last dot, expert index included) whose leaf
names stand in one row. All members are optional; a set of one is an ordinary tensor. Rows that share a leaf present
below one parent are merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from shardmill.core.matching import templates


@dataclass(frozen=True, slots=True)
class Row:
    """Leaves below one parent that one runtime layer merges."""

    leaves: tuple[str, ...]
    runtime: str = ""
    """Leaf under which an engine asks for the merged layer's scheme; empty where it has no name of its own."""


def _row(leaves: str, runtime: str = "") -> Row:
    return Row(tuple(leaves.split()), runtime)


ROWS: Final[tuple[Row, ...]] = (
    _row("q_proj k_proj v_proj", "qkv_proj"),
    _row("wq wk wv", "qkv_proj"),
    _row("query key value", "qkv_proj"),
    _row("linear_q linear_k linear_v"),
    _row("key_proj value_proj"),
    _row("q_a_proj kv_a_proj_with_mqa g_proj", "fused_qkv_a_proj"),
    _row("wq_a wkv_a_with_mqa", "fused_qkv_a_proj"),
    _row("wq_a wkv", "fused_wqa_wkv"),
    _row("wkv wgate", "fused_wkv_wgate"),
    _row("gate_proj up_proj", "gate_up_proj"),
    _row("w1 w3", "gate_up_proj"),
    _row("in_proj_qkv in_proj_z", "in_proj_qkvz"),
    _row("in_proj_b in_proj_a", "in_proj_ba"),
    _row("q_proj k_proj v_proj b_proj f_a_proj g_a_proj", "in_proj_qkvgfab"),
    _row("wk weights_proj", "wk_weights_proj"),
)
"""By family; the runtime names are vLLM's."""
FUSED_ROWS: Final[tuple[tuple[str, ...], ...]] = tuple(row.leaves for row in ROWS)
"""Leaf names that one runtime layer merges, by family."""


@dataclass(frozen=True, slots=True, eq=False)
class FusedTable:
    """Rows that hold for a checkpoint, with what is looked up in them; equal only to itself, which is quick to hash.

    >>> len(FusedTable.build(dropped=[("v_proj", "k_proj", "q_proj")]).rows) == len(ROWS) - 2
    True
    """

    rows: tuple[Row, ...]
    rows_of: Mapping[str, tuple[int, ...]]
    """Numbers of the rows by leaf."""
    leaf_templates: frozenset[str]

    @classmethod
    def build(
        cls, added: Iterable[tuple[str, ...]] = (), dropped: Iterable[tuple[str, ...]] = (), rows: Sequence[Row] = ROWS
    ) -> FusedTable:
        """The table with rows added, and without those that hold all leaves of an entry of `dropped`."""
        gone = [frozenset(leaves) for leaves in dropped]
        left = (row for row in rows if not any(leaves <= frozenset(row.leaves) for leaves in gone))
        kept = (*left, *(Row(tuple(leaves)) for leaves in added))
        rows_of: dict[str, list[int]] = {}
        for number, row in enumerate(kept):
            for leaf in row.leaves:
                rows_of.setdefault(leaf, []).append(number)
        return cls(kept, {leaf: tuple(at) for leaf, at in rows_of.items()}, frozenset(templates(list(rows_of))))


TABLE: Final = FusedTable.build()
"""The table without changes."""


def may_fuse(template: str, table: FusedTable = TABLE) -> bool:
    """Tell whether any module of a template stands in the table; see `matching.templates`.

    >>> may_fuse("model.layers.00.w0"), may_fuse("model.layers.00.o_proj")
    (True, False)
    """
    return template.rpartition(".")[2] in table.leaf_templates


def is_fusable(module: str, table: FusedTable = TABLE) -> bool:
    """Tell whether the module's leaf name stands in the table.

    >>> is_fusable("model.layers.0.self_attn.q_proj"), is_fusable("model.layers.0.self_attn.o_proj")
    (True, False)
    """
    return module.rpartition(".")[2] in table.rows_of


def fused_sets(modules: Iterable[str], table: FusedTable = TABLE) -> tuple[tuple[str, ...], ...]:
    """Group modules into fused sets of two or more members, each sorted; independent of the order of the input.

    >>> fused_sets(["a.k_proj", "b.q_proj", "a.q_proj", "a.o_proj", "a.v_proj"])
    (('a.k_proj', 'a.q_proj', 'a.v_proj'),)
    """
    known = table.rows_of
    below: dict[str, list[str]] = {}
    for module in sorted(set(modules)):
        parent, _, leaf = module.rpartition(".")
        if leaf in known:
            below.setdefault(parent, []).append(leaf)
    found: list[tuple[str, ...]] = []
    for parent, leaves in below.items():
        prefix = f"{parent}." if parent else ""
        found += [tuple(prefix + leaf for leaf in group) for group in fused_leaves(tuple(leaves), table)]
    return tuple(sorted(found))


@lru_cache(maxsize=4096)
def fused_leaves(leaves: tuple[str, ...], table: FusedTable = TABLE) -> tuple[tuple[str, ...], ...]:
    """Group the leaves below one parent into fused sets of two or more members, each sorted.

    >>> fused_leaves(("w1", "w2", "w3"))
    (('w1', 'w3'),)
    """
    present = [leaf for leaf in leaves if leaf in table.rows_of]
    return tuple(tuple(sorted(group)) for group in _merge_rows(present, table) if len(group) > 1)


def _merge_rows(leaves: list[str], table: FusedTable) -> list[set[str]]:
    """Union of the table's rows that share a present leaf."""
    groups: list[set[str]] = []
    for row in {number for leaf in leaves for number in table.rows_of[leaf]}:
        present = {leaf for leaf in leaves if leaf in table.rows[row].leaves}
        touching = [group for group in groups if group & present]
        groups = [group for group in groups if not group & present]
        groups.append(present.union(*touching))
    return groups
