"""Section `speed`: shardmill, the reference and the copy floor, in turns within one run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Final

from bench import equality, reference
from bench.checkpoints import TOY, Size, Spec, experts, llama, prepare
from bench.lab import Lab, say
from bench.measure import (
    CommandFailed,
    Run,
    cores,
    evict,
    execute,
    file_system,
    middle,
    quantize,
    shards_of,
    versions,
    warm,
)
from bench.results import SpeedRow

_SPECS: Final[Mapping[str, Callable[[Size], Spec]]] = {"llama": llama, "experts": experts}
_FLOOR: Final = Path(__file__).with_name("floor.py")


@dataclass(frozen=True, slots=True)
class _Case:
    """One preset on one checkpoint, and where results of it may lie."""

    preset: str
    source: Path
    tiny: Path
    home: Path
    is_cold: bool

    @contextmanager
    def result(self) -> Iterator[Path]:
        """A place for one result and its store; nothing else is on its way to the disk meanwhile."""
        os.sync()
        (evict if self.is_cold else warm)(shards_of(self.source))
        folder = self.home / "result"
        try:
            folder.mkdir()
            yield folder / "out"
        finally:
            rmtree(folder)


@dataclass(slots=True)
class _Times:
    """What was measured so far."""

    start: list[Run] = field(default_factory=list)
    ours: list[Run] = field(default_factory=list)
    theirs: dict[int, list[Run]] = field(default_factory=dict)
    """By number of workers."""
    floor: dict[int, list[float]] = field(default_factory=dict)
    """By number of threads."""
    error: str = ""

    @property
    def workers(self) -> int:
        """How many workers make the reference quickest; 0 when it did not run."""
        return min(self.theirs, key=lambda count: middle(self.theirs[count]), default=0)


def measure(lab: Lab) -> None:
    """Measure every preset on both checkpoints in every folder."""
    if lab.reference_repeats:
        tiny = lab.checkpoint(replace(llama(TOY), name="float32").as_float32())
        equality.check_reference(tiny, lab.presets, lab.home)
        say(f"llm-compressor stores the same bytes for a float32 source: {', '.join(lab.presets)}")
    for root in lab.roots:
        with _home(lab, root) as home:
            for name in lab.checkpoints:
                big, small = _SPECS[name](lab.size), _SPECS[name](TOY)
                source = prepare(big, home, lab.noise)
                tiny = prepare(replace(small, name=f"{small.name}-toy"), home, lab.noise)
                for preset in lab.presets:
                    lab.keep("speed", _measure_case(lab, big, _Case(preset, source, tiny, home, lab.is_cold)))


@contextmanager
def _home(lab: Lab, root: Path) -> Iterator[Path]:
    """Checkpoints of the folder that is kept stay; those of others go."""
    if root == lab.home:
        yield root
    else:
        with TemporaryDirectory(dir=root, prefix="shardmill-bench-") as folder:
            yield Path(folder)


def _measure_case(lab: Lab, spec: Spec, case: _Case) -> SpeedRow:
    equality.check_kernels(case.tiny, case.preset, case.home)
    sizes = _check_whole(case)
    times = _Times()
    for turn in range(max(lab.repeats, lab.reference_repeats)):
        if turn < lab.repeats:
            _time_floor(case, sizes, times)
            _time_ours(case, times)
        if turn < lab.reference_repeats and not times.error:
            _time_theirs(case, lab.reference_workers if not turn else [times.workers], times)
    place = file_system(case.home) + (", not in the page cache" if case.is_cold else "")
    return SpeedRow(
        place=place,
        checkpoint=spec.name,
        preset=case.preset,
        source_bytes=sum(path.stat().st_size for path in shards_of(case.source)),
        output_bytes=sum(sizes),
        shards=len(sizes),
        start=tuple(times.start),
        ours=tuple(times.ours),
        theirs=tuple(times.theirs.get(times.workers, ())),
        workers=times.workers,
        error=times.error,
        reference=_versions() if times.theirs else "",
        floor={str(threads): tuple(found) for threads, found in times.floor.items()},
    )


@cache
def _versions() -> str:
    found = versions(reference.PYTHON, reference.DISTRIBUTIONS)
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _check_whole(case: _Case) -> list[int]:
    """Let a first result be verified; returns the sizes of its shards."""
    with case.result() as out:
        quantize(case.source, out, case.preset)
        equality.check_whole(out, case.source)
        return [path.stat().st_size for path in shards_of(out)]


def _time_floor(case: _Case, sizes: Sequence[int], times: _Times) -> None:
    pairs = [word for path, size in zip(shards_of(case.source), sizes, strict=True) for word in (path, str(size))]
    for threads in sorted({1, cores()}):
        with case.result() as out:
            done = execute([sys.executable, "-P", _FLOOR, str(threads), out, *pairs])
        times.floor.setdefault(threads, []).append(float(done.stdout))


def _time_ours(case: _Case, times: _Times) -> None:
    with case.result() as out:
        times.start.append(quantize(case.tiny, out, case.preset).run)
    with case.result() as out:
        times.ours.append(quantize(case.source, out, case.preset).run)


def _time_theirs(case: _Case, workers: Sequence[int], times: _Times) -> None:
    failures: list[str] = []
    for count in workers:
        with case.result() as out:
            try:
                done = execute(reference.command(case.source, out, case.preset, count), **reference.ENVIRONMENT)
            except CommandFailed as error:
                failures.append(str(error).strip().splitlines()[-1])
                say(f"llm-compressor fails with {case.preset} and {count} workers: {failures[-1]}")
                continue
            if not times.theirs:
                ours = out.with_name("ours")
                quantize(case.source, ours, case.preset)
                equality.check_names(ours, out, case.preset)
        times.theirs.setdefault(count, []).append(done.run)
    if not times.theirs:
        times.error = failures[-1]
