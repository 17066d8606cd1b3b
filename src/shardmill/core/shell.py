"""Commands as text that can be copied into a shell."""

from __future__ import annotations

import json
import shlex


def quote(argument: str) -> str:
    r"""Quote an argument for a POSIX shell; what cannot be printed is written as an escape that bash and zsh read.

    >>> print(quote("out put"), quote("a\nb"))
    'out put' $'a\nb'
    """
    if argument.isprintable():
        return shlex.quote(argument)
    body = json.dumps(argument)[1:-1].replace('\\"', '"').replace("'", "\\'")
    return f"$'{body}'"


def command_line(*arguments: str) -> str:
    """A command as one line to copy."""
    return " ".join(map(quote, arguments))
