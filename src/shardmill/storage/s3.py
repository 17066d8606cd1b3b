"""A prefix of a bucket of any S3-compatible storage as a folder."""

from __future__ import annotations

import base64
import binascii
import errno
import functools
import logging
import secrets
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardmill.core.digest import Digest
from shardmill.errors import FileTooLarge, ObjectMissing, Problem, SourceChanged, StorageFailed, refuse, show
from shardmill.storage.blocks import BlockReader
from shardmill.storage.folder import FileIdentity, Folder, Reader, Traits, Writer
from shardmill.storage.s3_client import Client, Place, RequestRefused, changed, connect, etag_of
from shardmill.storage.s3_marks import CANARY, MARKS, body_of, hold, let_go, objects
from shardmill.storage.s3_marks import sweep as sweep_marks
from shardmill.storage.s3_upload import S3Writer, copy_in_parts, copy_seconds, metadata_in, metadata_of, tags_of

RANGE_BYTES: Final[int] = 16 << 20
"""Read by one request; each of them costs client and server."""
COPY_WHOLE_BYTES: Final[int] = 5 * 1000**3
"""Up to this size one request copies an object; larger ones are copied in parts."""
_CREATE_TRIES: Final = 3

_log = logging.getLogger(__name__)


def open_s3(bucket: str, prefix: str) -> S3Folder:
    """Name the folder `s3://bucket/prefix`; nothing is asked of the storage yet."""
    return S3Folder(bucket, prefix.strip("/"))


