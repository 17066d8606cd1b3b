"""Folders in buckets while the network and the server fail: same bytes, or a typed error and nothing left."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import pytest
from blake3 import blake3

from shardmill.core.digest import Digest
from shardmill.errors import ShardmillError, StorageFailed, StorageUnavailable, TransferDamaged
from shardmill.storage import s3_client
from shardmill.storage.folder import Folder
from shardmill.storage.hashing import SourceHash
from storage.fault_proxy import FaultProxy, Rule
from storage.places import S3Place, brief
from storage.servers import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture
def place(server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    """A place behind the proxy; clients are less patient than usual."""
    monkeypatch.setattr(s3_client, "_clients", {})
    monkeypatch.setattr(s3_client, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(s3_client, "_LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(s3_client, "READ_SECONDS", 1.0)
    return S3Place(server, monkeypatch, proxy.url)


@pytest.fixture
def folder(place: S3Place) -> Folder:
    return place.open()


def write(folder: Folder, name: str, data: bytes) -> None:
    with folder.writer(name, len(data), tags={"shardmill-run": "run-1"}) as writer:
        writer.write(memoryview(data))
        writer.commit()


def read(folder: Folder, name: str) -> bytes:
    with folder.open(name) as reader:
        data = bytearray(reader.identity.size)
        reader.read_into(0, memoryview(data))
    return bytes(data)


def copy_and_back(place: S3Place, folder: Folder) -> None:
    """Do what a run does: large and small files, looks, copies, moves, deletions."""
    large, small = os.urandom(3 * place.part + 7), os.urandom(1000)
    write(folder, "store/large", large)
    folder.put("store/small", small)
    assert folder.create("claim", b"mine")
    assert not folder.create("claim", b"theirs")
    assert {name: found.size for name, found in folder.listing().items()} == {
        "claim": 4,
        "store/large": len(large),
        "store/small": 1000,
    }
    assert folder.copy_in("result/large", folder, "store/large")
    folder.move("store/small", "result/small")
    folder.remove("claim")
    folder.remove("store/large")
    assert brief(read(folder, "result/large")) == brief(large)
    assert folder.read("result/small", 1000) == small
    assert folder.read_start("result/large", 10)[1] == large[:10]
    assert place.files() == {"result/large": brief(large), "result/small": brief(small)}
    assert place.unfinished() == []


TROUBLES = {
    "503 at 10 %": (Rule("status", p=0.1, seed=1),),
    "503 at 30 %": (Rule("status", p=0.3, seed=2),),
    "500 at 30 %": (Rule("status", p=0.3, seed=3, status=500, code="InternalError"),),
    "resets at 10 %": (Rule("reset", p=0.1, seed=4),),
    "resets of uploads at 30 %": (Rule("reset_upload", method="PUT", p=0.3, seed=5, at=30_000),),
    "short bodies": (Rule("short", method="GET", header="Range", p=0.5, seed=1, at=10_000),),
    "resets of bodies": (Rule("reset_body", method="GET", header="Range", p=0.5, seed=1, at=1),),
    "a stall": (Rule("stall", method="GET", header="Range", nth=(2,), at=10_000),),
    "no answer": (Rule("hang", nth=(3,)), Rule("hang", method="GET", nth=(3,))),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_passes_is_survived(place: S3Place, folder: Folder, proxy: FaultProxy, trouble: str) -> None:
    proxy.set_rules(*TROUBLES[trouble])
    copy_and_back(place, folder)
    assert proxy.fired


LOST = {
    "begin": ("POST", r"[?&]uploads"),
    "part": ("PUT", "partNumber=2"),
    "finish": ("POST", "uploadId="),
    "put": ("PUT", "store/small"),
    "create": ("PUT", "claim"),
    "copy": ("PUT", "result/"),
    "delete": ("DELETE", "store/"),
}


@pytest.mark.parametrize("do", ["lost_reset", "lost_status"])
@pytest.mark.parametrize("request_", LOST)
def test_a_lost_reply_changes_nothing(
    place: S3Place, folder: Folder, proxy: FaultProxy, request_: str, do: str
) -> None:
    method, path = LOST[request_]
    proxy.set_rules(Rule(do, method=method, path=path, nth=(1,)))
    copy_and_back(place, folder)
    assert proxy.fired == 1


REFUSALS = {
    "denied": Rule("status", status=403, code="AccessDenied"),
    "wrong key": Rule("status", status=403, code="SignatureDoesNotMatch"),
    "expired token": Rule("status", status=400, code="ExpiredToken"),
    "no bucket": Rule("status", status=404, code="NoSuchBucket"),
}
ACTIONS: dict[str, Callable[[Folder], object]] = {
    "write": lambda folder: write(folder, "new", bytes(3 << 16)),
    "put": lambda folder: folder.put("new", b"1"),
    "create": lambda folder: folder.create("new", b"1"),
    "list": lambda folder: folder.listing(),
    "read": lambda folder: folder.read("there", 10),
    "read start": lambda folder: folder.read_start("there", 10),
    "copy": lambda folder: folder.copy_in("new", folder, "there"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_told_at_once(place: S3Place, folder: Folder, proxy: FaultProxy, refusal: str) -> None:
    place.plant("there", b"1")
    for act in ACTIONS.values():
        proxy.set_rules(REFUSALS[refusal])
        with pytest.raises(StorageFailed) as caught:
            act(folder)
        assert len(proxy.log) <= 2
        assert not isinstance(caught.value, StorageUnavailable)
        assert place.bucket in str(caught.value)
        assert_silent(caught.value, place.server)
    assert place.files() == {"there": b"1"}
    assert place.unfinished() == []


@pytest.mark.parametrize("number", range(1, 5))
def test_rights_that_are_lost_on_the_way_leave_nothing(
    place: S3Place, folder: Folder, proxy: FaultProxy, number: int
) -> None:
    proxy.set_rules(Rule("status", method="PUT", status=403, code="AccessDenied", nth=(number,)))
    with pytest.raises(StorageFailed, match="denied"):
        write(folder, "new", bytes(3 * place.part))
    assert proxy.fired == 1
    assert place.files() == {}
    assert place.unfinished() == []


@pytest.mark.parametrize(
    "rule",
    [
        Rule("status", status=500, code="InternalError", path="partNumber=2"),
        Rule("reset_upload", path="partNumber=2", at=1000),
        Rule("hang", path="partNumber=2", seconds=60),
    ],
    ids=lambda rule: rule.do,
)
def test_a_part_that_never_arrives_ends_the_upload(
    place: S3Place, folder: Folder, proxy: FaultProxy, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_patience(folder, monkeypatch)
    proxy.set_rules(rule)
    with pytest.raises(StorageUnavailable, match="upload part") as caught:
        write(folder, "new", bytes(3 * place.part))
    assert_silent(caught.value, place.server)
    assert place.files() == {}
    assert place.unfinished() == []


def test_a_trickle_is_given_up(
    place: S3Place, folder: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.plant("slow", bytes(1 << 20))
    lose_patience(folder, monkeypatch)
    proxy.set_rules(Rule("slow", method="GET", header="Range", rate=1000))
    with pytest.raises(StorageUnavailable):
        read(folder, "slow")
    assert proxy.fired


@pytest.mark.parametrize("at", [0, 1, 40_000, 65_535])
def test_a_flipped_byte_is_found_where_the_digest_is_known(
    place: S3Place, folder: Folder, proxy: FaultProxy, at: int
) -> None:
    data = os.urandom(4 << 16)
    place.plant("a", data)
    expected = Digest("blake3", blake3(data).hexdigest())
    proxy.set_rules(Rule("corrupt", method="GET", header="Range", nth=(3,), at=at))
    with folder.open("a") as reader, pytest.raises(TransferDamaged, match="blake3"):
        SourceHash(reader, expected).finish()
    assert proxy.fired == 1
    with folder.open("a") as reader:
        assert SourceHash(reader, expected).finish() == expected


@pytest.mark.ceph
def test_a_part_that_was_damaged_is_sent_again(radosgw: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(11 << 20)
    with FaultProxy(radosgw.endpoint) as proxy:
        place = S3Place(radosgw, monkeypatch, proxy.url)
        proxy.set_rules(Rule("corrupt_upload", method="PUT", path="partNumber=", every=2, at=1000))
        write(place.open(), "a", data)
        assert proxy.fired
    assert place.files() == {"a": brief(data)}
    assert place.unfinished() == []


def lose_patience(folder: Folder, patch: pytest.MonkeyPatch) -> None:
    """Give up requests after seconds, which is enough for a good one on a busy machine once there is a connection."""
    assert list(folder.listing()) in ([], ["slow"])
    patch.setattr(s3_client, "REQUEST_SECONDS", 2.5)


def assert_silent(error: ShardmillError, server: S3Server) -> None:
    """No message of an error, nor of what led to it, may hold a secret."""
    text = "".join(traceback.format_exception(error, chain=True)) + str(error) + repr(error)
    assert server.secret_key not in text
    assert server.access_key not in str(error)
    assert "Signature=" not in text
