"""What one core quantizes per second: the compiled kernels and the reference kernels, in turns and in one process.

    python tests/bench/kernels.py [--dtype BF16] [--rows 4096] [--cols 4096] [--repeats 5] [PRESET ...]

Rates count source bytes and are those of the quickest repeat, in processor time, so that a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from shardmill.core.dtypes import scale_dtype_for
from shardmill.core.scheme import PRESETS, Scheme
from shardmill.kernels import cpu, reference

DEFAULT = [
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "W8A8",
    "W2A16",
    "W3A16",
    "W4A16",
    "W8A16",
    "W4A16_ASYM",
    "NVFP4A16",
    "MXFP4A16",
    "MXFP8A16",
]


def quickest(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of the quickest repeat of each call, taken in turns; one call before warms up or compiles."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(repeats):
        for number, call in enumerate(calls):
            started = time.thread_time()
            call()
            best[number] = min(best[number], time.thread_time() - started)
    return best


def measure(scheme: Scheme, weight: torch.Tensor, dtype: str, repeats: int) -> tuple[float, float]:
    """Seconds that the compiled kernels and the reference kernels take for one row block."""
    bits = cpu.from_buffer(reference.to_bytes(weight), dtype, tuple(weight.shape))
    workspace, whole, scales = cpu.Workspace(), reference.measure(weight), scale_dtype_for(dtype)
    args, form = scheme.weights, scheme.format
    fast, slow = quickest(
        [
            lambda: cpu.encode(bits, dtype, args, format=form, scale_dtype=scales, whole=whole, workspace=workspace),
            lambda: reference.encode(weight, args, format=form, scale_dtype=scales, whole=whole),
        ],
        repeats,
    )
    return fast, slow


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the kernels on one core.")
    parser.add_argument("presets", nargs="*", default=DEFAULT, metavar="PRESET")
    parser.add_argument("--dtype", default="BF16", choices=["BF16", "F16", "F32"])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(options.rows, options.cols, generator=torch.Generator().manual_seed(1)) * 0.02
    weight = weight.to(reference.DTYPES[options.dtype])
    size = weight.numel() * weight.element_size() / 1e9
    print(f"[{options.rows}, {options.cols}] {options.dtype}, one core")
    print(f"{'preset':<12} {'cpu GB/s':>9} {'reference GB/s':>15} {'ratio':>6}")
    for name in options.presets:
        fast, slow = measure(PRESETS[name], weight, options.dtype, options.repeats)
        print(f"{name:<12} {size / fast:>9.2f} {size / slow:>15.3f} {slow / fast:>6.1f}")


if __name__ == "__main__":
    main()
