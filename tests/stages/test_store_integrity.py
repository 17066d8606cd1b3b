"""A store that was damaged, poisoned or exchanged: nothing of it is used, everything is counted and done again."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import checkpoints
from shardmill.core.digest import STAGE_VERSIONS
from shardmill.core.receipt import Receipt, parse_receipt
from shardmill.core.recipe import Recipe, parse_recipe, uniform
from shardmill.errors import BlobsGone, Refused
from shardmill.stages import finalize as finalize_module
from shardmill.stages import pipeline
from shardmill.stages.pipeline import RunOptions, RunResult, run
from shardmill.stages.plan import Locations
from shardmill.storage import hashing
from shardmill.storage import store as store_module
from shardmill.storage.hashing import hash_file
from shardmill.storage.local import LocalFolder
from shardmill.storage.publish import forget_gone
from shardmill.storage.seal import KEY_VARIABLE, Seal
from shardmill.storage.store import Store, blob_name

SHARDS = 3
FP8 = uniform("FP8_DYNAMIC")
KEY = "a key of the tests alone"


@pytest.fixture(autouse=True)
def _remember_young_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_FRESH_NS", 0)


@pytest.fixture
def locations(tmp_path: Path) -> Locations:
    """A checkpoint; the store of its conversions lies apart from every destination."""
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(layers=1), SHARDS))
    return Locations(source=str(source), destination=str(tmp_path / "first"), store=str(tmp_path / "store"))


def convert(locations: Locations, name: str, recipe: Recipe = FP8) -> RunResult:
    there = replace(locations, destination=str(Path(locations.destination).parent / name))
    return run(there, recipe, RunOptions(device="cpu", workers=1))


def hits(result: RunResult) -> int:
    return sum(outcome.is_hit for outcome in result.outcomes)


def files(locations: Locations, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(locations.destination).parent / name).iterdir()}


class Damage:
    """The parts of a store, for who damages it."""

    def __init__(self, locations: Locations) -> None:
        self.root = Path(locations.store)
        found = sorted((self.root / "receipts").iterdir())
        self.receipts = sorted(found, key=lambda path: not json.loads(path.read_bytes())["weights"])
        """Those of shards with quantized weights come first."""
        self.blobs = [self.root / blob_name(path.stem) for path in self.receipts]
        self.digests = sorted((self.root / "digests").iterdir())

    @staticmethod
    def write(path: Path, data: bytes) -> None:
        path.unlink(missing_ok=True)  # a published result may share the bytes
        path.write_bytes(data)

    def swap(self, paths: list[Path]) -> None:
        first, second = paths[0].read_bytes(), paths[1].read_bytes()
        self.write(paths[0], second)
        self.write(paths[1], first)

    def receipt(self, number: int = 0) -> Receipt:
        return parse_receipt(self.receipts[number].read_bytes())


def torn_receipt(store: Damage) -> None:
    store.write(store.receipts[0], store.receipts[0].read_bytes()[:-20])


def pickled_receipt(store: Damage) -> None:
    store.write(store.receipts[0], pickle.dumps({"schema": 1}))


def receipt_that_names_a_class(store: Damage) -> None:
    store.write(
        store.receipts[0], json.dumps({"schema": 1, "key": {"__class__": "os.system", "data": "true"}}).encode()
    )


def deep_receipt(store: Damage) -> None:
    store.write(store.receipts[0], b"[" * 100_000)


def swapped_receipts(store: Damage) -> None:
    store.swap(store.receipts)


def renamed_receipts(store: Damage) -> None:
    """Whole, well-formed, and each says that it is the other's."""
    first, second = store.receipt(0), store.receipt(1)
    for path, blob, mine, other in (
        (store.receipts[0], store.blobs[0], first, second),
        (store.receipts[1], store.blobs[1], second, first),
    ):
        store.write(path, replace(other, key=mine.key).to_bytes())
        store.write(
            blob, (store.root / blob_name(other.key)).read_bytes() if blob == store.blobs[0] else blob.read_bytes()
        )
        assert other.key != mine.key


def swapped_blobs(store: Damage) -> None:
    store.swap(store.blobs)


def truncated_blob(store: Damage) -> None:
    store.write(store.blobs[0], store.blobs[0].read_bytes()[:-1])


