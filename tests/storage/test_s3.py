"""Buckets as folders, against a server in this process: what becomes visible, what stays open, what errors tell."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import re
import secrets
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Self

os.environ.setdefault("S3_UPLOAD_PART_MIN_SIZE", "65536")  # read by moto when it is imported

import pytest
from aiobotocore.awsrequest import AioAWSResponse
from blake3 import blake3
from botocore.exceptions import ConnectionClosedError
from botocore.utils import parse_timestamp
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from shardmill.core.digest import Digest, canonical_json
from shardmill.errors import (
    CheckpointInvalid,
    FileTooLarge,
    ObjectMissing,
    SourceChanged,
    StorageFailed,
    StorageUnavailable,
)
from shardmill.storage import s3, s3_client, s3_upload
from shardmill.storage.operations import Faults, watched
from shardmill.storage.process import Process
from shardmill.storage.prompt import PromptSocket
from shardmill.storage.s3 import S3Folder, open_s3
from shardmill.storage.s3_client import Place, connect
from shardmill.storage.s3_marks import MARKS

PART = 65536
SECRET = "canary-secret-0123456789"  # noqa: S105 - to be looked for in messages
KEY_ID = "CANARYKEYID012345678"
BUCKET = "bucket"
ERROR = b"<Error><Code>%s</Code><Message>for %s</Message></Error>"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel("ERROR")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class _Raw:
    def __init__(self, body: bytes) -> None:
        self.body = body

    async def read(self) -> bytes:
        return self.body


def reply(status: int, code: str) -> AioAWSResponse:
    body = ERROR % (code.encode(), SECRET.encode())
    return AioAWSResponse("http://x/?X-Amz-Signature=" + SECRET, status, {}, _Raw(body))


@dataclass
class Server:
    """What tests need besides folders: events, and sight of what no listing shows."""

    begun: dict[str, datetime] = field(default_factory=dict)
    """When an upload began, by id, where it is not now."""
    heard: list[tuple[Any, str, Callable[..., Any]]] = field(default_factory=list)

    @property
    def session(self) -> Any:
        client = connect()
        asyncio.run_coroutine_threadsafe(client._connect(), client._fs.loop).result()
        return client._fs.s3

    def on(self, event: str, act: Callable[..., Any]) -> None:
        events = self.session.meta.events
        events.register(event, act)
        self.heard.append((events, event, act))

    def fail(self, operation: str, answer: Callable[[], Any], *, times: int = 10**9, skip: int = 0) -> list[int]:
        """Answer requests of this kind before they are sent; gives a list that grows by one per request."""
        seen: list[int] = []

        def act(**_: Any) -> Any:
            seen.append(len(seen))
            return answer() if skip < len(seen) <= skip + times else None

        self.on(f"before-send.s3.{operation}", act)
        return seen

    def lose(self, operation: str, *, times: int = 1) -> None:
        """Let a request be carried out and lose its reply."""
        left = [None] * times

        def act(**_: Any) -> None:
            if left:
                left.pop()
                raise ConnectionClosedError(endpoint_url=f"http://{SECRET}@x")

        self.on(f"response-received.s3.{operation}", act)

    def call(self, method: str, **arguments: Any) -> Any:
        client = connect()
        return asyncio.run_coroutine_threadsafe(client.send(method, **arguments), client._fs.loop).result()

    def uploads(self) -> list[str]:
        return [item["UploadId"] for item in self.call("list_multipart_uploads", Bucket=BUCKET).get("Uploads", [])]

    def keys(self) -> list[str]:
        return [item["Key"] for item in self.call("list_objects_v2", Bucket=BUCKET).get("Contents", [])]

    def begin(self, key: str) -> str:
        """Begin an upload as a foreign program would."""
        return str(self.call("create_multipart_upload", Bucket=BUCKET, Key=key)["UploadId"])

    def set_times(self, parsed: dict[str, Any], **_: Any) -> None:
        """Moto tells one date for all uploads."""
        for item in parsed.get("Uploads", []):
            item["Initiated"] = self.begun.get(item["UploadId"], datetime.now().astimezone())


@pytest.fixture
def server(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(s3_client, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(s3_client, "_LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(s3_client, "REQUEST_SECONDS", 5.0)
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART)
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()  # noqa: S310
    made = Server()
    made.on("after-call.s3.ListMultipartUploads", made.set_times)
    made.call("create_bucket", Bucket=BUCKET)
    yield made
    for events, event, act in made.heard:
        events.unregister(event, act)


@pytest.fixture
def folder(server: Server) -> S3Folder:
    assert server.keys() == []
    return open_s3(BUCKET, "some/prefix/")


def data_of(size: int) -> bytes:
    return (b"%08d" * (size // 8 + 1) % tuple(range(size // 8 + 1)))[:size]


def write(folder: S3Folder, name: str, data: bytes, *, step: int = 50_000, **tags: str) -> None:
    with folder.writer(name, len(data), tags=tags) as writer:
        for begin in range(0, len(data), step):
            writer.write(memoryview(data)[begin : begin + step])
        writer.commit()


def read(folder: S3Folder, name: str) -> bytes:
    with folder.open(name) as reader:
        data = bytearray(reader.identity.size)
        reader.read_into(0, memoryview(data))
    return bytes(data)


def nothing_is_left(server: Server) -> bool:
    return server.uploads() == [] and server.keys() == []


# ---- bytes there and back


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 5 * PART + 7])
@pytest.mark.parametrize("step", [10_007, 10**6])
def test_what_is_written_is_read(folder: S3Folder, server: Server, size: int, step: int) -> None:
    data = data_of(size)
    with folder.writer("dir/file", size, tags={"job_key": "a ü%\n"}) as writer:
        for begin in range(0, size, step):
            buffer = bytearray(data[begin : begin + step])
            writer.write(memoryview(buffer))
            buffer[:] = bytes(len(buffer))  # the writer may keep no view
        digests = writer.commit("dir/file")

    assert read(folder, "dir/file") == data
    assert folder.read("dir/file", size) == data
    assert digests.whole == Digest("blake3", blake3(data).hexdigest())
    state = folder.identity("dir/file")
    assert state is not None
    assert (state.size, state.tags, state.url) == (size, {"job_key": "a ü%\n"}, "s3://bucket/some/prefix/dir/file")
    assert folder.listing() == {"dir/file": state}
    assert server.uploads() == []
    assert server.keys() == ["some/prefix/dir/file"]


@pytest.mark.parametrize("is_committed", [True, False])
def test_uploads_share_buffers_and_leave_them_to_others(
    folder: S3Folder, monkeypatch: pytest.MonkeyPatch, *, is_committed: bool
) -> None:
    shared = threading.BoundedSemaphore(1)
    monkeypatch.setattr(s3_upload, "_shared", shared)
    data = data_of(5 * PART + 7)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(folder.writer(name, len(data))) for name in ("a", "b", "c")]
        for begin in range(0, len(data), PART):
            for writer in writers:
                writer.write(memoryview(data)[begin : begin + PART])
        assert not shared.acquire(blocking=False)
        if is_committed:
            for writer in writers:
                writer.commit()
    assert shared.acquire(blocking=False)
    assert [name for name in "abc" if folder.identity(name)] == (["a", "b", "c"] if is_committed else [])
    assert all(read(folder, name) == data for name in folder.listing())


def test_views_of_other_formats_are_written_as_bytes(folder: S3Folder) -> None:
    data = data_of(2 * PART)
    with folder.writer("file", len(data)) as writer:
        writer.write(memoryview(data).cast("I"))
        writer.write(memoryview(b"").cast("B"))
        writer.commit()

    assert folder.read("file", len(data)) == data


def test_read_start_takes_one_request(folder: S3Folder) -> None:
    folder.put("file", b"0123456789")
    folder.put("empty", b"")

    for length in (1, 9, 10, 11, 100):
        with watched(Faults()) as seen:
            state, start = folder.read_start("file", length)
        assert [name for name, _ in seen.log] == ["get"]
        assert (state, start) == (folder.identity("file"), b"0123456789"[:length])
    assert folder.read_start("file", 0) == (folder.identity("file"), b"")
    assert folder.read_start("empty", 10) == (folder.identity("empty"), b"")


def test_parts_grow_with_the_file() -> None:
    assert s3_upload.part_bytes(10**9, 16 << 20) == 16 << 20
    assert s3_upload.part_bytes(5 * 10**12, 16 << 20) % (1 << 20) == 0
    assert 5 * 10**12 / s3_upload.part_bytes(5 * 10**12, 16 << 20) <= 9000


def test_small_files(folder: S3Folder) -> None:
    folder.put("file", b"one")
    folder.put("file", b"three")

    assert folder.read("file", 5) == b"three"
    with pytest.raises(FileTooLarge, match="5 bytes, the limit is 4"):
        folder.read("file", 4)
    folder.remove("file")
    folder.remove("file")
    assert folder.identity("file") is None
    with pytest.raises(ObjectMissing):
        folder.read("file", 5)
    with pytest.raises(ObjectMissing):
        folder.read_start("file", 5)
    with pytest.raises(ObjectMissing):
        folder.open("file")


def test_digest_is_that_of_the_whole_object_only(folder: S3Folder, server: Server) -> None:
    place = {"Bucket": BUCKET, "Key": "some/prefix/file"}
    server.call("put_object", Body=b"abc", ChecksumAlgorithm="SHA256", **place)
    state = folder.identity("file")
    assert state is not None
    assert state.digest == Digest.parse("sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")

    server.call("put_object", Body=b"abc", ChecksumAlgorithm="CRC32", **place)
    state = folder.identity("file")
    assert state is not None
    assert state.digest is None


@pytest.mark.parametrize(
    ("extra", "is_whole"),
    [
        ({}, True),
        ({"ChecksumType": "FULL_OBJECT"}, True),
        ({"ChecksumType": "COMPOSITE"}, False),
        ({"ETag": '"abc-2"'}, False),
        ({"ChecksumSHA256": "x" * 40 + "=-2"}, False),
        ({"ChecksumSHA256": "?"}, False),
        ({"ChecksumSHA256": "AAAA"}, False),
    ],
)
def test_digests_of_digests_are_not_believed(extra: dict[str, str], *, is_whole: bool) -> None:
    value = {"ETag": '"abc"', "ChecksumSHA256": "A" * 43 + "="} | extra

    assert (s3._digest(value) is not None) == is_whole


# ---- names


def test_names_survive(folder: S3Folder) -> None:
    names = sorted(["with space", "100%", "a+b", "ä/ö €", "%41", "a&b=c?d#e", "dir/x", "~'()*!"])
    for name in names:
        folder.put(name, name.encode())

    assert list(folder.listing()) == names
    assert [folder.read(name, 99).decode() for name in names] == names
    for name in names:
        folder.move(name, "new " + name)
    assert list(folder.listing()) == sorted(f"new {name}" for name in names)


def test_listing_leaves_out_what_is_no_file_below_the_folder(folder: S3Folder, server: Server) -> None:
    for key in ["", "a/x", "ab/x", "a/../b", "a/./b", "a//b", "a/", "/a", "x/", f"{MARKS}/1", f"a/{MARKS}/1"]:
        server.call("put_object", Bucket=BUCKET, Key=f"some/prefix/{key}", Body=b"")
    server.call("put_object", Bucket=BUCKET, Key="some/prefix2", Body=b"")

    assert list(folder.listing()) == ["a/x", "ab/x"]
    assert list(folder.listing("a/")) == ["a/x"]
    assert list(folder.listing(f"{MARKS}/")) == [f"{MARKS}/1"]
    assert folder.exists()
    assert open_s3(BUCKET, "some").exists()
    assert not open_s3(BUCKET, "some/pref").exists()
    assert not open_s3(BUCKET, "some/prefix/x").exists()
    assert open_s3(BUCKET, "").url == "s3://bucket"


def test_listing_goes_on_after_a_thousand(folder: S3Folder) -> None:
    client = connect()

    async def fill() -> None:
        for begin in range(0, 1001, 91):
            keys = [f"some/prefix/{number:04}" for number in range(begin, begin + 91)]
            await asyncio.gather(*(client.send("put_object", Bucket=BUCKET, Key=key, Body=b"") for key in keys))

    asyncio.run_coroutine_threadsafe(fill(), client._fs.loop).result()

    with watched(Faults()) as seen:
        assert list(folder.listing()) == [f"{number:04}" for number in range(1001)]
    assert [name for name, _ in seen.log] == ["list", "list"]


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/x", "", "a//b", "a/", "./a", "a\0b"])
def test_names_that_lead_elsewhere_are_refused_before_any_request(folder: S3Folder, name: str) -> None:
    with watched(Faults()) as seen:
        for act in (folder.identity, folder.open, folder.remove):
            with pytest.raises(StorageFailed, match="is not the name of a file"):
                act(name)
        with pytest.raises(CheckpointInvalid):
            folder.check(name)
    assert seen.log == []


def test_check(folder: S3Folder) -> None:
    folder.put("file", b"")
    folder.check("file")
    with pytest.raises(CheckpointInvalid, match="file is missing"):
        folder.check("other")


# ---- writers that do not finish


@pytest.mark.parametrize("fails_at", range(6))
def test_exception_at_any_write_leaves_nothing(folder: S3Folder, server: Server, fails_at: int) -> None:
    data = data_of(5 * PART)

    def work() -> None:
        with folder.writer("file", len(data)) as writer:
            for number in range(5):
                if number == fails_at:
                    raise KeyError("of the caller")
                writer.write(memoryview(data)[number * PART : (number + 1) * PART])
            raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        work()
    assert nothing_is_left(server)


@pytest.mark.parametrize("size", [PART, 3 * PART])
def test_writer_that_is_dropped_publishes_nothing(folder: S3Folder, server: Server, size: int) -> None:
    writer = folder.writer("file", size)
    writer.write(memoryview(data_of(size)))
    del writer
    gc.collect()

    for thread in threading.enumerate():
        if thread.name == "abandoned upload":
            thread.join()
    assert nothing_is_left(server)


@pytest.mark.parametrize("size", [100, 3 * PART])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_other_sizes_than_announced_are_refused(folder: S3Folder, server: Server, size: int, wrong: int) -> None:
    with folder.writer("file", size) as writer:
        writer.write(memoryview(data_of(size + wrong)))
        with pytest.raises(StorageFailed, match=f"{size} bytes announced, {size + wrong} written"):
            writer.commit()
    assert nothing_is_left(server)


def test_writer_ends_once(folder: S3Folder, server: Server) -> None:
    with folder.writer("file", 2 * PART) as writer:
        writer.write(memoryview(data_of(2 * PART)))
        with pytest.raises(ValueError, match="the name is fixed"):
            writer.commit("other")
        writer.commit("file")
        writer.abort()
        writer.abort()
        for act in (writer.commit, lambda: writer.write(memoryview(b"x"))):
            with pytest.raises(StorageFailed, match="closed"):
                act()
    assert folder.read("file", 2 * PART) == data_of(2 * PART)
    assert server.uploads() == []


@pytest.mark.parametrize(
    ("status", "code", "kind", "number"),
    [
        (403, "AccessDenied", StorageFailed, errno.EACCES),
        (507, "InsufficientStorage", StorageFailed, errno.ENOSPC),
        (403, "QuotaExceeded", StorageFailed, errno.ENOSPC),
        (500, "InternalError", StorageUnavailable, errno.EIO),
    ],
)
@pytest.mark.parametrize("operation", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
def test_refused_uploads_leave_nothing(
    folder: S3Folder,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    status: int,
    code: str,
    kind: type[StorageFailed],
    number: int,
) -> None:
    if kind is StorageUnavailable:
        monkeypatch.setattr(s3_client, "REQUEST_SECONDS", 0.5)
        monkeypatch.setattr(s3_upload, "_FINISH_SECONDS", 0.5)
    monkeypatch.setattr(s3_client, "SLOWEST", 1 << 40)
    server.fail(operation, lambda: reply(status, code))
    with pytest.raises(kind, match=f"HTTP {status} {code}") as caught:
        write(folder, "file", data_of(9 * PART))
    assert caught.value.errno == number
    monkeypatch.setattr(s3_client, "REQUEST_SECONDS", 5.0)
    assert nothing_is_left(server)


def test_errors_that_pass_are_survived(folder: S3Folder, server: Server) -> None:
    data = data_of(7 * PART)
    for operation in ("CreateMultipartUpload", "CompleteMultipartUpload", "HeadObject", "DeleteObject", "PutObject"):
        server.fail(operation, lambda: reply(503, "SlowDown"), times=2)
    server.fail("UploadPart", lambda: reply(400, "BadDigest"), times=3, skip=2)
    server.fail("GetObject", lambda: reply(429, "TooManyRequests"), times=3)
    write(folder, "file", data)

    assert read(folder, "file") == data
    assert server.uploads() == []


@pytest.mark.parametrize(
    "operation", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "HeadObject", "PutObject"]
)
def test_lost_replies_are_survived(folder: S3Folder, server: Server, operation: str) -> None:
    server.lose(operation)
    write(folder, "file", data_of(3 * PART))

    assert folder.read("file", 10 * PART) == data_of(3 * PART)
    assert server.uploads() == []  # the first of two uploads that were begun is no secret to the writer
    assert server.keys() == ["some/prefix/file"]


def test_lost_reply_whose_upload_is_forgotten_counts_where_the_object_is_ours(folder: S3Folder, server: Server) -> None:
    server.lose("CompleteMultipartUpload")
    server.fail("CompleteMultipartUpload", lambda: reply(404, "NoSuchUpload"), skip=1)
    write(folder, "file", data_of(3 * PART))
    assert folder.read("file", 10 * PART) == data_of(3 * PART)


def test_object_of_another_writer_is_not_taken_for_ours(folder: S3Folder, server: Server) -> None:
    data = data_of(3 * PART)
    folder.put("file", data)
    server.fail("CompleteMultipartUpload", lambda: reply(404, "NoSuchUpload"))
    with pytest.raises(ObjectMissing, match="finish upload"):
        write(folder, "file", data)
    assert server.uploads() == []


def test_wrong_size_after_the_end_is_told_and_taken_back(folder: S3Folder, server: Server) -> None:
    def shorten(parsed: dict[str, Any], **_: Any) -> None:
        parsed["ContentLength"] -= 1

    server.on("after-call.s3.HeadObject", shorten)
    with pytest.raises(StorageFailed, match=f"has {3 * PART - 1} bytes, expected {3 * PART}"):
        write(folder, "file", data_of(3 * PART))
    assert nothing_is_left(server)


@pytest.mark.parametrize("size", [100, 3 * PART])
def test_any_failing_operation_leaves_the_whole_file_or_nothing(folder: S3Folder, server: Server, size: int) -> None:
    data = data_of(size)
    with watched(Faults()) as seen:
        write(folder, "file", data)
    folder.remove("file")

    failed = 0
    for number in range(1, len(seen.log) + 1):
        is_last = seen.log[number - 1][0] == "delete"  # of the mark: a later sweep removes it
        expectation = contextlib.nullcontext() if is_last else pytest.raises(StorageFailed, match=r"Input/output error")
        with watched(Faults("EIO", number)), expectation:
            write(folder, "file", data)
        failed += not is_last
        assert [folder.read(name, size) for name in folder.listing()] == [data] * is_last
        folder.remove("file")
        assert server.uploads() == []
        for name in folder.listing(f"{MARKS}/"):
            folder.remove(name)
    assert failed >= len(seen.log) - 1
    assert nothing_is_left(server)


def test_abort_that_fails_leaves_its_mark_and_the_first_error(folder: S3Folder, server: Server) -> None:
    server.fail("UploadPart", lambda: reply(403, "AccessDenied"))
    server.fail("AbortMultipartUpload", lambda: reply(403, "AccessDenied"), times=1)
    with pytest.raises(StorageFailed, match="upload part"):
        write(folder, "file", data_of(3 * PART))
    assert len(server.uploads()) == 1
    assert len(folder.listing(f"{MARKS}/")) == 1
    assert folder.sweep() == 1  # though this process still runs
    assert nothing_is_left(server)


# ---- create once


def test_create_keeps_the_first(folder: S3Folder) -> None:
    assert folder.create("file", b"first")
    assert not folder.create("file", b"other")
    assert not folder.create("file", b"firstly")
    assert folder.create("file", b"first")
    assert folder.read("file", 99) == b"first"


def test_one_of_many_creators_wins(folder: S3Folder) -> None:
    won: list[int] = []

    def attempt(number: int) -> None:
        if folder.create("file", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [folder.read("file", 9)] == [b"%d" % number for number in won]


def test_lost_reply_to_create_counts_as_written(folder: S3Folder, server: Server) -> None:
    server.lose("PutObject")
    assert folder.create("file", b"first")


def test_create_where_conditions_are_refused(folder: S3Folder, server: Server) -> None:
    def refuse(request: Any, **_: Any) -> Any:
        return reply(501, "NotImplemented") if "If-None-Match" in request.headers else None

    server.on("before-send.s3.PutObject", refuse)
    assert folder.create("file", b"first")
    assert folder.create("file", b"first")
    assert not folder.create("file", b"other")


# ---- reads that are disturbed


TIMES = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@given(TIMES, st.sampled_from(["auto", "seconds", "milliseconds"]))
def test_times_are_read_as_botocore_reads_them(time: datetime, precision: str) -> None:
    iso = time.isoformat(timespec=precision)
    header = format_datetime(time, usegmt=True)
    for text in (iso, iso.replace("+00:00", "Z"), header, header.replace("GMT", "+0000")):
        assert s3_client.read_time(text) == parse_timestamp(text)


@pytest.mark.parametrize(
    "text", ["0", "1700000000.5", 1700000000, "20260131T101112Z", "Sunday, 06-Nov-94 08:49:37 GMT"]
)
def test_times_in_other_spellings_are_left_to_botocore(text: Any) -> None:
    assert s3_client.read_time(text) == parse_timestamp(text)


@pytest.mark.parametrize("text", ["", "never", "2026-13-01T00:00:00Z", None])
def test_what_is_no_time_is_refused_as_botocore_does(text: Any) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError)) as expected:
        parse_timestamp(text)
    with pytest.raises(expected.type):
        s3_client.read_time(text)


def test_requests_tell_which_program_sends_them(folder: S3Folder) -> None:
    folder.put("file", b"data")
    sent: list[bytes] = []

    def note(request: Any, **_: Any) -> None:
        sent.append(request.headers["User-Agent"])

    async def listen() -> None:
        session = await connect()._fs.set_session()
        session.meta.events.register("before-send.s3", note)

    asyncio.run_coroutine_threadsafe(listen(), connect()._fs.loop).result()
    folder.identity("file")
    assert [re.match(rb"shardmill/\d+\.\d+", agent) is not None for agent in sent] == [True], sent


def test_other_object_is_noticed_at_the_first_read(folder: S3Folder) -> None:
    folder.put("file", data_of(PART))
    acts: list[Callable[[], None]] = [
        lambda: folder.put("file", data_of(PART)[::-1]),
        lambda: folder.remove("file"),
    ]
    for act in acts:
        with folder.open("file") as reader:
            act()
            with pytest.raises(SourceChanged, match=r"s3://bucket/some/prefix/file.*changed"):
                reader.read_into(0, memoryview(bytearray(10)))


def test_server_that_does_not_heed_conditions_is_not_believed(folder: S3Folder, server: Server) -> None:
    def strip(request: Any, **_: Any) -> None:
        del request.headers["If-Match"]

    folder.put("file", b"first")
    server.on("before-sign.s3.GetObject", strip)
    with folder.open("file") as reader:
        folder.put("file", b"other")
        with pytest.raises(SourceChanged):
            reader.read_into(0, memoryview(bytearray(5)))


def test_server_that_does_not_read_ranges_is_not_believed(folder: S3Folder, server: Server) -> None:
    folder.put("file", b"0123456789")
    state = folder.identity("file")
    assert state is not None

    def strip(request: Any, **_: Any) -> None:
        del request.headers["Range"]

    server.on("before-sign.s3.GetObject", strip)
    view = memoryview(bytearray(5))
    place = Place(BUCKET, "some/prefix/file")
    with pytest.raises(StorageFailed, match="does not read ranges"):
        connect().read_range(place, state.version, 5, view).result()
    connect().read_range(place, state.version, 0, view).result()
    assert bytes(view) == b"01234"
    assert folder.read_start("file", 3) == (state, b"012")


@pytest.mark.parametrize("cut", [0, 1, 70_000, 199_999])
def test_broken_bodies_are_resumed_where_they_broke(folder: S3Folder, server: Server, cut: int) -> None:
    data = data_of(200_000)
    folder.put("file", data)
    spans: list[str] = []

    def note(request: Any, **_: Any) -> None:
        spans.append(str(request.headers["Range"].decode()))

    class Cut:
        """Bodies that end too early, at first."""

        def __init__(self, body: Any, left: int) -> None:
            self.body, self.left = body, left

        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *_: object) -> None:
            self.body.close()

        async def read(self, count: int) -> bytes:
            chunk = bytes(await self.body.read(min(count, self.left))) if self.left else b""
            self.left -= len(chunk)
            return chunk

    def shorten(parsed: dict[str, Any], **_: Any) -> None:
        if len(spans) == 1:
            parsed["Body"] = Cut(parsed["Body"], cut)

    server.on("before-send.s3.GetObject", note)
    server.on("after-call.s3.GetObject", shorten)
    assert read(folder, "file") == data
    assert spans == ["bytes=0-199999", f"bytes={cut}-199999"]


def test_silence_and_trickles_end(folder: S3Folder, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.put("file", b"0123456789")
    monkeypatch.setattr(s3_client, "REQUEST_SECONDS", 0.2)

    class Trickle:
        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def read(self, _: int) -> bytes:
            await asyncio.sleep(0.1)
            return b"x"

    def slow(parsed: dict[str, Any], **_: Any) -> None:
        parsed["Body"].close()
        parsed["Body"] = Trickle()

    server.on("after-call.s3.GetObject", slow)
    with folder.open("file") as reader, pytest.raises(StorageUnavailable, match="no answer in time"):
        reader.read_into(0, memoryview(bytearray(10)))


def test_failing_read_is_told(folder: S3Folder) -> None:
    folder.put("file", b"0123456789")
    with folder.open("file") as reader, watched(Faults("EIO", 1)), pytest.raises(StorageFailed, match=r"get .*failed"):
        reader.read_into(0, memoryview(bytearray(10)))


# ---- copies


@pytest.mark.parametrize("whole_up_to", [10**9, 1000])
def test_copy_within_the_storage(
    folder: S3Folder, server: Server, monkeypatch: pytest.MonkeyPatch, whole_up_to: int
) -> None:
    monkeypatch.setattr(s3, "COPY_WHOLE_BYTES", whole_up_to)
    monkeypatch.setattr(s3_upload, "COPY_PART_BYTES", PART)
    server.call("create_bucket", Bucket="other")
    origin = open_s3("other", "")
    data = data_of(4 * PART + 5)
    write(origin, "ä b+%/file", data, old="1")

    assert folder.copy_in("copy", origin, "ä b+%/file", tags={"new": "2"})

    state = folder.identity("copy")
    assert state is not None
    assert state.tags == {"new": "2"}
    assert folder.read("copy", 10**6) == data
    assert read(origin, "ä b+%/file") == data
    folder.move("copy", "moved")
    assert list(folder.listing()) == ["moved"]
    assert folder.listing().keys() == {"moved"}
    moved = folder.identity("moved")
    assert moved is not None
    assert moved.tags == {"new": "2"}
    assert server.uploads() == []
    folder.move("absent", "moved")
    assert folder.read("moved", 10**6) == data
    with pytest.raises(ObjectMissing):
        folder.copy_in("copy", origin, "absent")


def test_copy_in_parts_that_fails_leaves_nothing(
    folder: S3Folder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "COPY_WHOLE_BYTES", 0)
    monkeypatch.setattr(s3_upload, "COPY_PART_BYTES", PART)
    data = data_of(4 * PART)
    write(folder, "file", data)
    with watched(Faults()) as seen:
        folder.copy_in("copy", folder, "file")
    folder.remove("copy")
    for number in range(1, len(seen.log)):  # the last one removes the mark
        with watched(Faults("EIO", number)), pytest.raises(StorageFailed):
            folder.copy_in("copy", folder, "file")
        assert list(folder.listing()) == ["file"]
        assert server.uploads() == []
    assert seen.log[-1][0] == "delete"


# ---- what dead writers left


PROGRAM = """
import sys
from shardmill.storage import s3_upload
from shardmill.storage.s3 import open_s3
s3_upload.PART_BYTES = 65536
with open_s3("bucket", "some/prefix").writer("file", 4 * 65536) as writer:
    writer.write(memoryview(bytes(4 * 65536)))
    writer.commit()
