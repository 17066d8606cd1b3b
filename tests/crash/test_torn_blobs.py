"""Blobs of the right size with wrong bytes: found, computed again, and never published."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoints
from shardmill.core.recipe import uniform
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.stages.verify import verify
from shardmill.storage import hashing
from shardmill.storage.location import open_folder
from shardmill.storage.store import FAST, FULL, Store

VARIANTS = 200
Tear = Callable[[bytes, random.Random], bytes]


def zero_tail(data: bytes, rng: random.Random) -> bytes:
    cut = rng.randrange(len(data))
    return data[:cut] + bytes(len(data) - cut)


def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def zero_hole(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data))
    length = rng.randrange(1, 512)
    return (data[:begin] + bytes(length) + data[begin + length :])[: len(data)]


def swap_halves(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(1, len(data))
    return data[at:] + data[:at]


def damage_header(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(8 + int.from_bytes(data[:8], "little"))
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


TEARS: list[Tear] = [zero_tail, flip, zero_hole, swap_halves, damage_header]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = checkpoints.write(tmp_path_factory.mktemp("torn") / "in", checkpoints.deal(checkpoints.llama(), 2))
    time.sleep(2.1)  # so that digests are remembered
    return root


def torn(data: bytes, variant: int) -> bytes:
    """Other bytes of the same length."""
    rng = random.Random(variant)  # noqa: S311 - variants that can be had again
    while True:
        found = TEARS[variant % len(TEARS)](data, rng)
        assert len(found) == len(data)
        if found != data:
            return found


def write_in_place(path: Path, data: bytes) -> None:
    """As a dying machine leaves it: same name, same size, and the times of before."""
    status = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_torn_blobs_are_found_and_never_published(model: Path, tmp_path: Path) -> None:
    locations = Locations(source=str(model), destination=str(tmp_path / "model"))
    recipe = uniform("FP8_DYNAMIC")
    run(locations, recipe)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    blobs = sorted((tmp_path / ".shardmill" / "blobs").iterdir())
    undetected = []
    for variant in range(VARIANTS):
        shutil.rmtree(tmp_path / "model")
        blob = blobs[variant % len(blobs)]
        write_in_place(blob, torn(blob.read_bytes(), variant))
        store = Store(open_folder(str(tmp_path / ".shardmill")))
        if [problem.file for problem in store.verify()] != [blob.stem]:
            undetected.append(("store verify", variant))

        result = run(locations, recipe, RunOptions(verify=FULL if variant % 2 else FAST))

        if sum(outcome.is_hit for outcome in result.outcomes) != len(blobs) - 1:
            undetected.append(("run", variant))
        assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == expected, variant
    assert undetected == []


def test_full_verification_needs_nobody_to_have_looked_before(model: Path, tmp_path: Path) -> None:
    locations = Locations(source=str(model), destination=str(tmp_path / "model"))
    run(locations, uniform("FP8_DYNAMIC"))
    expected = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    for variant in range(20):
        shutil.rmtree(tmp_path / "model")
        blob = sorted((tmp_path / ".shardmill" / "blobs").iterdir())[variant % 2]
        write_in_place(blob, torn(blob.read_bytes(), variant))
        result = run(locations, uniform("FP8_DYNAMIC"), RunOptions(verify=FULL))
        assert [outcome.is_hit for outcome in result.outcomes].count(False) == 1, variant
        assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == expected


@pytest.mark.parametrize(
    ("verify", "where", "is_new_time", "is_found"),
    [
        (FAST, "head", True, True),
        (FAST, "tail", True, True),
        (FAST, "middle", True, False),  # fast verification reads the ends only
        (FAST, "head", False, False),  # and nothing of a blob in the state in which it was verified
        (FULL, "middle", True, True),
        (FULL, "middle", False, True),
    ],
)
def test_what_is_found_in_a_blob_that_is_longer_than_its_ends(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, verify: str, where: str, is_new_time: bool,
    is_found: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(hashing, "EDGE_BYTES", 4096)
    locations = Locations(source=str(model), destination=str(tmp_path / "model"))
    run(locations, uniform("FP8_DYNAMIC"))
    shutil.rmtree(tmp_path / "model")
    blob = min((tmp_path / ".shardmill" / "blobs").iterdir())
    data = bytearray(blob.read_bytes())
    data[{"head": 10, "middle": len(data) // 2, "tail": -10}[where]] ^= 1
    write_in_place(blob, bytes(data))
    if is_new_time:
        os.utime(blob)
    result = run(locations, uniform("FP8_DYNAMIC"), RunOptions(verify=verify))
    assert (sum(outcome.is_hit for outcome in result.outcomes) == 1) is is_found


def test_torn_shards_of_a_result_are_found_by_verify(model: Path, tmp_path: Path) -> None:
    run(Locations(source=str(model), destination=str(tmp_path / "model")), uniform("FP8_DYNAMIC"))
    names = [shard["name"] for shard in json.loads((tmp_path / "model" / "shardmill.json").read_bytes())["shards"]]
    undetected = []
    for variant in range(VARIANTS):
        path = tmp_path / "model" / names[variant % len(names)]
        whole = path.read_bytes()
        write_in_place(path, torn(whole, variant))
        if not any(problem.file == path.name for problem in verify(str(tmp_path / "model"))):
            undetected.append(variant)
        write_in_place(path, whole)
    assert verify(str(tmp_path / "model")) == []
    assert undetected == []
