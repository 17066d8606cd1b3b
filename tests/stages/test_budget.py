"""A size instead of a scheme: what is measured, what is chosen, and that the result is as large as asked for."""

from __future__ import annotations

import secrets
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file
from torch import Tensor

import checkpoints
from shardmill.core.budget import Wish, parse_budget, parse_candidates
from shardmill.core.budget_recipe import write_recipe
from shardmill.core.recipe import parse_recipe, uniform
from shardmill.core.scheme import Search
from shardmill.core.summary import summarize_plan
from shardmill.errors import Interrupted, NonFiniteWeight, Refused
from shardmill.stages.budget import MeasureWatch, Solved, solve_budget
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations, make_plan
from shardmill.storage import store as store_module
from shardmill.storage.location import open_folder
from shardmill.storage.source import open_source
from shardmill.storage.store import Store
from stages.test_several import Reads

OPTIONS = RunOptions(device="cpu", workers=2)
CANDIDATES = ("NVFP4A16", "W4A16:64", "FP8_DYNAMIC", "W8A16:64")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(3), 5))


def solved(
    source: Path, budget: str, store: Path | None = None, names: tuple[str, ...] = CANDIDATES, **base: Any
) -> Solved:
    candidates = parse_candidates(names)
    wish = Wish(budget=parse_budget(budget), candidates=candidates, base=uniform(candidates[0], **base))
    place = Store(open_folder(str(store or source.parent / "store")))
    return solve_budget(open_source(str(source)), place, wish, OPTIONS)


@pytest.mark.parametrize("budget", ["4.5bpw-quantized", "5bpw-quantized", "6.75bpw-quantized", "7bpw", "8bpw", "400kB"])
def test_the_result_is_within_the_budget_and_uses_it(source: Path, budget: str) -> None:
    found = solved(source, budget)
    plan = make_plan(open_source(str(source)), found.recipe)
    assert not plan.problems
    summary, asked = summarize_plan(plan), parse_budget(budget)
    reached = {
        "bpw": summary.bits_per_weight,
        "bpw-quantized": summary.quantized_bits_per_weight,
        "bytes": summary.totals.output_bytes,
    }[asked.unit]
    assert 0.97 * asked.amount < reached <= asked.amount * (1 + 1e-9)
    assert summary.bits_per_weight == pytest.approx(found.solution.bits_per_weight)
    assert summary.quantized_bits_per_weight == pytest.approx(found.solution.quantized_bits_per_weight)


