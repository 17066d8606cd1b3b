"""A size instead of a scheme: what is measured, what is chosen, and that the result is as large as asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import checkpoints
from shardmill.core.budget import Wish, parse_budget, parse_candidates
from shardmill.core.budget_recipe import write_recipe
from shardmill.core.recipe import parse_recipe, uniform
from shardmill.core.scheme import Search
from shardmill.core.summary import summarize_plan
from shardmill.errors import NonFiniteWeight, Refused
from shardmill.stages.budget import Solved, solve_budget
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
    names, store = CANDIDATES[1:3], source.parent / "store"
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
