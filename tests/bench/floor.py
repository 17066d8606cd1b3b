"""What moving the bytes costs at least: read every input once, write as many bytes as the result has, flush alike.

    python floor.py THREADS DESTINATION SOURCE OUTPUT_BYTES [SOURCE OUTPUT_BYTES ...]

Outputs are preallocated, flushed to the device, and as many as the inputs. Prints the seconds from the first open to
the last flush.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PIECE_BYTES: Final = 64 << 20
BLOCK_BYTES: Final = 8 << 20
_LOCAL: Final = threading.local()


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of one input, and the range of the output that goes with it."""

    source: int
    destination: int
    read: tuple[int, int]
    write: tuple[int, int]


def pieces(source: int, destination: int, size: int, output_bytes: int) -> Iterator[Piece]:
    """Cut a pair of open files into ranges that any thread may take."""
    count = max(1, -(-size // PIECE_BYTES))
    for n in range(count):
        read = (size * n // count, size * (n + 1) // count)
        yield Piece(source, destination, read, (output_bytes * n // count, output_bytes * (n + 1) // count))


def move(piece: Piece) -> None:
    """Read one range and write the other, block by block, with one buffer per thread."""
    if not hasattr(_LOCAL, "buffer"):
        _LOCAL.buffer = memoryview(bytearray(os.urandom(1 << 16) * (BLOCK_BYTES >> 16)))
    buffer: memoryview = _LOCAL.buffer
    begin, end = piece.read
    while begin < end:
        begin += os.preadv(piece.source, [buffer[: min(BLOCK_BYTES, end - begin)]], begin)
    begin, end = piece.write
    while begin < end:
        begin += os.pwrite(piece.destination, buffer[: min(BLOCK_BYTES, end - begin)], begin)


def copy(pairs: Sequence[tuple[Path, int]], destination: Path, threads: int) -> float:
    """Move every pair of input and output size; returns seconds."""
    started = time.perf_counter()
    destination.mkdir()
    with ThreadPoolExecutor(threads) as pool:
        work: list[Piece] = []
        for path, output_bytes in pairs:
            source = os.open(path, os.O_RDONLY)
            target = os.open(destination / path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            if output_bytes:
                os.posix_fallocate(target, 0, output_bytes)
            work += pieces(source, target, os.fstat(source).st_size, output_bytes)
        list(pool.map(move, work))
        list(pool.map(os.fsync, {piece.destination for piece in work}))
    folder = os.open(destination, os.O_RDONLY)
    os.fsync(folder)
    return time.perf_counter() - started


def main() -> None:
    threads, destination, *words = sys.argv[1:]
    pairs = [(Path(path), int(size)) for path, size in zip(words[::2], words[1::2], strict=True)]
    sys.stdout.write(f"{copy(pairs, Path(destination), int(threads))}\n")


if __name__ == "__main__":
    main()
