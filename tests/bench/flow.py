"""Section `flow`: the flow and the plain loop on the same tiny shards, in turns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from bench import equality
from bench.checkpoints import tiny_shards
from bench.lab import Lab
from bench.measure import execute
from bench.results import FlowRow

_SCRIPT: Final = Path(__file__).with_name("convert.py")


def measure(lab: Lab) -> None:
    """Convert many tiny shards both ways."""
    one, many = lab.checkpoint(tiny_shards(1)), lab.checkpoint(tiny_shards(lab.size.flow))
    found: dict[str, list[float]] = {"flow": [], "loop": []}
    for _ in range(lab.repeats):
        for way, seconds in found.items():
            seconds.append(_convert(way, one, many, lab.home))
    lab.keep("flow", FlowRow(shards=lab.size.flow, flow=tuple(found["flow"]), loop=tuple(found["loop"])))


def _convert(way: str, one: Path, many: Path, home: Path) -> float:
    with equality.scratch(home) as folder:
        environment = {
            "DO_NOT_TRACK": "1",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        }
        done = execute([sys.executable, "-P", _SCRIPT, way, one, many, folder], **environment)
    return float(done.stdout.split()[-1])
