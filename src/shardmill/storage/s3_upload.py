"""Uploads in parts: of a stream whose size is known, and of another object's ranges."""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import logging
import math
import os
import queue
import re
import secrets
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote, unquote

from shardmill.core.receipt import BlobDigests
from shardmill.errors import ObjectMissing, StorageFailed, StorageUnavailable, show
from shardmill.storage.buffers import copy_bytes, new_buffer
from shardmill.storage.hashing import BlobHashes
from shardmill.storage.operations import operation
from shardmill.storage.s3_client import CLEANUP_SECONDS, Body, Client, Place, transfer_seconds, wait_for
from shardmill.storage.s3_marks import body_of, end_upload, hold, let_go, new_mark, settle

PART_BYTES: Final[int] = 16 << 20
"""Least size of a part; a file that is no larger is written in one request."""
PARTS_IN_FLIGHT: Final[int] = 3
"""Most of one upload."""
SHARED_BUFFERS: Final[int] = 2
"""Buffers of a part's size that the uploads of a process share, beside the one that each has for itself."""
COPY_PART_BYTES: Final[int] = 256 << 20
COPIES_IN_FLIGHT: Final[int] = 8
_PARTS: Final = 9000
"""A file has at most so many; servers allow 10,000."""
_FINISH_SECONDS: Final = 300.0
_COPY_SPEED: Final = 16 << 20
"""Bytes per second that a server-side copy is given time for."""
_MIB: Final = 1 << 20
_TAG: Final = "shardmill-tag-"
_WRITER: Final = "shardmill-writer"
_PLAIN: Final = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")

_log = logging.getLogger(__name__)


def part_bytes(size: int, least: int) -> int:
    """Size of the parts of a file; it follows from the size of the file alone, so that the ETag repeats."""
    needed = math.ceil(size / _PARTS)
    return least if needed <= least else math.ceil(needed / _MIB) * _MIB


def copy_seconds(size: int) -> float:
    """How long a server-side copy of `size` bytes may take."""
    return transfer_seconds(0) + size / _COPY_SPEED


def metadata_of(tags: Mapping[str, str]) -> dict[str, str]:
    """User metadata that holds tags.

    Raises:
        ValueError: the name of a tag is not made of lower-case letters, digits, `_`, and `-`.
    """
    for name in tags:
        if not re.fullmatch(r"[a-z0-9_-]{1,64}", name):
            raise ValueError(f"tag {show(name)}: expected lower-case letters, digits, `_`, and `-`")
    # Some proxies drop headers whose names hold an underscore, and some servers take few other characters.
    return {_TAG + name.replace("_", "."): quote(value, safe=_PLAIN) for name, value in tags.items()}


