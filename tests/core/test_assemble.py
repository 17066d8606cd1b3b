from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core import assemble
from shardmill.core.digest import Digest
from shardmill.core.index import INDEX_NAME
from shardmill.core.matching import Matcher
from shardmill.core.plan import Plan
from shardmill.core.planner import build_plan
from shardmill.core.receipt import BlobDigests, Receipt, WeightRecord, parse_receipt
from shardmill.core.recipe import parse_recipe, uniform
from shardmill.core.statistics import Statistics
from shardmill.core.targets import disjoint_targets
from shardmill.errors import ShardmillError
from strategies import checkpoint_of, llama_table

CONFIG = {
    "model_type": "llama",
    "z_first": 1,
    "a_second": {"quantization_config": None, "kept": 2},
    "compression_config": {},
}


def plan_of(recipe: Any, config: dict[str, Any] | None = None, shards: int = 1) -> Plan:
    table = list(llama_table().items())
    parts = [dict(table[n::shards]) for n in range(shards)]
    return build_plan(checkpoint_of(parts, config), parse_recipe(recipe))


def test_one_scheme_targets_linear_with_a_complete_ignore_list() -> None:
    found = assemble.quantization_config(plan_of({"scheme": "FP8_DYNAMIC"}))
    assert found["config_groups"]["group_00"]["targets"] == ["Linear"]
    assert found["ignore"] == ["lm_head", "model.embed_tokens"]
    assert (found["format"], found["quantization_status"]) == ("float-quantized", "compressed")


MIXED = {
    "groups": [
        {"scheme": "FP8_DYNAMIC", "targets": ["re:.*self_attn"]},
        {"scheme": "NVFP4A16", "targets": ["re:.*layers.0.mlp.(gate|up)_proj"]},
        {"scheme": "W8A8", "targets": ["Linear"]},
    ]
}


def test_several_schemes_are_named_by_disjoint_expressions() -> None:
    plan = plan_of(MIXED)
    config = assemble.quantization_config(plan)
    groups = [config["config_groups"][f"group_{n:02d}"]["targets"] for n in range(3)]
    assert config["format"] == "mixed-precision"
    for tensor in plan.shards[0].tensors:
        module = tensor.spec.name.removesuffix(".weight")
        hits = [n for n, targets in enumerate(groups) if any(re.match(t.removeprefix("re:"), module) for t in targets)]
        if tensor.scheme >= 0:
            assert hits == [tensor.scheme]
    assert all(target.startswith("re:.*") for targets in groups for target in targets)


@given(
    st.dictionaries(
        st.builds(
            "m.layers.{}.{}.experts.{}.{}".format,
            st.integers(0, 12),
            st.sampled_from("ab"),
            st.integers(0, 9),
            st.sampled_from(["w1", "w2"]),
        ),
        st.integers(0, 2),
        min_size=1,
    )
)
def test_disjoint_targets_resolve_to_their_group_and_to_no_other(modules: dict[str, int]) -> None:
    targets = disjoint_targets(modules, 3)
    for module, group in modules.items():
        hits = {
            n for n, patterns in enumerate(targets) if any(re.match(p.removeprefix("re:"), module) for p in patterns)
        }
        assert hits == {group}
    assert Matcher.build(targets, []).unmatched() or targets


def test_experts_are_also_named_as_engines_ask_for_them() -> None:
    targets = disjoint_targets({"m.layers.0.b.experts.0.w1": 0, "m.layers.0.x": 1}, 2)
    assert any(re.match(t.removeprefix("re:"), "m.layers.0.b.experts.0.gate_proj") for t in targets[0])


def test_config_keeps_its_order_and_loses_stale_quantization() -> None:
    document = assemble.config_document(plan_of({"scheme": "FP8_DYNAMIC"}, CONFIG))
    assert list(document) == ["model_type", "z_first", "a_second", "quantization_config"]
    assert document["a_second"] == {"kept": 2}


