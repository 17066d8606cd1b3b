"""Count the bytes in which the kernel and compressed-tensors differ, for every preset and source dtype.

    python tests/oracle/oracle_table.py [--write docs/oracle.md]

Exits with 1 when a byte differs and no entry of `EXPLAINED` says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from kernels.oracle import INPUTS, SOURCES, actual, differing_bytes, expected, octets, sample
from shardmill.core.scheme import PRESETS

EXPLAINED: Final[Mapping[tuple[str, str], str]] = {}
"""The intended divergence, such as `D9`, by preset and source dtype; none so far."""

SHAPES: Final = ((40, 256), (256, 1024))
HEAD: Final = """# Bytes against compressed-tensors

For every preset and source dtype: stored bytes (codes, scales, zero points, shapes, global scales) that were compared
with compressed-tensors' own, and how many differ. Its scales come from `calculate_qparams` and `generate_gparam`, its
codes from the compressor of the format; both get float32 weights, and scales are rounded once, to the dtype in which
they are stored.

Written by `python tests/oracle/oracle_table.py --write docs/oracle.md`.
Inputs: {inputs}; shapes {shapes}.
Versions: {versions}.

"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    preset: str
    source: str
    compared: int
    """Bytes."""
    differing: Mapping[str, int]
    """Bytes by param name."""

    @property
    def reason(self) -> str:
        return EXPLAINED.get((self.preset, self.source), "")

    @property
    def is_unexplained(self) -> bool:
        return bool(self.differing) and not self.reason

    def __str__(self) -> str:
        names = ", ".join(f"{name} {count}" for name, count in self.differing.items())
        found = f"{sum(self.differing.values())}{f' ({names})' if names else ''}"
        return f"| {self.preset} | {self.source} | {self.compared:,} | {found} | {self.reason or '-'} |"


def compare(preset: str, source: str) -> Row:
    compared, differing = 0, dict[str, int]()
    for weight in (sample(kind, SOURCES[source], shape) for kind in INPUTS for shape in SHAPES):
        theirs = expected(PRESETS[preset], weight)
        compared += sum(octets(tensor).numel() for tensor in theirs.values())
        for name, count in differing_bytes(actual(PRESETS[preset], weight), theirs).items():
            differing[name] = differing.get(name, 0) + count
    return Row(preset=preset, source=source, compared=compared, differing=differing)


def table(rows: Iterable[Row]) -> Iterator[str]:
    yield "| preset | source | bytes compared | bytes that differ | explained by |"
    yield "| --- | --- | ---: | ---: | --- |"
    yield from map(str, rows)


def head() -> str:
    names = ("compressed-tensors", "torch")
    return HEAD.format(
        inputs=", ".join(INPUTS),
        shapes=" and ".join(f"{rows} x {cols}" for rows, cols in SHAPES),
        versions=", ".join(f"{name} {version(name)}" for name in names),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare stored bytes with compressed-tensors, preset by preset.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table, as Markdown")
    target = parser.parse_args().write
    with torch.no_grad():
        rows = [compare(preset, source) for preset in PRESETS for source in SOURCES]
    text = "\n".join(table(rows)) + "\n"
    sys.stdout.write(text)
    if target is not None:
        target.write_text(head() + text)
    unexplained = [row for row in rows if row.is_unexplained]
    sys.stderr.writelines(f"{row.preset} {row.source}: bytes differ and nothing explains it\n" for row in unexplained)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
