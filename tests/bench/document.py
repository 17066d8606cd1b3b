"""The Markdown of docs/benchmarks.md, made of what was kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Final, cast

from bench import targets
from bench.measure import middle
from bench.results import CommandRow, FlowRow, MemoryRow, PlanRow, Results, Row, Runs, SpeedRow

TITLES: Final[Mapping[str, str]] = {
    "llama": "Dense layers of Llama's shape",
    "experts": "One layer of a mixture of experts",
}
HEAD: Final = """# Benchmarks

Written by `make bench`; `make bench BENCH='--only speed --presets W4A16'` measures a part, and `BENCH=--render` writes
this page anew from what was measured. Timings are medians. Processes are measured from outside: wall time from start to
end, processor time (user and system) and largest resident size as the kernel counts them. GB and MB are powers of ten.

"""
SPEED: Final = """## Speed

`shardmill run SRC DST --scheme PRESET --device cpu`, everything else as it comes: a new store each time, digests of
source and result, error statistics, results flushed to the device. The reference is llm-compressor's
`model_free_ptq(device="cpu")` with the `max_workers` of the second table: the quicker of those that were tried, which
are 1, its default, and one per core unless `--reference-workers` says otherwise. It does not flush what it writes, and
its ratio is not corrected for that.

*Processing* is the wall time less start-up, which is that of the same command on a checkpoint of a few hundred KB. The
*copy floor* reads every source byte once and writes as many bytes as the result has, into as many files, preallocated
and flushed, in 8 MiB blocks, with one thread and with one per core: the quicker counts.

All take turns, floor, start-up, shardmill, reference; before each, pending writes are flushed and the source is
{cache}. Values are random normal bf16.

Before anything is timed, compiled and reference kernels have to write the same bytes for a small checkpoint,
llm-compressor has to store the same bytes for a small float32 one, and `shardmill verify --against` has to pass on the
whole result. Names, dtypes and shapes of both whole results have to be the same.

"""
MEMORY: Final = """## Memory

Peak resident size of `shardmill run` with a worker per core, and what of it is above a process that has only imported
the modules of such a run.

"""
STARTUP: Final = """## Start-up

On a checkpoint of a few hundred KB, preset FP8_DYNAMIC. Kernels are compiled once per machine and kept by numba; the
last row is such a first run.

"""
RERUN: Final = """## Running again

*Read* are the bytes of all read calls of the process, Python's own modules included.

"""
PLAN: Final = """## Planning

`shardmill plan` on headers of a mixture of experts, a thousand tensors in each shard. For 1,000,000 tensors the target
is {seconds} s and {gigabytes:.0f} GB.

"""
FLOW: Final = """## What the flow adds

The Prefect flow and the plain loop on the same tiny shards, timed within the process after a run of one shard, for
which Prefect's server has been started.

"""


def render(results: Results, picture: str = "") -> str:
    """Write the page; sections without figures are left out.

    Args:
        results: What was measured.
        picture: File name of the picture, if there is one.
    """
    parts = [HEAD, *_machine(results), f"\n![Figures of this page]({picture})\n\n" if picture else "\n"]
    for section, write in _WRITERS.items():
        if rows := results.rows.get(section):
            parts += write(rows)
    return "".join(parts).rstrip("\n") + "\n"


def _machine(results: Results) -> Iterator[str]:
    yield from _table(("machine", ""), results.machine.items())
    references = {row.reference: None for row in results.rows.get("speed", ()) if isinstance(row, SpeedRow)}
    for text in filter(None, references):
        yield f"| reference | {text} |\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table whose first column is text and whose others are numbers."""
    yield f"| {' | '.join(head)} |\n"
    yield f"| --- |{' ---: |' * (len(head) - 1)}\n"
    for row in rows:
        yield f"| {' | '.join(row)} |\n"


def _speed(rows: Sequence[SpeedRow]) -> Iterator[str]:
    yield SPEED.format(cache=" or ".join(sorted({_cache(row) for row in rows})))
    for (place, checkpoint), group in _grouped(rows):
        first = group[0]
        yield f"### {TITLES[checkpoint]}, {place}\n\n"
        yield f"{_count(first.shards, 'shard')}, {first.source_bytes / 1e9:.2f} GB.\n\n"
        yield from _table(
            (
                "preset",
                "shardmill s",
                "llm-compressor s",
                "ratio",
                "target",
                "processing s",
                "copy floor s",
                "ratio",
                "target",
            ),
            map(_speed_cells, group),
        )
        yield "\n"
        yield from _table(
            (
                "preset",
                "source GB/s",
                "processor s",
                "theirs",
                "peak MB",
                "theirs",
                "their workers",
                "floor's threads",
                "runs",
                "load",
            ),
            map(_cost_cells, group),
        )
        yield from (f"\nllm-compressor fails with {row.preset}: {row.error}\n" for row in group if row.error)
        yield "\n"


def _cache(row: SpeedRow) -> str:
    return "dropped from the page cache" if "not in the page cache" in row.place else "read into the page cache"


def _grouped(rows: Sequence[SpeedRow]) -> Iterator[tuple[tuple[str, str], list[SpeedRow]]]:
    """Tables in the order of places, rows in the order of the targets."""
    order = {preset: number for number, preset in enumerate(targets.PRESETS)}
    by_table = sorted(rows, key=lambda row: (row.place, row.checkpoint != "llama", order.get(row.preset, len(order))))
    for key, group in groupby(by_table, key=lambda row: (row.place, row.checkpoint)):
        yield key, list(group)


