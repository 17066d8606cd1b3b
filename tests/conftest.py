"""What every test shares: a Prefect that touches nothing outside, Hypothesis profiles, goldens, reference systems."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).resolve().parent.parent
_FLOWS: Final = "tests/flows/"

# Prefect reads its settings when it is imported, and this file is imported before any test module.
_PREFECT = Path(tempfile.mkdtemp(prefix="shardmill-tests-"))
os.environ |= {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PREFECT_HOME": str(_PREFECT / "home"),
    "PREFECT_LOCAL_STORAGE_PATH": str(_PREFECT / "results"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
for _name in ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_PROFILE"):
    os.environ.pop(_name, None)  # a developer's own server is none of the tests' business

# Time limits per example would fail on a busy machine; how long a test may take in all is pytest-timeout's to say.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", _PATIENT, max_examples=50, derandomize=True)
settings.register_profile("large", _PATIENT, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write golden files anew instead of comparing")
    parser.addoption("--pictures", metavar="FOLDER", help="keep the pictures that tests in a browser take")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """With `--dist loadfile`: all flows to one process, so that their server is started once."""
    return _LoadFile(config, log) if config.getvalue("dist") == "loadfile" else None


class _LoadFile(LoadFileScheduling):  # type: ignore[misc] # untyped
    def _split_scope(self, nodeid: str) -> str:
        return _FLOWS if nodeid.startswith(_FLOWS) else str(super()._split_scope(nodeid))


def pytest_unconfigure() -> None:
    shutil.rmtree(_PREFECT, ignore_errors=True)


@pytest.fixture(scope="session")
def update_goldens(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written anew."""
    return bool(request.config.getoption("--update-goldens"))


@pytest.fixture(scope="session")
def reference_python() -> Path:
    """The interpreter of the reference system, for tests marked `oracle`."""
    return _interpreter("reference")


@pytest.fixture(scope="session")
def seed_python() -> Path:
    """The interpreter of the older reference system, for tests marked `seed`."""
    return _interpreter("seed")


def _interpreter(system: str) -> Path:
    given = os.environ.get(f"SHARDMILL_{system.upper()}_PYTHON")
    python = Path(given) if given else ROOT / f".venv-{system}" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} does not exist; run `make .venv-{system}/stamp`")
    return python
