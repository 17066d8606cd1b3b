"""What every section needs: sizes, repeats, folders, and where results are kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.checkpoints import Noise, Size, Spec, prepare
from bench.results import Archive, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """One call of the benchmark."""

    size: Size
    home: Path
    """Where checkpoints are kept and results come and go."""
    roots: Sequence[Path]
    """Folders that speed is measured in."""
    checkpoints: Sequence[str]
    """Names of those that speed is measured on."""
    presets: Sequence[str]
    repeats: int
    reference_repeats: int
    """0 leaves the reference out."""
    reference_workers: Sequence[int]
    is_cold: bool
    noise: Noise
    archive: Archive

    def checkpoint(self, spec: Spec) -> Path:
        """The folder of a checkpoint."""
        return prepare(spec, self.home, self.noise)

    def keep(self, section: str, row: Row) -> None:
        """Keep a row, and tell that it is done."""
        self.archive.add(section, row)
        say(f"{section}: {row.key}")


def say(text: str) -> None:
    """Tell what goes on."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
