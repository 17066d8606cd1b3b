"""Many conversions in one process leave nothing behind: no file, no descriptor, no thread, no memory."""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
import threading
from pathlib import Path
from statistics import median

import pytest

import checkpoints
from shardmill.core.recipe import uniform
from shardmill.errors import ShardFailures
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations

SCHEMES = ("FP8_DYNAMIC", "NVFP4A16", "W4A16_ASYM", "MXFP8A16")


def resident_bytes() -> int:
    """Anonymous memory of this process; pages of mapped files come and go with the page cache."""
    gc.collect()
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def convert_once(home: Path, number: int) -> None:
    """A conversion with a store of its own; every tenth is of a checkpoint with a NaN and fails."""
    source = home / ("bad" if number % 10 == 9 else "source")
    place = home / "work"
    places = Locations(source=str(source), destination=str(place / "result"))
    recipe = uniform(SCHEMES[number % len(SCHEMES)])
    if source.name == "bad":
        with pytest.raises(ShardFailures):
            run(places, recipe, RunOptions(device="cpu", workers=2))
        left = {path.name for path in place.iterdir()}
        assert left <= {".shardmill"}
    else:
        run(places, recipe, RunOptions(device="cpu", workers=2))
        assert {path.name for path in place.iterdir()} == {".shardmill", "result"}
    hidden = [path for path in place.rglob(".*") if path.name != ".shardmill"]
    assert hidden == []
    shutil.rmtree(place)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tensors = checkpoints.llama(layers=1)
    checkpoints.write(tmp_path / "source", checkpoints.deal(tensors, 3))
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    checkpoints.write(tmp_path / "bad", checkpoints.deal(tensors, 3))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def test_conversions_leave_no_file_descriptor_or_thread(home: Path) -> None:
    convert_once(home, 0)
    convert_once(home, 9)
    before = descriptors(), threading.active_count()
    for number in range(2, 12):
        convert_once(home, number)
    assert (descriptors(), threading.active_count()) == before
    assert list((home / "temporary").iterdir()) == []


@pytest.mark.slow
def test_500_conversions_take_no_more_memory_than_100(home: Path) -> None:
    early, late, before = list[int](), list[int](), (0, 0)
    for number in range(500):
        convert_once(home, number)
        if 80 <= number < 120 or number >= 460:  # one alone tells which threads were at work together
            (early if number < 120 else late).append(resident_bytes())
        if number == 99:
            before = descriptors(), threading.active_count()
    assert (descriptors(), threading.active_count()) == before
    assert list((home / "temporary").iterdir()) == []
    print(f"anonymous memory after 100 conversions {median(early) / 1e6:.1f} MB, after 500 {median(late) / 1e6:.1f} MB")
    assert median(late) < 1.05 * median(early)
