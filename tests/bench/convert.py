"""One conversion of the section `flow`, in a process of its own.

    python convert.py flow|loop WARM_UP SOURCE FOLDER

Prints the seconds that one conversion took, after another one of a single shard, for which the server was started.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

PRESET: Final = "FP8_DYNAMIC"


def run_loop(source: Path, destination: Path) -> None:
    """Convert with the plain loop."""
    from shardmill.core.recipe import uniform
    from shardmill.stages.pipeline import RunOptions, run
    from shardmill.stages.plan import Locations

    run(Locations(source=str(source), destination=str(destination)), uniform(PRESET), RunOptions(device="cpu"))


def run_flow(source: Path, destination: Path) -> None:
    """Convert with the flow."""
    from shardmill.flows.parameters import QuantizeRequest
    from shardmill.flows.quantize_checkpoint import quantize_checkpoint

    quantize_checkpoint(QuantizeRequest(source=str(source), destination=str(destination), scheme=PRESET, device="cpu"))


def main() -> None:
    way, warm_up, source, folder = sys.argv[1:]
    convert = {"flow": run_flow, "loop": run_loop}[way]
    convert(Path(warm_up), Path(folder, "warm-up", "out"))
    started = time.perf_counter()
    convert(Path(source), Path(folder, "measured", "out"))
    sys.stdout.write(f"seconds {time.perf_counter() - started}\n")


if __name__ == "__main__":
    main()
