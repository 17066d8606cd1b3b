"""The flow against the plain loop, and what is done again after something went wrong."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prefect.client.orchestration import get_client
from prefect.task_runners import ThreadPoolTaskRunner
from torch import Tensor

import checkpoints
import quantized
from served import Ask, artifacts, run_id, states
from shardmill.core.recipe import uniform
from shardmill.errors import DestinationInvalid, NonFiniteWeight, Refused, ShardFailures
from shardmill.flows.quantize_checkpoint import FlowSummary, quantize_checkpoint
from shardmill.stages import finalize
from shardmill.stages.budget import solve_budget
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.storage.location import open_folder
from shardmill.storage.source import open_source
from shardmill.storage.store import Store


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16"])
def test_flow_and_plain_loop_write_equal_bytes(source: Path, tmp_path: Path, ask: Ask, scheme: str) -> None:
    locations = Locations(source=str(source), destination=str(tmp_path / "loop" / "result"))
    run(locations, uniform(scheme), RunOptions(device="cpu", workers=1))

    summary = quantize_checkpoint(ask(scheme=scheme))

    assert files(tmp_path / "result") == files(tmp_path / "loop" / "result")
    assert (summary.shards, summary.hits) == (4, 0)
    assert summary.output_bytes == sum(p.stat().st_size for p in (tmp_path / "result").glob("*.safetensors"))


def test_a_second_run_into_the_same_destination_reads_no_tensor(ask: Ask, computed: list[str]) -> None:
    quantize_checkpoint(ask())
    computed.clear()

    state = quantize_checkpoint(ask(), return_state=True)

    summary: FlowSummary = state.result()
    assert (summary.hits, summary.bytes_read, computed) == (4, 0, [])
    assert set(states(run_id(state), 4).values()) == {"Cached"}


def test_checks_of_the_store_that_fail_are_counted_and_cost_work_only(
    ask: Ask, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(ask())
    receipt = min((tmp_path / ".shardmill" / "receipts").iterdir())
    receipt.write_bytes(receipt.read_bytes()[:100])
    second = quantize_checkpoint(ask(destination=str(tmp_path / "second")))
    assert (second.store_checks_failed, second.hits) == (1, 3)

    # somebody deletes a blob right before the next run publishes
    computed.clear()
    check = finalize._check_blobs
    blobs = sorted((tmp_path / ".shardmill" / "blobs").iterdir())

    def check_after_loss(*args: Any) -> None:
        for blob in blobs[:1]:
            blob.unlink()
        blobs.clear()
        check(*args)

    monkeypatch.setattr(finalize, "_check_blobs", check_after_loss)
    third = quantize_checkpoint(ask(destination=str(tmp_path / "third")))
    assert (third.store_checks_failed, third.hits, len(computed)) == (1, 3, 1)
    assert files(tmp_path / "third") == files(tmp_path / "result")


def test_a_second_run_into_another_destination_reads_no_tensor(ask: Ask, tmp_path: Path, computed: list[str]) -> None:
    quantize_checkpoint(ask())
    computed.clear()

    state = quantize_checkpoint(ask(destination=str(tmp_path / "other")), return_state=True)

    summary: FlowSummary = state.result()
    assert (summary.hits, summary.bytes_read, computed) == (4, 0, [])
    assert set(states(run_id(state), 4).values()) == {"Cached"}
    assert files(tmp_path / "other") == files(tmp_path / "result")


def twelve_shards(root: Path) -> Path:
    weights: list[dict[str, Tensor]] = [
        {f"model.layers.{n}.mlp.down_proj.weight": checkpoints.gaussian(n, 64, 128)} for n in range(12)
    ]
    return checkpoints.write(root, weights)


def test_one_bad_shard_of_twelve_fails_the_run_and_only_it_is_done_again(
    tmp_path: Path, ask: Ask, computed: list[str]
) -> None:
    source = twelve_shards(tmp_path / "twelve")
    bad = source / "model-00005-of-00012.safetensors"
    healthy = checkpoints.poison(bad)

    failed = quantize_checkpoint(ask(source=str(source)), return_state=True)

    error = failed.result(raise_on_failure=False)
    assert failed.is_failed()
    assert isinstance(error, ShardFailures)
    assert error.done == 11
    assert [(name, type(cause)) for name, cause in error.failures] == [(bad.name, NonFiniteWeight)]
    assert Counter(states(run_id(failed), 12).values()) == {"Completed": 11, "Failed": 1}
    assert json.loads(artifacts(run_id(failed))["failures"])[0]["file"] == bad.name
    assert len(computed) == 12
    assert not (tmp_path / "result").exists()

    bad.write_bytes(healthy)
    computed.clear()
    mended = quantize_checkpoint(ask(source=str(source)), return_state=True)

    assert mended.is_completed()
    assert computed == [bad.name]
    assert Counter(states(run_id(mended), 12).values()) == {"Cached": 11, "Completed": 1}
    assert mended.result().hits == 11


def test_another_machine_finds_everything_in_the_store(
    ask: Ask, tmp_path: Path, records: Path, computed: list[str]
) -> None:
    for destination in ("first", "second"):  # the second run leaves records under the job keys
        quantize_checkpoint(ask(destination=str(tmp_path / destination)))
    shutil.rmtree(records)
    computed.clear()

    state = quantize_checkpoint(ask(destination=str(tmp_path / "other")), return_state=True)

    assert (state.result().hits, computed) == (4, [])
    assert set(states(run_id(state), 4).values()) == {"Cached"}


def test_a_damaged_blob_is_done_again_and_no_other(ask: Ask, tmp_path: Path, computed: list[str]) -> None:
    for destination in ("a", "b"):  # the second run leaves records under the job keys
        quantize_checkpoint(ask(destination=str(tmp_path / destination)))
    shutil.rmtree(tmp_path / "a")
    wanted = files(tmp_path / "b")
    names = sorted(name for name in wanted if name.endswith(".safetensors"))
    blobs = {path.read_bytes(): path for path in (tmp_path / ".shardmill" / "blobs").iterdir()}
    for name, damage in zip(names, ("delete", "shorten", "change"), strict=False):
        whole = wanted[name]
        blobs[whole].unlink()  # the published file is a link to it
        if damage != "delete":
            blobs[whole].write_bytes(whole[:-1] if damage == "shorten" else whole[:-1] + bytes([whole[-1] ^ 1]))
    computed.clear()

    summary = quantize_checkpoint(ask(destination=str(tmp_path / "c")))

    assert sorted(computed) == names[:3]
    assert summary.hits == 1
    assert files(tmp_path / "c") == wanted


def test_a_destination_with_another_result_is_refused_before_a_shard_is_begun(ask: Ask, computed: list[str]) -> None:
    quantize_checkpoint(ask())
    computed.clear()

    state = quantize_checkpoint(ask(scheme="W8A8"), return_state=True)

    error = state.result(raise_on_failure=False)
    assert isinstance(error, DestinationInvalid)
    assert [problem.kind for problem in error.problems] == ["destination-in-use"]
    assert computed == []


def test_every_problem_is_told_before_a_shard_is_begun(tmp_path: Path, ask: Ask, computed: list[str]) -> None:
    tensors = {f"model.layers.{n}.mlp.down_proj.weight": checkpoints.gaussian(n, 64, 100) for n in range(14)}
    source = checkpoints.write(tmp_path / "odd", checkpoints.deal(tensors, 2))

    state = quantize_checkpoint(ask(source=str(source), scheme="W4A16"), return_state=True)

    error = state.result(raise_on_failure=False)
    assert isinstance(error, Refused)
    assert len(error.problems) == 11
    assert "4 more problems" in str(error)
    rows = json.loads(artifacts(run_id(state))["failures"])
    assert [row["kind"] for row in rows] == ["group-indivisible"] * 14
    assert all("ignore" in row["way out"] for row in rows)
    assert states(run_id(state), 0) == {}
    assert computed == []
    assert not (tmp_path / ".shardmill").exists()


def test_a_missing_source_is_one_problem(ask: Ask, tmp_path: Path) -> None:
    state = quantize_checkpoint(ask(source=str(tmp_path / "nowhere")), return_state=True)

    error = state.result(raise_on_failure=False)
    assert isinstance(error, Refused)
    assert [problem.kind for problem in error.problems] == ["source-missing"]


def test_no_failure_is_silent_whatever_a_task_returns(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is no outcome, a crash and a refusal each fail the run; none counts as done."""

    def misbehave(shard: Any, *_: object) -> Any:
        if shard.number == 0:
            raise MemoryError("no memory")
        if shard.number == 1:
            raise OSError(28, "no space")
        return SimpleNamespace(is_hit=shard.number == 2)

    monkeypatch.setattr("shardmill.tasks.quantize.quantize.find_stored", lambda *_: None)
    monkeypatch.setattr("shardmill.tasks.quantize.quantize.quantize_shard", misbehave)
    monkeypatch.setattr("shardmill.tasks.quantize.cached", lambda _: None)

    state = quantize_checkpoint(ask(), return_state=True)

    error = state.result(raise_on_failure=False)
    assert state.is_failed()
    assert isinstance(error, ShardFailures)
    assert error.done == 0
    assert sorted(type(cause).__name__ for _, cause in error.failures) == [
        "MemoryError",
        "OSError",
        "ShardmillError",
        "ShardmillError",
    ]


