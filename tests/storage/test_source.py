from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import checkpoints
from shardmill.core.plan import Checkpoint
from shardmill.errors import CheckpointInvalid
from shardmill.storage.source import open_source, read_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write(
        tmp_path / "src",
        checkpoints.deal(checkpoints.llama(), 3),
        checkpoints.LLAMA,
        **{"tokenizer.json": "{}", "modeling.py": "", "LICENSE": ""},
    )


def load(root: Path) -> Checkpoint:
    return read_checkpoint(open_source(str(root)))


def kinds(root: Path) -> set[str]:
    return {problem.kind for problem in load(root).problems}


def shard(root: Path, number: int = 2) -> Path:
    return root / f"model-{number:05d}-of-00003.safetensors"


def test_a_good_checkpoint_is_read_whole(source: Path) -> None:
    checkpoint = load(source)
    assert checkpoint.problems == ()
    assert [(w.file, w.kind) for w in checkpoint.warnings] == [("modeling.py", "code-left-out")]
    assert len(checkpoint.shards) == 3
    assert checkpoint.files == ("LICENSE", "tokenizer.json")
    assert [name for name, _ in checkpoint.left_out] == ["modeling.py"]


def test_every_broken_file_is_reported_at_once(source: Path) -> None:
    shard(source, 1).unlink()
    shard(source, 2).write_bytes(shard(source, 2).read_bytes()[:-7])
    (source / "config.json").write_text("{")
    assert kinds(source) == {"file-missing", "shard-truncated", "config-invalid"}


def test_mistrals_params_are_read_beside_config_json_and_not_instead_of_it(source: Path) -> None:
    (source / "params.json").write_text('{"dim": 8}')
    assert load(source).rewritten == (("params.json", '{"dim": 8}'),)
    (source / "config.json").unlink()
    (missing,) = load(source).problems
    assert (missing.file, missing.kind) == ("config.json", "file-missing")
    assert "params.json alone" in missing.way_out
    (source / "params.json").write_text("[")
    assert sorted(problem.kind for problem in load(source).problems) == ["config-invalid", "file-missing"]


@pytest.mark.parametrize(
    ("index", "kind"),
    [
        ("{", "index-invalid"),
        ("{}", "index-invalid"),
        ('{"weight_map": {}}', "index-invalid"),
        ('{"weight_map": {"a": 3}}', "shard-name"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "shard-name"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "shard-name"),
        ('{"weight_map": {"a": "x.bin"}}', "shard-name"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "index-invalid"),
    ],
)
def test_a_bad_index_is_refused(source: Path, index: str, kind: str) -> None:
    (source / "model.safetensors.index.json").write_text(index)
    assert kind in kinds(source)


def test_several_shards_without_an_index_are_refused(source: Path) -> None:
    (source / "model.safetensors.index.json").unlink()
    assert kinds(source) == {"index-missing"}


def test_a_shard_that_links_out_of_the_checkpoint_is_refused(source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    shard(source).rename(outside)
    shard(source).symlink_to(outside)
    assert kinds(source) == {"file-outside"}


def test_the_layout_of_the_hub_cache_is_followed(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load(snapshot).problems == ()


def test_a_fifo_is_refused_and_never_opened(source: Path) -> None:
    shard(source).unlink()
    os.mkfifo(shard(source))
    assert kinds(source) == {"file-irregular"}


def test_what_the_index_does_not_name_is_reported(source: Path) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    (source / "consolidated.safetensors").write_bytes(b"")
    (source / "pytorch_model.bin").write_bytes(b"")
    checkpoint = load(source)
    kinds_told = {w.kind for w in checkpoint.warnings}
    assert kinds_told == {"tensor-unindexed", "weight-file-left-out", "pickle-left-out", "code-left-out"}
    assert {name for name, _ in checkpoint.left_out} == {"consolidated.safetensors", "modeling.py", "pytorch_model.bin"}


def test_a_source_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="expected a folder"):
        open_source(str(tmp_path / "absent"))


def test_a_source_is_found_by_url_as_by_path(source: Path) -> None:
    assert open_source(f"file://{source}").folder.path == source
    with pytest.raises(CheckpointInvalid, match="not supported"):
        open_source("gs://bucket/x")
