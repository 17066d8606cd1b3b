"""What was measured, kept as JSON by section, so that a document can be made of several partial runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.measure import Run, middle

Runs = tuple[Run, ...]

CHECKPOINTS: Final = ("llama", "experts")
"""What speed is measured on."""
SECTIONS: Final = ("speed", "memory", "startup", "rerun", "plan", "flow")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """One preset on one checkpoint on one file system."""

    place: str
    """The kind of file system, and whether sources were in the page cache."""
    checkpoint: str
    preset: str
    source_bytes: int
    output_bytes: int
    shards: int
    start: Runs
    """`shardmill run` of a tiny checkpoint."""
    ours: Runs
    theirs: Runs
    workers: int
    """`max_workers` of the reference: of those tried, the quicker."""
    error: str
    """Why there is nothing to compare with; empty if there is."""
    reference: str
    """Versions of the reference; empty without one."""
    floor: Mapping[str, tuple[float, ...]]
    """Seconds by number of threads."""

    @property
    def key(self) -> str:
        """What a newer measurement replaces."""
        return f"{self.place}/{self.checkpoint}/{self.preset}"

    @property
    def processing(self) -> float:
        """Seconds beyond start-up: the median of the whole process less that of a tiny checkpoint."""
        return middle(self.ours) - middle(self.start)

    @property
    def speedup(self) -> float | None:
        """Wall time of the reference over ours."""
        return middle(self.theirs) / middle(self.ours) if self.theirs else None

    @property
    def floor_threads(self) -> str:
        """With how many threads the copy is quicker."""
        return min(self.floor, key=lambda threads: median(self.floor[threads]))

    @property
    def floor_seconds(self) -> float:
        """Median of the quicker copy."""
        return median(self.floor[self.floor_threads])

    @property
    def over_floor(self) -> float:
        """Processing over the copy floor."""
        return self.processing / self.floor_seconds

    @property
    def load(self) -> float:
        """The largest load average before a run."""
        return max(run.load for run in (*self.ours, *self.theirs))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """Peak memory of one preset on one checkpoint."""

    checkpoint: str
    preset: str
    source_bytes: int
    runs: Runs
    bare: Runs
    """A process that has only imported what a run imports."""

    @property
    def key(self) -> str:
        return f"{self.checkpoint}/{self.preset}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRow:
    """One command."""

    what: str
    runs: Runs
    hits: int | None = None
    """Shards found in the store."""
    shards: int | None = None
    source_bytes: int | None = None

    @property
    def key(self) -> str:
        return self.what


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """Planning of one size."""

    preset: str
    shards: int
    tensors: int
    runs: Runs

    @property
    def key(self) -> str:
        return f"{self.preset}/{self.tensors}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRow:
    """The flow and the plain loop on the same tiny shards, in seconds within the process, after a run of one shard."""

    shards: int
    flow: tuple[float, ...]
    loop: tuple[float, ...]

    @property
    def key(self) -> str:
        return str(self.shards)


Row = SpeedRow | MemoryRow | CommandRow | PlanRow | FlowRow
_TYPES: Final[Mapping[str, type[Row]]] = {
    "speed": SpeedRow,
    "memory": MemoryRow,
    "startup": CommandRow,
    "rerun": CommandRow,
    "plan": PlanRow,
    "flow": FlowRow,
}
_RUNS: Final = ("start", "ours", "theirs", "runs", "bare")


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was measured on one machine."""

    machine: Mapping[str, str]
    """What the figures depend on, in words."""
    rows: Mapping[str, tuple[Row, ...]]
    """By section."""


class Archive:
    """One JSON file per section; figures of another machine are never mixed in."""

    def __init__(self, folder: Path, machine: Mapping[str, str]) -> None:
        self._folder = folder
        self._machine = dict(machine)

    def add(self, section: str, row: Row) -> None:
        """Keep a row in place of the one with its key."""
        rows = self._read(section) | {row.key: asdict(row)}
        self._folder.mkdir(parents=True, exist_ok=True)
        document = {"machine": self._machine, "rows": rows}
        self._path(section).write_text(json.dumps(document, indent=1) + "\n")

    def results(self) -> Results:
        """Everything kept so far, in the order in which it was measured."""
        rows = {section: tuple(_row(section, row) for row in self._read(section).values()) for section in SECTIONS}
        return Results(self._machine, rows)

    def _path(self, section: str) -> Path:
        return self._folder / f"{section}.json"

    def _read(self, section: str) -> dict[str, Any]:
        if not self._path(section).exists():
            return {}
        document = json.loads(self._path(section).read_text())
        rows: dict[str, Any] = document["rows"] if document["machine"] == self._machine else {}
        return rows


def _row(section: str, data: Mapping[str, Any]) -> Row:
    runs = {name: tuple(Run(**run) for run in data[name]) for name in _RUNS if name in data}
    seconds = {name: tuple(data[name]) for name in ("flow", "loop") if name in data}
    floor = {"floor": {threads: tuple(found) for threads, found in data["floor"].items()}} if "floor" in data else {}
    return _TYPES[section](**{**data, **runs, **seconds, **floor})
