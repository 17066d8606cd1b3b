"""The tour: once with a checkpoint made up here, once for real."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardmill import example
from shardmill.core.scheme import PRESETS
from shardmill.errors import ShardmillError
from shardmill.flows import demo


@pytest.fixture
def tour(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> list[str]:
    """Arguments of a tour that downloads nothing, asks no model and leaves the environment alone."""
    monkeypatch.setattr(example, "prepare", lambda _folder, cache: source if cache.name == "cache" else None)
    monkeypatch.setattr(demo, "_answer", lambda folder: f"answer of {folder.name}")
    monkeypatch.setattr(demo, "_SETTLE_SECONDS", 0)
    monkeypatch.setattr(demo, "_set_up_prefect", lambda folder: folder.mkdir(exist_ok=True))
    return ["--folder", str(tmp_path / "demo")]


def test_the_second_run_of_a_tour_and_all_of_a_second_tour_find_everything_finished(
    tour: list[str], capsys: pytest.CaptureFixture[str], computed: list[str]
) -> None:
    assert demo.main(tour) == 0
    first = capsys.readouterr().out
    assert demo.main(tour) == 0
    second = capsys.readouterr().out

    assert re.findall(r"(\d) of (\d) shards were finished before, (\d+)", first)[1:] == [("4", "4", "0")]
    assert re.findall(r"(\d) of (\d) shards were finished before, (\d+)", second) == [("4", "4", "0")] * 2
    assert len(computed) == 4
    assert "bits per weight" in first
    assert f"answer of {demo.MODEL}-FP8_DYNAMIC" in first


def test_a_tour_takes_a_preset_in_any_case(tour: list[str], tmp_path: Path) -> None:
    assert demo.main([*tour, "--scheme", "w4a16"]) == 0
    config = json.loads((tmp_path / "demo" / f"{demo.MODEL}-W4A16" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_00"]["weights"]["group_size"] == 64


def test_only_integer_groups_get_another_group_size() -> None:
    assert {name for name, scheme in PRESETS.items() if demo.is_grouped(scheme)} == {
        name for name in PRESETS if re.match(r"W[2-8]A(16|4|8|FP8)", name) and name != "W8A8"
    }


def test_what_goes_wrong_is_said_in_a_line(
    tour: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> Path:
        raise ShardmillError("the example is not to be had")

    monkeypatch.setattr(example, "prepare", fail)

    assert demo.main(tour) == 1
    assert capsys.readouterr().err == "the example is not to be had\n"


@pytest.mark.slow
def test_the_real_tour_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "shardmill.flows.demo", "--folder", str(tmp_path / "demo")]
    for hits in ("0", "7"):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.findall(r"(\d+) of 7 shards were finished before", done.stdout) == [hits, "7"]
        assert "0 bytes of tensors read" in done.stdout
        assert "Paris" in done.stdout