def test_no_more_than_two_shards_per_worker_are_outstanding(
    tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    outstanding: list[int] = []
    unfinished: set[int] = set()
    submit = ThreadPoolTaskRunner.submit

    def note(self: Any, task: Any, parameters: dict[str, Any]) -> Any:
        future = submit(self, task, parameters)
        unfinished.add(id(future))
        outstanding.append(len(unfinished))
        future.add_done_callback(lambda done: unfinished.discard(id(done)))
        return future

    monkeypatch.setattr(ThreadPoolTaskRunner, "submit", note)

    quantize_checkpoint(ask(source=str(twelve_shards(tmp_path / "twelve")), workers=1))

    assert len(outstanding) == 12
    assert max(outstanding) <= 2


def test_a_half_precision_checkpoint_in_one_file_has_no_index(tmp_path: Path, ask: Ask) -> None:
    weight = checkpoints.gaussian(1, 64, 128, dtype=torch.float16)
    source = checkpoints.write(tmp_path / "one", [{"model.o_proj.weight": weight}])

    summary = quantize_checkpoint(ask(source=str(source)))

    assert summary.shards == 1
    assert not (tmp_path / "result" / "model.safetensors.index.json").exists()


def test_the_run_is_named_and_shows_its_artifacts(ask: Ask) -> None:
    state = quantize_checkpoint(ask(), return_state=True)

    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run_id(state)).name == "quantize-source-FP8_DYNAMIC"
    shown = artifacts(run_id(state))
    assert set(shown) == {"plan", "progress", "report"}
    assert float(shown["progress"]) == 100
    assert [row["store"] for row in json.loads(shown["plan"])] == ["unknown"] * 4
    assert "bits per weight" in shown["report"]


