"""What fsspec, s3fs and S3 servers do that the storage layer is built around; an upgrade that changes it shows here."""

from __future__ import annotations

import errno
import gc
import pickle
import secrets
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from botocore.exceptions import ClientError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.utils import FileExpired

from shardmill.storage.s3_client import Body, Place, connect
from storage.fault_proxy import FaultProxy, Rule
from storage.servers import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture
def bucket(server: S3Server) -> str:
    return server.new_bucket()


def new_s3fs(*, use_listings_cache: bool = False) -> Any:
    """An s3fs of its own, as it comes but for the listings cache."""
    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=use_listings_cache)


def is_moto(server: S3Server) -> bool:
    return server.backend is not None


def code_of(error: ClientError) -> tuple[int, str]:
    return error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]


# ---- writing through open files, which is never done


def fail_while_writing(fs: Any, path: str, length: int) -> None:
    with fs.open(path, "wb", block_size=5 << 20) as file:
        file.write(bytes(length))
        raise KeyError(path)


@pytest.mark.parametrize("length", [100, 12 << 20])
def test_an_exception_in_an_open_file_commits_what_was_written(server: S3Server, bucket: str, length: int) -> None:
    with pytest.raises(KeyError):
        fail_while_writing(new_s3fs(), f"{bucket}/a", length)
    assert server.client.head_object(Bucket=bucket, Key="a")["ContentLength"] == length


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_so_it_does_on_disk_and_in_memory(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "a") if kind == "file" else f"/facts-{secrets.token_hex(6)}/a"
    fs = fsspec.filesystem(kind)
    with pytest.raises(KeyError):
        fail_while_writing(fs, path, 100)
    assert fs.size(path) == 100
    fs.rm(path)


def test_a_dropped_open_file_is_committed(server: S3Server, bucket: str) -> None:
    file = new_s3fs().open(f"{bucket}/a", "wb")
    file.write(bytes(100))
    del file
    gc.collect()
    assert server.keys(bucket) == ["a"]


# ---- conditions


def test_a_put_heeds_if_none_match(server: S3Server, bucket: str) -> None:
    server.client.put_object(Bucket=bucket, Key="a", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError) as caught:
        server.client.put_object(Bucket=bucket, Key="a", Body=b"2", IfNoneMatch="*")
    assert code_of(caught.value)[0] == 412


def test_a_copy_ignores_if_none_match(server: S3Server, bucket: str) -> None:
    for key, data in (("a", b"1"), ("b", b"2")):
        server.client.put_object(Bucket=bucket, Key=key, Body=data)
    server.client.copy_object(Bucket=bucket, Key="b", CopySource={"Bucket": bucket, "Key": "a"}, IfNoneMatch="*")
    assert server.client.get_object(Bucket=bucket, Key="b")["Body"].read() == b"1"


def test_a_copy_ignores_if_match_of_its_source(server: S3Server, bucket: str) -> None:
    server.client.put_object(Bucket=bucket, Key="a", Body=b"1")
    server.client.copy_object(
        Bucket=bucket, Key="b", CopySource={"Bucket": bucket, "Key": "a"}, CopySourceIfMatch='"' + "0" * 32 + '"'
    )
    assert server.keys(bucket) == ["a", "b"]


