"""Result records: which ones count, and that the others neither run anything nor change a result."""

from __future__ import annotations

import base64
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer, PickleSerializer
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from served import Ask, run_id, states
from shardmill.core.digest import Digest
from shardmill.core.outcome import ShardOutcome
from shardmill.core.receipt import BlobDigests, Receipt, WeightRecord
from shardmill.core.recipe import uniform
from shardmill.core.statistics import Statistics
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.orchestration.cache import StageCachePolicy, agrees, is_own_record
from shardmill.stages.plan import make_plan
from shardmill.storage.local import RangeReader
from shardmill.storage.source import open_source

NAME = "model-00002-of-00004.safetensors"
BLAKE = Digest("blake3", "00ff")
OUTCOME = ShardOutcome(
    shard=NAME,
    receipt=Receipt(
        key="ab" * 32,
        blob=BlobDigests(whole=BLAKE, head=BLAKE, tail=BLAKE, size=7),
        tensors=("a.weight",),
        weights=(WeightRecord("a", "FP8_DYNAMIC", Statistics(count=3, squared_weight=1 / 3)),),
        producer=(("torch", "2"),),
    ),
    is_hit=False,
    sources=((NAME, "blake3:00ff"),),
    bytes_read=100,
    seconds=1.5,
)


def record_of(outcome: ShardOutcome) -> bytes:
    """What Prefect writes for an outcome."""
    store = ResultStore(result_storage=LocalFileSystem(basepath="/nowhere"), serializer=JSONSerializer())
    return store.create_result_record(outcome, key="key").serialize()


def edited(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """A record of ours after `change(record, result)`."""
    record = json.loads(record_of(OUTCOME))
    result = json.loads(record["result"])
    change(record, result)
    if isinstance(record.get("result"), str):
        record["result"] = json.dumps(result)
    return json.dumps(record).encode()


def rename_class(_: dict[str, Any], result: dict[str, Any]) -> None:
    result["__class__"] = "subprocess.getoutput"


def nest_class(_: dict[str, Any], result: dict[str, Any]) -> None:
    result["data"]["receipt"]["producer"] = [{"__class__": "subprocess.getoutput", "data": "true"}]


def nest_exception(_: dict[str, Any], result: dict[str, Any]) -> None:
    result["data"]["seconds"] = {"__exc_type__": "shardmill.errors.Refused", "message": "x"}


def pickle_serializer(record: dict[str, Any], _: dict[str, Any]) -> None:
    record["metadata"]["serializer"] = PickleSerializer().model_dump()


def foreign_decoder(record: dict[str, Any], _: dict[str, Any]) -> None:
    record["metadata"]["serializer"]["object_decoder"] = "os.system"


def foreign_json_library(record: dict[str, Any], _: dict[str, Any]) -> None:
    record["metadata"]["serializer"]["jsonlib"] = "planted"


def older_field_names(record: dict[str, Any], _: dict[str, Any]) -> None:
    record["serializer"] = PickleSerializer().model_dump()  # Prefect lets these win
    record["data"] = "gASVAAAAAA=="


def result_is_no_text(record: dict[str, Any], result: dict[str, Any]) -> None:
    record["result"] = result


def other_block(record: dict[str, Any], _: dict[str, Any]) -> None:
    record["metadata"]["storage_block_id"] = "00000000-0000-0000-0000-000000000000"


def no_class(_: dict[str, Any], result: dict[str, Any]) -> None:
    del result["__class__"]


FOREIGN = [
    rename_class,
    nest_class,
    nest_exception,
    pickle_serializer,
    foreign_decoder,
    foreign_json_library,
    older_field_names,
    result_is_no_text,
    other_block,
    no_class,
]


def test_a_record_as_prefect_writes_it_is_ours() -> None:
    assert is_own_record(record_of(OUTCOME))
    assert is_own_record(edited(lambda _record, _result: None))


@pytest.mark.parametrize("change", FOREIGN)
def test_an_edited_record_is_foreign(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    assert not is_own_record(edited(change))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        record_of(OUTCOME)[:-40],
        record_of(OUTCOME)[:-1] + b',"metadata":{}}',
        pickle.dumps(OUTCOME),
    ],
)
def test_what_is_no_record_is_foreign(content: bytes) -> None:
    assert not is_own_record(content)


def test_a_record_agrees_with_the_store_whatever_the_work_cost() -> None:
    kept = json.loads(OUTCOME.receipt.to_bytes())["weights"][0]["squared_weight"]
    rounded = WeightRecord("a", "FP8_DYNAMIC", Statistics(count=3, squared_weight=kept))
    stored = _changed(is_hit=True, bytes_read=0, seconds=0.0, receipt=_receipt(weights=(rounded,)))
    assert agrees(record_of(OUTCOME), stored)