def test_a_larger_budget_leaves_less_error(source: Path) -> None:
    errors = [solved(source, f"{bits}bpw-quantized").solution.cost for bits in (4.3, 4.6, 5, 6, 7, 8.3)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


@pytest.mark.usefixtures("settled")
def test_a_second_solution_reads_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch, source)
    first = solved(source, "5bpw-quantized", names=CANDIDATES[1:])
    tensors = sum(path.stat().st_size - start(path) for path in source.glob("*.safetensors"))
    assert sum(reads.bytes.values()) == tensors
    reads.bytes.clear()
    again = solved(source, "5bpw-quantized", names=CANDIDATES[1:])
    other = solved(source, "6bpw-quantized", names=CANDIDATES[1:3])
    assert not sum(reads.bytes.values())
    assert again == first
    assert other.recipe != first.recipe


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are as good as old."""
    monkeypatch.setattr(store_module, "_FRESH_NS", 0)


def start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.usefixtures("settled")
def test_what_was_quantized_before_is_not_measured_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, store = CANDIDATES[:3], source.parent / "store"
    for number, scheme in enumerate(parse_candidates(names)):
        place = Locations(source=str(source), destination=str(source.parent / f"{number}"), store=str(store))
        run(place, uniform(scheme), OPTIONS)
    apart = solved(source, "5bpw-quantized", source.parent / "another", names)
    reads = Reads(monkeypatch, source)
    assert solved(source, "5bpw-quantized", store, names) == apart
    assert not sum(reads.bytes.values())


def test_the_written_recipe_is_the_solved_one(source: Path) -> None:
    found = solved(source, "5bpw-quantized", ignore=["re:.*layers[.]1[.]mlp.*"], indivisible="copy")
    text = write_recipe(found.recipe, found.solution)
    assert parse_recipe(yaml.safe_load(text)) == found.recipe
    assert "# Solved for a budget of 5 bits per quantized weight" in text


def test_members_of_fused_sets_share_a_scheme_and_ignored_ones_stay(source: Path) -> None:
    found = solved(source, "5.2bpw-quantized", ignore=["re:.*layers[.]1[.]mlp.*"])
    chosen = found.solution.scheme_of
    assert not any(".layers.1.mlp" in module for module in chosen)
    for module, scheme in chosen.items():
        for leaf, partner in (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert chosen[module.replace(leaf, partner)] == scheme
    plan = make_plan(open_source(str(source)), found.recipe)
    assert not plan.problems
    assert not plan.warnings


@pytest.mark.parametrize(
    ("budget", "says"),
    [("3bpw-quantized", "bpw-quantized"), ("3bpw", "bpw"), ("90kB", "bytes")],
)
def test_a_budget_out_of_reach_tells_what_can_be_reached(source: Path, budget: str, says: str) -> None:
    with pytest.raises(Refused) as refusal:
        solved(source, budget)
    [problem] = refusal.value.problems
    assert problem.kind == "budget-unreachable"
    least = problem.message.partition("reach ")[2].partition(" to ")[0].replace(",", "").replace(" bytes", "B")
    assert says in problem.message
    found = solved(source, least.replace(" ", ""))
    assert len(set(found.solution.picks)) == 1


def test_a_candidate_is_used_where_it_fits(tmp_path: Path) -> None:
    tensors = checkpoints.llama(2, hidden=96, width=256)
    source = checkpoints.write(tmp_path / "source", [tensors])
    found = solved(source, "7.5bpw-quantized", names=("W4A16:128", "FP8_DYNAMIC"))
    chosen = found.solution.scheme_of
    assert {module.rpartition(".")[2] for module, number in chosen.items() if number == 0} == {"down_proj"}
    with pytest.raises(Refused) as refusal:
        solved(source, "7bpw-quantized", names=("W4A16:128", "W8A16:128"))
    assert {problem.kind for problem in refusal.value.problems} == {"group-indivisible"}
    copied = solved(source, "7bpw-quantized", names=("W4A16:128", "W8A16:128"), indivisible="copy")
    assert all(module.endswith("down_proj") for module in copied.solution.scheme_of)


def test_nan_is_refused_or_copied(source: Path) -> None:
    checkpoints.poison(min(source.glob("*.safetensors")))
    with pytest.raises(NonFiniteWeight):
        solved(source, "6bpw-quantized")
    found = solved(source, "6bpw-quantized", allow_nonfinite=True)
    place = Locations(source=str(source), destination=str(source.parent / "result"))
    assert run(place, found.recipe, OPTIONS).manifest


def test_a_search_is_in_force_when_candidates_are_measured(source: Path) -> None:
    def cost(search: Search | None) -> float:
        schemes = tuple(replace(scheme, search=search) for scheme in parse_candidates(CANDIDATES[1:3]))
        wish = Wish(budget=parse_budget("5bpw-quantized"), candidates=schemes, base=uniform(schemes[0]))
        store = Store(open_folder(str(source.parent / "store")))
        return solve_budget(open_source(str(source)), store, wish, OPTIONS).solution.cost

    assert cost(Search()) < cost(None)


def test_source_and_store_may_lie_elsewhere(source: Path) -> None:
    folder = f"memory://{secrets.token_hex(8)}"
    for path in source.iterdir():
        MemoryFileSystem().pipe_file(f"{folder}/source/{path.name}".removeprefix("memory:/"), path.read_bytes())
    candidates = parse_candidates(CANDIDATES)
    wish = Wish(budget=parse_budget("6bpw-quantized"), candidates=candidates, base=uniform(candidates[0]))
    store = Store(open_folder(f"{folder}/store"))
    found = solve_budget(open_source(f"{folder}/source"), store, wish, OPTIONS)
    assert found == solved(source, "6bpw-quantized")
    assert len(store.folder.listing("errors/")) == 5 * len(CANDIDATES)


def test_damaged_errors_are_measured_again(source: Path) -> None:
    first = solved(source, "6bpw-quantized")
    records = sorted((source.parent / "store" / "errors").iterdir())
    records[0].write_bytes(b"{}")
    records[1].write_bytes(records[2].read_bytes())
    store = Store(open_folder(str(source.parent / "store")))
    assert store.errors(records[0].stem) is None
    assert store.errors(records[1].stem) is None
    assert len(store.failed_checks) == 2
    assert solved(source, "6bpw-quantized") == first
    store.collect(older_than=-10)
    assert not list((source.parent / "store" / "errors").iterdir())


def test_stopping_keeps_what_was_measured(source: Path) -> None:
    stop, seen = threading.Event(), list[int]()

    def on_bytes(size: int) -> None:
        seen.append(size)
        stop.set()

    candidates = parse_candidates(CANDIDATES)
    wish = Wish(budget=parse_budget("6bpw-quantized"), candidates=candidates, base=uniform(candidates[0]))
    store = Store(open_folder(str(source.parent / "store")))
    with pytest.raises(Interrupted):
        solve_budget(open_source(str(source)), store, wish, OPTIONS, MeasureWatch(on_bytes=on_bytes), stop)
    assert seen
    assert solved(source, "6bpw-quantized").recipe.groups


@pytest.mark.parametrize("layout", ["experts", "stacks"])
def test_experts_of_a_layer_share_a_scheme(tmp_path: Path, layout: str) -> None:
    config = checkpoints.LLAMA | {"model_type": "mixtral", "moe_intermediate_size": 64}
    source = checkpoints.write(tmp_path / "source", [EXPERTS[layout]()], config)
    found = solved(source, "6.5bpw-quantized", expert_layout="rows")
    plan = make_plan(open_source(str(source)), found.recipe)
    assert not plan.problems
    chosen = found.solution.scheme_of
    for layer in range(2):
        assert len({number for module, number in chosen.items() if f".{layer}.mlp." in module}) == 1
    assert len(set(chosen.values())) == 2


def experts() -> dict[str, Tensor]:
    names = [f"model.layers.{n}.mlp.experts.{e}.{leaf}.weight" for n in range(2) for e in range(3) for leaf in WIDE]
    return {name: checkpoints.gaussian(number, 64, 64) for number, name in enumerate(names)}


def stacks() -> dict[str, Tensor]:
    return {
        f"model.layers.{n}.mlp.experts.{leaf}": checkpoints.gaussian(n, 3, rows, 64)
        for n in range(2)
        for leaf, rows in (("gate_up_proj", 128), ("down_proj", 64))
    }


WIDE = ("w1", "w2", "w3")
EXPERTS = {"experts": experts, "stacks": stacks}


def test_importance_weighs_errors(source: Path) -> None:
    tensors = checkpoints.read(source)
    weights = {
        name.removesuffix(".weight"): torch.full((value.shape[1],), 100.0 if ".layers.0." in name else 1.0)
        for name, value in tensors.items()
        if name.endswith("_proj.weight")
    }
    file = source.parent / "importance.safetensors"
    save_file(weights, file)

    def first_layer(importance: str) -> set[int]:
        search = Search(importance_file=importance)
        schemes = tuple(replace(scheme, search=search) for scheme in parse_candidates(CANDIDATES[1:4]))
        wish = Wish(budget=parse_budget("6bpw-quantized"), candidates=schemes, base=uniform(schemes[0]))
        store = Store(open_folder(str(source.parent / "store")))
        found = solve_budget(open_source(str(source)), store, wish, OPTIONS)
        assert not make_plan(open_source(str(source)), found.recipe).problems
        return {number for module, number in found.solution.scheme_of.items() if ".layers.0." in module}

    assert 0 in first_layer("")
    assert first_layer(str(file)) == {2}
