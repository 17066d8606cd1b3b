"""What engines demand, one rule at a time: each is broken once, and a plain model breaks none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from shardmill.core.input_scale import parse_input_scale
from shardmill.core.planner import build_plan
from shardmill.core.recipe import parse_recipe
from shardmill.core.scheme import Scheme, preset, with_group_size
from shardmill.core.serving import (
    RULES,
    Served,
    Setting,
    check_plan_serving,
    check_serving,
    read_setting,
    rules_document,
)
from strategies import checkpoint_of, llama_table

FP8, BLOCK, INT4, NVFP4 = (preset(name) for name in ("FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "NVFP4A16"))


def kinds(modules: list[Served], setting: Setting | None = None) -> set[str]:
    found = check_serving(modules, setting or Setting())
    return {problem.kind.removeprefix("serving-") for problem in found}


def qkv(rows: int, cols: int, scheme: Scheme | None = BLOCK) -> list[Served]:
    return [Served(f"m.{leaf}_proj", rows, cols, scheme) for leaf in "qkv"]


def experts(
    width: int, scheme: Scheme | None = FP8, leaves: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> list[Served]:
    return [
        Served(f"m.experts.{e}.{leaf}", *((256, width) if leaf in ("down_proj", "w2") else (width, 256)), scheme)
        for e in range(2)
        for leaf in leaves
    ]


W4A4 = [replace(preset("NVFP4"), input_scale=parse_input_scale(f"constant:{amax}")) for amax in (6, 7)]
CASES: list[tuple[str, list[Served], Setting]] = [
    ("merged-one-scheme", [*qkv(128, 128, NVFP4)[:2], Served("m.v_proj", 128, 128, W4A4[0])], Setting()),
    ("merged-input-scale", [*qkv(128, 128, W4A4[0])[:2], Served("m.v_proj", 128, 128, W4A4[1])], Setting()),
    ("experts-one-scheme", [*experts(128, W4A4[0])[:-1], Served("m.experts.1.down_proj", 256, 128, NVFP4)], Setting()),
    ("merged-one-scheme", [*qkv(128, 128)[:2], Served("m.v_proj", 128, 128, FP8)], Setting()),
    ("merged-one-scheme", [*qkv(128, 128)[:2], Served("m.v_proj", 128, 128, None)], Setting()),
    ("experts-one-scheme", [*experts(128)[:-1], Served("m.experts.1.down_proj", 256, 128, NVFP4)], Setting()),
    ("experts-named", experts(128, leaves=("fc1", "fc2")), Setting()),
    ("experts-equal-shapes", [*experts(128)[:-1], Served("m.experts.1.down_proj", 256, 64, FP8)], Setting()),
    ("experts-split", experts(128), Setting(model_types=("gpt_oss",), split_experts=True)),
    ("block-merged-rows", qkv(192, 128), Setting()),
    ("block-partition", [Served("m.o_proj", 128, 384, BLOCK)], Setting(tp=2)),
    ("block-partition", [Served("m.q_proj", 128, 128, BLOCK)], Setting(tp=2)),
    ("block-expert-width", experts(192, BLOCK), Setting()),
    ("block-expert-width", experts(256, BLOCK), Setting(tp=4)),
    ("group-partition", [Served("m.o_proj", 128, 384, INT4)], Setting(tp=2)),
    ("tensor-parallel", [Served("m.o_proj", 128, 130, FP8)], Setting(tp=4)),
    ("tensor-parallel", [Served("m.q_proj", 130, 128, FP8)], Setting(tp=4)),
    ("marlin-shape", [Served("m.fc", 65, 128, INT4)], Setting()),
    ("marlin-group", [Served("m.fc", 64, 256, with_group_size(INT4, 256))], Setting()),
    ("packed-bits", [Served("m.fc", 64, 128, preset("W3A16"))], Setting()),
    ("run-dense", [Served("model.layers.0.mlp.gate", 64, 128, FP8)], Setting()),
    ("mtp-one-scheme", [Served("mtp.fc", 64, 128, None), Served("mtp.layers.0.fc", 64, 128, FP8)], Setting()),
    (
        "mtp-one-scheme",
        [Served("model.layers.9.a", 64, 128, None), Served("model.layers.9.b", 64, 128, FP8)],
        Setting(past_last=frozenset({9})),
    ),
]


@pytest.mark.parametrize(("rule", "modules", "setting"), CASES)
def test_each_rule_finds_what_breaks_it(rule: str, modules: list[Served], setting: Setting) -> None:
    assert rule in kinds(modules, setting)


DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "architectures.md"


def test_the_document_has_every_rule() -> None:
    rows = [line.split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    told = {row[0].strip("| `"): (row[1], row[2].strip(" |<>")) for row in rows if len(row) == 3}
    assert {name: (rule.says, rule.source) for name, rule in RULES.items()}.items() <= told.items()


def test_every_rule_is_broken_by_some_case_and_has_a_source() -> None:
    assert {rule for rule, _, _ in CASES} == RULES.keys()
    assert all(urlparse(rule.source).scheme == "https" and rule.says for rule in RULES.values())


@pytest.mark.parametrize(
    ("modules", "setting"),
    [
        (qkv(192, 128, FP8), Setting()),
        ([*qkv(128, 128)[:2], Served("m.v_proj", 192, 128, BLOCK)], Setting()),  # the last part may be ragged
        ([Served("m.o_proj", 192, 256, BLOCK)], Setting(tp=2)),
        (experts(192, FP8), Setting()),
        (experts(128, None), Setting(model_types=("gpt_oss",), split_experts=True)),
        (experts(128), Setting(model_types=("gpt_oss",))),
        ([Served("m.k_proj", 128, 128, FP8)], Setting(tp=64, kv_heads=2)),
        ([Served("m.gate_up_proj", 64, 128, INT4)], Setting()),
        ([Served("mtp.fc", 64, 128, None)], Setting()),
        ([Served("model.layers.0.a", 64, 128, FP8), Served("x.9.b", 64, 128, FP8)], Setting(past_last=frozenset({9}))),
        (experts(128, BLOCK), Setting()),
    ],
)
def test_what_engines_take_is_not_told(modules: list[Served], setting: Setting) -> None:
    assert kinds(modules, setting) == set()


def test_blocks_that_ranks_do_not_divide_are_told_once() -> None:
    assert kinds([Served("m.q_proj", 129, 128, BLOCK)], Setting(tp=2)) == {"tensor-parallel"}


def test_a_warning_names_tensor_rule_and_number() -> None:
    modules = [Served(f"layers.{n}.m.o_proj", 128, 384, INT4) for n in range(5)]
    (found,) = [p for p in check_serving(modules, Setting(tp=2)) if p.kind == "serving-group-partition"]
    assert found.tensor == "layers.0.m.o_proj"
    assert "4 times more" in found.message
    assert "multiple of the group size" in found.message
    assert rules_document([found])[0]["source"].startswith("https://")


def test_a_plan_is_judged_by_its_config_and_its_ranks() -> None:
    config = {"model_type": "llama", "num_key_value_heads": 4}
    plan = build_plan(checkpoint_of([llama_table()], config), parse_recipe({"scheme": "W4A16"}))
    assert check_plan_serving(plan) == []
    assert {p.kind for p in check_plan_serving(plan, 8)} == {"serving-group-partition", "serving-marlin-shape"}


def test_split_stacks_are_judged_as_experts() -> None:
    table: dict[str, Any] = {
        "m.experts.gate_up_proj": ("BF16", (2, 64, 256)),
        "m.experts.down_proj": ("BF16", (2, 128, 64)),
        "m.experts.down_proj_bias": ("BF16", (2, 64)),
    }
    config = {"model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 128}
    plan = build_plan(checkpoint_of([table], config), parse_recipe({"scheme": "NVFP4A16"}))
    assert {p.kind for p in check_plan_serving(plan)} == {"serving-experts-split"}


def test_a_config_that_is_none_tells_nothing() -> None:
    assert read_setting({"num_key_value_heads": "x"}, 2, [], split_experts=False) == Setting(tp=2)
