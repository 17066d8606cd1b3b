"""Whole runs from bucket to bucket and from the Hub: the bytes of a run on disk, whatever the network does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

from crash.sites import toy_model
from shardmill.core.recipe import uniform
from shardmill.errors import (
    DestinationInvalid,
    Refused,
    ShardFailures,
    SourceChanged,
    TransferDamaged,
)
from shardmill.stages.pipeline import RunOptions, RunResult, Watcher, run
from shardmill.stages.plan import Locations
from shardmill.stages.quantize import Sources
from shardmill.storage import s3_client
from shardmill.storage.claim import new_claim
from shardmill.storage.folder import Reader
from shardmill.storage.location import open_folder
from shardmill.storage.store import FAST, FULL
from storage.fake_hub import NEW, OLD, REPO, TOKEN, fill_cache, run_hub
from storage.fault_proxy import FaultProxy, Rule
from storage.places import use_small_parts
from storage.servers import S3Server

SCHEME = "NVFP4A16"
pytestmark = pytest.mark.s3


def convert(
    locations: Locations, scheme: str = SCHEME, watcher: Watcher | None = None, *, workers: int = 0, verify: str = FAST
) -> RunResult:
    return run(locations, uniform(scheme), RunOptions(workers=workers, verify=verify), watcher=watcher)


def on_disk(locations: Locations) -> dict[str, bytes]:
    """Every file of a destination on disk."""
    return {path.name: path.read_bytes() for path in Path(locations.destination).iterdir()}


@dataclass(frozen=True)
class Bucket:
    """A bucket with a source in it."""

    server: S3Server
    name: str

    @property
    def locations(self) -> Locations:
        base = f"s3://{self.name}"
        return Locations(source=f"{base}/in", destination=f"{base}/out/model")

    def result(self, prefix: str = "out/model/") -> dict[str, bytes]:
        keys = [key for key in self.server.keys(self.name) if key.startswith(prefix)]
        return {
            key.removeprefix(prefix): self.server.client.get_object(Bucket=self.name, Key=key)["Body"].read()
            for key in keys
        }

    def left_over(self) -> list[str]:
        hidden = [key for key in self.server.keys(self.name) if "/.shardmill-" in key]
        return hidden + self.server.open_uploads(self.name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model") / "in")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of a run on disk."""
    folder = tmp_path_factory.mktemp("expected")
    time.sleep(2.1)  # so that digests are remembered
    convert(Locations(source=str(model), destination=str(folder / "model")))
    return {path.name: path.read_bytes() for path in (folder / "model").iterdir()}


