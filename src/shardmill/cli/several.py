"""`shardmill run` and `shardmill plan` with several schemes: a result or a plan for each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shardmill.cli.arguments import Options, read_intake, read_recipe
from shardmill.cli.console import Console, print_document, print_result
from shardmill.cli.documents import asked_for
from shardmill.cli.failures import DONE, FAILED, REFUSED, SCHEMA, describe, problem_lines
from shardmill.cli.planning import document_of, told_of
from shardmill.cli.running import read_request, settings, show_result, stop_on_interrupt, watcher, write_result
from shardmill.core.scheme import PRESETS
from shardmill.errors import Interrupted, Problem, RecipeInvalid, Refused, show

if TYPE_CHECKING:
    from shardmill.stages.pipeline import RunResult

T = TypeVar("T")

_PLACE: Final = "{scheme}"


def run_schemes(options: Options, console: Console) -> int:
    """Quantize a checkpoint by every scheme; what fails of one is told after all others are done.

    Raises:
        Refused: something stands against one of them; nothing was begun.
    """
    from shardmill.stages.several import prepare_several, run_several

    chosen = [_options_of(options, scheme) for scheme in options.schemes]
    _check(options)
    requests = _read_all(chosen, read_request)
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


def plan_schemes(options: Options, console: Console) -> int:
    """Show what every scheme would do to every tensor.

    Raises:
        Refused: a scheme is unknown, or asked for twice.
    """
    from shardmill.stages.plan import collection_paused, make_plan
    from shardmill.stages.validate import validate_plan
    from shardmill.storage.source import open_source

    chosen = [replace(options, scheme=scheme) for scheme in options.schemes]
    _check(options)
    recipes = _read_all(chosen, read_recipe)
    source = open_source(options.source, read_intake(options))
    documents, code = [], DONE
    for each, recipe in zip(chosen, recipes, strict=True):
        with collection_paused():
            found = make_plan(source, recipe)
            problems = validate_plan(found)
            documents.append({"scheme": each.scheme, **document_of(found, problems, each)})
            if not problems and not options.json:
                print_result(f"\n{each.scheme}\n\n{told_of(found, each)}\n")
        for line in problem_lines(problems):
            console.error(f"{each.scheme}: {line}")
        code = REFUSED if problems else code
    if options.json:
        status = "refused" if code else "done"
        print_document({"command": options.command, "schema": SCHEMA, "status": status, "plans": documents})
    return code


def _read_all(chosen: Sequence[Options], read: Callable[[Options], T]) -> list[T]:
    """What is asked for of each scheme.

    Raises:
        Refused: what stands against any of them.
    """
    found, problems = list[T](), list[Problem]()
    for each in chosen:
        try:
            found.append(read(each))
        except Refused as error:
            problems += error.problems
    if problems:
        raise Refused(problems)
    return found


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
