"""Marks of unfinished uploads: small objects that tell whose they are, so that those of a dead process can be ended.

A listing of uploads names no owner. So a mark is written before an upload begins, without the id that is not known yet,
and again with it, and removed after the upload; it outlives a process that is killed at any point between. Of an
owner on another machine only the age of what it left is known.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from shardmill.core.digest import canonical_json
from shardmill.errors import ObjectMissing, StorageFailed
from shardmill.storage.process import Process
from shardmill.storage.s3_client import CLEANUP_SECONDS, REQUEST_SECONDS, Client, Place

MARKS: Final = ".shardmill-uploads"
"""Folder of the marks; no listing shows it."""
CANARY: Final = ".shardmill-canary-"
"""Start of the names of the files that a probe writes."""
_COMMON: Final = ".shardmill-"
_MARK_LIMIT: Final = 16 << 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mark:
    """What one mark says."""

    place: Place
    owner: Process
    modified: datetime
    key: str = ""
    """Of the upload; empty in a canary."""
    upload: str | None = None
    """Id of the upload; None while it is not known."""

    def is_held(self) -> bool | None:
        """Whether a living writer holds it; None where that cannot be told."""
        return self.place in _held if self.owner == Process.current() else self.owner.is_running()

    def may_cover(self, upload: OpenUpload) -> bool:
        """Whether an upload could be the one whose id the mark does not know."""
        # Servers tell some times in whole seconds.
        since = (upload.begun - self.modified.replace(microsecond=0)).total_seconds()
        return self.upload is None and self.key == upload.key and 0 <= since <= 2 * REQUEST_SECONDS


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """An unfinished upload in a bucket."""

    key: str
    id: str
    begun: datetime


_held: set[Place] = set()
"""Marks and canaries that this process has in use."""


def hold(place: Place) -> None:
    """Protect a mark or canary of this process from its own sweeps."""
    _held.add(place)


def let_go(place: Place) -> None:
    """A sweep of any process may remove this mark or canary, and what it stands for."""
    _held.discard(place)


def body_of(key: str = "", upload: str | None = None) -> bytes:
    """Write a mark of this process."""
    return canonical_json({"owner": asdict(Process.current()), "key": key, "upload": upload})


def new_mark(root: Place) -> Place:
    """Name a mark for an upload below a prefix that ends in `/` or is empty."""
    return Place(root.bucket, f"{root.key}{MARKS}/{secrets.token_hex(12)}")


def open_uploads(client: Client, below: Place) -> Iterator[OpenUpload]:
    """Every unfinished upload whose key starts so."""
    after: dict[str, Any] = {}
    while True:
        page = client.call("list uploads", below, "list_multipart_uploads", Key=None, Prefix=below.key, **after)
        for item in page.get("Uploads", []):
            if str(item["Key"]).startswith(below.key):
                yield OpenUpload(item["Key"], item["UploadId"], item["Initiated"])
        if not page.get("IsTruncated"):
            return
        after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}


def objects(client: Client, below: Place, **arguments: Any) -> Iterator[Any]:
    """Every object whose key starts so, as the listing tells it."""
    while True:
        page = client.call("list", below, "list_objects_v2", Key=None, Prefix=below.key, **arguments)
        yield from page.get("Contents", [])
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def read_marks(client: Client, root: Place) -> list[Mark]:
    """Every mark and canary of a folder."""
    found = []
    for item in objects(client, Place(root.bucket, root.key + _COMMON)):
        name = str(item["Key"])[len(root.key) :]
        if not name.startswith((f"{MARKS}/", CANARY)):
            continue
        place = Place(root.bucket, item["Key"])
        with contextlib.suppress(ObjectMissing):
            data = client.get(place, _MARK_LIMIT)[1]
            found.append(_parse_mark(data, place, item["LastModified"]))
    return [mark for mark in found if mark is not None]


def _parse_mark(data: bytes, place: Place, modified: datetime) -> Mark | None:
    """Read a mark or canary; None when it names no owner."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        fields = json.loads(data)
        owner = Process.parse(fields["owner"])
        if owner is not None:
            return Mark(place, owner, modified, fields.get("key") or "", fields.get("upload"))
    return None


def end_upload(client: Client, place: Place, upload: str, *, seconds: float | None = None) -> None:
    """Abort the upload of that id; one that is not there is no error."""
    with contextlib.suppress(ObjectMissing):
        client.call("abort upload", place, "abort_multipart_upload", UploadId=upload, seconds=seconds)


def lost_uploads(uploads: Sequence[OpenUpload], mark: Mark, marks: Sequence[Mark]) -> list[OpenUpload]:
    """Uploads that can only be the one whose id `mark` does not know, though no request told it."""
    claimed = {other.upload for other in marks}
    rivals = [other for other in marks if other.place != mark.place and other.is_held() is not False]
    return [
        upload
        for upload in uploads
        if mark.may_cover(upload) and upload.id not in claimed and not any(rival.may_cover(upload) for rival in rivals)
    ]


def settle(client: Client, root: Place, place: Place, key: str) -> bool:
    """End uploads that a request of this process began without an answer; False where that fails.

    Args:
        place: of the mark.
        key: of the upload.
    """
    try:
        uploads = [upload for upload in open_uploads(client, Place(root.bucket, key)) if upload.key == key]
        marks = read_marks(client, root)
        for mark in marks:
            if mark.place == place:
                for upload in lost_uploads(uploads, mark, marks):
                    end_upload(client, Place(root.bucket, upload.key), upload.id, seconds=CLEANUP_SECONDS)
    except StorageFailed as error:
        _log.debug("%s", error.strerror)
        return False
    return True


def sweep(client: Client, root: Place, prefix: str, grace_seconds: float) -> int:
    """End the uploads of dead owners below `prefix` of a folder, and those older than the grace time; count them.

    Their marks, and canaries, go with them.
    """
    # Uploads first: an upload that is in this list has had its mark before, so a living owner is never overlooked.
    uploads = list(open_uploads(client, Place(root.bucket, root.key + prefix)))
    marks = read_marks(client, root)
    eldest = datetime.fromtimestamp(time.time() - grace_seconds).astimezone()
    gone = [mark for mark in marks if mark.is_held() is False]
    doomed = {upload for upload in uploads if upload.begun < eldest}
    doomed |= {upload for upload in uploads if upload.id in {mark.upload for mark in gone}}
    doomed |= {upload for mark in gone for upload in lost_uploads(uploads, mark, marks)}
    held = {mark.upload for mark in marks if mark.is_held()}
    doomed = {upload for upload in doomed if upload.id not in held}
    for upload in sorted(doomed, key=lambda upload: (upload.key, upload.id)):
        end_upload(client, Place(root.bucket, upload.key), upload.id)
    is_old = eldest - timedelta(seconds=2 * REQUEST_SECONDS)
    for mark in marks:
        is_below = (mark.key or mark.place.key).startswith(root.key + prefix)
        if is_below and (mark in gone or (mark.modified < is_old and not mark.is_held())):
            client.remove(mark.place)
    return len(doomed)
