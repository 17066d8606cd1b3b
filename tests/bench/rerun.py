"""What a run costs that has nothing to do, per shard: the plain loop and the flow, interleaved in one process.

    rerun.py [shards] [tensors per shard]

`cold` computes every shard of a tiny checkpoint; `hits` publishes from a complete store, and once more with what the
flow recorded by then; `done` finds the destination finished. The flow talks to a server of its own, which works on
after the flow has ended; each figure is taken when that server is at rest.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
FRESH_SECONDS = 2.2
"""Files younger than two seconds are not remembered."""
RESTING_SECONDS = 0.1
"""CPU that a server at rest uses in a second, at most."""


def write_checkpoint(root: Path, shards: int, tensors: int) -> Path:
    """Write a checkpoint of 128 x 64 weights, all of them one."""
    root.mkdir()
    data = b"\x80\x3f" * (64 * 128)
    weight_map: dict[str, str] = {}
    for layer in range(shards):
        name = f"model-{layer + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"model.layers.{layer}.mlp.experts.{n}.up_proj.weight" for n in range(tensors)]
        header = {
            tensor: {"dtype": "BF16", "shape": [64, 128], "data_offsets": [n * len(data), (n + 1) * len(data)]}
            for n, tensor in enumerate(names)
        }
        body = json.dumps(header).encode()
        body += b" " * (-len(body) % 8)
        (root / name).write_bytes(len(body).to_bytes(8, "little") + body + data * tensors)
        weight_map |= dict.fromkeys(names, name)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return root


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def server_seconds() -> float:
    """CPU seconds of the processes that this one has started and that are alive."""
    found = 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def settle() -> float:
    """Wait until the server is at rest; returns the CPU seconds that it has used so far."""
    before = server_seconds()
    while True:
        time.sleep(1.0)
        after = server_seconds()
        if after - before < RESTING_SECONDS:
            return after
        before = after


def plain(source: Path, destination: Path) -> Callable[[], object]:
    """The plain loop."""
    from shardmill.core.recipe import uniform
    from shardmill.stages.pipeline import RunOptions, run
    from shardmill.stages.plan import Locations

    locations = Locations(source=str(source), destination=str(destination))
    return lambda: run(locations, uniform("FP8_DYNAMIC"), RunOptions(device="cpu"))


def flow(source: Path, destination: Path) -> Callable[[], object]:
    """The flow."""
    from shardmill.flows.parameters import QuantizeRequest
    from shardmill.flows.quantize_checkpoint import quantize_checkpoint

    request = QuantizeRequest.model_validate(
        {"source": str(source), "destination": str(destination), "device": "cpu", "scheme": "FP8_DYNAMIC"}
    )
    return lambda: quantize_checkpoint(request)


def main() -> None:
    """Print one table."""
    shards, tensors = (int(n) for n in (*sys.argv[1:], *("500", "4")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home = Path(folder)
        os.environ["PREFECT_HOME"] = str(home / "prefect")
        from prefect.settings import (
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
            PREFECT_LOCAL_STORAGE_PATH,
            PREFECT_LOGGING_LEVEL,
            temporary_settings,
        )
        from prefect.testing.utilities import prefect_test_harness

        stack.enter_context(prefect_test_harness(server_startup_timeout=120))
        stack.enter_context(
            temporary_settings(
                {
                    PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
                    PREFECT_LOGGING_LEVEL: "ERROR",
                    PREFECT_LOCAL_STORAGE_PATH: home / "records",
                }
            )
        )
        logging.getLogger("prefect").setLevel(logging.ERROR)
        source = write_checkpoint(home / "source", shards, tensors)
        warm = write_checkpoint(home / "warm", 2, 1)
        time.sleep(FRESH_SECONDS)
        plain(warm, home / "warm-plain" / "out")()
        flow(warm, home / "warm-flow" / "out")()
        print(f"{shards} shards of {tensors} tensors, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print("| case | plain s | CPU s | flow s | CPU s | more ms per shard | more CPU ms | server CPU ms |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for case, name in (("cold", "1"), ("hits", "2"), ("hits again", "3"), ("done", "3")):
            served = settle()
            loop = timed(plain(source, home / "plain" / name))
            flown = timed(flow(source, home / "flow" / name))
            more = [1000 * (b - a) / shards for a, b in zip(loop, flown, strict=True)]
            more.append(1000 * (settle() - served) / shards)
            figures = [f"{value:.2f}" for value in (*loop, *flown)] + [f"{value:.1f}" for value in more]
            print(f"| {case} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
