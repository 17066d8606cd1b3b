"""`--budget` on the command line: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import checkpoints
from shardmill.cli import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 3))


def test_run_keeps_to_a_budget_and_its_recipe_gives_the_same(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, here = tmp_path / "found.yaml", ["--store", str(tmp_path / "store"), "--json", "--quiet"]
    asked = ["--budget", "6bpw-quantized", "--candidates", "W4A16,W8A16", "--group-size", "64"]
    assert main(["run", str(source), str(tmp_path / "a"), *asked, "--write-recipe", str(recipe), *here]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["summary"]["quantized_bits_per_weight"] == first["budget"]["quantized_bits_per_weight"]
    assert 5.7 < first["budget"]["quantized_bits_per_weight"] <= 6
    assert main(["run", str(source), str(tmp_path / "b"), "--recipe", str(recipe), *here]) == 0
    second = json.loads(capsys.readouterr().out)
    assert (second["plan"], second["hits"]) == (first["plan"], 3)
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    assert main(["run", str(source), str(tmp_path / "a"), *asked, *here]) == 0


def test_plan_tells_what_was_chosen(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", str(source), "--store", str(tmp_path / "store"), "--budget", "6.5bpw-quantized"]
    assert main([*asked, "--write-recipe", str(tmp_path / "found.yml")]) == 0
    told = capsys.readouterr()
    assert "budget 6.5 bits per quantized weight" in told.out
    assert "bits per weight: " in told.out
    assert "found.yml" in told.err
    assert main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["budget"]["budget"] == {"amount": 6.5, "unit": "bpw-quantized"}
    assert {row["scheme"] for row in document["budget"]["layers"]} <= set(document["budget"]["candidates"])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--budget", "4.5"], "such as 4.5bpw"),
        (["--budget", "0bpw"], "such as 4.5bpw"),
        (["--budget", "1bpw"], "the candidates reach"),
        (["--budget", "5bpw", "--candidates", "W4A16"], "two candidates or more"),
        (["--budget", "5bpw", "--candidates", "W4A16,w4a16"], "stands twice"),
        (["--budget", "5bpw", "--candidates", "W4A16,nothing"], "unknown scheme"),
        (["--budget", "5bpw", "--candidates", "W4A16:x,W8A16"], "group size behind the colon"),
        (["--budget", "5bpw", "--candidates", "W4A16,FP8_DYNAMIC:32"], "does not fit scheme"),
        (["--budget", "5bpw", "--write-recipe", "found.json"], "end in .yaml or .yml"),
        (["--budget", "5bpw", "--dry-run"], "use plan --budget"),
        (["--candidates", "W4A16,W8A16"], "--candidates goes with --budget"),
        (["--write-recipe", "found.yaml"], "--write-recipe goes with --budget"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], says: str
) -> None:
    assert main(["run", str(source), str(tmp_path / "result"), *asked]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("other", [["--scheme", "W4A16"], ["--recipe", "found.yaml"], ["--dequantize"]])
def test_a_budget_goes_with_no_scheme_and_no_recipe(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(source), str(tmp_path / "result"), "--budget", "5bpw", *other])
    assert ended.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_file_of_somebody_else_is_not_replaced(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("scheme: W4A16\n")
    asked = ["--store", str(tmp_path / "store"), "--budget", "7bpw", "--write-recipe", str(tmp_path / "mine.yaml")]
    assert main(["plan", str(source), *asked]) == 2
    assert "did not write" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
