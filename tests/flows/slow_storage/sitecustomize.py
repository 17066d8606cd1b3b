"""In the path of a worker: every shard takes about a second, so that there is time to stop a run of small ones."""

from __future__ import annotations

import time

from shardmill.storage.local import FileWriter

SMALLEST = 4096
"""Bytes of a write that takes time: those of receipts and headers do not."""
SECONDS = 1.0
_write = FileWriter.write


def _slow_write(self: FileWriter, data: memoryview) -> None:
    _write(self, data)
    if data.nbytes >= SMALLEST:
        time.sleep(SECONDS)


FileWriter.write = _slow_write  # type: ignore[method-assign]
