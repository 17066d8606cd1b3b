"""From an error to an exit code, lines for people and a document for machines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardmill.core.shell import command_line
from shardmill.core.summary import problem_document
from shardmill.errors import Interrupted, Problem, Refused, ShardFailures, ShardmillError

DONE: Final = 0
FAILED: Final = 1
REFUSED: Final = 2
STOPPED: Final = 130
PROBLEMS_SHOWN: Final = 100
SCHEMA: Final = 1
"""Of every JSON document that the command line prints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a command did not succeed."""

    exit_code: int
    message: str
    problems: tuple[Problem, ...] = ()
    resume: str = ""
    """The command that goes on."""

    def lines(self) -> Iterator[str]:
        """What stderr gets: the message, up to a hundred problems, the way on."""
        yield self.message
        yield from problem_lines(self.problems)
        if self.resume:
            yield "go on with:"
            yield f"    {self.resume}"

    def document(self) -> dict[str, Any]:
        """What stdout gets when a document was asked for."""
        status = {REFUSED: "refused", STOPPED: "interrupted"}.get(self.exit_code, "failed")
        return {
            "schema": SCHEMA,
            "status": status,
            "message": self.message,
            "problems": [problem_document(problem) for problem in self.problems],
            "resume": self.resume or None,
        }


def problem_lines(problems: Sequence[Problem]) -> Iterator[str]:
    """One line for each of the first hundred problems."""
    yield from (f"  {problem}" for problem in problems[:PROBLEMS_SHOWN])
    if len(problems) > PROBLEMS_SHOWN:
        yield f"  … and {len(problems) - PROBLEMS_SHOWN} more; --json lists all of them"


def count(number: int, noun: str) -> str:
    """Write a number with its noun.

    >>> count(1, "problem"), count(2, "problem")
    ('1 problem', '2 problems')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe(error: BaseException, arguments: Sequence[str]) -> Failure:
    """Turn an error into what is told about it."""
    if isinstance(error, Refused):
        message = f"refused: {count(len(error.problems), 'problem')}"
        return Failure(exit_code=REFUSED, message=message, problems=error.problems)
    if isinstance(error, ShardFailures):
        code = REFUSED if error.is_refusal else FAILED
        message = str(error).partition("\n")[0]
        return Failure(exit_code=code, message=message, problems=tuple(_shard_problems(error.failures)))
    if isinstance(error, Interrupted | KeyboardInterrupt):
        message = str(error) or "stopped at once; finished shards stay in the store"
        return Failure(exit_code=STOPPED, message=message, resume=command_line("shardmill", *arguments))
    if isinstance(error, ShardmillError):
        return Failure(exit_code=FAILED, message=f"failed: {error}")
    message = f"failed: unexpected {type(error).__name__}: {error}; --debug shows where"
    return Failure(exit_code=FAILED, message=message)


def _shard_problems(failures: Iterable[tuple[str, BaseException]]) -> Iterator[Problem]:
    """Every problem of every failed shard; an error that is no refusal becomes one problem."""
    for shard, error in failures:
        if isinstance(error, Refused):
            yield from error.problems
        else:
            kind = type(error).__name__
            message = str(error) if isinstance(error, ShardmillError) else f"unexpected {kind}: {error}"
            yield Problem(file=shard, kind=kind, message=message)
