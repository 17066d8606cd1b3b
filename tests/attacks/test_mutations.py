"""Random damage: typed refusals and nothing else, in little memory; nothing foreign is read or comes out."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from safetensors import SafetensorError, deserialize

from attacks import attack_cases as attacks
from attacks import mutations
from shardmill.cli import main
from shardmill.core.assemble import config_document, encode_document
from shardmill.core.header import LENGTH_BYTES, header_length, parse_header
from shardmill.core.index import is_shard_name, parse_index
from shardmill.core.planner import build_plan
from shardmill.core.recipe import uniform
from shardmill.core.strict_json import parse_json
from shardmill.errors import Refused
from shardmill.storage.operations import Faults, watched
from shardmill.storage.source import open_source, read_checkpoint

SHARDS = 200
MEMORY_LIMIT = 300 << 20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judge(read: Callable[[bytes], object], inputs: list[bytes]) -> Counter[str]:
    """Read everything; what is neither taken nor refused with a type raises here."""
    before, slowest, longest, verdicts = peak_bytes(), 0.0, 0, Counter[str]()
    for data in inputs:
        started = time.perf_counter()
        try:
            read(data)
        except Refused as error:
            verdicts["refused"] += 1
            longest = max(longest, *map(len, str(error).splitlines()))
        else:
            verdicts["taken"] += 1
        slowest = max(slowest, time.perf_counter() - started)
    growth = peak_bytes() - before
    print(f"\n{dict(verdicts)}, slowest {slowest:.3f} s, {growth / 1e6:.1f} MB more memory")
    assert growth < MEMORY_LIMIT
    assert longest <= 300
    return verdicts


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_spoiled_headers(count: int) -> None:
    rng = Random(11)  # noqa: S311
    sound, data_bytes = mutations.sound_header()

    def read(head: bytes) -> None:
        shard = mutations.as_shard(head, data_bytes)
        length = header_length(shard[:LENGTH_BYTES], len(shard), file="m.safetensors")
        parse_header(shard[LENGTH_BYTES : LENGTH_BYTES + length], len(shard), file="m.safetensors")
        try:
            deserialize(shard)
        except SafetensorError as error:
            raise AssertionError(f"taken, and the library refuses it: {error}") from error

    verdicts = judge(read, [mutations.mutate(sound, rng) for _ in range(count)])
    assert verdicts["refused"] > count // 2


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_spoiled_indexes_and_configs(count: int, tmp_path: Path) -> None:
    rng = Random(12)  # noqa: S311
    attacks.put_checkpoint(tmp_path / "source", attacks.sound())
    sound = read_checkpoint(open_source(str(tmp_path / "source")))
    config = mutations.sound_config()

    def read_config(data: bytes) -> None:
        parse_json(data, file="config.json", kind="config-invalid")
        attacks.put(tmp_path / "source/config.json", data)
        plan = build_plan(read_checkpoint(open_source(str(tmp_path / "source"))), uniform("FP8_DYNAMIC"))
        if plan.problems:
            raise Refused(plan.problems)
        json.loads(encode_document(config_document(plan)))

    assert not sound.problems
    found = judge(parse_index, [mutations.mutate(mutations.sound_index(), rng) for _ in range(count // 2)])
    found += judge(read_config, [mutations.mutate(config, rng) for _ in range(count // 2)])
    assert found["refused"] > count // 4


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_name_leads_outside(count: int, tmp_path: Path) -> None:
    """Names of an index, and names of links, special files and folders that lie there."""
    rng = Random(13)  # noqa: S311
    pieces = ["..", ".", "", "a", "outside", "x.safetensors", "\\", "%2e%2e", "~", "\0", "\u202e", "C:", "/", " ", "é"]
    source, outside = tmp_path / "source", tmp_path / "outside"
    attacks.put(outside / "x.safetensors", attacks.CANARY)
    attacks.put_checkpoint(source, attacks.sound())
    os.mkfifo(source / "pipe.safetensors")
    (source / "zero.safetensors").symlink_to("/dev/zero")
    (source / "link.safetensors").symlink_to("../outside/x.safetensors")
    names = ["/".join(rng.choice(pieces) for _ in range(rng.randint(1, 5))) + ".safetensors" for _ in range(count)]
    names += ["pipe.safetensors", "zero.safetensors", "link.safetensors"]
    through_links = ["in/x.safetensors", "up/outside/x.safetensors"]
    refused = 0
    with watched(Faults()) as seen:
        for name in [*names, *through_links]:
            if name == through_links[0]:
                (source / "in").symlink_to(outside)
                (source / "up").symlink_to("..")
            attacks.put(source / attacks.INDEX, {"weight_map": {"a.weight": name}})
            refused += bool(read_checkpoint(open_source(str(source))).problems)
    places = {Path(where) for what, where in seen.log if what in ("open", "read")}
    leading_out = [path for path in places if not path.resolve().is_relative_to(source)]
    assert refused == len(names) + len(through_links)
    assert leading_out == []
    assert (outside / "x.safetensors").read_text() == attacks.CANARY
    print(f"\n{len(names)} names, {sum(map(is_shard_name, names))} plain ones, {len(places)} places looked at")


def test_only_listed_files_come_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    attacks.put_checkpoint(source, attacks.sound())
    listed = ["tokenizer.json", "LICENSE", "README.md", "vocab.txt", "chat_template.jinja", "sub/merges.txt"]
    suffixes = ["py", "so", "bin", "pt", "pkl", "sh", "ipynb", "exe", "txt", "gguf", "onnx", "h5", "zip", "tar", "npy"]
    foreign = [*(f"file.{suffix}" for suffix in suffixes), ".env", ".git/config", "Dockerfile", "sub/.netrc", "x"]
    for name in (*listed, *foreign):
        attacks.put(source / name, attacks.CANARY if name in foreign else "{}")
    assert main(["run", str(source), str(destination), "--device", "cpu"]) == 0
    found = {path.relative_to(destination).as_posix() for path in destination.rglob("*") if path.is_file()}
    ours = {attacks.ONE, attacks.TWO, attacks.INDEX, "config.json", "shardmill.json"}
    assert found == {*ours, *listed}
    manifest = json.loads((destination / "shardmill.json").read_text())
    left_out = {entry["file"] for entry in manifest["files_not_copied"]}
    assert left_out == {name if name != ".git/config" else ".git/" for name in foreign}
    assert all(entry["reason"] for entry in manifest["files_not_copied"])
    assert "WARNING" in capsys.readouterr().err


def test_defects_of_the_last_shard_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    names = [f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(1, SHARDS + 1)]
    shards = {name: {f"model.layers.{n}.mlp.up_proj.weight": attacks.matrix()} for n, name in enumerate(names)}
    shards[names[-1]] |= {f"bad.{n}.weight": attacks.matrix(seed=n) for n in range(9)}
    attacks.put_checkpoint(source, shards)
    head = attacks.header(shards[names[-1]])
    changes = [{"dtype": "Q4"}, {"shape": [1.5]}, {"shape": [-1]}, {"data_offsets": [9, 0]}, {"x": 1}, {"shape": None}]
    for number, change in enumerate(changes):
        head[f"bad.{number}.weight"] |= change
    head["bad\x1b.weight"] = head.pop("bad.8.weight")
    attacks.put_shard(source / names[-1], head, attacks.body(shards[names[-1]]))
    attacks.put(source / "config.json", "{")
    (source / "tokenizer.json").symlink_to("/etc/hostname")
    started = time.perf_counter()
    assert main(["run", str(source), str(destination), "--device", "cpu"]) == 2
    seconds = time.perf_counter() - started
    talk = capsys.readouterr().err
    told = [*(f"`bad.{number}.weight`" for number in range(len(changes))), "control", "config.json", "tokenizer.json"]
    assert [text for text in told if text not in talk] == []
    assert not destination.exists()
    assert not list(tmp_path.rglob(".shardmill/**/*.safetensors"))
    print(f"\n{len(told)} defects in the last of {SHARDS} shards told in {seconds:.2f} s")


@pytest.mark.slow
def test_the_fuzzer_finds_nothing() -> None:
    seconds = os.environ.get("SHARDMILL_FUZZ_SECONDS", "120")
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), f"-max_total_time={seconds}", "-max_len=4096"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=550)
    print(done.stderr[-600:])
    assert done.returncode == 0, done.stderr[-4000:]