@pytest.mark.parametrize("field", ["shard", "sources", "receipt"])
def test_a_record_that_says_something_else_than_the_store_does_not_count(field: str) -> None:
    others: dict[str, Any] = {
        "shard": "model-00009-of-00009.safetensors",
        "sources": ((NAME, "blake3:11"),),
        "receipt": _receipt(blob=BlobDigests(whole=Digest("blake3", "11"), head=BLAKE, tail=BLAKE, size=7)),
    }
    assert not agrees(record_of(OUTCOME), _changed(**{field: others[field]}))


def _changed(**fields: Any) -> ShardOutcome:
    return replace(OUTCOME, **fields)


def _receipt(**fields: Any) -> Receipt:
    return replace(OUTCOME.receipt, **fields)


# ---- records in a real run --------------------------------------------------------------------------------------


def by_job(records: Path) -> list[Path]:
    """Records under job keys."""
    return sorted(path for path in records.iterdir() if path.name.startswith("quantize-"))


@pytest.fixture
def kept(ask: Ask, tmp_path: Path, records: Path) -> list[Path]:
    """The records of four finished shards, which the next run will look at."""
    for destination in ("first", "second"):
        quantize_checkpoint(ask(destination=str(tmp_path / destination)))
    found = by_job(records)
    assert len(found) == 4
    assert all(is_own_record(path.read_bytes()) for path in found)
    return found


def test_records_that_the_store_vouches_for_skip_the_bodies(
    ask: Ask, kept: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*_: object) -> None:
        raise AssertionError("a body ran")

    monkeypatch.setattr("shardmill.tasks.quantize.quantize.find_stored", must_not_run)
    monkeypatch.setattr("shardmill.tasks.quantize.quantize.quantize_shard", must_not_run)

    state = quantize_checkpoint(ask(destination=str(tmp_path / "third")), return_state=True)

    assert (state.result().hits, state.result().bytes_read) == (4, 0)
    assert set(states(run_id(state), 4).values()) == {"Cached"}
    assert all(path.exists() for path in kept)


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def planted_pickle(record: dict[str, Any], mark: Path) -> None:
    record["metadata"]["serializer"] = PickleSerializer().model_dump()
    record["result"] = base64.encodebytes(pickle.dumps(Planted(mark))).decode()


def planted_call(record: dict[str, Any], mark: Path) -> None:
    record["result"] = json.dumps({"__class__": "subprocess.getoutput", "data": {"cmd": f"touch {mark}"}})


def planted_nested_call(record: dict[str, Any], mark: Path) -> None:
    result = json.loads(record["result"])
    result["data"]["receipt"]["key"] = {"__class__": "subprocess.getoutput", "data": {"cmd": f"touch {mark}"}}
    record["result"] = json.dumps(result)


def planted_old_fields(record: dict[str, Any], mark: Path) -> None:
    record["serializer"] = PickleSerializer().model_dump()
    record["data"] = base64.encodebytes(pickle.dumps(Planted(mark))).decode()


PLANTED = [planted_pickle, planted_call, planted_nested_call, planted_old_fields]


@pytest.mark.parametrize("plant", PLANTED)
def test_the_planted_records_would_run_without_the_policy(
    plant: Callable[[dict[str, Any], Path], None], tmp_path: Path
) -> None:
    """What the next test defends against is real."""
    record, mark = json.loads(record_of(OUTCOME)), tmp_path / "executed"
    plant(record, mark)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "key").write_text(json.dumps(record))

    ResultStore(result_storage=LocalFileSystem(basepath=str(tmp_path / "records"))).exists("key")

    assert mark.exists()


def test_planted_records_run_nothing_and_are_replaced(
    ask: Ask, kept: list[Path], tmp_path: Path, computed: list[str]
) -> None:
    mark = tmp_path / "executed"
    for path, plant in zip(kept, PLANTED, strict=True):
        record = json.loads(path.read_bytes())
        plant(record, mark)
        path.write_text(json.dumps(record))

    state = quantize_checkpoint(ask(destination=str(tmp_path / "third")), return_state=True)

    assert not mark.exists()
    assert (state.result().hits, computed) == (4, [])
    assert all(is_own_record(path.read_bytes()) for path in kept)


def relabelled(content: bytes, path: Path) -> str:
    """A record as it would be if it had been written under the name of another one."""
    record = json.loads(content)
    record["metadata"]["storage_key"] = json.loads(path.read_bytes())["metadata"]["storage_key"]
    return json.dumps(record)


def give_pickles(kept: list[Path], mark: Path, _ask: Ask) -> None:
    for path in kept:
        record = json.loads(path.read_bytes())
        planted_pickle(record, mark)
        path.write_text(json.dumps(record))


def swap(kept: list[Path], _mark: Path, _ask: Ask) -> None:
    texts = [relabelled(kept[number - 1].read_bytes(), path) for number, path in enumerate(kept)]
    for path, text in zip(kept, texts, strict=True):
        path.write_text(text)


def take_from_another_storage(kept: list[Path], mark: Path, ask: Ask) -> None:
    """Records of the same shards, quantized otherwise into another store, whole and well-formed."""
    others = mark.parent / "other-records"
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: others}):
        for destination in ("first", "second"):
            quantize_checkpoint(ask(scheme="NVFP4A16", destination=str(mark.parent / "elsewhere" / destination)))
    for path, other in zip(kept, by_job(others), strict=True):
        path.write_text(relabelled(other.read_bytes(), path))