def tags_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Tags that user metadata holds."""
    lowered = {name.lower(): value for name, value in metadata.items()}
    return {
        name[len(_TAG) :].replace(".", "_"): unquote(value)
        for name, value in sorted(lowered.items())
        if name.startswith(_TAG)
    }


def metadata_in(reply: Mapping[str, Any]) -> Mapping[str, str]:
    """User metadata of a reply."""
    found: Mapping[str, str] = reply.get("Metadata", {})
    return found


class Upload:
    """One upload in parts, begun; `finish` makes the object visible, `abort` leaves nothing."""

    def __init__(self, client: Client, root: Place, place: Place, tags: Mapping[str, str]) -> None:
        self._client, self._root, self._place = client, root, place
        self._token = secrets.token_hex(12)
        self._futures: dict[int, Future[str]] = {}
        self._failure: BaseException | None = None
        self._is_stopped = False
        self._is_over = False
        self._tries = 0
        self._id = ""
        self._mark = new_mark(root)
        hold(self._mark)
        try:
            client.put(self._mark, body_of(place.key))
            self._begin(metadata_of(tags) | {_WRITER: self._token})
        except BaseException:
            self.abort()
            raise

    def _begin(self, metadata: Mapping[str, str]) -> None:
        def attempt() -> Awaitable[Any]:
            self._tries += 1
            return self._client.send(
                "create_multipart_upload", Bucket=self._place.bucket, Key=self._place.key, Metadata=metadata
            )

        with operation("begin upload", self._place.url):
            self._id = wait_for(self._client.start("begin upload", self._place.url, attempt))["UploadId"]
        if self._tries == 1:  # else one more may have begun, and the mark has to cover it until that is settled
            self._client.put(self._mark, body_of(self._place.key, self._id))

    def raise_failure(self) -> None:
        """Raise the first error of a part, if there was one."""
        if self._failure is not None:
            raise self._failure

    def send_part(self, number: int, view: memoryview, release: Callable[[], None]) -> None:
        """Begin to send a part; `release` is called when its bytes are needed no more."""

        def attempt() -> Awaitable[Any]:
            return self._client.send("upload_part", Body=Body(view), PartNumber=number, **self._names())

        self._start("upload part", number, attempt, transfer_seconds(len(view)), release)

    def copy_part(self, number: int, source: Place, etag: str, span: range, release: Callable[[], None]) -> None:
        """Begin to copy a range of another object; `release` is called at its end."""

        def attempt() -> Awaitable[Any]:
            return self._client.send(
                "upload_part_copy",
                CopySource={"Bucket": source.bucket, "Key": source.key},
                CopySourceIfMatch=f'"{etag}"',
                CopySourceRange=f"bytes={span.start}-{span.stop - 1}",
                PartNumber=number,
                **self._names(),
            )

        self._start("copy part", number, attempt, copy_seconds(len(span)), release)

    def _names(self) -> dict[str, str]:
        return {"Bucket": self._place.bucket, "Key": self._place.key, "UploadId": self._id}

    def _start(
        self,
        name: str,
        number: int,
        attempt: Callable[[], Awaitable[Any]],
        seconds: float,
        release: Callable[[], None],
    ) -> None:
        async def etag() -> str:
            reply = await attempt()
            return str(reply.get("CopyPartResult", reply)["ETag"])

        with operation(name, self._place.url):
            future = self._client.start(name, self._place.url, etag, seconds=seconds, give_up=lambda: self._is_stopped)
        self._futures[number] = future
        future.add_done_callback(functools.partial(self._end_part, release))

    def _end_part(self, release: Callable[[], None], future: Future[str]) -> None:
        if not future.cancelled() and self._failure is None:
            self._failure = future.exception()
        release()

    def finish(self, size: int) -> None:
        """Wait for every part and make the object visible.

        Raises:
            StorageFailed: a part failed, the storage refuses, or the object has another size.
        """
        concurrent.futures.wait(self._futures.values())
        self.raise_failure()
        parts = [{"PartNumber": number, "ETag": self._futures[number].result()} for number in sorted(self._futures)]
        trouble: StorageFailed | None = None
        try:
            self._client.call(
                "finish upload",
                self._place,
                "complete_multipart_upload",
                seconds=_FINISH_SECONDS,
                UploadId=self._id,
                MultipartUpload={"Parts": parts},
            )
        except (ObjectMissing, StorageUnavailable) as error:
            trouble = error  # done all the same, where only the reply was lost
        try:
            self._check(size, trouble)
        except StorageFailed:
            if trouble is None:
                self._remove_quietly(self._place)
            raise
        self._is_over = True
        self._leave_mark()

    def _check(self, size: int, trouble: StorageFailed | None) -> None:
        try:
            reply = self._client.call("head", self._place, "head_object")
        except StorageFailed:
            if trouble is not None:
                raise trouble from None
            raise
        if trouble is not None and metadata_in(reply).get(_WRITER) != self._token:
            raise trouble
        if reply["ContentLength"] != size:
            message = f"{show(self._place.url, 200)} has {reply['ContentLength']} bytes, expected {size}"
            raise StorageFailed(errno.EIO, f"finish upload: {message}")

    def abort(self) -> None:
        """Send no more, wait for what is on its way, drop it all; the mark stays where that fails."""
        if self._is_over:
            return
        self._is_over = self._is_stopped = True
        concurrent.futures.wait(self._futures.values())
        if self._id:
            try:
                end_upload(self._client, self._place, self._id, seconds=CLEANUP_SECONDS)
            except StorageFailed as error:
                _log.warning("%s; a later sweep will end the upload", error.strerror)
                let_go(self._mark)
                return
        self._leave_mark()

    def _leave_mark(self) -> None:
        is_unsure = self._tries > 1 or (self._tries == 1 and not self._id)
        if not is_unsure or settle(self._client, self._root, self._mark, self._place.key):
            self._remove_quietly(self._mark)
        let_go(self._mark)

    def _remove_quietly(self, place: Place) -> None:
        try:
            self._client.remove(place, seconds=CLEANUP_SECONDS)
        except StorageFailed as error:
            _log.debug("%s", error.strerror)


def copy_in_parts(
    client: Client, root: Place, place: Place, source: Place, etag: str, size: int, tags: Mapping[str, str]
) -> None:
    """Copy an object within the storage by ranges.

    Raises:
        StorageFailed: the storage refuses; nothing is left then.
    """
    upload = Upload(client, root, place, tags)
    slots = threading.BoundedSemaphore(COPIES_IN_FLIGHT)
    length = part_bytes(size, COPY_PART_BYTES)
    try:
        for number, begin in enumerate(range(0, size, length), 1):
            slots.acquire()
            upload.raise_failure()
            upload.copy_part(number, source, etag, range(begin, min(size, begin + length)), slots.release)
        upload.finish(size)
    except BaseException:
        upload.abort()
        raise


_shared = threading.BoundedSemaphore(SHARED_BUFFERS)


def _after_fork() -> None:
    global _shared  # noqa: PLW0603 - uploads of the other process hold what it lends
    _shared = threading.BoundedSemaphore(SHARED_BUFFERS)


os.register_at_fork(after_in_child=_after_fork)


class _Buffers:
    """How many buffers a writer has: one of its own, and of the shared ones as many as there are."""

    def __init__(self) -> None:
        self._shared = _shared
        self._count = 0

    def take(self) -> bool:
        """Whether there may be another buffer; never more than one above the parts on their way."""
        if self._count and (self._count > PARTS_IN_FLIGHT or not self._shared.acquire(blocking=False)):
            return False
        self._count += 1
        return True

    def give_back(self) -> None:
        """Leave all of them to others, once no part is on its way."""
        for _ in range(1, self._count):
            self._shared.release()
        self._count = 0


def _abandon(uploads: list[Upload], buffers: _Buffers) -> None:
    """Abort what a dropped writer left; in a thread, since garbage is collected anywhere, the event loop included."""

    def abort() -> None:
        for upload in uploads:
            upload.abort()
        buffers.give_back()

    if uploads:
        threading.Thread(target=abort, name="abandoned upload", daemon=True).start()


class S3Writer:
    """Writes one object of known size under its final name; `commit` makes it visible, anything else leaves nothing."""

    def __init__(self, client: Client, root: Place, place: Place, size: int, tags: Mapping[str, str]) -> None:
        self._client, self._root, self._place, self._size = client, root, place, size
        self._tags = dict(tags)
        metadata_of(tags)
        self._hashes = BlobHashes(size)
        self._part_bytes = part_bytes(size, PART_BYTES)
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._buffers = _Buffers()
        self._buffer = memoryview(b"")
        self._used = 0
        """Bytes in the buffer."""
        self._taken = 0
        """Bytes that were accepted, those in the buffer included."""
        self._parts = 0
        self._is_over = False
        self._uploads: list[Upload] = []
        self._finalizer = weakref.finalize(self, _abandon, self._uploads, self._buffers)
        self._finalizer.atexit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, data: memoryview) -> None:
        """Append bytes; the view may be used again as soon as this returns.

        Raises:
            StorageFailed: the storage refused a part, or the writer is closed.
        """
        self._demand_open()
        view = data.cast("B") if data.nbytes else memoryview(b"")
        self._hashes.update(view)
        rest = view[: self._size - self._taken]  # bytes beyond the announced ones are told by `commit`
        while len(rest):
            if self._used == len(self._buffer):
                self._next_buffer()
            count = min(len(rest), len(self._buffer) - self._used)
            copy_bytes(self._buffer[self._used : self._used + count], rest[:count])
            self._used += count
            self._taken += count
            rest = rest[count:]
            if self._used == self._part_bytes and self._size > self._part_bytes:
                self._send()

    def commit(self, name: str = "", *, sealed: bool = False) -> BlobDigests:  # noqa: ARG002 - objects have no modes
        """Make the object visible; return the digests of what was written.

        Raises:
            StorageFailed: fewer or more bytes than announced, or the storage refuses.
        """
        if name and self._root.key + name != self._place.key:
            raise ValueError(f"{show(self._place.url, 200)} cannot be named {show(name)}: the name is fixed")
        self._demand_open()
        digests = self._hashes.result()
        if digests.size != self._size:
            found = f"{self._size} bytes announced, {digests.size} written"
            raise StorageFailed(errno.EIO, f"write {show(self._place.url, 200)}: {found}")
        if self._size <= self._part_bytes:
            self._client.put_view(self._place, self._buffer[: self._used], Metadata=metadata_of(self._tags))
        else:
            if self._used:
                self._send()
            self._uploads[0].finish(self._size)
        self._close()
        self._buffers.give_back()
        return digests

    def abort(self) -> None:
        """Drop what was written; nothing to do after `commit` or another `abort`."""
        uploads = list(self._uploads)
        self._close()
        for upload in uploads:
            upload.abort()
        self._buffers.give_back()

    def _demand_open(self) -> None:
        if self._is_over:
            raise StorageFailed(errno.EBADF, f"write {show(self._place.url, 200)}: the writer is closed")

    def _close(self) -> None:
        self._is_over = True
        self._finalizer.detach()
        self._buffer = memoryview(b"")
        self._used = 0

    def _next_buffer(self) -> None:
        """Take a buffer: a new one where there may be more, else one whose part has arrived."""
        if self._buffers.take():
            self._buffer = new_buffer(min(self._part_bytes, self._size))
        else:
            self._buffer = self._free.get()
        self._used = 0
        for upload in self._uploads:
            upload.raise_failure()

    def _send(self) -> None:
        if not self._uploads:
            self._uploads.append(Upload(self._client, self._root, self._place, self._tags))
        buffer, length = self._buffer, self._used
        self._parts += 1
        self._uploads[0].send_part(self._parts, buffer[:length], functools.partial(self._free.put, buffer))
        self._buffer, self._used = memoryview(b""), 0
