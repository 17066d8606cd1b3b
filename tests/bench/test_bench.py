"""That the benchmark runs at toy size, checks before it times, and writes what it measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from bench import document, equality, floor, picture, targets
from bench.__main__ import main
from bench.checkpoints import (
    FULL,
    TOY,
    Noise,
    contents,
    experts,
    headers,
    llama,
    one_shard,
    one_tensor,
    prepare,
    stored,
)
from bench.measure import CommandFailed, Run, cores, execute, file_system, shards_of
from bench.results import SECTIONS, Archive, CommandRow, FlowRow, MemoryRow, PlanRow, Results, Row, Runs, SpeedRow
from shardmill.core.scheme import PRESETS

MACHINE = {"CPU": "one of ours"}


@pytest.fixture(scope="module")
def noise() -> Noise:
    return Noise()


def run(seconds: float, peak_bytes: int = 200_000_000) -> Run:
    return Run(seconds=seconds, cpu_seconds=2 * seconds, peak_bytes=peak_bytes, read_bytes=7_000_000, load=0.25)


def runs(*seconds: float) -> Runs:
    return tuple(map(run, seconds))


SPEED = SpeedRow(
    place="disk (ext4)",
    checkpoint="llama",
    preset="FP8_DYNAMIC",
    source_bytes=4_000_000_000,
    output_bytes=2_000_000_000,
    shards=4,
    start=runs(0.5, 0.7, 0.6),
    ours=runs(3.6, 9.0, 3.5),
    theirs=runs(44.0, 47.0),
    workers=2,
    error="",
    reference="llmcompressor 1",
    floor={"1": (3.0, 3.0, 3.0), "2": (2.5, 9.0, 2.0)},
)
PLANS = tuple(PlanRow(preset="W4A16", shards=n, tensors=1000 * n, runs=runs(n / 100)) for n in (125, 1000))


# ---- the whole --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_toy_run_measures_and_writes_the_page_and_renders_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []  # the checks themselves take seconds, and the slow test lets them be
    monkeypatch.setattr(equality, "check_kernels", lambda _source, preset, _home: checked.append(preset))
    monkeypatch.setattr(equality, "check_whole", lambda result, _source: checked.append(result.name))
    page = tmp_path / "docs" / "page.md"
    where = ["--results", str(tmp_path / "kept"), "--document", str(page), "--no-picture"]
    what = ["--toy", "--repeats", "1", "--skip-reference", "--checkpoints", "llama", "--presets", "NVFP4A16"]

    assert main([*what, *where, "--only", "speed,rerun,plan", "--work", str(tmp_path / "work")]) == 0

    assert checked == ["NVFP4A16", "out"]
    first = page.read_text()
    assert [line for line in first.splitlines() if line.startswith("## ")] == [
        "## Speed",
        "## Running again",
        "## Planning",
    ]
    assert first.count("| NVFP4A16 | ") == 2 + len(TOY.planned)
    assert "| second run | 5 of 5 | " in first
    row = json.loads((tmp_path / "kept" / "speed.json").read_text())["rows"]
    assert [(found["shards"], len(found["ours"]), found["theirs"]) for found in row.values()] == [(4, 1, [])]
    assert list((tmp_path / "work").glob("results-*")) + list((tmp_path / "work").glob("result")) == []
    page.unlink()
    assert main([*where, "--render"]) == 0
    assert page.read_text() == first


@pytest.mark.slow
def test_every_section_runs_at_toy_size(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    where = [
        "--results",
        str(tmp_path / "kept"),
        "--document",
        str(page),
        "--no-picture",
        "--work",
        str(tmp_path / "w"),
    ]

    assert main(["--toy", "--repeats", "1", "--skip-reference", "--presets", "FP8_BLOCK", *where]) == 0

    assert sum(line.startswith("## ") for line in page.read_text().splitlines()) == len(SECTIONS)


@pytest.mark.oracle
def test_the_reference_takes_its_turn(tmp_path: Path, reference_python: Path) -> None:
    where = ["--results", str(tmp_path / "kept"), "--document", str(tmp_path / "page.md"), "--no-picture"]
    what = ["--toy", "--only", "speed", "--repeats", "1", "--reference-repeats", "1", "--work", str(tmp_path / "work")]

    assert reference_python.exists()
    assert main([*what, *where, "--presets", "NVFP4A16", "--reference-workers", "1"]) == 0

    rows = json.loads((tmp_path / "kept" / "speed.json").read_text())["rows"].values()
    assert [(row["checkpoint"], row["workers"], len(row["theirs"])) for row in rows] == [
        ("llama", 1, 1),
        ("experts", 1, 1),
    ]


def test_every_preset_with_a_target_is_known() -> None:
    assert set(targets.PRESETS) <= set(PRESETS)


# ---- checkpoints ------------------------------------------------------------------------------------------------


def test_sizes_are_those_that_are_asked_for() -> None:
    dense, moe = llama(FULL), experts(FULL)

    assert [round(replace(dense, shards=[table]).source_bytes / 1e9, 1) for table in dense.shards] == [0.9] * 4
    assert 1e9 < moe.source_bytes < 1.8e9
    assert sum(".experts." in name for table in moe.shards for name in table) == 3 * 128
    assert round(one_shard(FULL, FULL.large_layers).source_bytes / 1e9) == 5
    assert round(one_tensor(FULL).source_bytes / 1e9, 2) == 3.0
    assert [len(table) for table in headers(3).shards] == [1000] * 3
    assert FULL.planned[-1] * 1000 == targets.PLAN_TENSORS


def test_values_are_normal_and_differ_between_tensors(tmp_path: Path, noise: Noise) -> None:
    folder = prepare(llama(TOY).as_float32(), tmp_path, noise)

    weights = [np.frombuffer(data, np.float32) for _, shape, data in contents(folder).values() if len(shape) == 2]
    assert all(0.015 < weight.std() < 0.03 and abs(weight.mean()) < 0.001 for weight in weights)
    assert len({weight[:256].tobytes() for weight in weights}) == len(weights)


def test_bf16_values_are_the_rounded_ones_and_safetensors_reads_them(tmp_path: Path, noise: Noise) -> None:
    rounded, exact = (prepare(spec, tmp_path, noise) for spec in (llama(TOY), llama(TOY).as_float32()))

    for path in shards_of(rounded):
        with safe_open(path, "pt") as shard, safe_open(exact / path.name, "pt") as other:
            for name in shard.keys():  # noqa: SIM118  no iterator there
                assert shard.get_tensor(name).equal(other.get_tensor(name).bfloat16())


def test_a_checkpoint_is_written_once_and_another_size_elsewhere(tmp_path: Path, noise: Noise) -> None:
    first = prepare(llama(TOY), tmp_path, noise)
    written = [path.stat().st_mtime_ns for path in shards_of(first)]

    assert prepare(llama(TOY), tmp_path, noise) == first
    assert [path.stat().st_mtime_ns for path in shards_of(first)] == written
    assert prepare(llama(replace(TOY, width=640)), tmp_path, noise) != first


def test_headers_stand_for_values_that_take_no_room(tmp_path: Path, noise: Noise) -> None:
    (path,) = shards_of(prepare(headers(1), tmp_path, noise))

    assert path.stat().st_size > headers(1).source_bytes
    assert path.stat().st_blocks * 512 < 1_000_000


# ---- measuring --------------------------------------------------------------------------------------------------


def test_a_process_is_measured_from_outside(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(20_000_000))
    program = "import pathlib, sys; held = pathlib.Path(sys.argv[1]).read_bytes(); print(len(held))"

    done = execute([sys.executable, "-c", program, file])

    assert done.stdout == "20000000\n"
    assert 20_000_000 < done.run.read_bytes < 30_000_000
    assert 25_000_000 < done.run.peak_bytes < 60_000_000  # not that of this process
    assert done.run.cpu_seconds > 0
    assert done.run.seconds > 0


def test_a_process_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(CommandFailed, match=r"ended with 3: no luck"):
        execute([sys.executable, "-c", "import sys; sys.stderr.write('no luck'); sys.exit(3)"])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_floor_writes_as_much_as_it_is_told(tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "PIECE_BYTES", 1000)
    sizes = {"a": (10_001, 5003), "b": (999, 3), "c": (0, 0)}
    for name, (source, _) in sizes.items():
        (tmp_path / name).write_bytes(bytes(source))

    seconds = floor.copy([(tmp_path / name, size) for name, (_, size) in sizes.items()], tmp_path / "out", threads)

    assert {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()} == {"a": 5003, "b": 3, "c": 0}
    assert seconds > 0


def test_the_pieces_of_a_file_are_all_of_it() -> None:
    found = list(floor.pieces(3, 4, 5 * floor.PIECE_BYTES + 7, 1001))

    assert [piece.read[1] for piece in found[:-1]] == [piece.read[0] for piece in found[1:]]
    assert [piece.write[1] for piece in found[:-1]] == [piece.write[0] for piece in found[1:]]
    assert (found[0].read[0], found[-1].read[1]) == (0, 5 * floor.PIECE_BYTES + 7)
    assert (found[0].write[0], found[-1].write[1]) == (0, 1001)


def test_a_place_is_named_by_its_file_system() -> None:
    assert file_system(Path("/dev/shm")) == "RAM disk (tmpfs)"  # noqa: S108  where Linux has it
    assert cores() >= 1


# ---- checks before timing ---------------------------------------------------------------------------------------


def test_results_with_other_names_or_dtypes_are_not_timed(tmp_path: Path, noise: Noise) -> None:
    ours, same = prepare(llama(TOY), tmp_path / "a", noise), prepare(llama(TOY), tmp_path / "b", noise)
    other = prepare(llama(TOY).as_float32(), tmp_path, noise)

    equality.check_names(ours, same, "W8A8")
    with pytest.raises(equality.WrongResult, match=f"W8A8: {len(stored(ours))} tensors are not alike"):
        equality.check_names(ours, other, "W8A8")


def test_kernels_that_write_other_bytes_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(_source: Path, destination: Path, _preset: str, **environment: str) -> None:
        destination.mkdir(parents=True)
        (destination / "model.safetensors").write_text(environment["SHARDMILL_KERNELS"])

    monkeypatch.setattr(equality, "quantize", write)

    with pytest.raises(equality.WrongResult, match="W4A16: compiled and reference kernels write different bytes"):
        equality.check_kernels(tmp_path, "W4A16", tmp_path)


# ---- the page ---------------------------------------------------------------------------------------------------


def test_medians_ratios_and_verdicts() -> None:
    assert SPEED.processing == pytest.approx(3.0)
    assert (SPEED.floor_threads, SPEED.floor_seconds) == ("2", 2.5)
    assert SPEED.over_floor == pytest.approx(1.2)
    assert SPEED.speedup == pytest.approx(45.5 / 3.6)

    text = document.render(Results(MACHINE, {"speed": (SPEED,)}), "page.svg")

    assert "| FP8_DYNAMIC | 3.60 | 45.5 | 12.6 | ≥ 12 reached | 3.00 | 2.50 | 1.20 | ≤ 1.5 reached |" in text
    assert "| FP8_DYNAMIC | 1.11 | 7.2 | 91.0 | 200 | 200 | 2 | 2 | 3 and 2 | 0.2 |" in text
    assert "![Figures of this page](page.svg)" in text
    missed = document.render(Results(MACHINE, {"speed": (replace(SPEED, theirs=runs(36.0), floor={"1": (1.0,)}),)}))
    assert "10.0 | ≥ 12 missed | 3.00 | 1.00 | 3.00 | ≤ 1.5 missed |" in missed


def test_where_the_reference_fails_the_page_says_so() -> None:
    text = document.render(Results(MACHINE, {"speed": (replace(SPEED, theirs=(), workers=0, error="ValueError: x"),)}))

    assert "| FP8_DYNAMIC | 3.60 | - | - | - | 3.00 | " in text
    assert "llm-compressor fails with FP8_DYNAMIC: ValueError: x" in text


def test_every_section_has_its_table() -> None:
    memory = MemoryRow(checkpoint="x", preset="W4A16", source_bytes=10**9, runs=runs(1), bare=(run(1, 150_000_000),))
    again = CommandRow(what="second run", runs=runs(0.5), hits=4, shards=4, source_bytes=2_500_000)
    flow = FlowRow(shards=500, flow=(30.0, 31.0, 90.0), loop=(1.0, 6.0, 9.0))
    rows: dict[str, tuple[Row, ...]] = {"memory": (memory,), "rerun": (again,), "plan": PLANS, "flow": (flow,)}
    rows["startup"] = (replace(again, what="shardmill run"),)

    text = document.render(Results(MACHINE, rows))

    assert "| x | W4A16 | 1.00 | 200 | 150 | 50 |" in text
    assert "| `shardmill run` | 0.50 | 1.00 | 200 | 0.2 |" in text
    assert "| second run | 4 of 4 | 0.50 | 1.00 | 200 | 0.2 | 7.0 |" in text
    assert "| W4A16 | 1,000 | 1,000,000 | 10.00 | 20.00 | 200 | 0.2 | 10.0 |" in text
    assert "| 500 shards | 31.0 | 6.0 | 50 |" in text


def test_kept_rows_add_up_and_newer_ones_replace_older(tmp_path: Path) -> None:
    archive = Archive(tmp_path, MACHINE)
    newer = replace(SPEED, ours=runs(1.0))

    for row in (SPEED, replace(SPEED, preset="W8A8"), newer):
        archive.add("speed", row)

    assert archive.results().rows["speed"] == (newer, replace(SPEED, preset="W8A8"))


def test_rows_of_another_machine_are_not_shown(tmp_path: Path) -> None:
    Archive(tmp_path, MACHINE).add("speed", SPEED)

    assert Archive(tmp_path, {"CPU": "another"}).results().rows["speed"] == ()


def test_the_picture_has_a_panel_per_question(tmp_path: Path) -> None:
    image = tmp_path / "image.svg"

    assert picture.draw(Results(MACHINE, {"speed": (SPEED,), "plan": PLANS}), image)
    assert image.read_text().count('id="axes_') == 3
    assert not picture.draw(Results(MACHINE, {}), tmp_path / "none.svg")
