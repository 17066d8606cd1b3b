"""Digests with their strength in the name, canonical JSON, and the version of every cached stage."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final

STAGE_VERSIONS: Final = {"quantize": 1, "search": 2}
"""Bumped by hand whenever a stage's output bytes change; part of every job key, `search` where scales are searched."""


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """An algorithm and its value in hex; `sha256` and `blake3` are content, `etag` is only a fingerprint.

    >>> str(Digest.parse("blake3:00ff"))
    'blake3:00ff'
    """

    algorithm: str
    value: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read `algorithm:value`.

        Raises:
            ValueError: no colon.
        """
        algorithm, colon, value = text.partition(":")
        if not (algorithm and colon and value):
            raise ValueError(f"expected algorithm:value, found {text!r}")
        return cls(algorithm, value)


def canonical_json(value: Any) -> bytes:
    """Encode a JSON value in the one way that digests are taken of.

    >>> canonical_json({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest_json(value: Any) -> str:
    """SHA-256 in hex of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