def test_the_page_is_written_and_the_report_says_where(tmp_path: Path, ask: Ask) -> None:
    state = quantize_checkpoint(ask(page=str(tmp_path / "page.html")), return_state=True)

    page = (tmp_path / "page.html").read_text()
    assert "4 shards; " in page
    assert "<figcaption>weight</figcaption>" in page
    shown = artifacts(run_id(state))
    assert f"`{tmp_path / 'page.html'}`" in shown["report"]
    assert "![heat map of SQNR by layer and module" in shown["report"]


def test_a_page_that_cannot_be_written_is_refused_before_work(tmp_path: Path, ask: Ask) -> None:
    with pytest.raises(DestinationInvalid, match="no folder that it could lie in"):
        quantize_checkpoint(ask(page=str(tmp_path / "nowhere" / "page.html")))
    assert not (tmp_path / "result").exists()


def test_non_finite_weights_are_copied_where_they_are_allowed(tmp_path: Path, ask: Ask) -> None:
    tensors = checkpoints.llama()
    tensors["model.layers.1.mlp.up_proj.weight"][0, 1] = torch.inf
    checkpoints.write(tmp_path / "source", checkpoints.deal(tensors, 4))
    recipe = uniform("NVFP4A16", allow_nonfinite=True)
    locations = Locations(source=str(tmp_path / "source"), destination=str(tmp_path / "loop" / "result"))
    run(locations, recipe, RunOptions(device="cpu", workers=1))

    quantize_checkpoint(ask(scheme="NVFP4A16", allow_nonfinite=True))

    assert files(tmp_path / "result") == files(tmp_path / "loop" / "result")


@pytest.mark.parametrize("choices", [{"dequantize": True}, {"scheme": "NVFP4A16"}])
def test_a_source_that_is_quantized_already(tmp_path: Path, ask: Ask, choices: dict[str, Any]) -> None:
    stored, _ = quantized.encode_all(checkpoints.llama(), quantized.block_fp8)
    source = checkpoints.write(
        tmp_path / "fp8", checkpoints.deal(stored, 5), quantized.config_of(quantized.CASES["fp8 blocks"][1])
    )
    request = ask(source=str(source), **choices)
    run(Locations(source=str(source), destination=str(tmp_path / "loop" / "result")), request.to_recipe())

    summary = quantize_checkpoint(request)

    assert summary.shards == 5
    assert files(tmp_path / "result") == files(tmp_path / "loop" / "result")


def test_a_budget_gives_what_its_recipe_gives(source: Path, tmp_path: Path, ask: Ask) -> None:
    request = ask(budget="6.5bpw-quantized", candidates=["NVFP4A16", "FP8_DYNAMIC"])
    wish = request.wish
    assert wish is not None
    store = Store(open_folder(str(tmp_path / "another")))
    found = solve_budget(open_source(str(source)), store, wish, RunOptions(device="cpu"))
    run(Locations(source=str(source), destination=str(tmp_path / "loop" / "result")), found.recipe)

    summary = quantize_checkpoint(request)

    assert summary.bits_per_weight == round(found.solution.bits_per_weight, 3)
    assert files(tmp_path / "result") == files(tmp_path / "loop" / "result")
