from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.fused import FUSED_ROWS, fused_sets, is_fusable


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["l.self_attn.q_proj", "l.self_attn.k_proj", "l.self_attn.v_proj"], 1),
        (["l.self_attn.q_proj", "l.self_attn.k_proj"], 1),
        (["l.self_attn.q_proj", "l.self_attn.o_proj"], 0),
        (["l.0.q_proj", "l.1.k_proj"], 0),
        (["mlp.experts.3.gate_proj", "mlp.experts.3.up_proj", "mlp.experts.4.up_proj"], 1),
        (["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"], 1),
        (["b.experts.0.w1", "b.experts.0.w3", "b.experts.0.w2"], 1),
        (["a.q_a_proj", "a.kv_a_proj_with_mqa", "a.q_b_proj"], 1),
        (["a.q_proj", "a.kv_a_proj_with_mqa"], 0),
        (["a.in_proj_qkv", "a.in_proj_z", "a.in_proj_b", "a.in_proj_a"], 2),
        (["attn.wq_a", "attn.wkv"], 1),
        (["attn.compressor.wkv", "attn.compressor.wgate", "attn.wkv", "attn.wq_a"], 2),
        (["q_proj", "k_proj"], 1),
    ],
)
def test_sets_form_by_parent_and_row(modules: list[str], expected: int) -> None:
    assert len(fused_sets(modules)) == expected


def test_rows_that_share_a_leaf_below_one_parent_become_one_set() -> None:
    kda = ["a.q_proj", "a.k_proj", "a.v_proj", "a.b_proj", "a.f_a_proj"]
    assert fused_sets(kda) == (tuple(sorted(kda)),)


@given(st.permutations([f"layers.{n}.self_attn.{leaf}_proj" for n in range(12) for leaf in "qkvo"]))
def test_the_order_of_names_does_not_matter(names: list[str]) -> None:
    assert fused_sets(names) == fused_sets(sorted(names))
    assert len(fused_sets(names)) == 12


def test_every_leaf_of_the_table_is_fusable_and_stands_once_per_row() -> None:
    for row in FUSED_ROWS:
        assert len(set(row)) == len(row) > 1
        assert all(is_fusable(f"model.x.{leaf}") for leaf in row)