"""


@pytest.mark.parametrize("number", [2, 3, 5, 8, 9])
def test_uploads_of_killed_processes_are_ended_at_once(folder: S3Folder, server: Server, number: int) -> None:
    foreign = server.begin("some/prefix/file2")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {"SHARDMILL_FAULT": f"kill@{number}"}, check=False
    )
    assert done.returncode == -9
    assert folder.listing().keys() == ({"file"} if number == 9 else set())
    assert len(folder.listing(f"{MARKS}/")) == 1

    swept = folder.sweep("other/")
    assert swept == 0
    assert len(folder.listing(f"{MARKS}/")) == 1

    assert folder.sweep() == (0 if number in {2, 9} else 1)
    assert server.uploads() == [foreign]
    assert folder.listing(f"{MARKS}/") == {}
    assert folder.sweep() == 0


def test_uploads_of_the_living_and_of_others_are_ended_by_age_only(folder: S3Folder, server: Server) -> None:
    foreign = server.begin("some/prefix/file")
    elsewhere = server.begin("some/prefix2/file")
    with folder.writer("file", 3 * PART) as writer:
        writer.write(memoryview(data_of(3 * PART)))
        [own] = set(server.uploads()) - {foreign, elsewhere}

        assert folder.sweep() == 0

        server.begun |= dict.fromkeys([foreign, elsewhere], datetime.now().astimezone() - timedelta(hours=2))
        assert folder.sweep(grace_seconds=3 * 3600) == 0
        server.begun[own] = server.begun[foreign]
        assert folder.sweep(grace_seconds=3600) == 1
        assert set(server.uploads()) == {own, elsewhere}
        writer.commit()
    assert folder.read("file", 3 * PART) == data_of(3 * PART)


def dead(**changes: Any) -> Process:
    return replace(Process.current(), **({"start": "1"} | changes))


def mark_of(folder: S3Folder, owner: Process, key: str, upload: str | None) -> str:
    name = f"{MARKS}/{secrets.token_hex(4)}"
    folder.put(name, canonical_json({"owner": asdict(owner), "key": f"some/prefix/{key}", "upload": upload}))
    return name


def test_mark_without_id_covers_only_what_nobody_else_could_have_begun(folder: S3Folder, server: Server) -> None:
    old, theirs, lost = (server.begin("some/prefix/file") for _ in range(3))
    server.begun[old] = datetime.now().astimezone() - timedelta(minutes=10)
    mark_of(folder, dead(), "file", None)
    kept = mark_of(folder, dead(host="x"), "file", theirs)
    rival = mark_of(folder, dead(host="x"), "file", None)

    assert folder.sweep() == 0
    assert set(server.uploads()) == {old, theirs, lost}

    folder.remove(rival)
    mark_of(folder, dead(), "file", None)
    assert folder.sweep() == 1
    assert set(server.uploads()) == {old, theirs}
    assert set(folder.listing(f"{MARKS}/")) == {kept}


def test_marks_that_make_no_sense_are_no_ones(folder: S3Folder, server: Server) -> None:
    for number, text in enumerate([b"", b"{", b"[]", b"{}", b'{"owner":{}}', b'{"owner":3}', b"\xff", b"null"]):
        folder.put(f"{MARKS}/{number}", text)
    folder.put(".shardmill-claim", b"{}")
    upload = server.begin("some/prefix/file")

    assert folder.sweep() == 0
    assert server.uploads() == [upload]
    assert ".shardmill-claim" in folder.listing()


# ---- probes, rights, secrets


def test_probe_leaves_nothing(folder: S3Folder, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    assert folder.probe() == []
    assert nothing_is_left(server)
    assert caplog.records == []


def test_probe_warns_where_nothing_is_created_once(
    folder: S3Folder, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def strip(request: Any, **_: Any) -> None:
        del request.headers["If-None-Match"]

    server.on("before-sign.s3.PutObject", strip)
    assert folder.probe() == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert nothing_is_left(server)


def test_canary_of_a_dead_probe_is_removed(folder: S3Folder) -> None:
    parent = Process.numbered(os.getppid())
    folder.put(".shardmill-canary-1", canonical_json({"owner": asdict(dead())}))
    folder.put(".shardmill-canary-2", canonical_json({"owner": asdict(dead(host="x"))}))
    folder.put(".shardmill-canary-3", canonical_json({"owner": asdict(parent)}))
    folder.sweep()
    assert list(folder.listing()) == [".shardmill-canary-2", ".shardmill-canary-3"]


@pytest.mark.parametrize(
    ("operation", "step"), [("PutObject", "create"), ("GetObject", "read"), ("DeleteObject", "delete")]
)
def test_probe_names_what_is_not_allowed(folder: S3Folder, server: Server, operation: str, step: str) -> None:
    server.fail(operation, lambda: reply(403, "AccessDenied"))
    problems = folder.probe()
    assert {problem.kind for problem in problems} == {"destination-unwritable"}
    assert any(f"cannot {step} a file" in problem.message for problem in problems)
    assert all(problem.way_out == "check the rights of the credentials" for problem in problems)


@pytest.mark.usefixtures("server")
def test_bucket_that_is_not_there() -> None:
    nowhere = open_s3("no-such-bucket", "x")
    [problem] = nowhere.probe()
    assert "there is no bucket `no-such-bucket`" in problem.message
    for act in (nowhere.listing, nowhere.exists, nowhere.sweep, lambda: nowhere.put("x", b"")):
        with pytest.raises(StorageFailed, match="there is no such bucket") as caught:
            act()
        assert not isinstance(caught.value, ObjectMissing)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda: reply(403, "AccessDenied"), "HTTP 403 AccessDenied"),
        (lambda: reply(400, "ExpiredToken"), "HTTP 400 ExpiredToken"),
        (lambda: reply(403, "InvalidAccessKeyId"), "HTTP 403 InvalidAccessKeyId"),
        (lambda: reply(403, SECRET + "\n"), "HTTP 403"),
    ],
)
def test_denied_requests_fail_at_once(folder: S3Folder, server: Server, answer: Callable[[], Any], told: str) -> None:
    folder.put("file", b"x")
    acts: dict[str, tuple[Callable[[], object], ...]] = {
        "PutObject": (lambda: folder.put("a", b""), lambda: folder.create("b", b"")),
        "GetObject": (
            lambda: folder.read("file", 9),
            lambda: folder.read_start("file", 9),
            lambda: read(folder, "file"),
        ),
        "ListObjectsV2": (folder.listing, folder.exists),
        "DeleteObject": (lambda: folder.remove("file"),),
        "CopyObject": (lambda: folder.copy_in("c", folder, "file"),),
        "HeadObject": (lambda: folder.identity("file"), lambda: folder.open("file")),
        "ListMultipartUploads": (folder.sweep,),
    }
    for operation, callers in acts.items():
        seen = server.fail(operation, answer)
        for number, act in enumerate(callers, 1):
            with pytest.raises(StorageFailed, match=told) as caught:
                act()
            assert caught.value.errno == errno.EACCES
            assert_silent(caught.value)
            assert len(seen) == number


def assert_silent(error: BaseException) -> None:
    """Neither an error nor any one behind it shows a secret."""
    behind: BaseException | None = error
    while behind is not None:
        for text in (str(behind), repr(behind), repr(vars(behind))):
            assert SECRET not in text
            assert KEY_ID not in text
            assert "Signature=" not in text
        behind = behind.__cause__ or behind.__context__


def test_errors_of_any_kind_are_silent(
    folder: S3Folder, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_client, "REQUEST_SECONDS", 0.3)
    caplog.set_level("DEBUG", "shardmill")

    def lost() -> Any:
        raise ConnectionClosedError(endpoint_url=f"http://x/?X-Amz-Signature={SECRET}")

    for answer in (lost, lambda: reply(503, "SlowDown"), lambda: reply(409, "x"), lambda: reply(301, SECRET)):
        server.fail("PutObject", answer, times=10**9)
        with pytest.raises(StorageFailed) as caught:
            folder.put("file", b"x")
        assert_silent(caught.value)
        assert "s3://bucket/some/prefix/file" in str(caught.value)
        monkeypatch.setattr(s3_client, "_clients", {})
    assert SECRET not in caplog.text


def test_missing_credentials_are_denied_access(folder: S3Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(StorageFailed, match="no usable credentials") as caught:
        folder.listing()
    assert caught.value.errno == errno.EACCES


def test_setup_that_cannot_work_is_told(folder: S3Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageFailed, match="cannot be sent"):
        open_s3("no such bucket!", "").listing()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"nonsense {SECRET}")
    with pytest.raises(StorageFailed, match="the endpoint is no URL") as caught:
        folder.listing()
    assert_silent(caught.value)


def test_server_that_is_not_there_is_unavailable(folder: S3Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "REQUEST_SECONDS", 2.0)  # the first session of a process takes some of it
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageUnavailable, match=r"failed( \d+ times)?: (the connection failed|no answer in time)"):
        folder.listing()


# ---- settings


def test_bodies_are_signed_over_plain_http_only(
    folder: S3Folder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    def note(request: Any, **_: Any) -> Any:
        header = request.headers["X-Amz-Content-SHA256"]
        sent.append(header.decode() if isinstance(header, bytes) else header)
        return reply(403, "AccessDenied")

    for url in ("http://127.0.0.1:1", "https://127.0.0.1:1"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        server.on("before-send.s3.PutObject", note)
        with pytest.raises(StorageFailed):
            folder.put("file", b"abc")
    assert re.fullmatch("[0-9a-f]{64}", sent[0])
    assert sent[1] == "UNSIGNED-PAYLOAD"


def test_endpoint_that_only_a_profile_names_is_found(
    folder: S3Folder, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    profile = tmp_path / "config"
    profile.write_text(f"[default]\nendpoint_url = {endpoint}\n")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(profile))
    folder.put("file", b"abc")

    assert connect()._signs_bodies
    assert folder.read("file", 3) == b"abc"


FORK = """
import os
from shardmill.storage.s3 import open_s3
folder = open_s3("bucket", "some/prefix")
folder.put("parent", b"1")
child = os.fork()
if not child:
    folder.put("child", folder.read("parent", 1))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
