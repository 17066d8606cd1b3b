"""Summaries of plans and manifests, the totals that they rest on, and reading manifests back."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from asked import asked
from manifests import manifest_of
from shardmill.core import assemble
from shardmill.core.digest import Digest
from shardmill.core.findings import check_statistics, typical_error
from shardmill.core.manifest import Totals, parse_manifest
from shardmill.core.plan import Plan
from shardmill.core.planner import build_plan
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import parse_recipe
from shardmill.core.scheme import PRESETS, WeightArgs, preset
from shardmill.core.statistics import Statistics
from shardmill.core.summary import (
    PROXY,
    Summary,
    human_bytes,
    plan_document,
    render,
    summarize,
    summarize_plan,
    summary_document,
)
from shardmill.errors import CheckpointInvalid, Problem
from strategies import checkpoint_of, llama_table

MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "moe_intermediate_size": 128,
}


def plan_of(recipe: Any = None, shards: int = 2, table: dict[str, Any] | None = None, **more: Any) -> Plan:
    entries = list((table or llama_table()).items())
    parts = [dict(entries[n::shards]) for n in range(shards)]
    return build_plan(checkpoint_of(parts, **more), parse_recipe(recipe or {"scheme": "FP8_DYNAMIC"}))


# ---- totals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", sorted(PRESETS))
def test_totals_add_up_to_the_bytes_of_the_output_shards(scheme: str) -> None:
    plan = plan_of(asked(scheme))
    found = assemble.totals(plan)
    layouts = [shard.layout() for shard in plan.shards]
    data = sum(layout.data_bytes for layout in layouts)
    assert found["quantized_bytes"] + found["copied_bytes"] == data
    assert found["output_bytes"] == data + sum(len(layout.header()) for layout in layouts)
    assert found["source_bytes"] == sum(shard.size for shard in plan.shards)


def test_totals_count_elements_of_the_source() -> None:
    table = llama_table()
    found = assemble.totals(plan_of(table=table))
    elements = {name: math.prod(shape) for name, (_, shape) in table.items()}
    quantized = sum(count for name, count in elements.items() if "_proj" in name)
    assert found["quantized_weights"] == quantized
    assert found["copied_weights"] == sum(elements.values()) - quantized


def test_totals_do_not_depend_on_sharding_but_for_headers() -> None:
    found = [assemble.totals(plan_of({"scheme": "NVFP4A16"}, shards)) for shards in (1, 3, 7)]
    keys = ("quantized_weights", "quantized_bytes", "copied_weights", "copied_bytes")
    assert len({tuple(totals[key] for key in keys) for totals in found}) == 1


def test_split_stacks_count_their_elements() -> None:
    prefix = "model.layers.0.mlp.experts"
    table = {
        f"{prefix}.gate_up_proj": ("BF16", (2, 256, 64)),
        f"{prefix}.down_proj": ("BF16", (2, 64, 128)),
        f"{prefix}.down_proj_bias": ("BF16", (2, 64)),
    }
    found = assemble.totals(plan_of(shards=1, table=table, config=MOE))
    assert found["quantized_weights"] == 2 * 256 * 64 + 2 * 64 * 128
    assert (found["copied_weights"], found["copied_bytes"]) == (2 * 64, 2 * 64 * 2)


def test_the_manifest_holds_the_totals() -> None:
    plan = plan_of()
    assert manifest_of(plan)["totals"] == assemble.totals(plan)


# ---- summaries --------------------------------------------------------------------------------------------------


def test_a_plan_and_its_manifest_give_the_same_summary() -> None:
    plan = plan_of({"scheme": "W4A16", "ignore": ["re:.*layers.1.mlp"]})
    planned, done = summarize_plan(plan), summarize(manifest_of(plan))
    assert (planned.totals, planned.decisions, planned.shards) == (done.totals, done.decisions, done.shards)
    assert planned.worst == ()
    assert len(done.worst) == 10


def test_bits_per_weight() -> None:
    found = summarize_plan(plan_of({"scheme": "NVFP4A16"}))
    scalars = 14 * 4 * 8 / found.totals.quantized_weights
    assert found.quantized_bits_per_weight == pytest.approx(4.5 + scalars)
    assert 4.5 < found.bits_per_weight < 16
    assert found.ratio == found.totals.output_bytes / found.totals.source_bytes


def test_figures_of_nothing_are_defined() -> None:
    nothing = Totals(**dict.fromkeys(Totals.__dataclass_fields__, 0))
    empty = Summary(totals=nothing, shards=0, decisions=(), worst=(), warnings=())
    assert (empty.ratio, empty.bits_per_weight, empty.quantized_bits_per_weight) == (1.0, 0.0, 0.0)


def test_decisions_are_counted_by_reason_under_folded_names() -> None:
    found = summarize_plan(plan_of({"scheme": "W8A8", "ignore": ["re:.*layers.1.mlp"]})).decisions
    assert [(d.action, d.scheme, d.count) for d in found][:1] == [("quantize", "W8A8", 11)]
    assert "model.layers.[0-1].self_attn.{k,o,q,v}_proj" in found[0].names
    ignored = next(d for d in found if d.reason.startswith("ignored"))
    assert ignored.names == ("model.layers.1.mlp.{down,gate,up}_proj",)
    assert sum(d.count for d in found) == len(llama_table())


def test_worst_weights_come_first_and_nan_before_all() -> None:
    document = manifest_of(plan_of(shards=1))
    weights = document["shards"][0]["weights"]
    weights[3] |= {"squared_error": 0.25}
    weights[5] |= {"squared_error": None}
    worst = summarize(document).worst
    assert [weight.module for weight in worst[:2]] == [weights[5]["module"], weights[3]["module"]]


# ---- what is unusual --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("FP8_DYNAMIC", 0.027),
        ("FP8_BLOCK", 0.027),
        ("W8A8", 0.0082),
        ("W8A16", 0.0066),
        ("W4A16", 0.111),
        ("W4A16_ASYM", 0.1),
        ("NVFP4A16", 0.095),
        ("MXFP4A16", 0.112),
        ("MXFP8A16", 0.027),
    ],
)
def test_typical_errors(scheme: str, expected: float) -> None:
    assert typical_error(preset(scheme).weights) == pytest.approx(expected, rel=0.02)


def test_fewer_bits_err_more() -> None:
    errors = [typical_error(WeightArgs(num_bits=bits, strategy="group", group_size=128)) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_usual_results_give_no_warning() -> None:
    assert summarize(manifest_of(plan_of())).warnings == ()


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"error": 0.1}, "error-unusual"), ({"error": math.inf}, "error-unusual"), ({"zeroed": 1}, "zeroed")],
)
def test_unusual_weights_are_named_in_one_warning(change: dict[str, Any], kind: str) -> None:
    warnings = summarize(manifest_of(plan_of(), **change)).warnings
    assert [(w.kind, w.tensor) for w in warnings] == [
        (kind, "model.layers.[0-1].mlp.{down,gate,up}_proj, model.layers.[0-1].self_attn.{k,o,q,v}_proj")
    ]


def test_a_scheme_that_the_recipe_does_not_know_gives_no_warning() -> None:
    weight = WeightRecord("m", "elsewhere", Statistics(count=1, squared_error=1.0, squared_weight=1.0))
    assert check_statistics([("m.safetensors", weight)], parse_recipe({"scheme": "W8A8"})) == []


# ---- text and documents -----------------------------------------------------------------------------------------


def test_a_rendered_result_tells_sizes_decisions_and_worst() -> None:
    plan = plan_of({"scheme": "NVFP4A16"})
    text = render(summarize(manifest_of(plan, error=0.09)))
    totals = assemble.totals(plan)
    assert f"{totals['output_bytes']:,} bytes" in text
    assert "quantize NVFP4A16: 14 tensors, target 'Linear'" in text
    assert "copy: 1 tensors, default: head (accuracy, and heads are often tied)" in text
    assert "0.0900   20.9 dB    0.0% zeroed" in text
    assert PROXY in text


def test_a_rendered_plan_has_no_errors_to_tell() -> None:
    text = render(summarize_plan(plan_of()))
    assert "largest relative errors" not in text
    assert PROXY not in text


def test_long_lists_are_cut() -> None:
    table = {f"{'abcdefghijkl'[n]}.x{n}y.w_{n}z": ("F32", (4,)) for n in range(12)} | llama_table()
    warnings = tuple(Problem(tensor=f"t{n}", kind="k", message="m") for n in range(103))
    text = render(summarize_plan(plan_of(table=table, warnings=warnings)))
    assert "… and 4 more names" in text
    assert "WARNING tensor `t0`: m" in text
    assert "… and 3 more warnings" in text


def test_a_weight_of_zeros_has_no_share_of_zeroed_elements() -> None:
    document = manifest_of(plan_of(shards=1))
    document["shards"][0]["weights"] = [document["shards"][0]["weights"][0] | {"nonzero": 0, "squared_error": 0.0}]
    assert "0.0000    inf dB" in render(summarize(document))


def test_foreign_text_is_escaped() -> None:
    document = manifest_of(plan_of(shards=1))
    document["shards"][0]["tensors"][0] |= {"name": "evil\x1b[31m`name", "reason": "why\nnot"}
    document["shards"][0]["weights"][0] |= {"module": "m\x00", "squared_error": 0.2}
    text = render(summarize(document))
    assert text.isprintable() or {c for c in text if not c.isprintable()} == {"\n"}
    assert "evil\\x1b[31m'name" in text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (5e18, "5000.0 PB")]
)
def test_sizes_are_written_in_decimal_units(size: float, text: str) -> None:
    assert human_bytes(size) == text


def test_a_summary_for_machines_is_json() -> None:
    document = manifest_of(plan_of(shards=1), error=0.0)
    found = json.loads(json.dumps(summary_document(summarize(document)), allow_nan=False))
    assert found["worst"][0]["sqnr_db"] is None
    assert found["totals"] == document["totals"]
    assert found["decisions"][0]["names"] == list(summarize(document).decisions[0].names)


# ---- the plan document ------------------------------------------------------------------------------------------


def test_the_plan_document_names_every_tensor_and_byte() -> None:
    plan = plan_of({"scheme": "NVFP4A16"}, 3)
    document = json.loads(json.dumps(plan_document(plan), allow_nan=False))
    assert document["totals"] == assemble.totals(plan)
    assert document["problems"] == []
    for shard, entry in zip(plan.shards, document["shards"], strict=True):
        assert [tensor["name"] for tensor in entry["tensors"]] == [tensor.spec.name for tensor in shard.tensors]
        outputs = [output for tensor in entry["tensors"] for output in tensor["outputs"]]
        placed = {p.spec.name: (p.spec.dtype, list(p.spec.shape), [p.begin, p.end]) for p in shard.layout().placed}
        assert {o["name"]: (o["dtype"], o["shape"], o["data_offsets"]) for o in outputs} == placed
        assert entry["reads"][0] == shard.name
    fused = [t for entry in document["shards"] for t in entry["tensors"] if t["fused"]]
    assert {len(tensor["fused"]) for tensor in fused} == {2, 3}


def test_a_refused_plan_has_decisions_and_no_outputs() -> None:
    plan = plan_of({"scheme": "W8A8", "ignore": "nowhere", "targets": ["re:.*norm", "Linear"]})
    more = Problem(tensor="model.norm.weight", kind="wrong-rank", message="m")
    document = plan_document(plan, [*plan.problems, more])
    assert [problem["kind"] for problem in document["problems"]] == ["pattern-unmatched", "wrong-rank"]
    assert (document["totals"], document["bits_per_weight"], document["quantized_bits_per_weight"]) == (None,) * 3
    assert {len(t["outputs"]) for shard in document["shards"] for t in shard["tensors"]} == {0}
    assert {shard["output_bytes"] for shard in document["shards"]} == {None}


def test_a_plan_document_takes_the_plans_own_problems() -> None:
    assert [p["kind"] for p in plan_document(plan_of({"scheme": "W8A8", "ignore": "no"}))["problems"]] == [
        "pattern-unmatched"
    ]


# ---- reading manifests ------------------------------------------------------------------------------------------


def test_a_manifest_is_read_back() -> None:
    plan = plan_of({"scheme": "W4A16"}, warnings=(Problem(file="f", tensor="t", kind="k", message="m"),))
    found = parse_manifest(manifest_of(plan))
    assert found.recipe == plan.recipe
    assert found.totals == Totals(**assemble.totals(plan))
    assert found.files == (("tokenizer.json", Digest("blake3", "00")),)
    assert found.warnings == (Problem(file="f", tensor="t", kind="k", message="m"),)
    assert [shard.name for shard in found.shards] == [shard.name for shard in plan.shards]
    assert [t.name for t in found.shards[0].tensors] == [t.spec.name for t in plan.shards[0].tensors]


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one field; numbers in the path are positions in lists."""

    def change(document: Any) -> None:
        *parents, last = path.split("/")
        for part in parents:
            document = document[int(part) if part.isdigit() else part]
        document[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("schema", 2),
        put("schema", value=True),
        put("plan", 7),
        put("recipe", {"scheme": "NONE"}),
        put("recipe", 7),
        put("files", {"a": "nocolon"}),
        put("files", {"a\x00": "blake3:00"}),
        put("files", {"": "blake3:00"}),
        put("files", []),
        put("totals", {}),
        put("totals/source_bytes", -1),
        put("totals/source_bytes", value=True),
        put("shards", {}),
        put("shards/0/name", "../x.safetensors"),
        put("shards/0/size", "7"),
        put("shards/0/weights/0/squared_error", "7"),
        put("shards/0/weights/0/squared_error", -1.0),
        put("shards/0/weights/0/squared_error", 10**400),
        put("shards/0/weights", [7]),
        put("shards/0/tensors/0/name", None),
        put("warnings", [{}]),
    ],
)
def test_a_malformed_manifest_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    document = copy.deepcopy(manifest_of(plan_of()))
    change(document)
    with pytest.raises(CheckpointInvalid) as caught:
        parse_manifest(document)
    assert {(p.file, p.kind) for p in caught.value.problems} == {("shardmill.json", "manifest-invalid")}
    assert all(len(str(p)) <= 300 for p in caught.value.problems)


@pytest.mark.parametrize("document", [None, [], "x", 7])
def test_what_is_no_object_is_no_manifest(document: Any) -> None:
    with pytest.raises(CheckpointInvalid, match="schema 1"):
        parse_manifest(document)


def test_one_value_that_outweighs_all_others_is_told_though_the_error_hides_it() -> None:
    recipe = parse_recipe({"scheme": "NVFP4A16"})
    figures = {"count": 1000, "nonzero": 1000, "zeroed": 999, "amax": 1e4, "squared_weight": 1e8 + 1}
    found = check_statistics([("s", WeightRecord("m", "NVFP4A16", Statistics(**figures)))], recipe)  # type: ignore[arg-type]
    assert sorted(problem.kind for problem in found) == ["outlier", "zeroed"]
    few = Statistics(count=2, nonzero=2, amax=1.0, squared_weight=1.01)
    assert check_statistics([("s", WeightRecord("m", "NVFP4A16", few))], recipe) == []
