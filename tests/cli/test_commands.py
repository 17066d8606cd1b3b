"""What the commands print where, and that interrupted runs go on."""

from __future__ import annotations

import doctest
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

import checkpoints
from shardmill import __version__
from shardmill.cli import arguments as cli_arguments
from shardmill.cli import commands, main, running
from shardmill.cli import failures as cli_failures
from shardmill.cli.arguments import parse_arguments, read_recipe
from shardmill.cli.console import Console, Progress
from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.core.recipe import uniform
from shardmill.core.shell import quote
from shardmill.errors import StorageFailed
from shardmill.stages import pipeline
from shardmill.stages import quantize as quantize_module

BASH = shutil.which("bash") or "bash"
PROGRAM = "import sys\nfrom shardmill.cli import main\nsys.exit(main())"
# Ends the process after a number of receipts, as a power cut or an impatient user would.
STRIKE = """
import os, sys
from shardmill.storage.store import Store
put, count = Store.put_receipt, 0
def strike(self, receipt, shape):
    global count
    put(self, receipt, shape)
    count += 1
    if count == {count}:
        os.kill(os.getpid(), {signal})
Store.put_receipt = strike
"""


def call(
    *arguments: str, program: str = PROGRAM, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **more},
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 3), LICENSE="free")


def run(source: Path, destination: Path, *arguments: str) -> int:
    return main(["run", str(source), str(destination), "--device", "cpu", *arguments])


# ---- streams and start-up ---------------------------------------------------------------------------------------


def test_version_and_help_answer_on_stdout() -> None:
    assert call("--version").stdout == f"shardmill {__version__}\n"
    done = call("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "exit codes: 0 done; 2" in done.stdout
    for verb in ("plan", "run", "verify", "report", "store"):
        assert call(verb, "--help").returncode == 0


@pytest.mark.parametrize("command", [["--version"], ["plan", "source"], ["plan", "source", "--json"]])
def test_light_commands_load_no_heavy_library(source: Path, command: list[str]) -> None:
    program = (
        "import atexit, sys\n"
        "heavy = ['numpy', 'torch', 'prefect', 'compressed_tensors', 'yaml', 'tqdm']\n"
        "atexit.register(lambda: print([n for n in heavy if n in sys.modules], file=sys.stderr))\n" + PROGRAM
    )
    done = call(*command, program=program, cwd=source.parent)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_a_run_on_the_cpu_loads_what_it_computes_with_and_no_more(source: Path, tmp_path: Path) -> None:
    program = (
        "import atexit, sys\n"
        "heavy = ['numba', 'torch', 'prefect', 'compressed_tensors', 'fsspec', 'transformers']\n"
        "atexit.register(lambda: print([n for n in heavy if n in sys.modules], file=sys.stderr))\n" + PROGRAM
    )
    asked = ("run", str(source), str(tmp_path / "result"), "--scheme", "NVFP4A16", "--device", "cpu")
    computed, found = (call(*asked, program=program) for _ in range(2))
    assert (computed.returncode, computed.stderr.splitlines()[-1]) == (0, "['numba']")
    assert (found.returncode, found.stderr.splitlines()[-1]) == (0, "[]")


def test_plan_tells_decisions_sizes_and_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 7), LICENSE="free")
    assert main(["plan", str(source), "--scheme", "NVFP4A16"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "quantize NVFP4A16: 14 tensors, target 'Linear'\n    model.layers.[0-1].mlp.{down,gate,up}_proj\n" in out
    assert "copy: 5 tensors, default: norm" in out
    assert "jobs  7 shards" in out
    assert "also read members of fused sets in other shards" in out
    assert "files 1 other file copied" in out


def test_the_plan_says_to_the_byte_what_a_run_writes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(source), "--scheme", "W4A16_ASYM", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert run(source, tmp_path / "result", "--scheme", "W4A16_ASYM") == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "result").glob("*.safetensors")}
    assert {shard["name"]: shard["output_bytes"] for shard in document["shards"]} == sizes
    assert document["totals"]["output_bytes"] == sum(sizes.values())
    for shard in document["shards"]:
        data = (tmp_path / "result" / shard["name"]).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        del header["__metadata__"]
        outputs = [output for tensor in shard["tensors"] for output in tensor["outputs"]]
        assert {output.pop("name"): output for output in outputs} == header


