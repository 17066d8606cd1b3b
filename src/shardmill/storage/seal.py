"""Seals: records of a store that others can write to count only with a code that takes a secret key to make.

The code is HMAC-SHA256 over the record's name, a zero byte and the record's bytes, so a record that was edited, written
by a stranger or moved to another name is refused. It is the last field of the record's JSON object:

    {"digest":"blake3:00ff"}   ->   {"digest":"blake3:00ff","mac":"hmac-sha256:5f2d…"}

The key comes from the environment and from nowhere else. Without one, nothing is sealed and codes are passed over.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from typing import Final

from shardmill.errors import Problem, Refused

KEY_VARIABLE: Final = "SHARDMILL_STORE_KEY"
_LEAST_KEY: Final = 16
"""Characters; a shorter key can be guessed."""
_CODE: Final = re.compile(rb',"mac":"hmac-sha256:([0-9a-f]{64})"\}\Z')


class Seal:
    """Seals records under one key, or passes them on where there is none."""

    def __init__(self, key: bytes = b"") -> None:
        self._key = key

    def __repr__(self) -> str:
        return f"Seal(is_strict={self.is_strict})"

    @property
    def is_strict(self) -> bool:
        """Whether there is a key, so that only sealed records count."""
        return bool(self._key)

    def close(self, name: str, record: bytes) -> bytes:
        """Seal a record, a JSON object with at least one field.

        >>> Seal().close("digests/00.json", b'{"a":1}')
        b'{"a":1}'
        >>> Seal(b"k" * 16).close("digests/00.json", b'{"a":1}')[:28]
        b'{"a":1,"mac":"hmac-sha256:6a'
        """
        if not self.is_strict:
            return record
        return b'%s,"mac":"hmac-sha256:%s"}' % (record[:-1], self._code(name, record).encode())

    def open(self, name: str, data: bytes) -> bytes:
        """Return the record as it was sealed under this name.

        Raises:
            ValueError: it is not sealed, or with another key, or was changed or moved.

        >>> seal = Seal(b"k" * 16)
        >>> seal.open("a", seal.close("a", b'{"a":1}'))
        b'{"a":1}'
        >>> seal.open("b", seal.close("a", b'{"a":1}'))
        Traceback (most recent call last):
        ValueError: it was not sealed under this name with the key of SHARDMILL_STORE_KEY
        """
        found = _CODE.search(data)
        record = data if found is None else data[: found.start()] + b"}"
        if not self.is_strict:
            return record
        if found is None:
            raise ValueError(f"it is not sealed, and {KEY_VARIABLE} is set")
        if not hmac.compare_digest(found[1].decode(), self._code(name, record)):
            raise ValueError(f"it was not sealed under this name with the key of {KEY_VARIABLE}")
        return record

    def _code(self, name: str, record: bytes) -> str:
        return hmac.new(self._key, name.encode() + b"\0" + record, hashlib.sha256).hexdigest()


def seal_from_environment() -> Seal:
    """The seal of this process.

    Raises:
        Refused: the key is so short that it can be guessed, or empty, which is seldom meant.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return Seal()
    if len(key) < _LEAST_KEY:
        message = f"{KEY_VARIABLE} has {len(key)} characters, expected at least {_LEAST_KEY}"
        raise Refused([Problem(kind="store-key", message=message, way_out="set a longer one, or unset it")])
    return Seal(os.fsencode(key))
