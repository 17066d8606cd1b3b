"""One function per command: it prints its result on stdout and returns the exit code."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from shardmill.cli.arguments import APART, Options, command_line, read_intake, read_recipe
from shardmill.cli.console import Console, Progress, print_document, print_result
from shardmill.cli.failures import DONE, FAILED, REFUSED, SCHEMA, count, problem_lines
from shardmill.core.plan import Plan
from shardmill.core.summary import (
    PROXY,
    WORST_SHOWN,
    human_bytes,
    plan_document,
    problem_document,
    render,
    render_warnings,
    summarize,
    summarize_manifest,
    summarize_plan,
    summary_document,
)
from shardmill.errors import Problem, RecipeInvalid, Refused, refuse, show

if TYPE_CHECKING:
    from shardmill.core.outcome import ShardOutcome
    from shardmill.stages.compare import Comparison
    from shardmill.stages.pipeline import RunResult, Watcher
    from shardmill.stages.plan import Locations
    from shardmill.storage.store import Store


def plan(options: Options, console: Console) -> int:
    """Show what would be done to every tensor."""
    from shardmill.stages.plan import collection_paused, make_plan
    from shardmill.stages.validate import validate_plan
    from shardmill.storage.source import open_source

    with collection_paused():
        found = make_plan(open_source(options.source, read_intake(options)), read_recipe(options))
        problems = validate_plan(found)
        return _show_plan(found, problems, options, console)


def _show_plan(found: Plan, problems: Sequence[Problem], options: Options, console: Console) -> int:
    if options.json:
        status = "refused" if problems else "done"
        print_document({"command": options.command, "status": status, **plan_document(found, problems)})
    elif not problems:
        summary = summarize_plan(found)
        print_result("\n".join([render(summary), "", *_job_lines(found, summary.totals.output_bytes)]))
    if problems:
        console.error(f"refused: {count(len(problems), 'problem')}")
        for line in problem_lines(problems):
            console.error(line)
    return REFUSED if problems else DONE


def _job_lines(found: Plan, need: int) -> Iterator[str]:
    """What a run would consist of, and the room that it needs."""
    sizes = [shard.size for shard in found.shards]
    each = f"{human_bytes(min(sizes))} to {human_bytes(max(sizes))} each, median {human_bytes(median(sizes))}"
    yield f"jobs  {count(len(sizes), 'shard')}, {each}"
    partners = sum(len(shard.sources) > 1 for shard in found.shards)
    if partners:
        yield f"      {partners} also read members of fused sets in other shards, for a shared global scale"
    yield f"disk  {need:,} bytes ({human_bytes(need)}) on the file system of DST; a store elsewhere needs as much again"
    other = ", ".join(show(name) for name, _ in found.left_out[:WORST_SHOWN])
    yield f"files {count(len(found.files), 'other file')} copied" + (f"; left out: {other}" if other else "")


def run(options: Options, console: Console) -> int:
    """Quantize a checkpoint."""
    from shardmill.stages.devices import check_devices
    from shardmill.stages.pipeline import RunOptions
    from shardmill.stages.pipeline import run as run_stages
    from shardmill.stages.plan import Locations

    recipe = read_recipe(options)
    locations = Locations(
        source=options.source, destination=options.destination, store=options.store, intake=read_intake(options)
    )
    unavailable = check_devices(options.device)
    if unavailable:
        raise Refused(unavailable)
    if options.dry_run:
        return _dry_run(locations, options, console)
    stop = threading.Event()
    settings = RunOptions(device=options.device, workers=options.workers, verify=options.verify)
    with _stop_on_interrupt(stop):
        result = run_stages(locations, recipe, settings, watcher=_watcher(console, stop), stop=stop)
    console.close_progress()
    _show_result(result, options, console)
    return DONE


def _dry_run(locations: Locations, options: Options, console: Console) -> int:
    """Everything that `run` checks before work."""
    from shardmill.stages.plan import make_plan
    from shardmill.stages.validate import pin_readable, validate_locations, validate_plan

    store = locations.open_store()
    locations = pin_readable(locations, store)
    found = make_plan(locations.open_source(), read_recipe(options))
    problems = sorted({*validate_plan(found), *validate_locations(found, locations, store)})
    code = _show_plan(found, problems, options, console)
    console.say("dry run: nothing was written")
    return code


@contextmanager
def _stop_on_interrupt(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C asks shards to stop, the second ends the program at once."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _watcher(console: Console, stop: threading.Event) -> Watcher:
    """Show a run's progress; a request to stop is acknowledged when the next bytes are counted."""
    from shardmill.stages.pipeline import Watcher

    progress: list[Progress] = []
    acknowledged = threading.Event()

    def on_plan(found: Plan) -> None:
        for line in render_warnings(found.warnings):
            console.say(line)
        progress.append(console.progress("quantize", found.source_bytes, len(found.shards)))

    def on_bytes(size: int) -> None:
        progress[-1].add(size)
        if stop.is_set() and not acknowledged.is_set():
            acknowledged.set()
            console.say("stopping: shards in work are dropped, finished ones are kept; Ctrl-C again stops at once")

    def on_shard(outcome: ShardOutcome) -> None:
        progress[-1].add_shard(is_hit=outcome.is_hit)

    def on_failure(shard: str, _error: BaseException) -> None:
        console.say(f"{show(shard)} failed; the other shards go on")

    return Watcher(on_plan=on_plan, on_bytes=on_bytes, on_shard=on_shard, on_failure=on_failure)


