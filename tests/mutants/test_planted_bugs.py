"""Bugs that are planted one at a time, in a copy of the package: the suite catches each of them.

A bug that no test catches shows a promise that nobody holds the code to: write the test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
CAUGHT: Final = 1
"""How pytest ends when tests fail; it ends otherwise when it finds none, or cannot run them."""
NUMBERS: Final = "tests/kernels/test_numbers.py"
ORACLE: Final = "tests/kernels/test_reference_oracle.py"
SHARDS: Final = "tests/stages/test_quantize.py"
INTEGRITY: Final = "tests/stages/test_store_integrity.py"


@dataclass(frozen=True)
class Bug:
    """One place that is changed, and the tests that must see it."""

    name: str
    file: str
    """Below `src/shardmill`."""
    right: str
    wrong: str
    tests: str
    choice: str
    """As pytest's `-k`."""


BUGS: Final = (
    Bug(
        "swapped nibbles",
        "kernels/reference.py",
        "return (pairs[..., 1].to(dtype) << size).bitwise_or_(pairs[..., 0])",
        "return (pairs[..., 0].to(dtype) << size).bitwise_or_(pairs[..., 1])",
        NUMBERS,
        "odd_shapes and MXFP4A16",
    ),
    Bug(
        "scale x 2",
        "kernels/reference.py",
        "        scale = self.scale.to(torch.float32)\n",
        "        scale = self.scale.to(torch.float32) * 2\n",
        NUMBERS,
        "odd_shapes and W8A8",
    ),
    Bug(
        "wrong axis",
        "kernels/reference.py",
        'pack_bits(stored["weight_zero_point"].t(), args.num_bits).t()',
        'pack_bits(stored["weight_zero_point"], args.num_bits)',
        NUMBERS,
        "odd_shapes and W4A16_ASYM",
    ),
    Bug(
        "another global scale",
        "kernels/reference.py",
        "(torch.ones_like(amax) / amax) * 2688.0",
        "(torch.ones_like(amax) / amax) * 2640.0",
        ORACLE,
        "global_scale_is_that and not many",
    ),
    Bug("a tie to the odd code", "kernels/reference.py", "(0.75, True)", "(0.75, False)", ORACLE, "MXFP4A16 and BF16"),
    Bug("wrong exponent", "kernels/reference.py", "{4: 2, 8: 8}", "{4: 2, 8: 7}", ORACLE, "MXFP8A16 and BF16"),
    Bug(
        "wrong offset of packed codes",
        "kernels/reference.py",
        "+ (1 << (bits - 1))  # modulo",
        "+ (1 << bits)  # modulo",
        NUMBERS,
        "odd_shapes and W4A16",
    ),
    Bug(
        "rounds down",
        "kernels/reference.py",
        "quotient.round_().to(torch.int8)",
        "quotient.floor_().to(torch.int8)",
        ORACLE,
        "W4A16 and gaussian and BF16",
    ),
    Bug(
        "does not saturate",
        "kernels/reference.py",
        "    quotient.clamp_(*args.code_range)\n",
        "",
        NUMBERS,
        "odd_shapes and W4A16",
    ),
    Bug(
        "takes NaN",
        "kernels/reference.py",
        "finite=torch.tensor(isfinite(statistics.amax))",
        "finite=torch.tensor(data=True)",
        NUMBERS,
        "hard_inputs and BF16 and W8A8",
    ),
    Bug(
        "scales that vanish",
        "core/dtypes.py",
        'return "BF16" if source_dtype == "BF16" else "F32"',
        'return "BF16" if source_dtype == "BF16" else "F16"',
        NUMBERS,
        "half_precision and W8A8",
    ),
    Bug(
        "a fused set without a member",
        "core/fused.py",
        '    _row("gate_proj up_proj", "gate_up_proj"),\n',
        "",
        "tests/core/test_fused.py",
        "fused",
    ),
    Bug(
        "partners are not measured",
        "kernels/pieces.py",
        "    for ref in refs:\n        if ref.decode is None:\n",
        "    for ref in refs[:1]:\n        if ref.decode is None:\n",
        SHARDS,
        "members_of_a_fused_set",
    ),
    Bug(
        "a stored shape the wrong way round",
        "kernels/shard.py",
        'struct.pack("<2q", unit.rows, unit.cols)',
        'struct.pack("<2q", unit.cols, unit.rows)',
        SHARDS,
        "oracles_bytes and W4A16",
    ),
    Bug(
        "a key without its sources",
        "core/plan.py",
        '({"sources": sources} if sources else {})',
        "{}",
        INTEGRITY,
        "whatever_changes_bytes",
    ),
    Bug(
        "nothing is ignored",
        "core/groups.py",
        '"ignore": sorted(set(ignore)),',
        '"ignore": [],',
        "tests/stages/test_nonfinite.py",
        "whole_layer",
    ),
    Bug(
        "half a layer is kept",
        "core/nonfinite.py",
        "if other not in bad]",
        "if other in bad]",
        "tests/stages/test_nonfinite.py",
        "whole_layer",
    ),
    Bug(
        "a damaged blob is a hit",
        "storage/store.py",
        'return None if same else "does not have the digest of its receipt"',
        "return None",
        "tests/storage/test_store.py",
        "damaged_blob",
    ),
    Bug(
        "any seal is good",
        "storage/seal.py",
        "if not hmac.compare_digest(found[1].decode(), self._code(name, record)):",
        "if len(found[1]) != len(self._code(name, record)):",
        INTEGRITY,
        "only_its_own_receipts",
    ),
    Bug(
        "the last block is not hashed",
        "storage/hashing.py",
        "        if end > self.size - EDGE_BYTES > 0:\n",
        "        if end > self.size > 0:\n",
        "tests/storage/test_local.py",
        "streamed_digests",
    ),
)


def run_tests(package: Path, tests: list[str], choice: str) -> subprocess.CompletedProcess[str]:
    """Run tests on another copy of the package, with kernels that need no compilation."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-k", choice]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(package), "SHARDMILL_KERNELS": "reference", "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=1500,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that goes before the installed one; returns the folder that holds it."""
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "shardmill", tmp_path / "shardmill", ignore=leave)
    for name in ("flows", "tasks"):
        shutil.copytree(ROOT / name, tmp_path / "shardmill" / name, ignore=leave)
    return tmp_path


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_every_bug_has_its_place(bug: Bug) -> None:
    folder = ROOT if bug.file.startswith(("flows/", "tasks/")) else ROOT / "src" / "shardmill"
    assert bug.right in (folder / bug.file).read_text(), "the code has changed: plant the bug elsewhere"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_there_are_twenty_bugs_and_the_tests_pass_without_them(package: Path) -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) == 20
    marker = package / "shardmill" / "errors.py"
    marker.write_text(marker.read_text() + "\nMARK = 1\n")
    seen = subprocess.run(
        [sys.executable, "-c", "from shardmill.errors import MARK"],
        env=os.environ | {"PYTHONPATH": str(package)},
        check=False,
    )
    assert seen.returncode == 0, "the copy is not the package that is imported"
    files = sorted({bug.tests for bug in BUGS})
    done = run_tests(package, files, " or ".join(f"({bug.choice})" for bug in BUGS))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_planted_bug_is_caught(package: Path, bug: Bug) -> None:
    path = package / "shardmill" / bug.file
    text = path.read_text()
    path.write_text(text.replace(bug.right, bug.wrong, 1))
    done = run_tests(package, [bug.tests], bug.choice)
    assert done.returncode == CAUGHT, done.stdout[-3000:] + done.stderr[-1000:]
    assert "failed" in done.stdout
