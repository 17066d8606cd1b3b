"""`shardmill verify`: a finished result is read back, compared with its source, or made again in part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shardmill.cli.arguments import Options
from shardmill.cli.console import Console, print_document, print_result
from shardmill.cli.failures import DONE, FAILED, SCHEMA, count, problem_lines
from shardmill.cli.planning import serving_document
from shardmill.core.summary import PROXY, WORST_SHOWN, problem_document, render_warnings
from shardmill.errors import Problem, Refused, show
from shardmill.storage.documents import check_document, write_document

if TYPE_CHECKING:
    from shardmill.stages.compare import Comparison
    from shardmill.stages.reproduce import Reproduction
    from shardmill.stages.result import VerifyWatch


def verify(options: Options, console: Console) -> int:
    """Check a finished result, and compare it with its source when asked to."""
    from shardmill.stages.result import VerifyWatch
    from shardmill.stages.verify import verify as verify_result
    from shardmill.stages.verify import verify_against

    if options.sha256:
        check_document(options.sha256)
    notes: list[str] = []
    read = 0

    def on_total(size: int) -> None:
        nonlocal read
        read += size
        console.progress("verify", size)

    watch = VerifyWatch(on_total=on_total, on_bytes=console.count_bytes, on_note=notes.append)
    if options.reproduce:
        return _reproduce(options, console, watch, notes)
    problems = verify_result(options.destination, watch)
    rows: tuple[Comparison, ...] = ()
    if options.against is not None:
        rows, found = verify_against(options.destination, options.against, watch)
        problems = sorted({*problems, *found})
    if options.sha256 and not problems:
        notes += _write_sums(options.destination, options.sha256, watch)
    elif options.sha256:
        notes.append(f"{show(options.sha256, 200)} was not written, since there are problems")
    console.close_progress()
    _tell(options, console, problems, notes, rows, read)
    return FAILED if problems else DONE


def _tell(
    options: Options,
    console: Console,
    problems: Sequence[Problem],
    notes: Sequence[str],
    rows: Sequence[Comparison],
    read: int,
) -> None:
    from shardmill.stages.verify import serving_warnings

    for note in notes:
        console.say(f"NOTE {note}")
    serving = serving_warnings(options.destination, options.tp)
    for line in render_warnings(serving):
        console.say(line)
    if options.json:
        document = _verify_document(options, problems, notes, rows)
        print_document(document | serving_document(serving, options))
    else:
        print_result("\n".join(_verify_lines(options, problems, rows, read)))
    for line in problem_lines(problems):
        console.error(line)


def _write_sums(destination: str, location: str, watch: VerifyWatch) -> list[str]:
    from shardmill.stages.sums import sha256_sums

    sums = sha256_sums(destination, watch)
    write_document(location, sums.encode())
    return [f"{show(location, 200)}: SHA-256 of {count(sums.count(chr(10)), 'file')}"]


def _reproduce(options: Options, console: Console, watch: VerifyWatch, notes: list[str]) -> int:
    """Make the named tensors again."""
    from shardmill.stages.reproduce import reproduce

    if options.against is None:
        message = "expected --against SRC: a tensor is made again from its source"
        raise Refused([Problem(kind="source-unknown", message=message)])
    if options.sha256:
        message = "--reproduce does nothing else, and so goes without --sha256"
        raise Refused([Problem(kind="options-exclude", message=message, way_out="run verify twice")])
    made: list[Reproduction] = []
    problems: list[Problem] = []
    for tensor in options.reproduce:
        found, defects = reproduce(options.destination, options.against, tensor, watch)
        made.append(found)
        problems += defects
    console.close_progress()
    for note in dict.fromkeys(notes):
        console.say(f"NOTE {note}")
    if options.json:
        document = _verify_document(options, problems, list(dict.fromkeys(notes)), ())
        print_document(document | {"reproduced": [asdict(found) for found in made]})
    else:
        print_result("\n".join(_reproduction_lines(made, problems)))
    for line in problem_lines(problems):
        console.error(line)
    return FAILED if problems else DONE


def _reproduction_lines(made: Sequence[Reproduction], problems: Sequence[Problem]) -> Iterator[str]:
    differing = {problem.tensor for problem in problems}
    for found in made:
        bad = len(differing.intersection(found.outputs))
        verdict = f"{bad} differ" if bad else "byte-identical"
        size = f"{count(len(found.outputs), 'output')}, {found.nbytes:,} bytes"
        yield f"{show(found.tensor)} of {show(found.shard)}: {size}: {verdict}"


def _verify_document(
    options: Options, problems: Sequence[Problem], notes: Sequence[str], rows: Sequence[Comparison]
) -> dict[str, Any]:
    return {
        "command": "verify",
        "schema": SCHEMA,
        "status": "failed" if problems else "done",
        "destination": options.destination,
        "against": options.against,
        "problems": [problem_document(problem) for problem in problems],
        "notes": list(notes),
        "weights": [
            {
                "module": row.module,
                "scheme": row.scheme,
                "relative_error": _finite(row.statistics.relative_error),
                "sqnr_db": _finite(row.statistics.sqnr_db),
                "usual_error": row.typical,
                "stated_error": row.stated if row.stated is None else _finite(row.stated),
                "is_unusual": row.is_unusual,
            }
            for row in rows
        ],
    }


def _finite(number: float) -> float | None:
    return number if float("-inf") < number < float("inf") else None


def _verify_lines(
    options: Options, problems: Sequence[Problem], rows: Sequence[Comparison], read: int
) -> Iterator[str]:
    if rows:
        unusual = sum(row.is_unusual for row in rows)
        yield f"{count(len(rows), 'quantized weight')} compared with the source, {unusual} with an unusual error"
        yield "largest relative errors:"
        for row in sorted(rows, key=lambda row: (-row.statistics.relative_error, row.module))[:WORST_SHOWN]:
            found = row.statistics
            figures = f"{found.relative_error:.4f}  {found.sqnr_db:5.1f} dB  usual {row.typical:.3f}"
            yield f"  {figures}  {show(row.module)[1:-1]} ({show(row.scheme)[1:-1]})"
        yield PROXY
    verdict = f"{count(len(problems), 'problem')} found" if problems else "no problem found"
    yield f"{show(options.destination, 200)}: {verdict}" + (f", {read:,} bytes of shards read" if read else "")