def test_finishing_an_upload_may_ignore_if_none_match(server: S3Server, bucket: str) -> None:
    where = {"Bucket": bucket, "Key": "a"}
    server.client.put_object(**where, Body=b"1")
    upload = where | {"UploadId": server.client.create_multipart_upload(**where)["UploadId"]}
    etag = server.client.upload_part(**upload, PartNumber=1, Body=b"22")["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    if is_moto(server):
        with pytest.raises(ClientError) as caught:
            server.client.complete_multipart_upload(**upload, MultipartUpload=parts, IfNoneMatch="*")
        assert code_of(caught.value)[0] == 412
    else:
        server.client.complete_multipart_upload(**upload, MultipartUpload=parts, IfNoneMatch="*")
    size = server.client.head_object(**where)["ContentLength"]
    assert size == (1 if is_moto(server) else 2)


def test_a_get_heeds_if_match(server: S3Server, bucket: str) -> None:
    server.client.put_object(Bucket=bucket, Key="a", Body=b"1")
    with pytest.raises(ClientError) as caught:
        server.client.get_object(Bucket=bucket, Key="a", IfMatch='"' + "0" * 32 + '"')
    assert code_of(caught.value)[0] == 412


def test_creating_what_is_there_is_told_in_two_ways(server: S3Server, bucket: str) -> None:
    fs = new_s3fs()
    fs.pipe_file(f"{bucket}/a", b"1", mode="create")
    with pytest.raises(OSError, match=r".") as caught:
        fs.pipe_file(f"{bucket}/a", b"2", mode="create")
    assert isinstance(caught.value, FileExistsError) or caught.value.errno == errno.EINVAL
    assert isinstance(caught.value, FileExistsError) == is_moto(server)


def test_an_open_file_that_is_replaced_expires(server: S3Server, bucket: str) -> None:
    fs = new_s3fs()
    fs.pipe_file(f"{bucket}/a", b"1" * 100)
    with fs.open(f"{bucket}/a", "rb", cache_type="none") as file:
        assert file.read(1) == b"1"
        fs.pipe_file(f"{bucket}/a", b"2" * 100)
        with pytest.raises(FileExpired if is_moto(server) else TypeError):  # it stumbles over the real server's answer
            file.read(1)
    assert server.keys(bucket) == ["a"]


# ---- listings, secrets


def test_a_cached_listing_hides_what_others_write(server: S3Server, bucket: str) -> None:
    cached, plain = new_s3fs(use_listings_cache=True), new_s3fs()
    server.client.put_object(Bucket=bucket, Key="models/a", Body=b"1")
    assert cached.ls(f"{bucket}/models") == [f"{bucket}/models/a"]
    server.client.put_object(Bucket=bucket, Key="models/a", Body=b"22")
    server.client.put_object(Bucket=bucket, Key="models/b", Body=b"1")
    assert cached.ls(f"{bucket}/models") == [f"{bucket}/models/a"]
    assert not cached.exists(f"{bucket}/models/b")
    assert cached.size(f"{bucket}/models/a") == 1
    assert plain.ls(f"{bucket}/models") == [f"{bucket}/models/a", f"{bucket}/models/b"]
    assert plain.size(f"{bucket}/models/a") == 2


def test_a_pickled_filesystem_holds_the_secret_key() -> None:
    fs = s3fs.S3FileSystem(key="id", secret="a-secret-key", skip_instance_cache=True)  # noqa: S106 - the test's own
    assert b"a-secret-key" in pickle.dumps(fs)


def test_errors_of_ranges_are_returned_among_the_results(bucket: str) -> None:
    found = new_s3fs().cat_ranges([f"{bucket}/absent"], [0], [1])
    assert isinstance(found[0], FileNotFoundError)


# ---- damage


def test_a_flipped_byte_passes_where_no_digest_is_known(server: S3Server, bucket: str, proxy: FaultProxy) -> None:
    data = secrets.token_bytes(1 << 20)
    server.client.put_object(Bucket=bucket, Key="a", Body=data)
    proxy.set_rules(Rule("corrupt", method="GET", header="Range", at=10))
    found = new_s3fs().cat_file(f"{bucket}/a", start=1000, end=2000)
    assert proxy.fired
    assert [at for at in range(1000) if found[at] != data[1000 + at]] == [10]


def test_a_signed_body_that_is_damaged_is_refused_by_a_real_server(
    server: S3Server, bucket: str, proxy: FaultProxy
) -> None:
    through = S3Server(proxy.url, server.access_key, server.secret_key, server.smallest_part)
    proxy.set_rules(Rule("corrupt_upload", method="PUT", at=10))
    if is_moto(server):
        through.client.put_object(Bucket=bucket, Key="a", Body=bytes(100))
        assert server.keys(bucket) == ["a"]
    else:
        with pytest.raises(ClientError, match="XAmzContentSHA256Mismatch"):
            through.client.put_object(Bucket=bucket, Key="a", Body=bytes(100))
        assert server.keys(bucket) == []
    assert proxy.fired


# ---- what the tests themselves rest on


def test_moto_takes_small_parts(moto: S3Server) -> None:
    where = {"Bucket": moto.new_bucket(), "Key": "a"}
    upload = where | {"UploadId": moto.client.create_multipart_upload(**where)["UploadId"]}
    bodies = {1: bytes(moto.smallest_part), 2: b"1"}
    etags = {n: moto.client.upload_part(**upload, PartNumber=n, Body=body)["ETag"] for n, body in bodies.items()}
    parts = [{"PartNumber": n, "ETag": etag} for n, etag in etags.items()]
    moto.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    assert moto.client.head_object(**where)["ContentLength"] == moto.smallest_part + 1


def test_memory_is_shared_by_the_whole_process() -> None:
    name = f"/facts-{secrets.token_hex(6)}/a"
    MemoryFileSystem(skip_instance_cache=True).pipe_file(name, b"1")
    assert MemoryFileSystem(skip_instance_cache=True).cat_file(name) == b"1"
    MemoryFileSystem().rm(name)


def test_a_body_is_sent_by_the_event_loop_alone(server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that aiohttp does not know would be read by threads of its own, 64 KiB at a time."""
    readers = []
    read = Body.read

    def read_noted(body: Body, size: int = -1, /) -> memoryview:
        readers.append(threading.current_thread().name)
        return read(body, size)

    monkeypatch.setattr(Body, "read", read_noted)
    monkeypatch.setattr(Body, "readinto", lambda *_: pytest.fail("nobody asks for copies"))
    data = secrets.token_bytes(3_000_001)

    connect().put(Place(bucket, "key"), data)

    assert server.client.get_object(Bucket=bucket, Key="key")["Body"].read() == data
    assert set(readers) == {"fsspecIO"}
