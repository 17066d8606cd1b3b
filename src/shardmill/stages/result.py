"""Reading a finished checkpoint: everything but its tensor bytes at once, and those range by range."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from shardmill.core.assemble import MANIFEST_NAME
from shardmill.core.limits import RESULT, Intake
from shardmill.core.manifest import Manifest, parse_manifest
from shardmill.core.plan import Checkpoint
from shardmill.core.strict_json import parse_json
from shardmill.core.written import PLAIN_CONFIG, Located, WrittenConfig, parse_written_config, quantized_modules
from shardmill.errors import CheckpointInvalid, Problem
from shardmill.storage.folder import Reader
from shardmill.storage.source import SourceFolder, open_source, read_checkpoint

BLOCK_BYTES: Final = 32 << 20
"""Bytes of a tensor that are read at a time."""
INTAKE: Final = Intake(limits=RESULT)
_MANIFEST_LIMIT: Final = 512_000_000
"""Bytes; a hundred thousand tensors take about 50 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyWatch:
    """Callbacks of a verification for whoever shows its progress."""

    on_total: Callable[[int], None] = field(default=lambda _size: None)
    """Called with the bytes that a pass is going to read."""
    on_bytes: Callable[[int], None] = field(default=lambda _size: None)
    on_note: Callable[[str], None] = field(default=lambda _note: None)
    """Called with what could not be checked, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished checkpoint without its tensor bytes."""

    folder: SourceFolder
    checkpoint: Checkpoint
    config: WrittenConfig
    tensors: dict[str, Located]
    modules: dict[str, dict[str, Located]]
    """Params of the quantized modules, by param name."""
    manifest: Manifest | None
    """None as well when it cannot be read; then a problem says so."""
    manifest_problems: tuple[Problem, ...]

    @property
    def is_ours(self) -> bool:
        """Whether a manifest lies there, be it readable or not."""
        return self.manifest is not None or bool(self.manifest_problems)


def read_result(destination: str) -> Result:
    """Read everything but tensors; what is wrong is in the problems of the parts.

    Raises:
        CheckpointInvalid: there is no such folder.
    """
    folder = open_source(destination, INTAKE)
    checkpoint = read_checkpoint(folder)
    tensors = {
        spec.name: Located(shard.name, shard.header.data_start, spec)
        for shard in checkpoint.shards
        for spec in shard.header.tensors
    }
    manifest, problems = _read_manifest(folder)
    is_plain = manifest is not None and manifest.recipe.dequantize
    return Result(
        folder=folder,
        checkpoint=checkpoint,
        config=PLAIN_CONFIG if is_plain else parse_written_config(checkpoint.config),
        tensors=tensors,
        modules=quantized_modules(tensors),
        manifest=manifest,
        manifest_problems=problems,
    )


def _read_manifest(folder: SourceFolder) -> tuple[Manifest | None, tuple[Problem, ...]]:
    if MANIFEST_NAME not in folder.names():
        return None, ()
    try:
        return read_manifest(folder), ()
    except CheckpointInvalid as error:
        return None, error.problems


def read_manifest(folder: SourceFolder) -> Manifest:
    """Read the manifest of a finished result.

    Raises:
        CheckpointInvalid: there is none that can be read.
    """
    data = folder.read_text(MANIFEST_NAME, _MANIFEST_LIMIT)
    return parse_manifest(parse_json(data, file=MANIFEST_NAME, kind="manifest-invalid", limits=RESULT))


@dataclass(slots=True)
class Readers:
    """Open shards of one checkpoint, each in the state in which it was first opened."""

    folder: SourceFolder
    stack: ExitStack
    opened: dict[str, Reader] = field(default_factory=dict)

    def read(self, shard: str, offset: int, length: int) -> bytearray:
        """Read bytes of a shard, counted from the start of the file."""
        if shard not in self.opened:
            self.opened[shard] = self.stack.enter_context(self.folder.open(shard))
        data = bytearray(length)
        self.opened[shard].read_into(offset, memoryview(data))
        return data

    def whole(self, located: Located) -> bytearray:
        """The bytes of a small tensor."""
        return self.read(located.shard, located.data_start + located.spec.begin, located.spec.nbytes)

    def blocks(self, located: Located) -> Iterator[bytearray]:
        """The bytes of a tensor, block by block."""
        spec = located.spec
        for begin in range(0, spec.nbytes, BLOCK_BYTES):
            length = min(BLOCK_BYTES, spec.nbytes - begin)
            yield self.read(located.shard, located.data_start + spec.begin + begin, length)


def stored_shapes(result: Result, readers: Readers) -> dict[str, tuple[int, int]]:
    """Values of all `weight_shape` tensors that hold two positive numbers, by tensor name."""
    found = {}
    for params in result.modules.values():
        located = params.get("weight_shape")
        if located is not None and located.spec.dtype == "I64" and located.spec.shape == (2,):
            rows, cols = struct.unpack("<qq", readers.whole(located))
            if rows > 0 and cols > 0:
                found[located.spec.name] = (rows, cols)
    return found
