"""Every case of `attack_cases` by the command line: refused whole, converted whole, or converted with a warning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attacks import attack_cases as attacks
from shardmill.cli import main
from shardmill.core.header import LENGTH_BYTES, parse_header

README = Path(__file__).with_name("README.md")
_MARK = "<!-- cases -->\n"


def tensor_names(root: Path) -> set[str]:
    names: set[str] = set()
    for path in root.rglob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        header = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data))
        names.update(spec.name for spec in header.tensors)
    return names


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


def check_talk(talk: str, case: attacks.Case) -> None:
    assert "Traceback" not in talk
    assert all(len(line) <= 310 for line in talk.splitlines()), max(map(len, talk.splitlines()))
    assert talk.replace("\n", "").isprintable()
    missing = [text for text in case.says if text not in talk and case.expect != "accept"]
    assert not missing, (missing, talk[:2000])


@pytest.mark.parametrize("case", attacks.CASES.values(), ids=list(attacks.CASES))
def test_a_hostile_checkpoint_is_refused_or_converted_in_the_open(
    case: attacks.Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, destination = attacks.build(case, tmp_path), tmp_path / "destination"
    outside = {path: path.read_bytes() for path in (tmp_path / "outside").rglob("*") if path.is_file()}
    arguments = ["run", str(source), str(destination), "--scheme", case.scheme, "--device", "cpu", *case.options]
    code = main([*arguments, "--ignore", "lm_head"])
    talk = capsys.readouterr().err
    check_talk(talk, case)
    if case.expect == "reject":
        assert code == 2, talk
        assert not destination.exists()
        assert case.is_late or not list((tmp_path / ".shardmill").rglob("*.safetensors"))
    else:
        assert code == 0, talk
        check_result(case, source, destination, talk)
    assert {path: path.read_bytes() for path in outside} == outside


def check_result(case: attacks.Case, source: Path, destination: Path, talk: str) -> None:
    manifest = json.loads((destination / "shardmill.json").read_text())
    told = json.dumps([manifest["warnings"], manifest["files_not_copied"]])
    is_warned = "WARNING" in talk
    assert is_warned == (case.expect == "policy"), talk
    assert all(text in told for text in case.says if case.expect == "policy"), told
    assert not files(destination) & set(case.absent)
    assert files(destination) >= set(case.present)
    found = b"".join(path.read_bytes() for path in destination.rglob("*") if path.is_file())
    assert attacks.CANARY.encode() not in found
    assert b"auto_map" not in (destination / "config.json").read_bytes()
    left_out = {entry["file"] for entry in manifest["files_not_copied"]}
    weights = {path.name for path in source.rglob("*.safetensors")} - {name.rpartition("/")[2] for name in left_out}
    if weights and not left_out & files(source) & {"consolidated.safetensors"} and case.scheme.startswith("FP8"):
        assert tensor_names(source) <= tensor_names(destination)


def test_the_table_of_cases_is_the_one_in_the_readme(update_goldens: bool) -> None:  # noqa: FBT001
    head, mark, _ = README.read_text().partition(_MARK)
    assert mark
    if update_goldens:
        README.write_text(head + mark + attacks.table() + "\n")
    assert README.read_text().partition(_MARK)[2].strip() == attacks.table(), "run pytest --update-goldens"


def test_there_are_many_cases_of_every_kind() -> None:
    kinds = [case.expect for case in attacks.CASES.values()]
    counts = {kind: kinds.count(kind) for kind in ("reject", "accept", "policy")}
    print(f"\n{counts}")
    assert counts["reject"] > 60
    assert min(counts.values()) > 15
