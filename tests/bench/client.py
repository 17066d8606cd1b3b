"""What moving the bytes through S3 costs: every byte of the source read, as many written as the result has.

    python client.py SOURCE_URL DESTINATION_URL NAME OUTPUT_BYTES [NAME OUTPUT_BYTES ...]

s3fs with the settings that it comes with; two files at a time, and of each four ranged reads and three parts of 16 MB
in flight, both directions at once. What arrives is dropped and what is sent is always the same, so that nothing is
computed but what the protocol asks for. Prints the bytes that were read and written, and the seconds of a run after the
imports.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

from s3fs import S3FileSystem

BLOCK_BYTES: Final = 16_000_000
READS_IN_FLIGHT: Final = 4
PARTS_IN_FLIGHT: Final = 3
FILES_AT_A_TIME: Final = 2

Pair = tuple[str, int]
"""Name of a file, and how many bytes of the result go with it."""


async def _gather(calls: Iterable[Callable[[], Awaitable[Any]]], at_a_time: int) -> list[Any]:
    """Results of all calls, in their order."""
    slots = asyncio.Semaphore(at_a_time)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await call()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(call)) for call in calls]
    return [task.result() for task in tasks]


def _spans(size: int) -> list[tuple[int, int]]:
    return [(begin, min(size, begin + BLOCK_BYTES)) for begin in range(0, size, BLOCK_BYTES)]


class Mover:
    """Moves the bytes of one checkpoint."""

    def __init__(self, files: S3FileSystem, source: str, destination: str) -> None:
        self._files, self._source, self._destination = files, source, destination
        self._block = os.urandom(BLOCK_BYTES)

    async def move(self, pairs: Sequence[Pair]) -> tuple[int, int]:
        """Move every file; returns how many bytes were read and written."""
        moved = await _gather([partial(self._move, *pair) for pair in pairs], FILES_AT_A_TIME)
        return sum(read for read, _ in moved), sum(written for _, written in moved)

    async def _move(self, name: str, output_bytes: int) -> tuple[int, int]:
        read, _ = await asyncio.gather(self._read(name), self._write(name, output_bytes))
        return read, output_bytes

    async def _read(self, name: str) -> int:
        path = f"{self._source}/{name}"
        size: int = (await self._files._info(path))["size"]

        async def get(begin: int, end: int) -> int:
            return len(await self._files._cat_file(path, start=begin, end=end))

        return sum(await _gather([partial(get, *span) for span in _spans(size)], READS_IN_FLIGHT))

    async def _write(self, name: str, size: int) -> None:
        bucket, _, key = f"{self._destination}/{name}".removeprefix("s3://").partition("/")
        if size <= BLOCK_BYTES:
            await self._call("put_object", Bucket=bucket, Key=key, Body=self._block[:size])
            return
        async with self._upload(bucket, key) as (names, parts):

            async def put(number: int, begin: int, end: int) -> dict[str, Any]:
                reply = await self._call("upload_part", **names, PartNumber=number, Body=self._block[: end - begin])
                return {"PartNumber": number, "ETag": reply["ETag"]}

            calls = [partial(put, n, *span) for n, span in enumerate(_spans(size), 1)]
            parts.extend(await _gather(calls, PARTS_IN_FLIGHT))

    @asynccontextmanager
    async def _upload(self, bucket: str, key: str) -> AsyncIterator[tuple[dict[str, str], list[dict[str, Any]]]]:
        begun = await self._call("create_multipart_upload", Bucket=bucket, Key=key)
        names = {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"]}
        parts: list[dict[str, Any]] = []
        yield names, parts
        await self._call("complete_multipart_upload", **names, MultipartUpload={"Parts": parts})

    async def _call(self, method: str, **arguments: Any) -> Any:
        return await self._files._call_s3(method, **arguments)


async def main() -> None:
    started = time.perf_counter()
    source, destination, *words = sys.argv[1:]
    pairs = [(name, int(size)) for name, size in zip(words[::2], words[1::2], strict=True)]
    files = S3FileSystem(asynchronous=True, skip_instance_cache=True)
    session = await files.set_session()
    try:
        read, written = await Mover(files, source, destination).move(pairs)
    finally:
        await session.close()
    seconds = time.perf_counter() - started
    sys.stdout.write(json.dumps({"read": read, "written": written, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
