"""Foreign text for people: names of files and tensors, which may hold anything."""

from __future__ import annotations

from shardmill.errors import NAME_LIMIT


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
