"""Names for people; names of files and tensors are foreign text."""

from __future__ import annotations

from typing import Any

from shardmill.errors import NAME_LIMIT


def shard_run_name(parameters: dict[str, Any]) -> str:
    """Name of the task run of a shard: which shard, of which model, with which scheme.

    The names of shard and model are foreign text.
    """
    label = parameters["job"].label
    return f"quantize {plain(parameters['shard'].name)}{f' of {label}' if label else ''}"


def plain(text: str, limit: int = NAME_LIMIT) -> str:
    r"""Foreign text for a name or a table cell: control characters escaped, cut at `limit` characters.

    >>> plain("model\n-1.safetensors")
    'model\\n-1.safetensors'
    """
    safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return safe if len(safe) <= limit else f"{safe[: limit - 1]}…"


def code(text: str, limit: int = NAME_LIMIT) -> str:
    r"""Foreign text for markdown: in code, where nothing is a link, an image, HTML or the end of a table cell.

    >>> code("a|b`<b>\n"), code("")
    ("`a¦b'<b>\\n`", '')
    """
    safe = plain(text, limit).replace("`", "'").replace("|", "¦")
    return f"`{safe}`" if safe else ""