@dataclass(frozen=True, slots=True)
class S3Folder:
    """The objects below `s3://bucket/prefix`; holds neither credentials nor connections, so it may go anywhere."""

    bucket: str
    prefix: str
    """Without a slash at either end; empty for the whole bucket."""

    @property
    def url(self) -> str:
        """Where the folder lies; holds no secret."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def traits(self) -> Traits:
        """Names are fixed when writing starts, and bytes cross a network."""
        return Traits(kind="s3", names_late=False, is_remote=True)

    @property
    def path(self) -> Path | None:
        """None: it is not on this machine's disk."""
        return None

    @property
    def _root(self) -> Place:
        return Place(self.bucket, f"{self.prefix}/" if self.prefix else "")

    def _place(self, name: str) -> Place:
        if not _is_inside(name):
            raise StorageFailed(errno.EINVAL, f"{show(name)} is not the name of a file in {show(self.url, 200)}")
        return Place(self.bucket, self._root.key + name)

    # ---- looking

    def exists(self) -> bool:
        """Whether there is at least one file below it.

        Raises:
            StorageFailed: the storage refuses, or there is no such bucket.
        """
        root = self._root
        return any(_is_shown(item["Key"][len(root.key) :], "") for item in objects(connect(), root))

    def listing(self, prefix: str = "") -> dict[str, FileIdentity]:
        """Every file below `prefix` (empty, or ends in `/`), by name, sorted; always as it is now.

        Keys whose names could not be those of files on disk are left out, as are marks of unfinished uploads.
        """
        root = self._root
        found = {}
        for item in objects(connect(), Place(root.bucket, root.key + prefix)):
            name = str(item["Key"])[len(root.key) :]
            if _is_shown(name, prefix):
                found[name] = _identity(Place(root.bucket, item["Key"]), item, int(item["Size"]))
        return dict(sorted(found.items()))

    def identity(self, name: str) -> FileIdentity | None:
        """The state of a file, tags and digest included; None when there is none."""
        place = self._place(name)
        try:
            reply = connect().call("head", place, "head_object", ChecksumMode="ENABLED")
        except ObjectMissing:
            return None
        return _identity(place, reply, int(reply["ContentLength"]))

    def _present(self, name: str) -> FileIdentity:
        found = self.identity(name)
        if found is None:
            place = self._place(name)
            raise ObjectMissing(errno.ENOENT, f"head {show(place.url, 200)} failed: there is no such file")
        return found

    def check(self, name: str) -> None:
        """Make sure that a file of a foreign checkpoint is there.

        Raises:
            CheckpointInvalid: it is not, or its name leads out of the folder.
        """
        if not _is_inside(name):
            raise refuse("file-outside", "its name leads out of the checkpoint", file=name)
        if self.identity(name) is None:
            raise refuse("file-missing", "file is missing", file=name, way_out="fetch it again")

    # ---- reading

    def read(self, name: str, limit: int) -> bytes:
        """Read a small file whole.

        Raises:
            ObjectMissing: there is none.
            FileTooLarge: it is larger than `limit` bytes.
        """
        place = self._place(name)
        reply, data = connect().get(place, limit, ChecksumMode="ENABLED")
        size = int(reply["ContentLength"])
        if size > limit:
            raise FileTooLarge(errno.EFBIG, f"get {show(place.url, 200)}: {size} bytes, the limit is {limit}")
        return data

    def read_start(self, name: str, length: int) -> tuple[FileIdentity, bytes]:
        """The identity and the first bytes of a file, `length` of them or all, in one request; two for empty files.

        Raises:
            ObjectMissing: there is none.
        """
        place = self._place(name)
        if length < 1:
            return self._present(name), b""
        try:
            reply, data = connect().get(place, length, Range=f"bytes=0-{length - 1}")
        except RequestRefused as error:
            if error.status != 416:
                raise
            found = self._present(name)
            if found.size:
                raise changed(place) from None
            return found, b""
        total = str(reply.get("ContentRange", "")).rpartition("/")[2]
        return _identity(place, reply, int(total) if total.isdigit() else int(reply["ContentLength"])), data

    def open(self, name: str) -> Reader:
        """Open a file for reads that mostly go forward.

        Raises:
            ObjectMissing: there is none.
        """
        client, place, identity = connect(), self._place(name), self._present(name)

        def submit(start: int, view: memoryview) -> Future[None]:
            return client.read_range(place, identity.version, start, view)

        return BlockReader(identity, submit, block_bytes=RANGE_BYTES, blocks=2, more_blocks=2)

    # ---- writing

    def prepare(self) -> None:
        """Nothing to do: prefixes need not be made."""

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:  # noqa: ARG002 - it always is
        """Write a small file whole or not at all; one that is there is replaced."""
        connect().put(self._place(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file whole unless one is there; tell whether it was written.

        Where the storage does not know conditional writes, one that comes between is replaced.
        """
        place, client = self._place(name), connect()
        for _ in range(_CREATE_TRIES):
            try:
                client.put(place, data, IfNoneMatch="*")
            except RequestRefused as error:
                if error.status == 501:
                    return self._create_unguarded(name, data)
                if error.status != 412:
                    raise
            else:
                return True
            try:
                return client.get(place, len(data) + 1)[1] == data
            except ObjectMissing:
                continue  # removed between the two requests
        raise StorageFailed(errno.EBUSY, f"put {show(place.url, 200)} failed: it appears and disappears")

    def _create_unguarded(self, name: str, data: bytes) -> bool:
        if self.identity(name) is not None:
            return self.read(name, len(data)) == data
        self.put(name, data)
        return True

    def writer(self, name: str, size: int, *, tags: Mapping[str, str] = {}) -> Writer:
        """Start writing a file of `size` bytes under its final name."""
        return S3Writer(connect(), self._root, self._place(name), size, tags)

    def copy_in(self, name: str, origin: Folder, origin_name: str, *, tags: Mapping[str, str] = {}) -> bool:
        """Copy a file of the same storage without moving its bytes through this process; False from anywhere else.

        Raises:
            ObjectMissing: there is no such file.
            SourceChanged: it was replaced meanwhile.
        """
        if not isinstance(origin, S3Folder):
            return False
        source, place = origin._place(origin_name), self._place(name)  # noqa: SLF001 - a folder of this class
        state = origin._present(origin_name)  # noqa: SLF001
        client = connect()
        try:
            if state.size <= COPY_WHOLE_BYTES:
                _copy_whole(client, place, source, state, tags)
            else:
                copy_in_parts(client, self._root, place, source, state.version, state.size, tags)
        except RequestRefused as error:
            if error.status != 412:
                raise
        else:
            return True
        raise changed(source)

    def move(self, name: str, target: str) -> None:
        """Give a file another name, tags included; one that is not there is no error."""
        state = self.identity(name)
        if state is None or name == target:
            return
        try:
            self.copy_in(target, self, name, tags=state.tags)
        except ObjectMissing:
            return
        self.remove(name)

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        connect().remove(self._place(name))

    # ---- before and after work

    def probe(self) -> list[Problem]:
        """Prove with a canary that files can be created once, read and deleted here; return what is wrong.

        A storage without conditional writes is told by a warning, since runs go on without.
        """
        name = CANARY + secrets.token_hex(8)
        place = self._place(name)
        hold(place)
        try:
            return self._probe(name, body_of())
        finally:
            let_go(place)

    def _probe(self, name: str, data: bytes) -> list[Problem]:
        try:
            self.create(name, data)
        except StorageFailed as error:
            return [self._problem("create", error)]
        steps = {
            "create again": functools.partial(self._prove_create_once, name, data),
            "read": functools.partial(self._prove_read, name, data),
            "delete": functools.partial(self.remove, name),
        }
        problems = []
        for step, act in steps.items():
            try:
                act()
            except (StorageFailed, SourceChanged) as error:
                problems.append(self._problem(step, error))
        return problems

    def _prove_create_once(self, name: str, data: bytes) -> None:
        if self.create(name, data + b" "):
            _log.warning(
                "%s: the storage replaces files that are to be written only once; let no two runs write here at once",
                self.url,
            )
            self.put(name, data)

    def _prove_read(self, name: str, data: bytes) -> None:
        if self.read(name, 2 * len(data)) != data:
            raise StorageFailed(errno.EIO, f"get {show(self._place(name).url, 200)}: other bytes than were written")

    def _problem(self, step: str, error: Exception) -> Problem:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if isinstance(error, RequestRefused) and error.is_bucket_missing:
            text, way_out = f"there is no bucket {show(self.bucket)}", "create it, or correct its name"
        else:
            text, way_out = f"cannot {step} a file: {text}", "check the rights of the credentials"
        return Problem(file=self.url, kind="destination-unwritable", message=text, way_out=way_out)

    def free_bytes(self) -> int | None:
        """None: there is no limit that can be asked for."""
        return None

    def sweep(self, prefix: str = "", *, grace_seconds: float = 24 * 3600) -> int:
        """End unfinished uploads below `prefix`: those of dead runs of this machine, and old ones. Returns how many."""
        return sweep_marks(connect(), self._root, prefix, grace_seconds)


def _is_inside(name: str) -> bool:
    """Whether a name joined to the prefix stays below it, read as a path."""
    return "\0" not in name and all(part not in {"", ".", ".."} for part in name.split("/"))


def _is_shown(name: str, prefix: str) -> bool:
    is_mark = MARKS in name[len(prefix) :].split("/")[:-1]
    return _is_inside(name) and not is_mark


def _identity(place: Place, reply: Mapping[str, Any], size: int) -> FileIdentity:
    # No version id: a listing does not tell it, and the ETag changes with the bytes.
    return FileIdentity(
        url=place.url,
        version=etag_of(reply),
        size=size,
        modified=reply["LastModified"].timestamp(),
        digest=_digest(reply),
        tags=tags_of(metadata_in(reply)),
    )


def _digest(reply: Mapping[str, Any]) -> Digest | None:
    """SHA-256 of the whole object, where the storage knows it; those of uploads in parts are digests of digests."""
    value = str(reply.get("ChecksumSHA256", ""))
    is_composite = "-" in value or "-" in etag_of(reply)
    if not value or is_composite or reply.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    try:
        raw = base64.b64decode(value, validate=True)
    except binascii.Error:
        return None
    return Digest("sha256", raw.hex()) if len(raw) == 32 else None


def _copy_whole(client: Client, place: Place, source: Place, state: FileIdentity, tags: Mapping[str, str]) -> None:
    client.call(
        "copy",
        place,
        "copy_object",
        seconds=copy_seconds(state.size),
        CopySource={"Bucket": source.bucket, "Key": source.key},
        CopySourceIfMatch=f'"{state.version}"',
        Metadata=metadata_of(tags),
        MetadataDirective="REPLACE",
    )
    size = client.call("head", place, "head_object")["ContentLength"]
    if size != state.size:
        client.remove(place)
        raise changed(source)