@pytest.fixture
def bucket(moto: S3Server, model: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    moto.lead(monkeypatch)
    use_small_parts(monkeypatch, moto.smallest_part)
    name = moto.new_bucket()
    for path in model.iterdir():
        moto.client.put_object(Bucket=name, Key=f"in/{path.name}", Body=path.read_bytes())
    return Bucket(moto, name)


@pytest.fixture
def proxy(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(bucket.server.endpoint) as running:
        bucket.server.lead(monkeypatch, running.url)
        yield running


# ---- what goes wrong on the way ---------------------------------------------------------------------------------


BAD_NETWORKS = {
    "503-10%": [Rule("status", p=0.1, seed=1)],
    "503-30%": [Rule("status", p=0.3, seed=2)],
    "reset-10%": [Rule("reset", p=0.1, seed=3)],
    "short-30%": [Rule("short", method="GET", p=0.3, seed=4, at=1000)],
    "stall": [Rule("stall", method="GET", header="Range", nth=(5, 25), at=1000, seconds=3.0)],
    "lost-complete": [Rule("lost_reset", method="POST", path="uploadId=", nth=(1, 4))],
    "lost-receipt": [Rule("lost_reset", method="PUT", path="receipts/", nth=(1, 7))],
    "lost-commit": [Rule("lost_reset", method="PUT", path="(config|shardmill|index).json$", nth=(1, 2, 3))],
}


def by_default(*names: str) -> list[object]:
    """All of them, the others only among the slow tests."""
    return [
        pytest.param(rules, id=name, marks=() if name in names else pytest.mark.slow)
        for name, rules in BAD_NETWORKS.items()
    ]


@pytest.mark.parametrize("rules", by_default("503-10%"))
def test_a_run_over_a_bad_network_gives_the_same_bytes(
    bucket: Bucket,
    proxy: FaultProxy,
    expected: dict[str, bytes],
    rules: list[Rule],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_client, "READ_SECONDS", 1.0)
    started = time.monotonic()
    convert(replace(bucket.locations, destination=f"s3://{bucket.name}/undisturbed/model"))
    undisturbed = time.monotonic() - started
    proxy.set_rules(*rules)

    started = time.monotonic()
    convert(bucket.locations)

    print(f"{time.monotonic() - started:.2f} s, undisturbed {undisturbed:.2f} s, {proxy.fired} faults")
    proxy.set_rules()
    assert bucket.result() == expected
    assert bucket.left_over() == []


@pytest.mark.parametrize(
    "every", [pytest.param(3, marks=pytest.mark.slow), 7, pytest.param(20, marks=pytest.mark.slow)]
)
def test_a_flipped_bit_is_found_where_the_digest_is_known(
    bucket: Bucket, proxy: FaultProxy, expected: dict[str, bytes], every: int
) -> None:
    store = f"s3://{bucket.name}/store"
    convert(replace(bucket.locations, destination=f"s3://{bucket.name}/other/model", store=store), "FP8_DYNAMIC")
    proxy.set_rules(Rule("corrupt", method="GET", header="Range", path="/in/model-.*safetensors", every=every, at=900))

    with pytest.raises((ShardFailures, Refused)) as caught:
        convert(replace(bucket.locations, store=store))

    if isinstance(caught.value, ShardFailures):
        assert all(isinstance(error, (TransferDamaged, SourceChanged)) for _, error in caught.value.failures)
    assert proxy.fired > 0
    assert "config.json" not in bucket.result()
    proxy.set_rules()
    convert(replace(bucket.locations, store=store))
    assert bucket.result() == expected


@pytest.mark.slow
def test_flipped_bits_in_fused_partners_are_found(
    bucket: Bucket, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of a partner is of the whole shard, of which only a part is read."""
    open_ = Sources.open

    class Flipping:
        def __init__(self, reader: Reader) -> None:
            self.reader, self.identity, self.bytes_read = reader, reader.identity, 0

        def read_into(self, offset: int, view: memoryview) -> None:
            self.reader.read_into(offset, view)
            view.cast("B")[-1] ^= 1

    def open_damaged(self: Sources, name: str) -> Any:
        reader = open_(self, name)
        return reader if name == self.shard.name else Flipping(reader)

    monkeypatch.setattr(Sources, "open", open_damaged)
    with pytest.raises(ShardFailures) as caught:
        convert(bucket.locations)
    assert all(isinstance(error, TransferDamaged) for _, error in caught.value.failures)
    assert "config.json" not in bucket.result()
    monkeypatch.setattr(Sources, "open", open_)
    result = convert(bucket.locations)
    assert {o.shard for o in result.outcomes if len(o.sources) > 1} == {name for name, _ in caught.value.failures}
    assert bucket.result() == expected


@pytest.mark.slow
def test_a_blob_whose_bytes_are_damaged_on_their_way_is_not_published(
    bucket: Bucket, proxy: FaultProxy, expected: dict[str, bytes]
) -> None:
    store = f"s3://{bucket.name}/store"
    convert(replace(bucket.locations, store=store))
    again = replace(bucket.locations, destination=f"s3://{bucket.name}/again/model", store=store)
    proxy.set_rules(Rule("corrupt", method="GET", header="Range", path="/store/blobs/", every=3, at=500))
    result = convert(again, verify=FULL)
    assert proxy.fired >= sum(not outcome.is_hit for outcome in result.outcomes) > 0
    assert bucket.result("again/model/") == expected


def test_a_flipped_bit_in_a_blob_is_not_copied_to_disk(
    bucket: Bucket, proxy: FaultProxy, expected: dict[str, bytes], tmp_path: Path
) -> None:
    store = f"s3://{bucket.name}/store"
    locations = Locations(source=f"s3://{bucket.name}/in", destination=str(tmp_path / "model"), store=store)
    proxy.set_rules(Rule("corrupt", method="GET", header="Range", path="/store/blobs/", nth=(4,), at=500))
    with pytest.raises(TransferDamaged):
        convert(locations)
    assert list(tmp_path.iterdir()) == []
    proxy.set_rules()
    convert(locations)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == expected


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId")]
)
@pytest.mark.parametrize("first", [1, pytest.param(150, marks=pytest.mark.slow)])
def test_lost_rights_end_a_run_soon_and_in_silence(
    bucket: Bucket, proxy: FaultProxy, status: int, code: str, first: int
) -> None:
    proxy.set_rules(Rule("status", status=status, code=code, nth=tuple(range(first, first + 5000))))
    token = "session-token-of-the-tests"  # noqa: S105 - a bait
    secrets = (bucket.server.access_key, bucket.server.secret_key, token)
    started = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from shardmill.cli import main; sys.exit(main())",
            "run",
            bucket.locations.source,
            bucket.locations.destination,
            "--scheme",
            SCHEME,
            "--debug",
            "-vv",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | bucket.server.environment(proxy.url) | {"AWS_SESSION_TOKEN": token},
    )
    seconds = time.monotonic() - started
    assert done.returncode in (1, 2)
    assert "denied" in done.stdout + done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in secrets)
    assert seconds < 10 + START_SECONDS
    assert "config.json" not in bucket.result()


START_SECONDS = 15
"""What the interpreter and its imports may take on a busy machine."""


# ---- sources and blobs that change ------------------------------------------------------------------------------


def at_first_shard(act: Callable[[], None]) -> Watcher:
    """Do something when the first shard is finished."""
    done = threading.Event()

    def on_shard(_outcome: object) -> None:
        if not done.is_set():
            done.set()
            act()

    return Watcher(on_shard=on_shard)


def test_an_object_that_is_replaced_fails_its_shard(bucket: Bucket, model: Path) -> None:
    name = max(path.name for path in model.glob("*.safetensors"))
    data = bytearray((model / name).read_bytes())
    data[-1] ^= 1
    first = convert(replace(bucket.locations, destination=f"s3://{bucket.name}/first/model"), "FP8_DYNAMIC")
    assert first.outcomes

    def overwrite() -> None:
        bucket.server.client.put_object(Bucket=bucket.name, Key=f"in/{name}", Body=bytes(data[:-2]))

    with pytest.raises(ShardFailures) as caught:
        convert(bucket.locations, watcher=at_first_shard(overwrite))
    failed = dict(caught.value.failures)
    assert name in failed
    assert isinstance(failed[name], SourceChanged)
    assert caught.value.done > 0
    assert "config.json" not in bucket.result()


@pytest.mark.parametrize("way", ["rewritten", "replaced"])
def test_a_file_that_changes_fails_its_shard(model: Path, tmp_path: Path, way: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for path in model.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    last = max(source.glob("*.safetensors"))
    data = bytearray(last.read_bytes())
    data[-3] ^= 1

    def change() -> None:
        if way == "rewritten":
            last.write_bytes(data[:-2])
        else:
            (source / "new").write_bytes(data[:-2])
            (source / "new").replace(last)

    locations = Locations(source=str(source), destination=str(tmp_path / "out" / "model"))
    with pytest.raises(ShardFailures) as caught:
        convert(locations, watcher=at_first_shard(change))
    failed = dict(caught.value.failures)
    assert isinstance(failed[last.name], (SourceChanged, Refused))
    assert caught.value.done > 0
    assert not (tmp_path / "out" / "model").exists()


def doubled(path: Path) -> bytes:
    """A shard with the same header and other values."""
    return save({name: 2 * tensor for name, tensor in load_file(path).items()}, {"format": "pt"})


@pytest.mark.parametrize("way", ["rewritten", "replaced"])
@pytest.mark.parametrize("which", [2, -1], ids=["partner", "last"])
def test_a_file_that_is_replaced_under_the_same_header_is_never_mixed_in(
    model: Path, tmp_path: Path, way: str, which: int
) -> None:
    source = Path(shutil.copytree(model, tmp_path / "in"))
    changed = sorted(source.glob("*.safetensors"))[which]
    data = doubled(changed)
    assert len(data) == changed.stat().st_size

    def change() -> None:
        if way == "rewritten":
            changed.write_bytes(data)
        else:
            (tmp_path / "new").write_bytes(data)
            (tmp_path / "new").replace(changed)

    locations = Locations(source=str(source), destination=str(tmp_path / "out" / "model"))
    with pytest.raises((SourceChanged, ShardFailures)) as caught:
        convert(locations, watcher=at_first_shard(change), workers=1)

    assert "changed" in str(caught.value)
    assert not (tmp_path / "out" / "model").exists()
    again = convert(locations)
    assert any(outcome.is_hit for outcome in again.outcomes)
    clean = replace(locations, destination=str(tmp_path / "clean" / "model"))
    convert(clean)
    assert on_disk(locations) == on_disk(clean)


@pytest.mark.slow
def test_an_object_that_is_replaced_under_the_same_header_is_never_mixed_in(
    bucket: Bucket, model: Path, tmp_path: Path
) -> None:
    changed = max(model.glob("*.safetensors"))

    def overwrite() -> None:
        bucket.server.client.put_object(Bucket=bucket.name, Key=f"in/{changed.name}", Body=doubled(changed))

    with pytest.raises(SourceChanged, match="changed"):
        convert(bucket.locations, watcher=at_first_shard(overwrite), workers=1)

    assert bucket.result() == {}
    assert bucket.left_over() == []
    assert any(outcome.is_hit for outcome in convert(bucket.locations).outcomes)
    clean = Locations(source=f"s3://{bucket.name}/in", destination=str(tmp_path / "clean" / "model"))
    convert(clean)
    assert bucket.result() == on_disk(clean)


# ---- two runs ---------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from shardmill.core.recipe import uniform
from shardmill.errors import Refused
from shardmill.stages.pipeline import run
from shardmill.stages.plan import Locations
try:
    run(Locations(source=sys.argv[1], destination=sys.argv[2], store=sys.argv[4]), uniform(sys.argv[3]))
except Refused as error:
    print(error)
    sys.exit(2)
"""


def start(locations: Locations, scheme: str, store: str = "") -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, locations.source, locations.destination, scheme, store]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_two_runs_of_one_plan_both_succeed(
    bucket: Bucket, model: Path, tmp_path: Path, expected: dict[str, bytes], place: str
) -> None:
    here = Locations(source=str(model), destination=str(tmp_path / "model"))
    locations = here if place == "local" else bucket.locations
    runs = [start(locations, SCHEME) for _ in range(2)]
    said = [one.communicate()[0] for one in runs]
    assert [one.returncode for one in runs] == [0, 0], said
    if place == "local":
        assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == expected
        assert {path.name for path in tmp_path.iterdir()} == {"model", ".shardmill"}
    else:
        assert bucket.result() == expected
        assert bucket.left_over() == []


@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_two_plans_one_is_refused_and_told_who_is_there(
    bucket: Bucket, model: Path, tmp_path: Path, place: str
) -> None:
    here = Locations(source=str(model), destination=str(tmp_path / "model"))
    locations = here if place == "local" else bucket.locations
    for _ in range(2):  # the first pair meets at the start, the second finds the result
        runs = [start(locations, scheme) for scheme in ("FP8_DYNAMIC", SCHEME)]
        said = [one.communicate()[0] for one in runs]
        assert sorted(one.returncode for one in runs) == [0, 2], said
        assert any("is making another result there" in text or "another plan" in text for text in said)
    manifest = json.loads(open_folder(locations.destination).read("shardmill.json", 1 << 30))
    schemes = {weight["scheme"] for shard in manifest["shards"] for weight in shard["weights"]}
    assert len(schemes) == 1


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_the_refusal_names_the_run_that_is_there(bucket: Bucket, model: Path, tmp_path: Path, place: str) -> None:
    here = Locations(source=str(model), destination=str(tmp_path / "model"))
    locations = here if place == "local" else bucket.locations
    destination = locations.open_destination()
    claim = new_claim("another plan", "run-of-somebody")
    with destination.claimed(claim), pytest.raises(DestinationInvalid, match="run-of-somebody"):
        convert(locations)
    convert(locations)


# ---- the Hub ----------------------------------------------------------------------------------------------------


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "shardmill.json"}


def test_a_run_from_the_hub_keeps_to_one_commit(
    model: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with run_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.commits[OLD] = files
        hub.commits[NEW] = files | {max(files): b"other"}
        locations = Locations(source=f"hf://{REPO}", destination=str(tmp_path / "out" / "model"))

        def move_branch() -> None:
            hub.branches["main"] = NEW

        result = convert(locations, watcher=at_first_shard(move_branch))

        found = {path.name: path.read_bytes() for path in (tmp_path / "out" / "model").iterdir()}
        assert weights(found) == weights(expected)
        assert all(digest.startswith("sha256:") for o in result.outcomes for _, digest in o.sources)
        assert not [path for path in hub.paths("resolve") if NEW in path]
        hub.branches["main"] = OLD
        hub.log.clear()
        again = convert(replace(locations, destination=str(tmp_path / "out" / "again")))
        assert all(outcome.is_hit for outcome in again.outcomes)
        assert hub.spans
        assert not any(entry[0] == "cdn" and int(size) > 1 << 18 for entry, size in sizes(hub.log, hub.spans))
        assert TOKEN not in json.dumps(again.manifest)


def sizes(log: list[tuple[str, str, str, str]], spans: list[str]) -> list[tuple[tuple[str, str, str, str], int]]:
    """Requests to the CDN with the last byte that each asked for."""
    asked = [entry for entry in log if entry[0] == "cdn"]
    lasts = [int(span.rpartition("-")[2]) for span in spans[-len(asked) :]] if asked else []
    return list(zip(asked, lasts, strict=True))


def test_a_run_from_the_cache_of_the_hub_asks_nobody(
    model: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with run_hub(monkeypatch, tmp_path / "cache") as hub:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        fill_cache(files)
        convert(Locations(source=f"hf://{REPO}", destination=str(tmp_path / "out" / "model")))
        found = {path.name: path.read_bytes() for path in (tmp_path / "out" / "model").iterdir()}
        assert weights(found) == weights(expected)
        assert hub.log == []
