from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmill.core.digest import Digest
from shardmill.core.index import encode_index
from shardmill.errors import (
    CheckpointInvalid,
    FileTooLarge,
    ObjectMissing,
    SourceChanged,
    StorageFailed,
    StorageUnavailable,
    TransferDamaged,
)
from shardmill.storage import operations
from shardmill.storage.folder import Folder, Reader
from shardmill.storage.hub import HubFolder, Patience, open_hub
from storage.fake_hub import (
    CONFIG,
    FILES,
    NEW,
    OLD,
    REPO,
    SHARD,
    SIGNATURE,
    TOKEN,
    FakeHub,
    Handler,
    fill_cache,
    git_name,
    run_hub,
    sha256,
)

QUICK = Patience(tries=3, first_wait=0.001, longest_wait=0.01, deadline=20.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with run_hub(monkeypatch, tmp_path / "cache") as made:
        yield made


@pytest.fixture
def offline(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return fake


def open_(revision: str = "", subfolder: str = "") -> Folder:
    return open_hub(REPO, revision, subfolder, patience=QUICK)


def take(reader: Reader, offset: int, length: int) -> bytes:
    found = bytearray(length)
    reader.read_into(offset, memoryview(found))
    return bytes(found)


# ---- looking ----------------------------------------------------------------------------------------------------


def test_the_listing_tells_sizes_and_digests_without_reading_a_file(fake: FakeHub) -> None:
    folder = open_()
    found = folder.listing()
    assert {name: identity.size for name, identity in found.items()} == {n: len(d) for n, d in FILES.items()}
    assert list(found) == sorted(FILES)
    shard = found["model.safetensors"]
    assert shard.digest == Digest("sha256", sha256(SHARD))
    assert shard.version == f"{OLD}:{sha256(SHARD)}"
    assert shard.url == f"hf://{REPO}@{OLD}/model.safetensors"
    assert found["config.json"].digest is None
    assert found["config.json"].version == f"{OLD}:{git_name(CONFIG)}"
    assert folder.identity("model.safetensors") == shard
    assert folder.identity("absent") is None
    assert folder.exists()
    assert (folder.traits.kind, folder.traits.is_writable, folder.traits.is_remote) == ("hub", False, True)
    assert folder.path is None
    assert fake.paths("/resolve/") == []
    assert len(fake.log) == 1


@pytest.mark.parametrize("revision", ["", "main", "refs/pr/1", OLD])
def test_a_revision_is_pinned_once(fake: FakeHub, revision: str) -> None:
    folder = open_(revision)
    changed = CONFIG.replace(b"llama", b"qwen3")
    fake.commits[NEW] = {**FILES, "config.json": changed}
    fake.branches["main"] = NEW
    assert folder.url == f"hf://{REPO}@{OLD}"
    assert folder.read("config.json", 100) == CONFIG
    assert fake.paths("/resolve/") == [f"/{REPO}/resolve/{OLD}/config.json"]
    assert open_().read("config.json", 100) == changed


def test_a_subfolder_is_a_folder_of_its_own(fake: FakeHub) -> None:
    folder = open_(subfolder="sub/")
    assert folder.url == f"hf://{REPO}@{OLD}/sub"
    assert list(folder.listing()) == ["model.safetensors"]
    identity, data = folder.read_start("model.safetensors", 10)
    assert identity.url == f"hf://{REPO}@{OLD}/sub/model.safetensors"
    assert data == SHARD[:10]
    assert fake.paths("/resolve/") == [f"/{REPO}/resolve/{OLD}/sub/model.safetensors"]
    assert not open_(subfolder="nothing").exists()


def test_a_listing_has_a_prefix(fake: FakeHub) -> None:
    assert list(open_().listing("sub/")) == ["sub/model.safetensors"]
    assert len(fake.log) == 1


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a//b", "./a", "a\0b"])
def test_names_that_lead_out_are_dropped(fake: FakeHub, name: str) -> None:
    fake.commits[OLD][name] = b"x"
    folder = open_()
    assert list(folder.listing()) == sorted(FILES)
    with pytest.raises(CheckpointInvalid, match="missing"):
        folder.check(name)
    with pytest.raises(ObjectMissing):
        folder.open(name)
    folder.check("config.json")


@pytest.mark.parametrize(
    ("repo", "revision", "subfolder"),
    [
        ("../x", "main", ""),
        ("a/b/c", "main", ""),
        ("a b/c", "main", ""),
        ("", "main", ""),
        (REPO, "../../etc", ""),
        (REPO, "main", "../up"),
    ],
)
def test_names_that_nothing_can_have_are_refused_before_any_request(
    fake: FakeHub, repo: str, revision: str, subfolder: str
) -> None:
    with pytest.raises(CheckpointInvalid, match="organization/name"):
        open_hub(repo, revision, subfolder)
    assert fake.log == []


# ---- reading ----------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranges=st.lists(st.tuples(st.integers(0, len(SHARD)), st.integers(0, 9_000_000)), max_size=5))
def test_ranges_are_those_of_the_file(fake: FakeHub, ranges: list[tuple[int, int]]) -> None:
    assert fake.hub
    with open_().open("model.safetensors") as reader:
        for offset, wanted in ranges:
            length = min(wanted, len(SHARD) - offset)
            assert take(reader, offset, length) == SHARD[offset : offset + length]
        assert reader.identity.digest == Digest("sha256", sha256(SHARD))


def test_the_start_of_a_file_takes_one_request(fake: FakeHub) -> None:
    identity, data = open_().read_start("model.safetensors", 1000)
    assert (identity.size, data) == (len(SHARD), SHARD[:1000])
    assert fake.spans == ["bytes=0-999"]


def test_an_empty_file_takes_no_request(fake: FakeHub) -> None:
    folder = open_()
    assert folder.read("empty.txt", 10) == b""
    assert folder.read_start("empty.txt", 10)[1] == b""
    assert fake.paths("/resolve/") == []


def test_a_file_above_the_limit_is_not_read(fake: FakeHub) -> None:
    with pytest.raises(FileTooLarge, match="the limit is 5"):
        open_().read("config.json", 5)
    assert fake.paths("/resolve/") == []


def test_small_files_must_have_the_digest_that_the_hub_tells(fake: FakeHub) -> None:
    folder = open_()
    fake.commits[OLD]["config.json"] = CONFIG.replace(b"llama", b"lLama")
    with pytest.raises(TransferDamaged, match=r"config\.json.*digest"):
        folder.read("config.json", 100)
    fake.commits[OLD]["sub/model.safetensors"] = bytes(1000)
    with pytest.raises(TransferDamaged, match="digest"):
        folder.read("sub/model.safetensors", 1000)


def test_the_token_goes_to_the_hub_and_nowhere_else(fake: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    fake.private = True
    with caplog.at_level(logging.DEBUG), open_().open("model.safetensors") as reader:
        take(reader, 0, 100)
    assert {(server, allowed) for server, _, _, allowed in fake.log} == {("hub", f"Bearer {TOKEN}"), ("cdn", "")}
    assert "HTTP Request: GET" in caplog.text
    for secret in (TOKEN, SIGNATURE):
        assert secret not in "".join(record.getMessage() for record in caplog.records if record.name == "httpx")


def read_whole(reader: Reader) -> bytes:
    return b"".join(take(reader, begin, 4_000_000) for begin in range(0, len(SHARD), 4_000_000))


def test_the_hub_is_asked_once_where_the_file_lies(fake: FakeHub) -> None:
    with open_().open("model.safetensors") as reader:
        assert read_whole(reader) == SHARD
    assert len(fake.spans) == 3
    assert len(fake.paths("/resolve/")) == 1
    assert {allowed for server, _, _, allowed in fake.log if server == "cdn"} == {""}


@pytest.mark.parametrize("fault", [403, 404, 503, "cut"])
def test_the_hub_is_asked_again_when_the_other_place_fails(fake: FakeHub, fault: int | str) -> None:
    with open_().open("model.safetensors") as reader:
        take(reader, 0, 10)
        fake.faults = [fault]
        assert read_whole(reader) == SHARD
    assert len(fake.paths("/resolve/")) == 2


def test_every_request_is_a_storage_operation(fake: FakeHub) -> None:
    fake.faults = [503]
    with operations.watched(operations.Faults()) as faults:
        open_().read_start("model.safetensors", 10)
    place = f"hf://{REPO}@{OLD}/model.safetensors"
    assert [entry for entry in faults.log if entry[0] != "list"] == [
        ("look up", f"hf://{REPO}@main"),
        ("read", place),
        ("read", place),
    ]
    with (
        operations.watched(operations.Faults("EACCES", 1)),
        pytest.raises(StorageFailed, match="look up"),
    ):
        open_()


# ---- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [503, 429, 408, 500, "cut", "long"])
def test_what_passes_is_tried_again(fake: FakeHub, fault: int | str) -> None:
    folder = open_()
    fake.faults = [fault, fault]
    with folder.open("model.safetensors") as reader:
        assert take(reader, 5, 1000) == SHARD[5:1005]


def test_a_cut_reply_goes_on_where_it_stopped(fake: FakeHub) -> None:
    folder = open_()
    fake.faults = ["cut", "cut", "cut", "cut", "cut"]  # more than the tries, but each of them brings something
    assert folder.read_start("model.safetensors", 1_000_000)[1] == SHARD[:1_000_000]
    firsts = [int(span.removeprefix("bytes=").partition("-")[0]) for span in fake.spans]
    assert firsts == [0, 500_000, 750_000, 875_000, 937_500, 968_750]


def test_the_hub_may_fail_in_passing_while_it_is_asked_for_the_commit(fake: FakeHub) -> None:
    fake.api_faults = [503, 429]
    assert open_().exists()


def test_patience_ends(fake: FakeHub) -> None:
    folder = open_()
    fake.faults = [503] * 50
    with pytest.raises(StorageUnavailable, match=r"model\.safetensors.*answers 503"):
        folder.read_start("model.safetensors", 10)
    assert len(fake.spans) == QUICK.tries


def test_leaving_does_not_wait_for_patience_to_end(fake: FakeHub) -> None:
    patient = Patience(tries=1000, first_wait=100.0, longest_wait=100.0)
    with ThreadPoolExecutor(1) as other:
        with open_hub(REPO, patience=patient).open("model.safetensors") as reader:
            take(reader, 0, 10)
            fake.faults = [503] * 50
            asked = other.submit(take, reader, 15_000_000, 10)
            while len(fake.spans) < 2:
                time.sleep(0.001)
        with pytest.raises(StorageUnavailable):
            asked.result(timeout=20)


@pytest.mark.parametrize(
    ("refusal", "kind", "code", "way_out"),
    [
        ((401, ""), StorageFailed, errno.EACCES, "hf auth login"),
        ((403, ""), StorageFailed, errno.EACCES, "hf auth login"),
        ((403, "GatedRepo"), StorageFailed, errno.EACCES, "licence"),
        ((401, "RepoNotFound"), ObjectMissing, errno.ENOENT, "check the name"),
        ((404, "RepoNotFound"), ObjectMissing, errno.ENOENT, "check the name"),
        ((404, "RevisionNotFound"), ObjectMissing, errno.ENOENT, "no such revision"),
        ((404, ""), ObjectMissing, errno.ENOENT, "check the name"),
        ((418, ""), StorageFailed, errno.EIO, "answers 418"),
    ],
)
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_refusals_are_told_at_once(
    fake: FakeHub, refusal: tuple[int, str], kind: type[StorageFailed], code: int, way_out: str, when: str
) -> None:
    folder = open_() if when == "reading" else None
    fake.refusal = refusal
    before = len(fake.log)
    with pytest.raises(StorageFailed) as caught:
        (folder or open_()).read("config.json", 100)
    assert type(caught.value) is kind
    assert caught.value.errno == code
    assert way_out in str(caught.value)
    assert f"{REPO}@" in str(caught.value)
    assert len(fake.log) == before + 1
    error: BaseException | None = caught.value
    while error is not None:
        assert TOKEN not in repr(error)
        assert not hasattr(error, "request")
        error = error.__cause__ or error.__context__


def test_a_file_that_is_not_there_says_so(fake: FakeHub) -> None:
    folder = open_()
    for ask in (folder.open, lambda name: folder.read(name, 1), lambda name: folder.read_start(name, 1)):
        with pytest.raises(ObjectMissing, match="absent"):
            ask("absent.json")
    assert len(fake.log) == 1


def test_a_file_of_another_size_is_a_changed_source(fake: FakeHub) -> None:
    folder = open_()
    fake.commits[OLD]["model.safetensors"] = SHARD[:-1]
    with folder.open("model.safetensors") as reader, pytest.raises(SourceChanged, match=r"model\.safetensors"):
        take(reader, 0, 10)
    fake.commits[OLD]["model.safetensors"] = SHARD[:5]
    with folder.open("model.safetensors") as reader, pytest.raises(SourceChanged, match="ends before"):
        take(reader, 15_000_000, 10)


def test_an_answer_of_somebody_else_is_told(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "send_info", lambda self, _: self.reply(200, b"<html>log in to the hotel</html>"))
    with pytest.raises(StorageFailed, match="HF_ENDPOINT"):
        open_()
    assert len(fake.log) == 1


def test_nothing_can_be_written(fake: FakeHub) -> None:
    folder = open_()
    assert isinstance(folder, HubFolder)
    for write in (
        folder.prepare,
        lambda: folder.put("a", b""),
        lambda: folder.create("a", b""),
        lambda: folder.writer("a", 1),
        lambda: folder.copy_in("a", folder, "b"),
        lambda: folder.move("a", "b"),
        lambda: folder.remove("a"),
        folder.sweep,
    ):
        with pytest.raises(StorageFailed) as caught:
            write()
        assert caught.value.errno == errno.EROFS
    [problem] = folder.probe()
    assert problem.kind == "destination-unwritable"
    assert folder.free_bytes() is None
    assert len(fake.log) == 1


# ---- the library's cache ----------------------------------------------------------------------------------------


def test_what_the_cache_holds_is_not_fetched(fake: FakeHub) -> None:
    fill_cache({"model.safetensors": SHARD, "config.json": CONFIG})
    folder = open_()
    with folder.open("model.safetensors") as reader:
        assert take(reader, 100, 5000) == SHARD[100:5100]
        assert reader.bytes_read == 5000
        assert reader.identity == folder.identity("model.safetensors")
    assert folder.read("config.json", 100) == CONFIG
    assert folder.read_start("model.safetensors", 8)[1] == SHARD[:8]
    assert fake.paths("/resolve/") == []
    assert folder.read_start("sub/model.safetensors", 8)[1] == SHARD[:8]
    assert len(fake.paths("/resolve/")) == 1


def test_identities_do_not_depend_on_the_cache(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = open_().listing()
    fill_cache(FILES)
    cached = open_().listing()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = open_().listing()
    assert bare == cached == offline
    assert {name: file.digest for name, file in offline.items()} == {name: file.digest for name, file in bare.items()}
    assert fake.paths("/resolve/") == []


def test_a_cached_file_of_another_commit_size_or_name_is_fetched(fake: FakeHub) -> None:
    snapshot = fill_cache({"config.json": CONFIG, "model.safetensors": SHARD})
    (snapshot / "config.json").resolve().write_bytes(CONFIG[:-1])
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/" + "0" * 64)
    (snapshot / "model.safetensors").resolve().write_bytes(SHARD)
    folder = open_()
    assert folder.read("config.json", 100) == CONFIG
    folder.read_start("model.safetensors", 8)
    assert len(fake.paths("/resolve/")) == 2
    fake.commits[NEW] = dict(FILES)
    open_(NEW).read("config.json", 100)
    assert len(fake.paths("/resolve/")) == 3


def test_a_cached_file_that_is_deleted_later_is_fetched(fake: FakeHub) -> None:
    snapshot = fill_cache({"config.json": CONFIG})
    folder = open_()
    (snapshot / "config.json").resolve().unlink()
    assert folder.read("config.json", 100) == CONFIG
    assert len(fake.paths("/resolve/")) == 1


def test_a_cached_file_that_is_cut_after_opening_is_a_changed_source(offline: FakeHub) -> None:
    snapshot = fill_cache(FILES)
    folder = open_()
    (snapshot / "model.safetensors").resolve().write_bytes(SHARD[:-1])
    with pytest.raises(SourceChanged, match=r"hf://acme/tiny@.*model\.safetensors"):
        folder.open("model.safetensors")
    assert offline.log == []


def test_links_that_lead_out_of_the_cache_are_passed_over(offline: FakeHub, tmp_path: Path) -> None:
    snapshot = fill_cache(FILES)
    secret = tmp_path / "secret"
    secret.write_text("key")
    (snapshot / "direct.json").symlink_to(secret)
    (snapshot.parent.parent / "blobs" / "1").symlink_to(secret)
    (snapshot / "by-blob.json").symlink_to("../../blobs/1")
    (snapshot / "ref.json").symlink_to("../../refs/main")
    (snapshot / "sideways.json").symlink_to("config.json")
    (snapshot / "loop.json").symlink_to("loop.json")
    os.mkfifo(snapshot / "pipe.json")
    assert list(open_().listing()) == sorted(FILES)
    assert offline.log == []


def test_a_blob_in_the_shared_store_is_not_named_by_its_content(offline: FakeHub) -> None:
    snapshot = fill_cache(FILES)
    blob = snapshot.parent.parent / "blobs" / sha256(SHARD)
    shared = Path(constants.HF_HUB_CACHE) / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    folder = open_()
    identity = folder.identity("model.safetensors")
    assert identity is not None
    assert identity.digest == Digest("sha256", sha256(SHARD))
    assert folder.read_start("model.safetensors", 9)[1] == SHARD[:9]
    assert offline.log == []


def test_a_cache_without_links_is_read_without_digests(offline: FakeHub) -> None:
    snapshot = fill_cache(FILES)
    for name in FILES:
        blob = (snapshot / name).resolve()
        (snapshot / name).unlink()
        blob.rename(snapshot / name)
    folder = open_()
    identity = folder.identity("model.safetensors")
    assert identity is not None
    assert identity.digest is None
    assert folder.read("config.json", 100) == CONFIG
    assert offline.log == []


@pytest.mark.parametrize("revision", ["", "main", OLD])
def test_without_a_network_the_cache_is_the_repository(offline: FakeHub, revision: str) -> None:
    fill_cache(FILES)
    folder = open_(revision)
    assert folder.url == f"hf://{REPO}@{OLD}"
    assert list(folder.listing()) == sorted(FILES)
    with folder.open("model.safetensors") as reader:
        assert take(reader, 7, 99) == SHARD[7:106]
    with pytest.raises(ObjectMissing, match=f"hf download {REPO} --revision {OLD}"):
        folder.open("absent.json")
    assert offline.log == []


def test_without_a_network_a_subfolder_is_found_too(offline: FakeHub) -> None:
    fill_cache({"sub/config.json": CONFIG, "sub/model.safetensors": SHARD})
    folder = open_(subfolder="sub")
    assert list(folder.listing()) == ["config.json", "model.safetensors"]
    assert folder.read("config.json", 100) == CONFIG
    assert offline.log == []


def test_a_hub_that_cannot_be_reached_leaves_the_cache(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_cache(FILES)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_().read("config.json", 100) == CONFIG
    assert f"hf://{REPO}@{OLD}" in caplog.text
    with pytest.raises(StorageUnavailable, match="connection failed"):
        open_("other")
    assert fake.log == []


def test_a_revision_that_the_cache_does_not_know_is_named(offline: FakeHub) -> None:
    fill_cache(FILES)
    for revision in ("v2", NEW):
        with pytest.raises(ObjectMissing, match=f"HF_HUB_OFFLINE.*hf download {REPO} --revision {revision}"):
            open_(revision)
    assert offline.log == []


def test_a_ref_that_leads_elsewhere_is_not_followed(offline: FakeHub) -> None:
    snapshot = fill_cache(FILES)
    (snapshot.parent.parent / "refs" / "main").write_text("../../../../etc")
    with pytest.raises(ObjectMissing, match="does not have this revision"):
        open_()
    assert offline.log == []


@pytest.mark.parametrize(
    ("files", "lacks"),
    [
        ({"model.safetensors": SHARD}, "config.json"),
        ({"config.json": CONFIG}, "model.safetensors"),
        (
            {
                "config.json": CONFIG,
                "model.safetensors.index.json": encode_index(
                    {"a": "model-1.safetensors", "b": "model-2.safetensors"}, 8
                ),
                "model-1.safetensors": b"x",
            },
            "model-2.safetensors",
        ),
    ],
)
def test_a_half_filled_cache_says_what_is_missing(offline: FakeHub, files: dict[str, bytes], lacks: str) -> None:
    fill_cache(files)
    with pytest.raises(ObjectMissing, match=f"lacks {lacks}; run `hf download {REPO} --revision {OLD}`"):
        open_()
    assert offline.log == []