def test_a_single_file_gets_no_index_and_shards_keep_their_names() -> None:
    assert assemble.output_index(plan_of({"scheme": "W4A16"})) is None
    plan = plan_of({"scheme": "W4A16_ASYM"}, shards=3)
    name, text = assemble.output_index(plan) or ("", b"")
    assert name == INDEX_NAME
    index = json.loads(text)
    names = {p.spec.name: shard.name for shard in plan.shards for p in shard.layout().placed}
    assert index["weight_map"] == names
    assert index["metadata"]["total_size"] == sum(shard.layout().data_bytes for shard in plan.shards)


def receipt(plan: Plan, number: int, tensors: tuple[str, ...] | None = None) -> Receipt:
    digest = Digest("blake3", "00")
    names = tuple(p.spec.name for p in plan.shards[number].layout().placed)
    return Receipt(
        key=f"k{number}",
        blob=BlobDigests(whole=digest, head=digest, tail=digest, size=7),
        tensors=names if tensors is None else tensors,
        weights=(WeightRecord("m", "FP8_DYNAMIC", Statistics(count=3, squared_error=0.25, squared_weight=1.0)),),
        producer=(("shardmill", "0"),),
    )


def build_manifest(plan: Plan, receipts: dict[str, Receipt]) -> dict[str, Any]:
    return assemble.manifest(plan, receipts, digest="d", sources={}, file_digests={}, versions={"shardmill": "0"})


def test_the_manifest_accounts_for_every_source_tensor() -> None:
    plan = plan_of({"scheme": "FP8_DYNAMIC"}, shards=2)
    found = build_manifest(plan, {shard.name: receipt(plan, n) for n, shard in enumerate(plan.shards)})
    assert sorted(t["name"] for s in found["shards"] for t in s["tensors"]) == sorted(llama_table())
    assert all(t["reason"] for s in found["shards"] for t in s["tensors"])


def test_a_gap_or_a_foreign_receipt_is_refused() -> None:
    plan = plan_of({"scheme": "FP8_DYNAMIC"}, shards=2)
    with pytest.raises(ShardmillError, match="do not agree"):
        build_manifest(plan, {plan.shards[0].name: receipt(plan, 0)})
    swapped = {shard.name: receipt(plan, 1 - n) for n, shard in enumerate(plan.shards)}
    with pytest.raises(ShardmillError, match="do not agree"):
        build_manifest(plan, swapped)


def test_the_plan_digest_changes_with_keys_files_and_config() -> None:
    plan = plan_of({"scheme": "FP8_DYNAMIC"})
    other = build_plan(checkpoint_of([llama_table()]), uniform("FP8_DYNAMIC", "re:.*self_attn"))
    digests = {
        assemble.plan_digest(plan, {"a": "1"}, {}),
        assemble.plan_digest(plan, {"a": "2"}, {}),
        assemble.plan_digest(plan, {"a": "1"}, {"tokenizer.json": "x"}),
        assemble.plan_digest(other, {"a": "1"}, {}),
    }
    assert len(digests) == 4


def test_a_receipt_survives_its_bytes() -> None:
    one = receipt(plan_of({"scheme": "FP8_DYNAMIC"}), 0)
    assert parse_receipt(one.to_bytes()) == one


@given(st.binary(max_size=200))
def test_any_bytes_are_a_receipt_or_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  every way to be wrong
        parse_receipt(data)


@pytest.mark.parametrize("field", ["schema", "key", "blob", "tensors", "weights", "producer"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [[]]])
def test_a_receipt_with_one_wrong_field_is_refused(field: str, value: object) -> None:
    raw = json.loads(receipt(plan_of({"scheme": "FP8_DYNAMIC"}), 0).to_bytes())
    legal = {("key", "x"), ("tensors", "[]"), ("weights", "[]"), ("producer", "{}")}
    if (field, str(value)) in legal:
        return
    with pytest.raises(ValueError):  # noqa: PT011  every way to be wrong
        parse_receipt(json.dumps(raw | {field: value}).encode())
