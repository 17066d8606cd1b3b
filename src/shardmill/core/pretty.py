"""JSON for people and loaders, indented by two, in a fraction of the time that `json` takes to indent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

_STEP: Final = 2


def pretty(document: Any, depth: int = 0) -> str:
    """The text that `json.dumps(document, indent=2, ensure_ascii=False)` gives.

    An object or list without further ones in it goes to the encoder that is written in C, which cannot indent, but
    takes any text between two entries.

    >>> pretty({"a": [1, 2], "b": {}}) == json.dumps({"a": [1, 2], "b": {}}, indent=2)
    True
    """
    is_object = isinstance(document, Mapping)
    if not document or not (is_object or isinstance(document, list | tuple)):
        return _encoder(0).encode(document)
    values = document.values() if is_object else document
    inner = "\n" + " " * _STEP * (depth + 1)
    outer = "\n" + " " * _STEP * depth
    if any(isinstance(value, dict | list | tuple) for value in values):
        texts = [pretty(value, depth + 1) for value in values]
        if is_object:
            texts = [f"{_key(key)}: {text}" for key, text in zip(document, texts, strict=True)]
        body = f",{inner}".join(texts)
    else:
        body = _encoder(depth + 1).encode(document)[1:-1]
    opening, closing = "{}" if is_object else "[]"
    return f"{opening}{inner}{body}{outer}{closing}"


@lru_cache(maxsize=64)
def _encoder(depth: int) -> json.JSONEncoder:
    return json.JSONEncoder(ensure_ascii=False, separators=(",\n" + " " * _STEP * depth, ": "))


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"expected a text as key, found {type(key).__name__}")
    return _encoder(0).encode(key)
