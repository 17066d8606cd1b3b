"""`shardmill run` with several schemes: one result for each, from one read of the source."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from shardmill.cli.arguments import Options
from shardmill.cli.console import Console, print_document, print_result
from shardmill.cli.documents import asked_for
from shardmill.cli.failures import DONE, FAILED, REFUSED, SCHEMA, describe
from shardmill.cli.running import read_request, settings, show_result, stop_on_interrupt, watcher, write_result
from shardmill.core.scheme import PRESETS
from shardmill.errors import Interrupted, Problem, RecipeInvalid, Refused, show

if TYPE_CHECKING:
    from shardmill.stages.pipeline import RunResult

_PLACE: Final = "{scheme}"


def run_schemes(options: Options, console: Console) -> int:
    """Quantize a checkpoint by every scheme; what fails of one is told after all others are done.

    Raises:
        Refused: something stands against one of them; nothing was begun.
    """
    from shardmill.stages.several import prepare_several, run_several

    chosen = [_options_of(options, scheme) for scheme in options.schemes]
    _check(options)
    requests, problems = [], list[Problem]()
    for each in chosen:
        try:
            requests.append(read_request(each))
        except Refused as error:
            problems += error.problems
    if problems:
        raise Refused(problems)
    how = settings(options)
    prepared = prepare_several(requests, how)
    if options.dry_run:
        console.say(f"dry run: nothing stands against {len(prepared)} conversions; plan shows each")
        return DONE
    total = sum(found.plan.source_bytes for found in prepared)
    progress = console.progress("quantize", total, sum(len(found.plan.shards) for found in prepared))
    stop = threading.Event()
    with stop_on_interrupt(stop):
        results = run_several(prepared, how, lambda _number: watcher(console, stop, progress), stop)
    console.close_progress()
    documents = [_tell(each, result, console) for each, result in zip(chosen, results, strict=True)]
    for result in results:
        if isinstance(result, Interrupted):
            raise result  # the command that goes on is the whole one
    code = _exit_code([document["exit_code"] for document in documents])
    if options.json:
        status = {DONE: "done", REFUSED: "refused"}.get(code, "failed")
        print_document({"command": "run", "schema": SCHEMA, "status": status, "runs": documents})
    return code


def _options_of(options: Options, scheme: str) -> Options:
    """The options of one scheme: its name stands for `{scheme}`, and is a folder below DST where there is none."""
    name = scheme.upper()
    destination = options.destination
    if _PLACE not in destination:
        destination = f"{destination.rstrip('/')}/{_PLACE}"
    files = {option: location.replace(_PLACE, name) for option, location in asked_for(options).items()}
    changes: dict[str, Any] = {"scheme": scheme, "destination": destination.replace(_PLACE, name), **files}
    if not _takes_input_scale(scheme):
        changes["input_scale"] = None
    return replace(options, **changes)


def _takes_input_scale(scheme: str) -> bool:
    known = PRESETS.get(scheme.upper())
    return known is not None and known.needs_input_scale


def _check(options: Options) -> None:
    """Refuse what would be written twice."""
    names = [scheme.upper() for scheme in options.schemes]
    problems = [
        Problem(kind="scheme-twice", message=f"scheme {show(name)} is asked for {names.count(name)} times")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    problems += [
        Problem(file=location, kind="document-shared", message="several reports would be written there",
                way_out=f"put {_PLACE} into its name")
        for location in asked_for(options).values()
        if _PLACE not in location
    ]  # fmt: skip
    if options.input_scale is not None and not any(map(_takes_input_scale, options.schemes)):
        problems.append(Problem(kind="input-scale", message="--input-scale goes with --scheme NVFP4"))
    if problems:
        raise RecipeInvalid(problems)


def _tell(options: Options, result: RunResult | Exception, console: Console) -> dict[str, Any]:
    """Tell of one run; returns its document."""
    if not options.json:
        print_result(f"\n{options.scheme}: {show(options.destination, 200)}\n")
    if not isinstance(result, Exception):
        document = show_result(result, options, console)
        write_result(result, options, console)
        return {"scheme": options.scheme, **document, "exit_code": DONE}
    failure = describe(result, ())
    if not isinstance(result, Interrupted):
        for line in failure.lines():
            console.error(f"{options.scheme}: {line}")
    told = {"scheme": options.scheme, "destination": options.destination}
    return {**told, **failure.document(), "exit_code": failure.exit_code}


def _exit_code(codes: Sequence[int]) -> int:
    """Done if all are, refused if the rest are refusals, else failed."""
    return next((code for code in (FAILED, REFUSED) if code in codes), DONE)
