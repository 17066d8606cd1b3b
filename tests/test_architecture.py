"""The arrows between the layers, what an import costs, and what the package promises to the outside."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import shardmill

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETTINGS = PROJECT["tool"]["setuptools"]
CONTRACTS: dict[str, dict[str, Any]] = {
    contract["id"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]
}

FRONT_DOOR = {
    "__version__",
    "process_file",
    "process_file_microscale_scheme",
    "split_fused_moe_experts",
    "validate_file",
}

# Folders of the repository, and where each is installed inside the package.
HOMES = {"src/shardmill": "", "flows": "flows", "tasks": "tasks", "deployments": "deployments"}

# Import names of dependencies whose distribution is called otherwise.
IMPORT_NAMES = {
    "compressed-tensors": "compressed_tensors",
    "huggingface-hub": "huggingface_hub",
    "prefect-dask": "prefect_dask",
    "pyyaml": "yaml",
}

# One import that breaks each contract: contract, new module, what it says.
VIOLATIONS = [
    ("layers", "core/planted.py", "from shardmill import stages"),
    ("layers", "storage/planted.py", "import shardmill.kernels"),
    ("layers", "stages/planted.py", "import shardmill.tasks"),
    ("layers", "tasks/planted.py", "import shardmill.flows"),
    ("layers", "planted.py", ""),  # a module without a layer
    ("prefect", "stages/planted.py", "import prefect.tasks"),
    ("prefect", "storage/planted.py", "def later() -> None:\n    import prefect"),
    ("pure", "core/planted.py", "import numpy"),
    ("pure", "core/planted.py", "def later() -> None:\n    import torch"),
    ("kernels", "kernels/planted.py", "import fsspec"),
    ("adapter", "kernels/planted.py", "from compressed_tensors.quantization import QuantizationConfig"),
    ("adapter", "stages/planted.py", "import compressed_tensors"),
]


def modules_after(statement: str) -> set[str]:
    """Names that `statement` adds to `sys.modules` of a fresh interpreter without the current folder on its path."""
    report = "print(json.dumps(sorted(set(sys.modules) - before)))"
    program = f"import json, sys\nbefore = set(sys.modules)\n{statement}\n{report}"
    done = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def top_names(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


# ---- the distribution -------------------------------------------------------------------------------------------


def folders_of_packages() -> set[str]:
    found = {"shardmill"}
    for home, prefix in HOMES.items():
        for init in (ROOT / home).rglob("__init__.py"):
            parts = [part for part in (prefix, *init.parent.relative_to(ROOT / home).parts) if part]
            found.add(".".join(["shardmill", *parts]))
    return found


def test_every_package_of_the_tree_is_installed_and_nothing_else() -> None:
    assert set(SETTINGS["packages"]) == folders_of_packages()


def test_every_folder_with_code_is_a_package() -> None:
    folders = {file.parent for home in HOMES for file in (ROOT / home).rglob("*.py")}

    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()


def test_types_are_announced() -> None:
    assert (ROOT / "src" / "shardmill" / "py.typed").exists()
    assert SETTINGS["package-data"]["shardmill"] == ["py.typed"]


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_every_folder_once(tmp_path: Path) -> None:
    """What `pip install` gets: deployment files, too, since `shardmill setup` reads them."""
    home = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".venv*", ".git", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, home, ignore=ignored)
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(home)]
    subprocess.run(command, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()

    inside = [name for name in names if ".dist-info/" not in name]
    wanted = {
        "/".join(filter(None, ("shardmill", target, file.relative_to(ROOT / source).as_posix())))
        for source, target in HOMES.items()
        for file in (ROOT / source).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert sorted(inside) == sorted(wanted)
    assert {f"shardmill/deployments/{name}" for name in ("platform.yaml", "prefect.yaml", "pool-docker.json")} <= wanted


def test_the_front_door_is_pinned() -> None:
    assert set(shardmill.__all__) == FRONT_DOOR
    assert {name for name in FRONT_DOOR if not hasattr(shardmill, name)} == set()
    assert shardmill.__version__ == PROJECT["project"]["version"]


# ---- what an import costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["import shardmill", "import shardmill.cli", "import shardmill.example"])
def test_cheap_imports_load_no_heavy_library(statement: str) -> None:
    loaded = top_names(modules_after(statement))

    assert loaded & {"compressed_tensors", "numpy", "prefect", "torch", "transformers"} == set()


def test_core_and_errors_load_the_standard_library_only() -> None:
    names = sorted(path.stem for path in (ROOT / "src" / "shardmill" / "core").glob("*.py") if path.stem != "__init__")
    statement = "\n".join(["import shardmill.errors", *(f"import shardmill.core.{name}" for name in names)])

    assert top_names(modules_after(statement)) - sys.stdlib_module_names == {"shardmill"}


def test_flows_and_tasks_load_no_torch() -> None:
    statement = "import shardmill.flows.quantize_checkpoint"
    loaded = modules_after(statement)

    assert "torch" not in loaded
    assert "compressed_tensors" not in loaded
    assert {"flows", "tasks"} & loaded == set()


def test_flows_and_tasks_are_no_top_level_modules_here() -> None:
    assert {"flows", "tasks"} & set(sys.modules) == set()


# ---- the arrows -------------------------------------------------------------------------------------------------


def imported_names(file: Path) -> set[str]:
    """Top-level names that `file` imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0] if not node.level else "shardmill")
    return found


def test_core_and_errors_import_the_standard_library_only() -> None:
    package = ROOT / "src" / "shardmill"
    foreign = {
        file.name: names
        for file in [package / "errors.py", *(package / "core").rglob("*.py")]
        if (names := imported_names(file) - sys.stdlib_module_names - {"shardmill"})
    }

    assert foreign == {}


def test_the_contract_for_core_names_every_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    declared = PROJECT["project"]["dependencies"] + extras["dask"] + extras["demo"]
    names = {requirement.partition(">=")[0].strip() for requirement in declared}

    assert set(CONTRACTS["pure"]["forbidden_modules"]) == {IMPORT_NAMES.get(name, name) for name in names}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with flows and tasks inside, as it is installed."""
    home = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", home)
    for source, target in HOMES.items():
        shutil.copytree(
            ROOT / source, home / "shardmill" / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    return home


def broken_contracts(tree: Path) -> set[str]:
    """Ids of the contracts that import-linter finds broken in `tree`."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "200"},
    )
    broken = {name for name, contract in CONTRACTS.items() if f"{contract['name']} BROKEN" in done.stdout}
    assert bool(broken) == (done.returncode != 0), done.stdout + done.stderr
    return broken


def test_the_contracts_hold(tree: Path) -> None:
    assert broken_contracts(tree) == set()


@pytest.mark.parametrize(("contract", "module", "source"), VIOLATIONS)
def test_a_planted_violation_breaks_its_contract(tree: Path, contract: str, module: str, source: str) -> None:
    planted = tree / "shardmill" / module
    planted.write_text(f"{source}\n")
    try:
        assert contract in broken_contracts(tree)
    finally:
        planted.unlink()


def test_every_contract_has_a_planted_violation() -> None:
    assert {contract for contract, _, _ in VIOLATIONS} == set(CONTRACTS)