folder.put("later", folder.read("child", 1))
"""


def test_forked_process_makes_its_own_connections(folder: S3Folder) -> None:
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK], check=True, timeout=60)
    assert list(folder.listing()) == ["child", "later", "parent"]


def test_short_replies_are_acknowledged_at_once(folder: S3Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    usual = PromptSocket.recv

    def recv(sock: PromptSocket, *arguments: Any) -> bytes:
        data = usual(sock, *arguments)
        received.append(len(data))
        return data

    monkeypatch.setattr(PromptSocket, "recv", recv)
    folder.put("file", b"0123456789")
    assert folder.read("file", 10) == b"0123456789"
    assert received


def test_folder_tells_what_it_is(folder: S3Folder) -> None:
    assert (folder.traits.kind, folder.traits.names_late, folder.traits.is_remote) == ("s3", False, True)
    assert folder.path is None
    assert folder.free_bytes() is None
    folder.prepare()
    with pytest.raises(ValueError, match="lower-case"):
        folder.writer("file", 1, tags={"Bad Name": ""})


def test_endpoint_that_never_answered_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "FIRST_SECONDS", 0.3)
    monkeypatch.setattr(s3_client, "REQUEST_SECONDS", 3600.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(StorageUnavailable, match=r"list .* failed"):
        open_s3("bucket", "prefix").listing()