def test_the_plan_document_is_a_stable_contract(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(source), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["command"], document["status"], document["schema"]) == ("plan", "done", 1)
    assert set(document) == {
        "command", "status", "schema", "problems", "warnings", "totals", "bits_per_weight",
        "quantized_bits_per_weight", "recipe", "ignore", "files", "files_not_copied", "shards",
        "architecture", "serving",
    }  # fmt: skip
    assert set(document["shards"][0]) == {"name", "source_bytes", "output_bytes", "reads", "tensors"}
    assert set(document["shards"][0]["tensors"][0]) == {
        "name", "dtype", "shape", "action", "reason", "scheme", "layout", "fused", "outputs",
    }  # fmt: skip
    assert set(document["shards"][0]["tensors"][0]["outputs"][0]) == {"name", "dtype", "shape", "data_offsets"}


def test_run_puts_its_result_on_stdout_and_talks_on_stderr(source: Path, tmp_path: Path) -> None:
    (source / "more.safetensors").write_bytes(b"stranger")
    done = call("run", "source", "out put", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0
    assert "largest relative errors:" in done.stdout
    assert "weight error is a proxy" in done.stdout
    assert "0 of 3 shards found in the store" in done.stdout
    assert done.stdout.endswith("next: vllm serve 'out put'\n")
    assert "WARNING `more.safetensors`: a weight file that the index does not name" in done.stderr
    assert "WARNING" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [".shardmill", "out put", "source"]


def test_quiet_is_quiet(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "more.safetensors").write_bytes(b"stranger")
    assert run(source, tmp_path / "result", "-q") == 0
    assert capsys.readouterr().err == ""


def test_run_gives_one_document(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "result", "--json", "--workers", "2") == 0
    document = json.loads(capsys.readouterr().out)
    manifest = json.loads((tmp_path / "result" / "shardmill.json").read_text())
    assert (document["command"], document["status"], document["hits"]) == ("run", "done", 0)
    assert document["plan"] == manifest["plan"]
    assert document["summary"]["totals"] == manifest["totals"]
    assert document["seconds"] > 0
    assert document["peak_memory_bytes"] > 0
    assert document["next"] == f"vllm serve {tmp_path / 'result'}"


def test_the_memory_of_the_parent_is_not_told_as_that_of_a_run(source: Path, tmp_path: Path) -> None:
    arguments = ["run", str(source), str(tmp_path / "result"), "--scheme", "FP8_DYNAMIC", "--device", "cpu", "--json"]
    parent = """
import subprocess, sys
held = bytearray(b"1") * 1_000_000_000
sys.exit(subprocess.run([sys.executable, "-c", *sys.argv[1:]]).returncode)
"""
    command = [sys.executable, "-c", parent, PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 30_000_000 < json.loads(done.stdout)["peak_memory_bytes"] < 900_000_000


def test_a_second_run_finds_everything(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "first") == 0
    assert run(source, tmp_path / "first", "--json") == 0
    assert run(source, tmp_path / "second", "--json", "--verify", "full") == 0
    out = capsys.readouterr().out
    documents = [json.loads(part) for part in out[out.index("{\n") :].replace("}\n{", "}\0{").split("\0")]
    assert documents[-1]["hits"] == 3
    assert documents[0]["status"] == "done"
    same = [(tmp_path / name / "shardmill.json").read_bytes() for name in ("first", "second")]
    assert same[0] == same[1]


def test_checks_of_the_store_that_fail_are_counted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, told in [("first", "0 of 3 shards"), ("second", "store checks failed: 1;"), ("third", "")]:
        for receipt in sorted((tmp_path / ".shardmill").glob("receipts/*"))[:1] if name != "first" else []:
            receipt.write_bytes(b"poison")
        assert run(source, tmp_path / name, *(["--json"] if name == "third" else [])) == 0
        out, err = capsys.readouterr()
        assert told in out
        assert ("WARNING store: receipt" in err) == (name != "first")
    assert json.loads(out)["store_checks_failed"] == 1


def test_a_dry_run_checks_and_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "result", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "quantize FP8_DYNAMIC: 14 tensors" in out
    assert "dry run: nothing was written" in err
    assert list(tmp_path.iterdir()) == [source]
    assert run(source, tmp_path / "result", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["command"] == "run"


def test_report_shows_the_summary_of_a_result(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(source, tmp_path / "result", "--scheme", "MXFP4A16", "-q")
    shown = capsys.readouterr().out.partition("weight error is a proxy")[0]
    assert main(["report", str(tmp_path / "result")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(shown)
    assert str(tmp_path / "result") in err


def test_report_writes_what_it_is_asked_for(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, page, card, figures = (tmp_path / name for name in ("result", "page.html", "card.md", "figures.json"))
    run(source, result, "--scheme", "W4A16", "-q")
    capsys.readouterr()

    asked = ["--html", str(page), "--card", str(card), "--json", str(figures), "--base-model", "org/tiny"]
    assert main(["report", str(result), "--against", str(source), *asked]) == 0

    told = capsys.readouterr().out
    assert [line.rpartition(": ")[0] for line in told.splitlines()] == [f"`{path}`" for path in (page, card, figures)]
    text = page.read_text()
    assert "Histograms are missing" not in text
    assert text.count("<figcaption>weight</figcaption>") == 14
    assert f"shardmill run {source} DST --scheme W4A16" in text
    assert "base_model: org/tiny" in card.read_text()
    document = json.loads(figures.read_text())
    assert sum(part["bytes"] for part in document["parts"]) == sum(
        document["summary"]["totals"][name] for name in ("quantized_bytes", "copied_bytes")
    )
    assert sum(part["elements"] for part in document["parts"]) == sum(
        document["summary"]["totals"][name] for name in ("quantized_weights", "copied_weights")
    )
    assert len(document["histograms"]) == 14
    assert {sum(found["weight"]) == sum(found["error"]) > 0 for found in document["histograms"].values()} == {True}


def test_report_says_what_is_missing_without_source_and_headers(source: Path, tmp_path: Path) -> None:
    result, page = tmp_path / "result", tmp_path / "page.html"
    run(source, result, "-q")
    assert main(["report", str(result), "--html", str(page)]) == 0
    assert "Histograms are missing" in page.read_text()
    next(result.glob("*.safetensors")).unlink()
    assert main(["report", str(result), "--html", str(page)]) == 0
    assert "Sizes by part are missing: the headers of 1 of 3 shards" in page.read_text()


@pytest.mark.slow
def test_the_report_of_a_thousand_shards_comes_soon(tmp_path: Path) -> None:
    """A manifest of 50,000 tensors: that of a small result, its shard a thousand times with other layers."""
    source = checkpoints.write(tmp_path / "source", [checkpoints.llama(6, 64, 64)])
    result, page = tmp_path / "result", tmp_path / "page.html"
    assert run(source, result, "-q", "--scheme", "W8A8") == 0
    manifest = json.loads((result / "shardmill.json").read_text())
    [shard] = manifest["shards"]

    def moved(number: int) -> Any:
        """The shard with its layers further on."""
        further = partial(re.sub, r"layers\.(\d)\.", lambda found: f"layers.{10 * number + int(found[1])}.")
        return json.loads(further(json.dumps(shard)))

    names = [f"model-{number:05d}-of-01000.safetensors" for number in range(1000)]
    manifest["shards"] = [moved(number) | {"name": name} for number, name in enumerate(names)]
    manifest["sources"] = dict.fromkeys(names, next(iter(manifest["sources"].values())))
    assert sum(len(entry["tensors"]) for entry in manifest["shards"]) >= 50_000
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "shardmill.json").write_text(json.dumps(manifest))
    begun = time.monotonic()

    assert main(["report", str(tmp_path / "large"), "--html", str(page)]) == 0

    print(f"{time.monotonic() - begun:.1f} s, {page.stat().st_size:,} bytes")
    assert page.stat().st_size < 5_000_000
    assert "the first 512 of 6,000 layers" in page.read_text()


def test_a_card_replaces_only_another_card(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "README.md").write_text("of the source")
    result, card = tmp_path / "result", tmp_path / "card.md"
    run(source, result, "-q")
    assert main(["report", str(result), "--card", str(result / "README.md")]) == 2
    assert "shardmill did not write" in capsys.readouterr().err
    assert (result / "README.md").read_text() == "of the source"
    for _ in range(2):
        assert main(["report", str(result), "--card", str(card)]) == 0
    assert "# result\n" in card.read_text()


def test_a_run_writes_page_and_card_with_its_time(source: Path, tmp_path: Path) -> None:
    asked = ["--html", str(tmp_path / "page.html"), "--card", str(tmp_path / "card.md")]
    assert run(source, tmp_path / "result", "-q", *asked) == 0
    assert re.search(r"3 shards; \d+\.\d s, [\d.]+ \wB/s", (tmp_path / "page.html").read_text())
    assert "shardmill run SRC result --scheme FP8_DYNAMIC" in (tmp_path / "card.md").read_text()


def test_parquet_without_its_library_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["report", str(source), "--parquet", str(tmp_path / "x.parquet")]) == 2
    assert "pip install 'shardmill[parquet]'" in capsys.readouterr().err


# ---- several schemes --------------------------------------------------------------------------------------------


def test_several_schemes_give_a_result_each(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--scheme", "fp8_dynamic", "--scheme", "W4A16", "-q"]
    page = str(tmp_path / "{scheme}.html")
    assert run(source, tmp_path / "out", *asked, "--html", page) == 0
    out = capsys.readouterr().out
    for scheme in ("FP8_DYNAMIC", "W4A16"):
        assert main(["verify", str(tmp_path / "out" / scheme), "--against", str(source), "-q"]) == 0
        assert f"next: vllm serve {tmp_path / 'out' / scheme}" in out
        assert (tmp_path / f"{scheme}.html").exists()
    capsys.readouterr()
    assert run(source, tmp_path / "tiny-{scheme}-v1", *asked, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["status"], [one["hits"] for one in document["runs"]]) == ("done", [0, 0])
    assert (tmp_path / "tiny-FP8_DYNAMIC-v1" / "config.json").exists()
    assert run(source, tmp_path / "again", *asked, "--store", str(tmp_path / ".shardmill"), "--json") == 0
    assert [one["hits"] for one in json.loads(capsys.readouterr().out)["runs"]] == [3, 3]
    assert run(source, tmp_path / "dry", *asked, "--dry-run") == 0
    assert not (tmp_path / "dry").exists()


def test_several_schemes_give_a_plan_each(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", str(source), "--scheme", "fp8_dynamic", "--scheme", "W4A16"]
    assert main([*asked, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    alone = []
    for scheme in ("fp8_dynamic", "W4A16"):
        assert main(["plan", str(source), "--scheme", scheme, "--json"]) == 0
        alone.append({"scheme": scheme} | json.loads(capsys.readouterr().out))
    assert both["status"] == "done"
    assert both["plans"] == [{key: one[key] for key in one if key != "command"} for one in alone]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert told.index("\nfp8_dynamic\n") < told.index("\nW4A16\n")
    assert main([*asked, "--scheme", "FP8_BLOCK", "--group-size", "64"]) == 2
    assert "group_size 64 does not fit scheme" in capsys.readouterr().err
    assert main([*asked, "--scheme", "W4A16"]) == 2
    assert "scheme `W4A16` is asked for 2 times" in capsys.readouterr().err


def test_a_plan_of_several_schemes_tells_which_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoints.write(tmp_path / "narrow", [checkpoints.llama(hidden=96)])
    assert main(["plan", str(source), "--scheme", "FP8_DYNAMIC", "--scheme", "W4A16", "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [(one["scheme"], one["status"]) for one in document["plans"]] == [
        ("FP8_DYNAMIC", "done"),
        ("W4A16", "refused"),
    ]
    assert "W4A16:   " in err
    assert "FP8_DYNAMIC" not in err


def test_one_of_several_schemes_may_fail(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize = quantize_module.quantize_shard

    def fail(shard: ShardPlan, *more: Any) -> ShardOutcome:
        if shard.number == 1 and shard.schemes[0].preset == "W4A16":
            raise StorageFailed(5, "the disk is on fire")
        return quantize(shard, *more)

    monkeypatch.setattr(pipeline, "quantize_shard", fail)
    assert run(source, tmp_path / "out", "--scheme", "W4A16", "--scheme", "W8A8", "--json") == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [(one["scheme"], one["status"]) for one in document["runs"]] == [("W4A16", "failed"), ("W8A8", "done")]
    assert "W4A16:   `model-00002-of-00003.safetensors`" in err
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["W8A8"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["--scheme", "W4A16", "--scheme", "w4a16"], "scheme `W4A16` is asked for 2 times"),
        (["--scheme", "W4A16", "--scheme", "W8A8", "--html", "x.html"], "put {scheme} into its name"),
        (["--scheme", "W4A16", "--scheme", "W5", "--scheme", "X"], "refused: 2 problems"),
        (["--scheme", "W4A16", "--scheme", "FP8_DYNAMIC", "--group-size", "64"], "group_size 64 does not fit scheme"),
    ],
)
def test_several_schemes_are_refused_before_any_begins(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], expected: str
) -> None:
    assert run(source, tmp_path / "out", *asked) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- verify -----------------------------------------------------------------------------------------------------


def test_verify_alone_and_against_the_source(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result"
    run(source, result, "--scheme", "NVFP4A16", "-q")
    capsys.readouterr()
    assert main(["verify", str(result)]) == 0
    assert "no problem found" in capsys.readouterr().out
    assert main(["verify", str(result), "--against", str(source)]) == 0
    out = capsys.readouterr().out
    assert "14 quantized weights compared with the source, 0 with an unusual error" in out
    assert "usual 0.095" in out
    assert main(["verify", str(result), "--against", str(source), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["status"], document["problems"], len(document["weights"])) == ("done", [], 14)
    assert document["weights"][0]["stated_error"] == pytest.approx(document["weights"][0]["relative_error"], rel=0.005)


def test_verify_names_what_differs_and_fails(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result"
    run(source, result, "-q")
    (result / "LICENSE").write_text("not free")
    capsys.readouterr()
    assert main(["verify", str(result)]) == 1
    out, err = capsys.readouterr()
    assert "1 problem found" in out
    assert "`LICENSE`: expected blake3" in err
    assert main(["verify", str(result), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [problem["kind"] for problem in document["problems"]] == ["digest-differs"]


def test_verify_makes_a_tensor_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, name = tmp_path / "result", "model.layers.0.mlp.up_proj"
    run(source, result, "-q")
    asked = ["verify", str(result), "--against", str(source), "--reproduce", name, "--reproduce", "model.norm"]
    capsys.readouterr()
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["byte-identical", "byte-identical"]
    assert lines[0].startswith(f"`{name}.weight` of `model-0000")

    path = max(result.glob("*.safetensors"))
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last tensor of the last shard
    path.unlink()
    path.write_bytes(data)
    last = max(checkpoints.read(result), key=lambda name: (name.startswith("model.norm"), name))
    assert main([*asked[:5], last, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [problem["kind"] for problem in document["problems"]] == ["bytes-differ"]
    assert document["reproduced"][0]["outputs"] == [last]


def test_sums_are_written_of_a_sound_result_only(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, sums = tmp_path / "result", tmp_path / "SHA256SUMS"
    run(source, result, "-q")
    assert main(["verify", str(result), "--sha256", str(sums)]) == 0
    assert "SHA-256 of 7 files" in capsys.readouterr().err
    sums.unlink()
    (result / "LICENSE").unlink()
    assert main(["verify", str(result), "--sha256", str(sums)]) == 1
    assert "was not written" in capsys.readouterr().err
    assert not sums.exists()


def test_verify_says_what_it_leaves_out(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result"
    run(source, result, "-q")
    (result / "shardmill.json").unlink()
    capsys.readouterr()
    assert main(["verify", str(result)]) == 0
    assert "NOTE there is no shardmill.json" in capsys.readouterr().err


# ---- going on ---------------------------------------------------------------------------------------------------


def many_shards(tmp_path: Path) -> tuple[Path, int]:
    tensors = checkpoints.llama(layers=3)
    return checkpoints.write(tmp_path / "source", checkpoints.deal(tensors, 15)), 15


def test_finished_shards_survive_kill_9(tmp_path: Path) -> None:
    source, shards = many_shards(tmp_path)
    arguments = ["run", str(source), str(tmp_path / "result"), "--device", "cpu", "--workers", "2", "--json"]
    killed = call(*arguments, program=STRIKE.format(count=6, signal=int(signal.SIGKILL)) + PROGRAM)
    assert killed.returncode == -signal.SIGKILL
    kept = len(list((tmp_path / ".shardmill" / "receipts").glob("*.json")))
    assert 6 <= kept < shards
    assert not (tmp_path / "result").exists()
    again = call(*arguments)
    assert again.returncode == 0
    assert json.loads(again.stdout)["hits"] == kept
    clean = call("run", str(source), str(tmp_path / "clean"), "--device", "cpu", "--store", str(tmp_path / "other"))
    assert clean.returncode == 0
    names = sorted(path.name for path in (tmp_path / "clean").iterdir())
    assert sorted(path.name for path in (tmp_path / "result").iterdir()) == names
    for name in names:
        assert (tmp_path / "result" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()


def test_ctrl_c_finishes_cleanly_and_prints_the_command_that_goes_on(tmp_path: Path) -> None:
    source, shards = many_shards(tmp_path)
    arguments = ["run", str(source), str(tmp_path / "the result"), "--device", "cpu", "--workers", "1", "--json"]
    stopped = call(*arguments, program=STRIKE.format(count=4, signal=int(signal.SIGINT)) + PROGRAM)
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    kept = len(list((tmp_path / ".shardmill" / "receipts").glob("*.json")))
    assert 4 <= kept < shards
    document = json.loads(stopped.stdout)
    assert document["status"] == "interrupted"
    assert document["message"] == f"stopped on request; {kept} of {shards} shards are finished, run again to go on"
    line = stopped.stderr.splitlines()[-1].strip()
    assert line == document["resume"]
    assert not (tmp_path / "the result").exists()
    program, *rest = shlex.split(line)
    assert (program, rest) == ("shardmill", arguments)
    again = call(*rest)
    assert again.returncode == 0
    assert json.loads(again.stdout)["hits"] == kept


def test_the_second_ctrl_c_stops_at_once() -> None:
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    with running.stop_on_interrupt(stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def work() -> None:
        with running.stop_on_interrupt(threading.Event()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_one_more_ignored_tensor_redoes_exactly_its_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, shards = many_shards(tmp_path)
    assert run(source, tmp_path / "first", "-q") == 0
    capsys.readouterr()
    assert run(source, tmp_path / "second", "--ignore", "model.layers.1.mlp.down_proj", "--json", "-q") == 0
    assert json.loads(capsys.readouterr().out)["hits"] == shards - 1
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    changed = index["model.layers.1.mlp.down_proj.weight"]
    for shard in set(index.values()):
        same = (tmp_path / "first" / shard).read_bytes() == (tmp_path / "second" / shard).read_bytes()
        assert same == (shard != changed)


@pytest.mark.parametrize("scheme", ["NVFP4A16", "W4A16_ASYM"])
def test_bytes_depend_neither_on_sharding_nor_on_workers(tmp_path: Path, scheme: str) -> None:
    tensors = checkpoints.llama()
    found = []
    for shards in (1, 3, 7):
        source = checkpoints.write(tmp_path / f"source{shards}", checkpoints.deal(tensors, shards))
        for workers in (1, 4):
            destination = tmp_path / f"result{shards}-{workers}"
            store = str(tmp_path / f"store{shards}-{workers}")
            assert run(source, destination, "--scheme", scheme, "--workers", str(workers), "--store", store, "-q") == 0
            found.append(checkpoints.as_bytes(checkpoints.read(destination)))
    assert all(result == found[0] for result in found[1:])


# ---- the store --------------------------------------------------------------------------------------------------


def test_the_store_is_listed_checked_and_emptied(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, tmp_path / "result", "-q")
    store = ["--store", str(tmp_path / ".shardmill")]
    capsys.readouterr()
    assert main(["store", "ls", *store]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.endswith("in use") for line in listed] == [True, True, True, False]
    assert listed[-1].startswith("3 shards, ")
    assert main(["store", "verify", *store]) == 0
    assert capsys.readouterr().out == "0 problems found\n"
    blob = next((tmp_path / ".shardmill" / "blobs").iterdir())
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    assert main(["store", "verify", *store]) == 1
    assert "blob does not have the digest of its receipt" in capsys.readouterr().err
    assert main(["store", "gc", "--older-than", "0", *store]) == 0
    assert capsys.readouterr().out.startswith("0 shards removed")
    for path in (tmp_path / "result").glob("*.safetensors"):
        path.unlink()
    assert main(["store", "gc", *store]) == 0
    assert capsys.readouterr().out.startswith("0 shards removed")
    assert main(["store", "gc", "--older-than", "0", *store]) == 0
    assert capsys.readouterr().out.startswith("3 shards removed")


def test_the_environment_names_the_store(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDMILL_STORE", str(tmp_path / "shared"))
    assert run(source, tmp_path / "result") == 0
    assert len(list((tmp_path / "shared" / "receipts").iterdir())) == 3
    assert not (tmp_path / ".shardmill").exists()
    capsys.readouterr()
    assert main(["store", "ls"]) == 0
    assert "3 shards" in capsys.readouterr().out
    assert run(source, tmp_path / "other", "--store", str(tmp_path / "own")) == 0
    assert (tmp_path / "own").is_dir()


def test_a_damaged_blob_is_a_warned_miss(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(source, tmp_path / "first", "-q")
    blob = next((tmp_path / ".shardmill" / "blobs").iterdir())
    blob.chmod(0o644)
    with blob.open("ab") as file:
        file.write(b"x")
    capsys.readouterr()
    assert run(source, tmp_path / "second", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["hits"] == 2
    assert "WARNING store: blob" in err
    assert "it is set aside and the shard is done again" in err
    assert logging.getLogger("shardmill").handlers == []


# ---- commands in a process of their own -------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "setup", "worker"])
def test_some_commands_become_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    class Replaced(BaseException):
        """A process that is replaced does not come back."""

    def record(path: str, arguments: list[str]) -> NoReturn:
        assert path == arguments[0] == sys.executable
        assert arguments[1:4] == ["-P", "-m", f"shardmill.flows.{command}"]
        assert arguments[4:] == ["--help", "--out", "x y", "here", "--debug"]
        raise Replaced

    monkeypatch.setattr(os, "execv", record)

    with pytest.raises(Replaced):
        main([command, "--help", "--out", "x y", "here", "--debug"])


# ---- errors -----------------------------------------------------------------------------------------------------


def broken(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> int:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (StorageFailed("write `x` failed: no space"), 1, "failed: write `x` failed: no space\n"),
        (ZeroDivisionError("oops"), 1, "failed: unexpected ZeroDivisionError: oops; --debug shows where\n"),
        (KeyboardInterrupt(), 130, "stopped at once; finished shards stay in the store\ngo on with:\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_errors_are_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException, code: int, expected: str
) -> None:
    monkeypatch.setitem(commands.COMMANDS, "plan", broken(error))
    assert main(["plan", "x"]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(expected)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(commands.COMMANDS, "plan", broken(ZeroDivisionError("oops")))
    assert main(["plan", "x", "--debug", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("Traceback (most recent call last):")
    assert json.loads(out)["status"] == "failed"


def test_a_shard_that_fails_unexpectedly_is_exit_code_1(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shardmill.kernels.shard.encode_shard", broken(MemoryError("all gone")))
    assert run(source, tmp_path / "result", "--json") == 1
    out, err = capsys.readouterr()
    assert "3 of 3 shards failed; 0 are finished and kept in the store" in err
    assert "`model-00001-of-00003.safetensors`: unexpected MemoryError: all gone" in err
    assert "`model-00002-of-00003.safetensors` failed; the other shards go on" in err
    assert {problem["kind"] for problem in json.loads(out)["problems"]} == {"MemoryError"}


def test_a_reader_that_goes_away_is_no_disaster(source: Path) -> None:
    command = shlex.join([sys.executable, "-P", "-c", PROGRAM, "plan", str(source), "--json"])
    done = subprocess.run([BASH, "-c", f"{command} | true"], check=False, capture_output=True, text=True)
    assert done.stderr == ""


def test_foreign_names_are_escaped(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = tmp_path / "re\x1b[31msult\n"
    assert run(source, destination) == 0
    assert main(["verify", str(destination)]) == 0
    assert main(["run", str(source), str(destination), "--scheme", "W8A8"]) == 2
    out, err = capsys.readouterr()
    assert {c for c in out + err if not c.isprintable()} == {"\n"}
    assert "next: vllm serve $'" in out


@pytest.mark.parametrize(
    "argument", ["plain", "out put", "it's", "a\nb", "\x1b[31m", "qu'o\"te\n", "back\\slash\n", "\u200bzero", "", "é"]
)
def test_quoted_arguments_are_read_back_by_bash(argument: str) -> None:
    done = subprocess.run([BASH, "-c", f"printf %s {quote(argument)}"], check=True, capture_output=True)
    assert done.stdout.decode() == argument
    assert quote(argument).isprintable()


@pytest.mark.parametrize("module", [cli_failures])
def test_examples_in_docstrings_run(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert (found.failed, found.attempted > 0) == (0, True)


# ---- recipes ----------------------------------------------------------------------------------------------------


def test_the_default_scheme_is_fp8() -> None:
    assert read_recipe(parse_arguments(["plan", "x"])) == uniform("FP8_DYNAMIC")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.json", '{"scheme": "W4A16", "group_size": 64, "ignore": ["a"], "indivisible": "copy"}'),
        ("r.yaml", "scheme: W4A16\ngroup_size: 64\nignore: a\nindivisible: copy\n"),
        ("r.yml", "groups: [{scheme: w4a16, group_size: 64}]\nignore: [a]\nindivisible: copy\n"),
    ],
)
def test_recipe_files_and_flags_go_together(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    flags = ["--ignore", "b", "--ignore", "a", "--no-default-ignores", "--expert-layout", "rows", "--partial-fused"]
    found = read_recipe(parse_arguments(["plan", "x", "--recipe", str(tmp_path / name), *flags]))
    same = read_recipe(
        parse_arguments(["plan", "x", "--scheme", "W4A16", "--group-size", "64", "--indivisible", "copy", *flags])
    )
    assert found.ignore == ("a", "b")
    assert (found.indivisible, found.expert_layout, found.default_ignores, found.partial_fused) == (
        "copy",
        "rows",
        False,
        True,
    )
    assert found.groups == same.groups
    assert {"a", "b"} == set(same.ignore)


def test_a_huge_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_arguments, "_RECIPE_LIMIT", 3)
    (tmp_path / "r.json").write_text("{    }")
    assert main(["plan", "x", "--recipe", str(tmp_path / "r.json")]) == 2
    assert capsys.readouterr().err.startswith("refused: 1 problem")


@pytest.mark.parametrize(("flags", "verbosity"), [([], 0), (["-q"], -1), (["-v"], 1), (["-vv"], 2), (["-v", "-q"], -1)])
def test_talk_is_set_before_or_after_the_verb(flags: list[str], verbosity: int) -> None:
    assert parse_arguments([*flags, "plan", "x"]).verbosity == verbosity
    assert parse_arguments(["plan", "x", *flags]).verbosity == verbosity
    assert parse_arguments(["store", "ls", *flags]).verbosity == verbosity


# ---- progress ---------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_in_bytes() -> None:
    terminal = Terminal()
    console = Console(0, terminal)
    progress = console.progress("quantize", 5_000_000_000, 2)
    progress.add(2_500_000_000)
    progress.add_shard(is_hit=True)
    console.say("WARNING something")
    progress.add(2_500_000_000)
    console.close_progress()
    shown = terminal.getvalue()
    assert "quantize:  50%" in shown
    assert "2.50G/5.00G" in shown
    assert "1/2 shards, 1 hits" in shown
    assert "WARNING something\n" in shown


def test_elsewhere_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmill.cli.console.LINE_SECONDS", 0.0)
    stream = io.StringIO()
    progress = Console(0, stream).progress("quantize", 200_000_000, 4)
    progress.add_shard(is_hit=True)
    progress.add(50_000_000)
    line = stream.getvalue()
    assert line.startswith("quantize: 50.0 MB of 200.0 MB (25%), ")
    assert "GB/s, ETA " in line
    assert line.endswith(" s, 1 of 4 shards, 1 hits\n")


def test_quiet_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmill.cli.console.LINE_SECONDS", 0.0)
    terminal = Terminal()
    console = Console(-1, terminal)
    console.progress("verify", 10).add(10)
    console.count_bytes(1)
    console.close_progress()
    console.count_bytes(1)
    assert terminal.getvalue() == ""


def test_progress_over_nothing_has_no_division_by_zero() -> None:
    assert "0 bytes of 0 bytes (100%)" in Progress(Console(0, io.StringIO()), "verify", 0, 0).line()


def test_plan_and_verify_warn_of_what_engines_refuse(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "served"
    assert main(["plan", str(source), "--tp", "96"]) == 0
    told = capsys.readouterr()
    assert "architecture  Llama and its like" in told.out
    assert "(rule: ranks divide the rows" in told.out
    assert main(["run", str(source), str(result)]) == 0
    capsys.readouterr()
    assert main(["verify", str(result), "--tp", "96", "--json"]) == 0
    told = capsys.readouterr()
    serving = json.loads(told.out)["serving"]
    assert serving["tp"] == 96
    assert [rule["name"] for rule in serving["rules"]] == ["tensor-parallel"]
    assert [warning["kind"] for warning in serving["warnings"]] == ["serving-tensor-parallel"]
    assert "serving-tensor-parallel" not in told.err
    assert "WARNING" in told.err
    assert main(["verify", str(result), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["serving"]["warnings"] == []