def _speed_cells(row: SpeedRow) -> tuple[str, ...]:
    theirs, ratio, target = "-", "-", "-"
    if row.speedup is not None:
        least = targets.SPEEDUP.get(row.preset)
        theirs, ratio = f"{middle(row.theirs):.1f}", f"{row.speedup:.1f}"
        target = f"≥ {least} {targets.verdict(is_reached=row.speedup >= least)}" if least else "-"
    most = targets.over_floor(row.preset)
    return (
        row.preset,
        f"{middle(row.ours):.2f}",
        theirs,
        ratio,
        target,
        f"{row.processing:.2f}",
        f"{row.floor_seconds:.2f}",
        f"{row.over_floor:.2f}",
        f"≤ {most} {targets.verdict(is_reached=row.over_floor <= most)}",
    )


def _cost_cells(row: SpeedRow) -> tuple[str, ...]:
    return (
        row.preset,
        f"{row.source_bytes / middle(row.ours) / 1e9:.2f}",
        f"{middle(row.ours, 'cpu_seconds'):.1f}",
        f"{middle(row.theirs, 'cpu_seconds'):.1f}" if row.theirs else "-",
        _megabytes(middle(row.ours, "peak_bytes")),
        _megabytes(middle(row.theirs, "peak_bytes")) if row.theirs else "-",
        str(row.workers or "-"),
        row.floor_threads,
        f"{len(row.ours)} and {len(row.theirs)}",
        f"{row.load:.1f}",
    )


def _memory(rows: Sequence[MemoryRow]) -> Iterator[str]:
    yield MEMORY
    yield from _table(
        ("checkpoint", "preset", "source GB", "peak MB", "imports MB", "above imports MB"), map(_memory_cells, rows)
    )
    yield "\n"


def _memory_cells(row: MemoryRow) -> tuple[str, ...]:
    peak, bare = middle(row.runs, "peak_bytes"), middle(row.bare, "peak_bytes")
    size = f"{row.source_bytes / 1e9:.2f}"
    return row.checkpoint, row.preset, size, _megabytes(peak), _megabytes(bare), _megabytes(peak - bare)


def _startup(rows: Sequence[CommandRow]) -> Iterator[str]:
    yield STARTUP
    cells = ((f"`{row.what}`" if "," not in row.what else row.what, *_run_cells(row.runs)) for row in rows)
    yield from _table(("command", "seconds", "processor s", "peak MB", "load"), cells)
    yield "\n"


def _run_cells(runs: Runs) -> tuple[str, ...]:
    load = max(run.load for run in runs)
    seconds, cpu = middle(runs), middle(runs, "cpu_seconds")
    return f"{seconds:.2f}", f"{cpu:.2f}", _megabytes(middle(runs, "peak_bytes")), f"{load:.1f}"


def _rerun(rows: Sequence[CommandRow]) -> Iterator[str]:
    yield RERUN
    first = rows[0]
    yield f"{_count(first.shards or 0, 'tiny shard')} with {(first.source_bytes or 0) / 1e6:.1f} MB of tensors.\n\n"
    cells = (
        (row.what, f"{row.hits} of {row.shards}", *_run_cells(row.runs), f"{middle(row.runs, 'read_bytes') / 1e6:.1f}")
        for row in rows
    )
    yield from _table(("", "found in the store", "seconds", "processor s", "peak MB", "load", "read MB"), cells)
    yield "\n"


def _plan(rows: Sequence[PlanRow]) -> Iterator[str]:
    yield PLAN.format(seconds=targets.PLAN_SECONDS, gigabytes=targets.PLAN_BYTES / 1e9)
    ordered = sorted(rows, key=lambda row: (row.preset, row.tensors))
    head = ("preset", "shards", "tensors", "seconds", "processor s", "peak MB", "load", "µs per tensor")
    cells = (
        (
            row.preset,
            f"{row.shards:,}",
            f"{row.tensors:,}",
            *_run_cells(row.runs),
            f"{1e6 * middle(row.runs) / row.tensors:.1f}",
        )
        for row in ordered
    )
    yield from _table(head, cells)
    yield "\n"


def _flow(rows: Sequence[FlowRow]) -> Iterator[str]:
    yield FLOW
    cells = (
        (
            _count(row.shards, "shard"),
            f"{median(row.flow):.1f}",
            f"{median(row.loop):.1f}",
            f"{1000 * (median(row.flow) - median(row.loop)) / row.shards:.0f}",
        )
        for row in rows
    )
    yield from _table(("", "flow s", "loop s", "ms more per shard"), cells)
    yield "\n"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_WRITERS: Final[Mapping[str, Callable[[Sequence[Row]], Iterator[str]]]] = {
    "speed": lambda rows: _speed(cast("Sequence[SpeedRow]", rows)),
    "memory": lambda rows: _memory(cast("Sequence[MemoryRow]", rows)),
    "startup": lambda rows: _startup(cast("Sequence[CommandRow]", rows)),
    "rerun": lambda rows: _rerun(cast("Sequence[CommandRow]", rows)),
    "plan": lambda rows: _plan(cast("Sequence[PlanRow]", rows)),
    "flow": lambda rows: _flow(cast("Sequence[FlowRow]", rows)),
}
