"""What each executor costs per shard, beside the plain loop on the same tiny shards.

    python tests/bench/executors.py [--shards 200] [--repeats 3] [--workers 2]

Each way converts the same checkpoint into a store of its own, in turns, after a short conversion that starts what
has to be started; the cluster that a run starts for itself is what the last row pays for. Overhead is the median
time above the median of the plain loop, per shard.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

PRESET = "FP8_DYNAMIC"
WARM_UP = 16
"""Shards of the conversion before, so that every worker has loaded what it needs."""
Convert = Callable[[Path, Path], object]


def ways(workers: int, scheduler: str) -> dict[str, Convert]:
    """Each executor by its name for people."""
    from shardmill.core.recipe import uniform
    from shardmill.flows.parameters import QuantizeRequest
    from shardmill.flows.quantize_checkpoint import quantize_checkpoint
    from shardmill.stages.pipeline import RunOptions, run
    from shardmill.stages.plan import Locations

    def loop(source: Path, destination: Path) -> object:
        options = RunOptions(device="cpu", workers=workers)
        return run(Locations(source=str(source), destination=str(destination)), uniform(PRESET), options)

    def flow(executor: str, address: str | None = None) -> Convert:
        def convert(source: Path, destination: Path) -> object:
            request = {"source": str(source), "destination": str(destination), "scheme": PRESET, "device": "cpu"}
            chosen = {"workers": workers, "executor": executor, "dask_scheduler": address}
            return quantize_checkpoint(QuantizeRequest.model_validate(request | chosen))

        return convert

    return {
        "plain loop": loop,
        "threads": flow("threads"),
        "dask, running scheduler": flow("dask", scheduler),
        "dask, own cluster": flow("dask"),
    }


def measure(converts: dict[str, Convert], home: Path, shards: int, repeats: int) -> dict[str, list[float]]:
    """Wall seconds of every repeat of every way, taken in turns."""
    from bench.checkpoints import Noise, prepare, tiny_shards

    few, many = (prepare(tiny_shards(count), home, Noise()) for count in (WARM_UP, shards))
    found: dict[str, list[float]] = {name: [] for name in converts}
    for repeat in range(repeats + 1):
        for number, (name, convert) in enumerate(converts.items()):
            started = time.perf_counter()
            convert(many if repeat else few, home / f"{repeat}-{number}" / "result")
            if repeat:
                found[name].append(time.perf_counter() - started)
    return found


def table(found: dict[str, list[float]], shards: int) -> str:
    """The figures as a Markdown table."""
    plain = median(found["plain loop"])
    lines = ["| executor | wall s, median (range) | overhead per shard | ratio |", "| --- | --- | --- | --- |"]
    for name, seconds in found.items():
        wall = median(seconds)
        spread = f"{wall:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        lines.append(f"| {name} | {spread} | {1e3 * (wall - plain) / shards:.1f} ms | {wall / plain:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the executors on tiny shards.")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    with tempfile.TemporaryDirectory(prefix="shardmill-bench-") as folder:
        home = Path(folder)
        os.environ |= {
            "DO_NOT_TRACK": "1",
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_LOGGING_LEVEL": "ERROR",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        }
        from distributed import LocalCluster

        with LocalCluster(
            n_workers=options.workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0
        ) as cluster:
            found = measure(ways(options.workers, cluster.scheduler_address), home, options.shards, options.repeats)
    print(f"{options.shards} shards of 256 kB, {options.workers} workers, {os.cpu_count()} cores")
    print(table(found, options.shards))


if __name__ == "__main__":
    main()
