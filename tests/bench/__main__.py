"""`make bench`: measure shardmill beside llm-compressor and the copy floor, and write docs/benchmarks.md.

    python tests/bench [--only speed,plan] [--presets W4A16] [--work DIR] [--skip-reference] [--render] ...

Every row is kept as JSON when it is measured, so a run may be stopped, and runs of parts add up.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import commands, document, equality, flow, memory, picture, reference, speed, targets
from bench.checkpoints import FULL, TOY, Noise
from bench.lab import Lab, say
from bench.measure import CommandFailed, cores, machine, versions
from bench.results import CHECKPOINTS, SECTIONS, Archive
from shardmill.core.scheme import PRESETS

ROOT: Final = reference.ROOT
_DISTRIBUTIONS: Final = ("shardmill", "numba", "numpy", "torch")
MEASURES: Final[Mapping[str, Callable[[Lab], None]]] = {
    "speed": speed.measure,
    "memory": memory.measure,
    "startup": commands.measure_startup,
    "rerun": commands.measure_rerun,
    "plan": commands.measure_plan,
    "flow": flow.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for and write the page; returns the exit code."""
    chosen = _parse(arguments)
    archive = Archive(chosen.results, _described())
    try:
        if not chosen.render:
            with _home(chosen.work) as home:
                lab = _lab(chosen, home, archive)
                for section in chosen.only:
                    MEASURES[section](lab)
    except (CommandFailed, equality.WrongResult) as error:
        say(f"stopped: {error}")
        return 1
    finally:
        _write(archive, chosen.document, has_picture=chosen.has_picture)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench BENCH=...", description=__doc__, allow_abbrev=False)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--only", type=_choices(SECTIONS), default=SECTIONS, metavar="SECTION,...")
    what.add_argument("--presets", type=_choices(tuple(PRESETS)), default=targets.PRESETS, metavar="PRESET,...")
    what.add_argument("--checkpoints", type=_choices(CHECKPOINTS), default=CHECKPOINTS, metavar="NAME,...")
    what.add_argument("--toy", action="store_true", help="tiny checkpoints: shows that everything runs")
    what.add_argument("--render", action="store_true", help="measure nothing, write the page from what was kept")
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=_positive, default=3, metavar="N")
    how.add_argument("--reference-repeats", type=_positive, default=3, metavar="N")
    how.add_argument("--reference-workers", type=_numbers, default=sorted({1, cores()}), metavar="N,...")
    how.add_argument("--skip-reference", action="store_true")
    how.add_argument("--cold", action="store_true", help="ask the kernel to forget source files before each run")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--work", type=Path, metavar="DIR", help="folder for checkpoints, kept (default: a temporary one)"
    )
    root = "folder on whose file system speed is measured, such as a RAM disk; may be repeated (default: --work)"
    where.add_argument("--root", type=Path, action="append", metavar="DIR", help=root)
    where.add_argument("--results", type=Path, metavar="DIR", help="what was measured (build/bench)")
    where.add_argument("--document", type=Path, metavar="FILE", help="the page (docs/benchmarks.md)")
    where.add_argument("--no-picture", dest="has_picture", action="store_false", help="do not draw beside the page")
    chosen = parser.parse_args(arguments)
    toy = ROOT / "build" / "bench-toy"
    chosen.results = chosen.results or (toy if chosen.toy else ROOT / "build" / "bench")
    chosen.document = chosen.document or (toy if chosen.toy else ROOT / "docs") / "benchmarks.md"
    return chosen


def _choices(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def words(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; known: {', '.join(known)}")
        return found

    return words


def _numbers(text: str) -> list[int]:
    return [_positive(word) for word in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return int(text)


def _described() -> dict[str, str]:
    found = versions(Path(sys.executable), _DISTRIBUTIONS)
    return machine() | {"versions": ", ".join(f"{name} {number}" for name, number in found.items())}


@contextmanager
def _home(work: Path | None) -> Iterator[Path]:
    """The folder for checkpoints: the one named, or one on disk that is removed at the end."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work.resolve()
    else:
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="shardmill-bench-") as folder:
            yield Path(folder)


def _lab(chosen: argparse.Namespace, home: Path, archive: Archive) -> Lab:
    repeats = 0 if chosen.skip_reference else chosen.reference_repeats
    if repeats and "speed" in chosen.only and not reference.PYTHON.exists():
        raise SystemExit(f"{reference.PYTHON} does not exist; run `make .venv-reference/stamp`, or --skip-reference")
    return Lab(
        size=TOY if chosen.toy else FULL,
        home=home,
        roots=[root.resolve() for root in chosen.root or [home]],
        checkpoints=chosen.checkpoints,
        presets=chosen.presets,
        repeats=chosen.repeats,
        reference_repeats=repeats,
        reference_workers=chosen.reference_workers,
        is_cold=chosen.cold,
        noise=Noise(),
        archive=archive,
    )


def _write(archive: Archive, page: Path, *, has_picture: bool) -> None:
    results, image = archive.results(), page.with_suffix(".svg")
    page.parent.mkdir(parents=True, exist_ok=True)
    is_drawn = has_picture and picture.draw(results, image)
    page.write_text(document.render(results, image.name if is_drawn else ""))
    say(f"wrote {page}")


if __name__ == "__main__":
    sys.exit(main())
