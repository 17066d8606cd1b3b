"""`shardmill run`: one conversion; `several` has those of many schemes."""

from __future__ import annotations

import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from shardmill.cli.arguments import Options, read_intake, read_recipe
from shardmill.cli.console import Console, Progress, print_document, print_result
from shardmill.cli.documents import asked_for, check_documents, write_documents
from shardmill.cli.failures import DONE, SCHEMA, count
from shardmill.cli.planning import show_plan
from shardmill.core.plan import Plan
from shardmill.core.recipe import Recipe
from shardmill.core.serving import check_plan_serving
from shardmill.core.shell import command_line
from shardmill.core.summary import human_bytes, render, render_warnings, summarize, summary_document
from shardmill.errors import Problem, RecipeInvalid, Refused, show

if TYPE_CHECKING:
    from shardmill.core.outcome import ShardOutcome
    from shardmill.stages.pipeline import RunOptions, RunResult, Watcher
    from shardmill.stages.plan import Locations


def run(options: Options, console: Console) -> int:
    """Quantize a checkpoint."""
    if len(options.schemes) > 1:
        from shardmill.cli.several import run_schemes  # few ask for it

        return run_schemes(options, console)
    from shardmill.stages.pipeline import run as run_stages

    locations, recipe = read_request(options)
    if options.dry_run:
        return _dry_run(locations, options, console)
    stop = threading.Event()
    told: dict[str, Any] = {}
    with stop_on_interrupt(stop):
        if options.budget is not None:
            from shardmill.cli.budgeting import solve_run  # few ask for it

            locations, recipe, told = solve_run(locations, options, options.budget, console, stop)
        result = run_stages(locations, recipe, settings(options), watcher=watcher(console, stop), stop=stop)
    console.close_progress()
    document = show_result(result, options, console) | told
    if options.json:
        print_document(document)
    write_result(result, options, console)
    return DONE


def read_request(options: Options) -> tuple[Locations, Recipe]:
    """Where and how, as far as it can be told before anything is read.

    Raises:
        Refused: an option cannot be met.
    """
    from shardmill.stages.devices import check_devices
    from shardmill.stages.plan import Locations

    recipe = read_recipe(options)
    if options.budget is not None and options.dry_run:
        message = "--dry-run does not go with --budget: what candidates leave is measured, and kept in the store"
        raise RecipeInvalid([Problem(kind="budget", message=message, way_out="use plan --budget")])
    check_documents(options)
    locations = Locations(
        source=options.source, destination=options.destination, store=options.store, intake=read_intake(options)
    )
    unavailable = check_devices(options.device)
    if unavailable:
        raise Refused(unavailable)
    return locations, recipe


def settings(options: Options) -> RunOptions:
    """How the run works."""
    from shardmill.stages.pipeline import RunOptions

    return RunOptions(device=options.device, workers=options.workers, verify=options.verify)


def write_result(result: RunResult, options: Options, console: Console) -> None:
    """Write page and card of a finished run, as far as they were asked for."""
    if not asked_for(options):
        return
    from shardmill.stages.report import base_model_of, make_report

    found = make_report(
        options.destination,
        source=options.source,
        base_model=options.base_model or base_model_of(options.source),
        seconds=result.seconds,
        with_histograms=True,
    )
    for line in write_documents(found, options):
        console.say(line)


def _dry_run(locations: Locations, options: Options, console: Console) -> int:
    """Everything that `run` checks before work."""
    from shardmill.stages.plan import make_plan
    from shardmill.stages.validate import pin_readable, validate_locations, validate_plan

    store = locations.open_store()
    locations = pin_readable(locations, store)
    found = make_plan(locations.open_source(), read_recipe(options))
    problems = sorted({*validate_plan(found), *validate_locations(found, locations, store)})
    code = show_plan(found, problems, options, console)
    console.say("dry run: nothing was written")
    return code


@contextmanager
def stop_on_interrupt(stop: threading.Event) -> Iterator[None]:
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


def watcher(console: Console, stop: threading.Event, common: Progress | None = None) -> Watcher:
    """Show a run's progress; a request to stop is acknowledged when the next bytes are counted.

    Args:
        common: progress of several runs together; None to begin one of this run's own.
    """
    from shardmill.stages.pipeline import Watcher

    progress = [] if common is None else [common]
    acknowledged = threading.Event()

    def on_plan(found: Plan) -> None:
        for line in render_warnings((*found.warnings, *check_plan_serving(found))):
            console.say(line)
        if common is None:
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


def show_result(result: RunResult, options: Options, console: Console) -> dict[str, Any]:
    """Tell what a run did, unless a document was asked for; returns the document."""
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
    if not options.json:
        speed = f"{result.seconds:.1f} s, {rate / 1e9:.2f} GB/s, peak memory {human_bytes(_peak_memory())}"
        stored = f"{hits} of {count(summary.shards, 'shard')} found in the store"
        if result.store_checks_failed:
            stored += f"\nstore checks failed: {result.store_checks_failed}; what failed was not used"
        lines = [render(replace(summary, warnings=new)), "", f"{speed}, {stored}", f"next: {following}"]
        print_result("\n".join(lines))
    return {
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


def _peak_memory() -> int:
    """Largest resident size of this process in bytes.

    What `getrusage` tells begins with the size of whoever started the process, and is in bytes on macOS.
    """
    try:
        own = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii", errors="replace"))
    except OSError:
        own = None
    if own is not None:
        return int(own[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
