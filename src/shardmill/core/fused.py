"""The one table of fused sets: modules that serving engines merge and that therefore share a global scale.

A fused set is made of modules with the same parent (the name before the last dot, expert index included) whose leaf
names stand in one row. All members are optional; a set of one is an ordinary tensor. Rows that share a leaf present
below one parent are merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from shardmill.core.matching import templates

FUSED_ROWS: Final[tuple[tuple[str, ...], ...]] = (
    ("q_proj", "k_proj", "v_proj"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("linear_q", "linear_k", "linear_v"),
    ("key_proj", "value_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
    ("wq_a", "wkv_a_with_mqa"),
    ("wq_a", "wkv"),
    ("wkv", "wgate"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj"),
    ("wk", "weights_proj"),
)
"""Leaf names that one runtime layer merges, by family."""

_ROWS_OF: Final[dict[str, list[int]]] = {}
for _number, _row in enumerate(FUSED_ROWS):
    for _leaf in _row:
        _ROWS_OF.setdefault(_leaf, []).append(_number)


_LEAF_TEMPLATES: Final = frozenset(templates(list(_ROWS_OF)))


def may_fuse(template: str) -> bool:
    """Tell whether any module of a template stands in the table; see `matching.templates`.

    >>> may_fuse("model.layers.00.w0"), may_fuse("model.layers.00.o_proj")
    (True, False)
    """
    return template.rpartition(".")[2] in _LEAF_TEMPLATES


def is_fusable(module: str) -> bool:
    """Tell whether the module's leaf name stands in the table.

    >>> is_fusable("model.layers.0.self_attn.q_proj"), is_fusable("model.layers.0.self_attn.o_proj")
    (True, False)
    """
    return module.rpartition(".")[2] in _ROWS_OF


def fused_sets(modules: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Group modules into fused sets of two or more members, each sorted; independent of the order of the input.

    >>> fused_sets(["a.k_proj", "b.q_proj", "a.q_proj", "a.o_proj", "a.v_proj"])
    (('a.k_proj', 'a.q_proj', 'a.v_proj'),)
    """
    below: dict[str, list[str]] = {}
    for module in sorted(set(modules)):
        parent, _, leaf = module.rpartition(".")
        if leaf in _ROWS_OF:
            below.setdefault(parent, []).append(leaf)
    found: list[tuple[str, ...]] = []
    for parent, leaves in below.items():
        prefix = f"{parent}." if parent else ""
        found += [tuple(prefix + leaf for leaf in group) for group in fused_leaves(tuple(leaves))]
    return tuple(sorted(found))


@lru_cache(maxsize=4096)
def fused_leaves(leaves: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Group the leaves below one parent into fused sets of two or more members, each sorted.

    >>> fused_leaves(("w1", "w2", "w3"))
    (('w1', 'w3'),)
    """
    present = [leaf for leaf in leaves if leaf in _ROWS_OF]
    return tuple(tuple(sorted(group)) for group in _merge_rows(present) if len(group) > 1)


def _merge_rows(leaves: list[str]) -> list[set[str]]:
    """Union of the table's rows that share a present leaf."""
    groups: list[set[str]] = []
    for row in {number for leaf in leaves for number in _ROWS_OF[leaf]}:
        present = {leaf for leaf in leaves if leaf in FUSED_ROWS[row]}
        touching = [group for group in groups if group & present]
        groups = [group for group in groups if not group & present]
        groups.append(present.union(*touching))
    return groups
