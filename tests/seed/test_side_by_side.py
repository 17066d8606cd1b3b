"""What the older reference system gives for the same calls; see `side_by_side.py` for the rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from seed import side_by_side
from shardmill import errors

pytestmark = pytest.mark.seed

FITTING = {side_by_side.RAGGED, "a vector that is ignored", "a vector of a norm"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> side_by_side.Outcome:
    """Both sides' results for every call; they do not depend on the tests."""
    if not side_by_side.SEED_PYTHON.exists():
        pytest.skip(f"{side_by_side.SEED_PYTHON} does not exist; run `make .venv-seed/stamp`")
    return side_by_side.run(tmp_path_factory.mktemp("side") / "by-side")


@pytest.mark.parametrize("scheme", side_by_side.PRESETS)
def test_what_is_written_and_returned_is_the_same_but_for_the_intended_divergences(
    scheme: str, outcome: side_by_side.Outcome
) -> None:
    found = side_by_side.compare_scheme(outcome, scheme)

    assert found.differences == []
    assert found.weights == 18
    assert found.divergences == {
        *([side_by_side.D1] if scheme == "NVFP4A16" else []),
        *([side_by_side.D9] if scheme.startswith(("FP8", "W")) else []),
    }


@pytest.mark.parametrize("scheme", side_by_side.PRESETS)
def test_what_they_accept_is_accepted(scheme: str, outcome: side_by_side.Outcome) -> None:
    names = [f"validate {scheme}/{shard}" for shard in (side_by_side.FIRST, side_by_side.SECOND)]

    assert [outcome.theirs[name] for name in names] == [side_by_side.Answer()] * 2
    assert [outcome.ours[name] for name in names] == [side_by_side.Answer()] * 2


@pytest.mark.parametrize("case", side_by_side.MISFITS)
def test_what_they_refuse_is_refused_with_the_name_of_the_tensor(case: str, outcome: side_by_side.Outcome) -> None:
    ours, theirs = (side[f"validate {case}"] for side in (outcome.ours, outcome.theirs))
    misfit = list(side_by_side.MISFITS[case][1])[-1]

    assert (ours.error, theirs.error) == (("", "") if case in FITTING else ("Refused", "ValueError"))
    assert (f"`{misfit}`" in ours.message, f"`{misfit}`" in theirs.message) == ((case not in FITTING),) * 2
    assert issubclass(errors.Refused, ValueError)


def test_ragged_blocks_are_written(outcome: side_by_side.Outcome) -> None:
    stored = outcome.stored("ours", side_by_side.RAGGED)

    assert outcome.ours[side_by_side.RAGGED].error == ""
    assert (stored["model.q_proj.weight"].shape, stored["model.q_proj.weight_scale"].shape) == ((200, 150), (2, 2))


def change_scale(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight_scale"][0, 0] *= 1.01


def change_code(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight_packed"][0] ^= 0x77777777


def change_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.input_layernorm.weight"][0] += 1


def change_dtype(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight_scale"
    tensors[name] = tensors[name].float()


def lose_a_tensor(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.down_proj.weight_shape"]


@pytest.mark.parametrize("change", [change_scale, change_code, change_norm, change_dtype, lose_a_tensor])
def test_a_difference_that_no_rule_allows_is_found(
    change: Callable[[dict[str, Tensor]], None], outcome: side_by_side.Outcome, tmp_path: Path
) -> None:
    name = f"W4A16/{side_by_side.FIRST}"
    tensors = outcome.stored("ours", name)
    change(tensors)
    (tmp_path / "ours").mkdir()
    save_file(tensors, tmp_path / "ours" / outcome.jobs[name].save_name)
    (tmp_path / "theirs").symlink_to(outcome.folder / "theirs")

    found = side_by_side.compare(replace(outcome, folder=tmp_path), name)

    assert len(found.differences) >= 1


def test_the_table_has_a_line_for_every_scheme_and_case(outcome: side_by_side.Outcome) -> None:
    lines = list(side_by_side.table(outcome))

    assert [line.split(" | ")[0] for line in lines[2:11]] == [f"| {scheme}" for scheme in side_by_side.PRESETS]
    assert len(lines) == 11 + 1 + 3 + len(side_by_side.MISFITS)
    assert all(line.endswith("| as required |") for line in lines[2:12])
