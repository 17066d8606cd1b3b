"""What it saves to convert by several schemes from one read, beside one run after the other.

    python tests/bench/several.py [--source FOLDER] [--schemes FP8_DYNAMIC,W4A16] [--repeats 3] [--rate MB/S]

Without a source a checkpoint of noise is made. `--rate` bounds what is read of the source per second, all runs
together, as a network or a cold disk does; without it the page cache holds the source, and reading costs little.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median


def bound(rate: float) -> None:
    """Let all reads of local files together take as long as at so many bytes per second."""
    from shardmill.storage.local import RangeReader

    read_into, lock, free = RangeReader.read_into, threading.Lock(), [0.0]

    def slow(reader: RangeReader, offset: int, view: memoryview) -> None:
        with lock:
            free[0] = max(free[0], time.monotonic()) + len(view) / rate
            until = free[0]
        read_into(reader, offset, view)
        time.sleep(max(0.0, until - time.monotonic()))

    RangeReader.read_into = slow  # type: ignore[assignment,method-assign]  # the disk is made slow


def convert(source: Path, home: Path, schemes: Sequence[str], *, is_together: bool) -> float:
    """Convert by all schemes; returns wall seconds."""
    from shardmill.core.recipe import uniform
    from shardmill.stages.pipeline import RunOptions, RunResult, run
    from shardmill.stages.plan import Locations
    from shardmill.stages.several import prepare_several, run_several

    options = RunOptions(device="cpu")
    requests = [
        (Locations(source=str(source), destination=str(home / scheme), store=str(home / "store" / scheme)), recipe)
        for scheme in schemes
        for recipe in [uniform(scheme)]
    ]
    started = time.perf_counter()
    if is_together:
        results = run_several(prepare_several(requests, options), options)
        assert all(isinstance(result, RunResult) for result in results), results
    else:
        for locations, recipe in requests:
            run(locations, recipe, options)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare one read for several schemes with one run for each.")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--schemes", default="FP8_DYNAMIC,W4A16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.0, metavar="MB/S")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    schemes = options.schemes.split(",")
    with tempfile.TemporaryDirectory(prefix="shardmill-bench-") as folder:
        home = Path(folder)
        source = options.source or noise(home)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        if options.rate:
            bound(options.rate * 1e6)
        found: dict[bool, list[float]] = {True: [], False: []}
        for repeat in range(options.repeats + 1):
            for is_together, seconds in found.items():
                took = convert(source, home / f"{repeat}-{is_together}", schemes, is_together=is_together)
                if repeat:  # the first compiles and warms up
                    seconds.append(took)
    alone, together = median(found[False]), median(found[True])
    limit = f"at most {options.rate:.0f} MB/s" if options.rate else "page cache"
    print(f"{', '.join(schemes)} of {size / 1e9:.2f} GB, {limit}, {os.cpu_count()} cores")
    print(f"one after the other {alone:.2f} s, from one read {together:.2f} s, ratio {together / alone:.2f}")


def noise(home: Path) -> Path:
    """A small checkpoint of noise."""
    from bench.checkpoints import FULL, Noise, llama, prepare

    return prepare(llama(replace(FULL, hidden=2048, kv=512, width=5632)), home, Noise())


if __name__ == "__main__":
    main()
