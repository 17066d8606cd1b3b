"""`shardmill plan`: what would be done to every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from shardmill.cli.arguments import Options, read_intake, read_recipe
from shardmill.cli.console import Console, print_document, print_result
from shardmill.cli.failures import DONE, REFUSED, count, problem_lines
from shardmill.core.plan import Plan
from shardmill.core.serving import check_plan_serving, rules_document
from shardmill.core.summary import (
    WORST_SHOWN,
    human_bytes,
    plan_document,
    problem_document,
    render,
    summarize_plan,
)
from shardmill.core.table import render_table, resolve_table
from shardmill.errors import Problem, show


def plan(options: Options, console: Console) -> int:
    """Show what would be done to every tensor."""
    if len(options.schemes) > 1:
        from shardmill.cli.several import plan_schemes  # few ask for it

        return plan_schemes(options, console)
    return _plan(options, console)


def _plan(options: Options, console: Console) -> int:
    from shardmill.stages.plan import collection_paused, make_plan
    from shardmill.stages.validate import validate_plan
    from shardmill.storage.source import open_source

    recipe, told = read_recipe(options), dict[str, Any]()
    source = open_source(options.source, read_intake(options))
    if options.budget is not None:
        from shardmill.cli.budgeting import solve_plan  # few ask for it

        recipe, told = solve_plan(source, options, options.budget, console)
    with collection_paused():
        found = make_plan(source, recipe)
        problems = validate_plan(found)
        return show_plan(found, problems, options, console, told)


def show_plan(
    found: Plan, problems: Sequence[Problem], options: Options, console: Console, more: Mapping[str, Any] | None = None
) -> int:
    """Print a plan, or why it is refused; returns the exit code.

    Args:
        more: what else the document holds.
    """
    if options.json:
        print_document({"command": options.command, **document_of(found, problems, options), **(more or {})})
    elif not problems:
        print_result(told_of(found, options))
    if problems:
        console.error(f"refused: {count(len(problems), 'problem')}")
        for line in problem_lines(problems):
            console.error(line)
    return REFUSED if problems else DONE


def document_of(found: Plan, problems: Sequence[Problem], options: Options) -> dict[str, Any]:
    """A plan for programs, with what stands against it, and what may keep an engine from loading the result."""
    serving = check_plan_serving(found, options.tp) if not problems else []
    status = "refused" if problems else "done"
    return {"status": status, **plan_document(found, problems), **serving_document(serving, options)}


def told_of(found: Plan, options: Options) -> str:
    """A plan for people; nothing stands against it."""
    summary = summarize_plan(found)
    told = render(replace(summary, warnings=(*summary.warnings, *check_plan_serving(found, options.tp))))
    return "\n".join(
        [*render_table(resolve_table(found)), "", told, "", *_job_lines(found, summary.totals.output_bytes)]
    )


def serving_document(serving: Sequence[Problem], options: Options) -> dict[str, Any]:
    """What may keep an engine from loading the result, and where it is written down."""
    warnings = [problem_document(problem) for problem in serving]
    return {"serving": {"tp": options.tp, "warnings": warnings, "rules": rules_document(serving)}}


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