def zeroed_blob(store: Damage) -> None:
    whole = store.blobs[0].read_bytes()
    store.write(store.blobs[0], whole[: len(whole) // 2].ljust(len(whole), b"\0"))


def blob_with_another_header(store: Damage) -> None:
    """Blob and receipt agree with each other, and not with the plan."""
    data = store.blobs[0].read_bytes().replace(b'"F8_E4M3"', b'"F8_E5M2"')
    store.write(store.blobs[0], data)
    found = hash_file(LocalFolder(store.root), blob_name(store.receipts[0].stem))[0]
    store.write(store.receipts[0], replace(store.receipt(), blob=found).to_bytes())


def receipt_of_other_tensors(store: Damage) -> None:
    receipt = store.receipt()
    store.write(store.receipts[0], replace(receipt, tensors=receipt.tensors[:-1]).to_bytes())


def receipt_without_statistics(store: Damage) -> None:
    store.write(store.receipts[0], replace(store.receipt(), weights=()).to_bytes())


def deleted_blob(store: Damage) -> None:
    store.blobs[0].unlink()


def deleted_receipt(store: Damage) -> None:
    store.receipts[0].unlink()


def torn_digest(store: Damage) -> None:
    store.write(store.digests[0], b'{"digest": 3')


def swapped_digests(store: Damage) -> None:
    store.swap(store.digests)


DAMAGES: list[tuple[Callable[[Damage], None], int, int]] = [
    (torn_receipt, 1, 1),
    (pickled_receipt, 1, 1),
    (receipt_that_names_a_class, 1, 1),
    (deep_receipt, 1, 1),
    (swapped_receipts, 2, 2),
    (renamed_receipts, 2, 2),
    (swapped_blobs, 2, 2),
    (truncated_blob, 1, 1),
    (zeroed_blob, 1, 1),
    (blob_with_another_header, 1, 1),
    (receipt_of_other_tensors, 1, 1),
    (receipt_without_statistics, 1, 1),
    (deleted_blob, 1, 1),
    (deleted_receipt, 0, 1),
    (torn_digest, 1, 0),
    (swapped_digests, 2, 0),
]
"""What is done to a store, how many records and blobs are found bad, and how many shards are done again."""


@pytest.mark.parametrize(("damage", "failed", "redone"), DAMAGES, ids=[damage.__name__ for damage, _, _ in DAMAGES])
def test_what_is_damaged_is_counted_and_done_again(
    locations: Locations, damage: Callable[[Damage], None], failed: int, redone: int, caplog: pytest.LogCaptureFixture
) -> None:
    first = convert(locations, "first")
    assert (hits(first), first.store_checks_failed) == (0, 0)
    damage(Damage(locations))

    second = convert(locations, "second")

    assert files(locations, "second") == files(locations, "first")
    assert (second.store_checks_failed, hits(second)) == (failed, SHARDS - redone)
    assert sum(record.levelname == "WARNING" for record in caplog.records) >= failed
    third = convert(locations, "third")
    assert (third.store_checks_failed, hits(third)) == (0, SHARDS)


# ---- sealed stores ----------------------------------------------------------------------------------------------


@pytest.fixture
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def reseal(store: Damage, path: Path, key: str) -> None:
    name = path.relative_to(store.root).as_posix()
    store.write(path, Seal(key.encode()).close(name, Seal().open(name, path.read_bytes())))


def unsealed(store: Damage) -> None:
    for path in store.receipts:
        store.write(path, Seal().open("", path.read_bytes()))


def sealed_by_a_stranger(store: Damage) -> None:
    for path in store.receipts:
        reseal(store, path, "the key of somebody else")


def edited(store: Damage) -> None:
    for path in store.receipts:
        store.write(path, path.read_bytes().replace(b'"size":', b'"size":1', 1))


def moved(store: Damage) -> None:
    names = [path.read_bytes() for path in store.receipts]
    for path, data in zip(store.receipts, [*names[1:], names[0]], strict=True):
        store.write(path, data)


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize("damage", [unsealed, sealed_by_a_stranger, edited, moved])
def test_with_a_key_only_its_own_receipts_count(locations: Locations, damage: Callable[[Damage], None]) -> None:
    convert(locations, "first")
    assert hits(convert(locations, "second")) == SHARDS
    damage(Damage(locations))

    third = convert(locations, "third")

    assert (third.store_checks_failed, hits(third)) == (SHARDS, 0)
    assert files(locations, "third") == files(locations, "first")
    assert hits(convert(locations, "fourth")) == SHARDS


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize("part", ["digests", "verified", "published"])
def test_with_a_key_nothing_else_counts_unless_it_is_sealed(locations: Locations, part: str) -> None:
    convert(locations, "first")
    store = Damage(locations)
    paths = list((store.root / part).iterdir())
    assert len(paths) == (1 if part == "published" else SHARDS)
    for path in paths:
        store.write(path, Seal().open("", path.read_bytes()))
    if part == "published":
        kept = locations.open_store()
        assert kept.publication(locations.destination) is None
        assert len(kept.failed_checks) == 1
        return
    second = convert(locations, "second")
    assert (second.store_checks_failed, hits(second)) == (SHARDS, SHARDS)
    assert files(locations, "second") == files(locations, "first")


@pytest.mark.usefixtures("_key")
def test_with_a_key_a_blob_that_is_met_for_the_first_time_is_read_whole(
    locations: Locations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "EDGE_BYTES", 2000)
    convert(locations, "first")
    store = Damage(locations)
    whole = store.blobs[0].read_bytes()
    middle = len(whole) // 2
    store.write(store.blobs[0], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    second = convert(locations, "second")
    assert (second.store_checks_failed, hits(second)) == (1, SHARDS - 1)
    assert files(locations, "second") == files(locations, "first")


def test_without_a_key_sealed_and_other_records_count_alike(
    locations: Locations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    convert(locations, "first")
    monkeypatch.delenv(KEY_VARIABLE)
    second = convert(locations, "second")
    assert (second.store_checks_failed, hits(second)) == (0, SHARDS)


@pytest.mark.parametrize("key", ["", "fifteen letters"])
def test_a_key_that_can_be_guessed_is_refused_and_not_shown(
    locations: Locations, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(Refused, match="at least 16") as refused:
        locations.open_store()
    assert not key or key not in str(refused.value)


@pytest.mark.usefixtures("_key")
def test_the_key_is_written_nowhere(locations: Locations, tmp_path: Path) -> None:
    convert(locations, "first")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > SHARDS
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in repr(vars(locations.open_store()))


# ---- keys -------------------------------------------------------------------------------------------------------


def test_whatever_changes_bytes_misses_and_nothing_else_does(
    tmp_path: Path, locations: Locations, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvfp4 = uniform("NVFP4A16")
    convert(locations, "first", nvfp4)
    source = Path(locations.source)

    # the same bytes elsewhere, under other names and times
    moved_to = tmp_path / "moved"
    shutil.copytree(source, moved_to)
    index = moved_to / "model.safetensors.index.json"
    for shard in sorted(moved_to.glob("*.safetensors")):
        name = shard.name.replace("model-", "weights-")
        index.write_text(index.read_text().replace(shard.name, name))
        shard.rename(moved_to / name)
    assert hits(convert(replace(locations, source=str(moved_to)), "moved-result", nvfp4)) == SHARDS
    for path in source.iterdir():
        path.touch()
    assert hits(convert(locations, "touched", nvfp4)) == SHARDS

    # each change of what is asked for; one shard holds norms alone, and no scheme concerns it
    for name, scheme, group_size in [("fp8", "FP8_DYNAMIC", None), ("g32", "W4A16", 32), ("g64", "W4A16", 64)]:
        recipe = parse_recipe({"scheme": scheme, "group_size": group_size})
        assert hits(convert(locations, name, recipe)) == 1, name
    with monkeypatch.context() as patch:
        patch.setitem(STAGE_VERSIONS, "quantize", 2)
        assert hits(convert(locations, "version", nvfp4)) == 0
    ignored = uniform("NVFP4A16", ignore=["model.layers.0.mlp.down_proj"])
    assert hits(convert(locations, "ignored", ignored)) == SHARDS - 1

    # one bit of one tensor whose global scale others share
    tensors = checkpoints.llama(layers=1)
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] *= 2
    checkpoints.write(source, checkpoints.deal(tensors, SHARDS))
    owners = [
        number
        for number, part in enumerate(checkpoints.deal(tensors, SHARDS))
        if any(leaf in name for name in part for leaf in ("q_proj", "k_proj", "v_proj"))
    ]
    assert hits(convert(locations, "bit", nvfp4)) == SHARDS - len(owners)


# ---- eviction during a run --------------------------------------------------------------------------------------


def collect_before(monkeypatch: pytest.MonkeyPatch, locations: Locations, times: int) -> list[int]:
    """Let somebody delete everything in the store right before a run publishes, `times` times."""
    left = [times]
    check = finalize_module._check_blobs

    def check_after_collection(*args: object) -> None:
        if left[0] > 0:
            left[0] -= 1
            store = Store(LocalFolder(Path(locations.store)))
            forget_gone(store)
            assert len(store.collect(older_than=-1)) == SHARDS
        check(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(finalize_module, "_check_blobs", check_after_collection)
    return left


@pytest.mark.parametrize("is_warm", [True, False], ids=["hits", "misses"])
def test_eviction_during_a_run_costs_work_and_not_the_run(
    locations: Locations,
    is_warm: bool,  # noqa: FBT001  a parameter of pytest
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convert(locations, "first")
    wanted = files(locations, "first")
    shutil.rmtree(locations.destination)
    if not is_warm:
        shutil.rmtree(locations.store)
    left = collect_before(monkeypatch, locations, 1)

    second = convert(locations, "second")

    assert left == [0]
    assert files(locations, "second") == wanted
    assert second.store_checks_failed == SHARDS


def test_a_run_gives_up_on_a_store_that_loses_everything(locations: Locations, monkeypatch: pytest.MonkeyPatch) -> None:
    left = collect_before(monkeypatch, locations, 10)
    with pytest.raises(BlobsGone, match="3 finished shards vanished"):
        convert(locations, "first")
    assert left == [10 - pipeline.ROUNDS]
    assert not Path(locations.destination).exists()
