"""Sound bytes, spoiled at random: what a header, an index or a config turns into on its way."""

from __future__ import annotations

import json
import struct
from random import Random

from attacks.attack_cases import CONFIG, TWO, header, sound

TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"NaN", b"-1", b"0"),
    *(b"1e999", b"9" * 200, b"18446744073709551616", b"\x00", b"\xff", b"\xef\xbb\xbf", b"[" * 200, b'{"a":' * 100),
    *(b'"__metadata__":{}', b'"shape":[]', b'"weight_map"', b'"dtype"', b"../../etc/passwd", b" ", b"\n", b"F4", b"Q8"),
    b"\xe2\x80\xae",
]


def mutate(data: bytes, rng: Random) -> bytes:
    """One to four small changes."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        first = rng.randrange(len(found) + 1)
        last = min(len(found), first + rng.choice([1, 1, 2, 8, 40]))
        kind = rng.randrange(6)
        if kind == 0 and first < len(found):
            found[first] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[first:last]
        elif kind == 2:
            found[first:first] = found[first:last]
        elif kind == 3:
            found[first:last] = rng.choice(TOKENS)
        elif kind == 4:
            found[first:first] = rng.choice(TOKENS)
        else:
            start = rng.randrange(len(found) + 1)
            found[first:last] = found[start : start + (last - first)]
    return bytes(found)


def sound_header() -> tuple[bytes, int]:
    """A header, and the size of its data section."""
    tensors = sound()[TWO]
    return json.dumps(header(tensors)).encode(), sum(len(tensor.data) for tensor in tensors.values())


def sound_index() -> bytes:
    """An index."""
    weight_map = {tensor: name for name, tensors in sound().items() for tensor in tensors}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def sound_config() -> bytes:
    """A config."""
    return json.dumps(dict(CONFIG) | {"text_config": {"a": [1, 2.5, None, "é"]}}).encode()


def as_shard(head: bytes, data_bytes: int) -> bytes:
    """A whole shard with zeros as data."""
    return struct.pack("<Q", len(head)) + head + bytes(data_bytes)
