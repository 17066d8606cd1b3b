"""`make bench`: what planning costs, as seconds, peak memory and the ratio between two sizes measured in one run.

The checkpoints are headers in front of sparse files: planning never reads a tensor, so none is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

EXPERTS = 64
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Measure:
    """One command, the quickest of a few runs."""

    shards: int
    tensors: int
    seconds: float
    peak_megabytes: float


def write_checkpoint(root: Path, shards: int) -> int:
    """Write the headers of a mixture-of-experts checkpoint, one layer per shard; return the number of tensors."""
    weight_map: dict[str, str] = {}
    for layer in range(shards):
        name = f"model-{layer + 1:05d}-of-{shards:05d}.safetensors"
        table = layer_table(layer)
        begin = 0
        header = {}
        for tensor, shape in table.items():
            size = 2 * shape[0] * shape[1]
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, begin + size]}
            begin += size
        body = json.dumps(header).encode()
        with (root / name).open("wb") as file:
            file.write(len(body).to_bytes(8, "little") + body)
            file.truncate(8 + len(body) + begin)
        weight_map |= dict.fromkeys(table, name)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return len(weight_map)


def layer_table(layer: int) -> dict[str, tuple[int, int]]:
    """Two hundred tensors of one layer."""
    prefix = f"model.layers.{layer}"
    table = {
        f"{prefix}.mlp.experts.{e}.{p}_proj.weight": (768, 2048) for e in range(EXPERTS) for p in ("gate", "up", "down")
    }
    table |= {f"{prefix}.self_attn.{leaf}_proj.weight": (2048, 2048) for leaf in "qkvo"}
    table |= {f"{prefix}.mlp.gate.weight": (EXPERTS, 2048)}
    table |= {f"{prefix}.mlp.shared_expert.{p}_proj.weight": (768, 2048) for p in ("gate", "up", "down")}
    return table


def measure(command: list[str], shards: int, tensors: int) -> Measure:
    """Run a command a few times; wall seconds of the quickest and its peak resident memory."""
    found: list[tuple[float, float]] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed with status {status}")
        found.append((time.perf_counter() - started, usage.ru_maxrss / 1000))
    seconds, peak = min(found)
    return Measure(shards, tensors, seconds, peak)


def measure_plan(shards: int, scheme: str) -> Measure:
    """`shardmill plan` on a synthetic checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = write_checkpoint(Path(folder), shards)
        return measure([sys.executable, "-m", "shardmill.cli", "plan", folder, "--scheme", scheme], shards, tensors)


def main() -> None:
    """Print one table."""
    base = measure([sys.executable, "-c", "import shardmill.cli"], 0, 0)
    print(f"machine: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; quickest of {REPEATS} runs")
    print(f"import alone: {base.seconds:.2f} s, {base.peak_megabytes:.0f} MB")
    print("| scheme | shards | tensors | seconds | peak MB | µs per tensor | seconds over half the size |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for scheme in ("FP8_DYNAMIC", "NVFP4A16"):
        half: Measure | None = None
        for shards in (500, 1000):
            found = measure_plan(shards, scheme)
            each = 1e6 * (found.seconds - base.seconds) / found.tensors
            ratio = f"{found.seconds / half.seconds:.2f}" if half else ""
            wall, peak = f"{found.seconds:.2f}", f"{found.peak_megabytes:.0f}"
            print(f"| {scheme} | {shards} | {found.tensors} | {wall} | {peak} | {each:.0f} | {ratio} |")
            half = found


if __name__ == "__main__":
    main()