def _show_result(result: RunResult, options: Options, console: Console) -> None:
    from shardmill.stages.plan import collection_paused

    with collection_paused():
        summary = summarize(result.manifest)
    hits = sum(outcome.is_hit for outcome in result.outcomes)
    rate = summary.totals.source_bytes / max(result.seconds, 1e-9)
    following = command_line("vllm", "serve", options.destination)
    told = {(problem.kind, problem.file, problem.tensor) for problem in result.plan.warnings}
    new = tuple(w for w in summary.warnings if (w.kind, w.file, w.tensor) not in told)
    for line in render_warnings(new):
        console.say(line)
    if options.json:
        print_document(
            {
                "command": "run",
                "schema": SCHEMA,
                "status": "done",
                "destination": options.destination,
                "plan": result.manifest["plan"],
                "seconds": result.seconds,
                "bytes_per_second": rate,
                "peak_memory_bytes": _peak_memory(),
                "hits": hits,
                "store_checks_failed": result.store_checks_failed,
                "summary": summary_document(summary),
                "next": following,
            }
        )
        return
    speed = f"{result.seconds:.1f} s, {rate / 1e9:.2f} GB/s, peak memory {human_bytes(_peak_memory())}"
    stored = f"{hits} of {count(summary.shards, 'shard')} found in the store"
    if result.store_checks_failed:
        stored += f"\nstore checks failed: {result.store_checks_failed}; what failed was not used"
    print_result("\n".join([render(replace(summary, warnings=new)), "", f"{speed}, {stored}", f"next: {following}"]))


def _peak_memory() -> int:
    """Largest resident size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def verify(options: Options, console: Console) -> int:
    """Check a finished result, and compare it with its source when asked to."""
    from shardmill.stages.verify import VerifyWatch, verify_against
    from shardmill.stages.verify import verify as verify_result

    notes: list[str] = []
    read = 0

    def on_total(size: int) -> None:
        nonlocal read
        read += size
        console.progress("verify", size)

    def on_bytes(size: int) -> None:
        console.count_bytes(size)

    watch = VerifyWatch(on_total=on_total, on_bytes=on_bytes, on_note=notes.append)
    problems = verify_result(options.destination, watch)
    rows: tuple[Comparison, ...] = ()
    if options.against is not None:
        rows, found = verify_against(options.destination, options.against, watch)
        problems = sorted({*problems, *found})
    console.close_progress()
    for note in notes:
        console.say(f"NOTE {note}")
    if options.json:
        print_document(_verify_document(options, problems, notes, rows))
    else:
        print_result("\n".join(_verify_lines(options, problems, rows, read)))
    for line in problem_lines(problems):
        console.error(line)
    return FAILED if problems else DONE


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


def report(options: Options, console: Console) -> int:
    """Show the summary of a finished result."""
    from shardmill.stages.result import read_manifest_of

    if options.html is not None:
        message = "reports in HTML are not available in this version"
        raise RecipeInvalid([Problem(kind="html-unavailable", message=message, way_out="leave --html out")])
    manifest = read_manifest_of(options.destination)
    console.say(f"plan {show(manifest.plan[:16])[1:-1]} of {show(options.destination, 200)}")
    print_result(render(summarize_manifest(manifest)))
    return DONE


def _open_store(options: Options) -> Store:
    """The store that was named, or the one in this folder.

    Raises:
        CheckpointInvalid: there is none.
    """
    from shardmill.storage.location import open_folder
    from shardmill.storage.store import FOLDER_NAME, Store

    store = Store(open_folder(options.store or FOLDER_NAME))
    if not store.exists():
        raise refuse("store-missing", "expected a store, found none", file=store.folder.url, way_out="set --store")
    return store


def store_ls(options: Options, _console: Console) -> int:
    """List the finished shards of a store."""
    entries = list(_open_store(options).entries())
    for entry in entries:
        moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
        use = "in use" if entry.is_published else ""
        print_result(f"{entry.key[:16]}  {human_bytes(entry.size):>10}  {moment}  {use}".rstrip())
    print_result(f"{count(len(entries), 'shard')}, {human_bytes(sum(entry.size for entry in entries))}")
    return DONE


def store_gc(options: Options, _console: Console) -> int:
    """Delete the finished shards that are old and that no result is made of."""
    from shardmill.storage.publish import forget_gone

    store = _open_store(options)
    forget_gone(store)
    removed = store.collect(older_than=options.older_than * 3600)
    print_result(f"{count(len(removed), 'shard')} removed, {human_bytes(sum(entry.size for entry in removed))}")
    return DONE


def store_verify(options: Options, console: Console) -> int:
    """Read every finished shard and compare it with its receipt."""
    problems = _open_store(options).verify()
    print_result(f"{count(len(problems), 'problem')} found")
    for line in problem_lines(problems):
        console.error(line)
    return FAILED if problems else DONE


def apart(options: Options, _console: Console) -> int:
    """Become a process of the module of that name: signals reach it, and it needs libraries that nothing else does."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-P", "-m", f"shardmill.flows.{options.command}", *options.rest]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter and the user's arguments


COMMANDS: Final[Mapping[str, Callable[[Options, Console], int]]] = {
    "plan": plan,
    "run": run,
    "verify": verify,
    "report": report,
    "store ls": store_ls,
    "store gc": store_gc,
    "store verify": store_verify,
    **dict.fromkeys(APART, apart),
}
