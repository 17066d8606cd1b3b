"""What is above a limit is refused, names the limit, and is taken when the limit is raised."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardmill.core.findings import check_copies, check_partners
from shardmill.core.foreign import sort_files
from shardmill.core.header import parse_header
from shardmill.core.index import parse_index
from shardmill.core.limits import DEFAULTS, NAMES, Limits
from shardmill.core.planner import build_plan
from shardmill.core.pretty import pretty
from shardmill.core.recipe import uniform
from shardmill.core.strict_json import parse_json
from shardmill.errors import CheckpointInvalid, RecipeInvalid
from strategies import checkpoint_of, llama_table


def head(count: int = 3, name: str = "t", shape: tuple[int, ...] = (0,), metadata: str = "") -> bytes:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
    table: dict[str, Any] = {f"{name}{number}": entry for number in range(count)}
    return json.dumps({"__metadata__": {"x": metadata}} | table).encode()


def read_header(data: bytes, limits: Limits) -> object:
    return parse_header(data, 8 + len(data), limits=limits)


def read_index(data: bytes, limits: Limits) -> object:
    return parse_index(data, limits=limits)


def read_json(data: bytes, limits: Limits) -> object:
    return parse_json(data, file="config.json", kind="config-invalid", limits=limits)


INDEX = json.dumps({"weight_map": {f"t{n}": f"{n % 7}.safetensors" for n in range(5000)}}).encode()
ESCAPED = INDEX.replace(b'"t1"', b'"\\u00741"')


@pytest.mark.parametrize(
    ("limit", "value", "read", "data"),
    [
        ("header_bytes", 100, read_header, head()),
        ("header_tensors", 2, read_header, head()),
        ("header_tensors", 2, read_header, head().replace(b"data_offsets", b"data\\u005foffsets")),
        ("name_bytes", 9, read_header, head(name="a" * 9)),
        ("name_bytes", 9, read_header, head(name="é" * 5)),
        ("rank", 2, read_header, head(shape=(0, 1, 1))),
        ("index_bytes", 1000, read_index, INDEX),
        ("index_tensors", 3000, read_index, INDEX),
        ("index_shards", 6, read_index, INDEX),
        ("index_shards", 6, read_index, ESCAPED),
        ("json_depth", 3, read_json, b'{"a": [[{}]]}'),
        ("json_digits", 5, read_json, b'{"a": -123456}'),
        ("json_string_bytes", 3, read_json, b'{"a": "bcde"}'),
    ],
)
def test_a_limit_refuses_by_name_and_can_be_raised(limit: str, value: int, read: Any, data: bytes) -> None:
    with pytest.raises(CheckpointInvalid, match=f"the limit `{limit}` is {value}; raise this limit"):
        read(data, Limits(**{limit: value}))
    assert read(data, DEFAULTS)


def test_no_limit_is_left_out_of_these_tests() -> None:
    elsewhere = {"metadata_bytes", "json_bytes", "stack_experts"}  # below, and in the attacks
    assert elsewhere < set(NAMES)
    assert len(NAMES) == 13


def test_long_metadata_are_passed_over_and_the_rest_is_read() -> None:
    data = head(metadata="\x1b[2J" * 100)
    found = parse_header(data, 8 + len(data), limits=Limits(metadata_bytes=64))
    assert found.passed_over > 64
    assert [spec.name for spec in found.tensors] == ["t0", "t1", "t2"]
    assert found.data_start == 8 + len(data)
    assert parse_header(data, 8 + len(data)).passed_over == 0


@pytest.mark.parametrize(
    "changes",
    [
        ["nothing=1"],
        ["rank"],
        ["rank=0"],
        ["rank=-1"],
        ["rank=x"],
        ["rank=65"],
        ["header_bytes=101MB"],
        ["json_depth=9999"],
    ],
)
def test_a_limit_that_cannot_be_is_refused(changes: list[str]) -> None:
    with pytest.raises(RecipeInvalid):
        Limits.parse(changes)


@pytest.mark.parametrize(
    "text", ['{"a": 1e999}', '{"a": "\\ud800"}', '{"a": {"b": 1, "b": 1}}', "\ufeff{}", '{"a": NaN}']
)
def test_what_two_readers_could_understand_differently_is_refused(text: str) -> None:
    with pytest.raises(CheckpointInvalid):
        read_json(text.encode(), DEFAULTS)


def test_hostile_text_takes_linear_time() -> None:
    # a quadratic reader would need hours for any of these
    for text in ('"' + '\\"' * 1_500_000, "[" * 4_000_000, '{"a":' * 800_000, '"a" ' * 1_000_000):
        with pytest.raises(CheckpointInvalid):
            read_json(text.encode(), DEFAULTS)
    for start in (b'{"__metadata__":{"x":"', b'{"__metadata__":{'):
        with pytest.raises(CheckpointInvalid):
            read_header(start + b'\\"' * 4_000_000, DEFAULTS)


def test_a_hundred_thousand_tensors_are_read_and_two_hundred_thousand_and_one_are_not() -> None:
    assert len(parse_header(head(100_000), 8 + len(head(100_000))).tensors) == 100_000
    with pytest.raises(CheckpointInvalid, match="`header_tensors` is 200000"):
        read_header(head(200_001), DEFAULTS)


def test_files_that_can_run_code_are_copied_on_demand_only() -> None:
    names = ["a.py", "b.pt", ".env", "x.gguf", "tokenizer.json", "notes.txt"]
    shy, open_ = sort_files(names), sort_files(names, allow_code=True)
    assert shy.copied == ("tokenizer.json",)
    assert open_.copied == ("a.py", "b.pt", ".env", "tokenizer.json")
    assert [name for name, _ in open_.left_out] == ["notes.txt", "x.gguf"]
    assert {w.kind for w in open_.warnings} == {
        "code-copied", "pickle-copied", "dot-file-copied", "weight-file-left-out", "file-left-out"
    }  # fmt: skip


def test_a_link_that_leads_out_is_not_copied_on_demand_either() -> None:
    found = sort_files(["a.py"], odd={"a.py": "a link that leads out of the checkpoint"}, allow_code=True)
    assert found.copied == ()
    assert found.left_out == (("a.py", "a link that leads out of the checkpoint"),)


def test_partners_that_only_some_layers_lack_are_told_in_one_warning() -> None:
    modules = [f"model.layers.{n}.self_attn.{leaf}_proj" for n in range(12) for leaf in "qkv"]
    assert check_partners([("s", module) for module in modules]) == []
    (found,) = check_partners([("s", module) for module in modules if "k_proj" not in module or ".1." not in module])
    assert found.tensor == "model.layers.1.self_attn"
    assert "q_proj, v_proj with k_proj" in found.message


def test_an_ordinary_checkpoint_gives_no_warning() -> None:
    plan = build_plan(checkpoint_of([llama_table()]), uniform("NVFP4A16"))
    assert plan.warnings == ()
    assert check_copies(plan.shards) == []


@pytest.mark.parametrize(
    "document", [{}, [], {"a": {}, "b": [1, [2, {"c": "\n"}]]}, [{"a": 1, "b": "é"}], "x", {"a": None}]
)
def test_pretty_json_is_what_the_library_writes(document: Any) -> None:
    assert pretty(document) == json.dumps(document, indent=2, ensure_ascii=False)
