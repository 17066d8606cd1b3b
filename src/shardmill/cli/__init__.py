"""The command line: `shardmill plan | run | verify | report | store | demo | setup | worker`.

    arguments   what may be asked for, and the recipe that follows from it
    console     stderr: talk, progress, warnings of the log
    commands    one function per verb; stdout carries its result

Exit codes: 0 done; 2 the input or the request is refused, every problem listed; 130 stopped by Ctrl-C; 1 anything else.
Heavy libraries are imported by the stage that needs them, so that `plan` and `--help` answer at once.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import traceback
from collections.abc import Sequence

from shardmill.cli.arguments import Options, parse_arguments
from shardmill.cli.commands import COMMANDS
from shardmill.cli.console import Console, print_document
from shardmill.cli.failures import Failure, describe

__all__ = ["main", "program"]

_COLLECT_AFTER = 50_000
"""New objects after which the cyclic garbage collector looks at them; a run makes little garbage of that kind."""


def program() -> int:
    """Be the program `shardmill`, whose process ends with this exit code."""
    gc.set_threshold(_COLLECT_AFTER)  # modules are loaded all along, and each few hundred objects cost a look at many
    code = main()
    gc.freeze()  # else the interpreter looks at every object twice before it ends, 0.3 s after a run
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = tuple(sys.argv[1:] if argv is None else argv)
    _survive_odd_names()
    options = parse_arguments(arguments)
    with Console.opened(options.verbosity) as console:
        try:
            return COMMANDS[options.command](options, console)
        except BrokenPipeError:
            _silence_stdout()
            return 1
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last line of defence; every error is told
            return _fail(describe(error, arguments), error, options, console)


def _fail(failure: Failure, error: BaseException, options: Options, console: Console) -> int:
    console.close_progress()
    if options.debug:
        console.error("".join(traceback.format_exception(error)).rstrip())
    for line in failure.lines():
        console.error(line)
    if options.json:
        print_document({"command": options.command, **failure.document()})
    return failure.exit_code


def _survive_odd_names() -> None:
    """Write what a terminal cannot show as an escape instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    """The reader of our stdout is gone: keep the interpreter from failing again when it flushes."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
