"""Fuzz headers, indexes and configs, led by coverage; runs until it is told to end, or finds an untyped error.

python tests/attacks/fuzz.py -max_total_time=600
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["shardmill.core"]):
    from shardmill.core.header import LENGTH_BYTES, header_length, parse_header
    from shardmill.core.index import parse_index
    from shardmill.core.strict_json import parse_json
    from shardmill.errors import Refused


def read_any(data: bytes) -> None:
    """Read bytes as each of the three; only typed refusals may come out."""
    with suppress(Refused):
        length = header_length(data[:LENGTH_BYTES], len(data))
        header = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data))
        assert header.size == len(data)
    with suppress(Refused):
        parse_header(data, LENGTH_BYTES + len(data))
    with suppress(Refused):
        assert parse_index(data).shards
    with suppress(Refused):
        parse_json(data, file="config.json", kind="config-invalid")


HEADER = b'{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]}}'
SEEDS = [
    len(HEADER).to_bytes(LENGTH_BYTES, "little") + HEADER + bytes(4),
    HEADER.replace(b"2,2", b"0,2").replace(b"0,4", b"0,0"),
    b'{"metadata": {"total_size": 4}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}',
    b'{"model_type": "llama", "a": [1, 2.5e3, null, "\\u00e9"], "b": {"c": true}}',
]


def run() -> None:
    """Fuzz, from a few sound inputs on."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], read_any)
        atheris.Fuzz()


if __name__ == "__main__":
    run()