def name_another_storage(kept: list[Path], _mark: Path, _ask: Ask) -> None:
    for path in kept:
        record = json.loads(path.read_bytes())
        other_block(record, {})
        path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "is_store_kept", [pytest.param(True, id="store"), pytest.param(False, id="no store", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("change", [give_pickles, swap, take_from_another_storage, name_another_storage])
def test_no_changed_record_is_executed_or_believed(
    change: Callable[[list[Path], Path, Ask], None],
    is_store_kept: bool,  # noqa: FBT001  a parameter of pytest
    ask: Ask,
    kept: list[Path],
    tmp_path: Path,
    computed: list[str],
) -> None:
    mark = tmp_path / "executed"
    change(kept, mark, ask)
    computed.clear()
    planted = [path.read_bytes() for path in kept]
    if not is_store_kept:
        for part in ("blobs", "receipts"):
            shutil.rmtree(tmp_path / ".shardmill" / part)

    summary = quantize_checkpoint(ask(destination=str(tmp_path / "third")))

    assert not mark.exists()
    assert (summary.hits, len(computed)) == ((4, 0) if is_store_kept else (0, 4))
    for path in sorted((tmp_path / "first").iterdir()):
        assert (tmp_path / "third" / path.name).read_bytes() == path.read_bytes(), path.name
    for path, content in zip(kept, planted, strict=True):
        assert not path.exists() or (path.read_bytes() != content and is_own_record(path.read_bytes()))


def test_records_without_a_store_count_for_nothing(
    ask: Ask, kept: list[Path], tmp_path: Path, computed: list[str]
) -> None:
    for path in kept[:2]:
        path.write_bytes(path.read_bytes()[:100])  # whole or truncated, they promise what is gone
    for part in ("blobs", "receipts"):
        shutil.rmtree(tmp_path / ".shardmill" / part)

    summary = quantize_checkpoint(ask(destination=str(tmp_path / "third")))

    assert summary.hits == 0
    assert len(computed) == 4


def test_a_record_of_other_shard_names_does_not_count(
    ask: Ask, kept: list[Path], source: Path, tmp_path: Path, computed: list[str]
) -> None:
    """Equal bytes under other shard names are the same jobs; their records name the wrong shards."""
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in source.iterdir():
        (renamed / path.name.replace("model-", "part-")).write_bytes(path.read_bytes())
    index = renamed / "model.safetensors.index.json"
    index.write_text((source / index.name).read_text().replace("model-0", "part-0"))

    summary = quantize_checkpoint(ask(source=str(renamed), destination=str(tmp_path / "third")))

    assert kept
    assert (summary.hits, computed) == (4, [])
    assert (tmp_path / "third" / "part-00001-of-00004.safetensors").exists()


# ---- keys -------------------------------------------------------------------------------------------------------


def key_of(ask: Ask, source: Path, records: object) -> str | None:
    """The key of the first shard of `source`, as the engine asks for it."""
    job = ask().to_job(f"{source}")
    shard = make_plan(open_source(str(source)), uniform("FP8_DYNAMIC")).shards[0]
    context: Any = SimpleNamespace(result_store=SimpleNamespace(result_storage=records))
    return StageCachePolicy().compute_key(context, {"shard": shard, "job": job}, {})


def test_a_key_is_the_job_key_as_soon_as_it_is_known_and_a_file_name(ask: Ask, source: Path, records: Path) -> None:
    storage = LocalFileSystem(basepath=str(records))
    before = key_of(ask, source, storage)
    quantize_checkpoint(ask())
    after = key_of(ask, source, storage)

    stored = {path.stem for path in (Path(ask().destination).parent / ".shardmill" / "receipts").iterdir()}
    assert before is None
    assert after is not None
    assert re.fullmatch("quantize-[0-9a-f]{64}", after)
    assert after.removeprefix("quantize-") in stored


def test_the_first_run_records_nothing_under_keys_it_cannot_know(ask: Ask, records: Path) -> None:
    quantize_checkpoint(ask())
    assert not records.exists() or by_job(records) == []


def test_records_elsewhere_than_on_this_disk_are_not_used(ask: Ask, source: Path) -> None:
    assert key_of(ask, source, object()) is None


def test_a_key_does_not_read_source_or_blob(
    ask: Ask, source: Path, kept: list[Path], records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_read(*_: object) -> None:
        raise AssertionError("bytes were read")

    shard = make_plan(open_source(str(source)), uniform("FP8_DYNAMIC")).shards[0]
    context: Any = SimpleNamespace(result_store=SimpleNamespace(result_storage=LocalFileSystem(basepath=str(records))))
    monkeypatch.setattr(RangeReader, "__init__", must_not_read)
    key = StageCachePolicy().compute_key(context, {"shard": shard, "job": ask().to_job("run")}, {})
    assert key in {path.name for path in kept}
