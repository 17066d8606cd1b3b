"""llm-compressor's `model_free_ptq`; this file is started with the interpreter of the reference environment.

    python reference.py SOURCE DESTINATION SCHEME MAX_WORKERS

Only the part below `main` runs there.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
PYTHON: Final = Path(os.environ.get("SHARDMILL_REFERENCE_PYTHON", ROOT / ".venv-reference" / "bin" / "python"))
DISTRIBUTIONS: Final = ("llmcompressor", "compressed-tensors", "torch")
ENVIRONMENT: Final = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
IGNORE: Final = ("lm_head", "re:.*embed_tokens", r"re:.*mlp\.gate$")
"""What shardmill leaves alone without being told."""


def command(source: Path, destination: Path, scheme: str, workers: int) -> list[str | Path]:
    """What to run for one conversion."""
    return [PYTHON, "-P", __file__, source, destination, scheme, str(workers)]


def main() -> None:
    model_free_ptq: Any = importlib.import_module("llmcompressor").model_free_ptq
    source, destination, scheme, workers = sys.argv[1:]
    model_free_ptq(source, destination, scheme=scheme, ignore=list(IGNORE), max_workers=int(workers), device="cpu")


if __name__ == "__main__":
    main()
