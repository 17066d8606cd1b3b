"""Whole checkpoints against llm-compressor itself.

It computes in the dtype of the source, so a float32 source makes it an oracle for every preset, and a BF16 checkpoint
that is upcast for it makes it one for NVFP4 and MX, whose scales do not depend on the source's dtype.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoints
from shardmill.core.recipe import uniform
from shardmill.core.scheme import PRESETS
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations

pytestmark = pytest.mark.oracle
SCRIPT = Path(__file__).parent / "run_reference.py"
PACKED_HERE = {"W4AFP8"}
"""Presets that are stored in another format on purpose: engines load them only packed."""
NEED_DATA = {"NVFP4"}
"""Presets that the reference calibrates; the weights of this one are those of NVFP4A16."""
FROM_BF16 = ["NVFP4A16", "MXFP4A16", "MXFP8A16"]


def reference(python: Path, source: Path, schemes: Iterable[str], folder: Path) -> None:
    pairs = [word for scheme in schemes for word in (scheme, str(folder / scheme))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([python, SCRIPT, source, *pairs], check=True, capture_output=True, env=environment)


def ours(source: Path, scheme: str, folder: Path) -> dict[str, Tensor]:
    locations = Locations(source=str(source), destination=str(folder / scheme))
    run(locations, uniform(scheme, ["lm_head", "re:.*embed_tokens"]), RunOptions(device="cpu", workers=1))
    return checkpoints.read(folder / scheme)


def quantized(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale")}
    return checkpoints.as_bytes({name: t for name, t in tensors.items() if name.rpartition(".")[0] in modules})


def zeros_and_outliers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    down[3] = 0
    down[:, 128:256] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = 3.0
    return tensors


def test_a_float32_checkpoint_has_the_same_bytes_in_every_preset(tmp_path: Path, reference_python: Path) -> None:
    tensors = zeros_and_outliers(checkpoints.llama(dtype=torch.float32))
    source = checkpoints.write(tmp_path / "src", checkpoints.deal(tensors, 1))
    schemes = sorted(set(PRESETS) - PACKED_HERE - NEED_DATA)
    reference(reference_python, source, schemes, tmp_path / "theirs")
    for scheme in schemes:
        theirs = quantized(checkpoints.read(tmp_path / "theirs" / scheme))
        assert theirs, scheme
        assert quantized(ours(source, scheme, tmp_path / "ours")) == theirs, scheme


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_for_the_reference_gives_our_bytes(tmp_path: Path, reference_python: Path, dtype: torch.dtype) -> None:
    tensors = zeros_and_outliers(checkpoints.llama(dtype=dtype))
    source = checkpoints.write(tmp_path / "src", checkpoints.deal(tensors, 3))
    upcast = checkpoints.write(tmp_path / "up", checkpoints.deal({k: v.float() for k, v in tensors.items()}, 1))
    schemes = FROM_BF16 if dtype == torch.bfloat16 else sorted(set(PRESETS) - PACKED_HERE - NEED_DATA)
    reference(reference_python, upcast, schemes, tmp_path / "theirs")
    for scheme in schemes:
        theirs = quantized(checkpoints.read(tmp_path / "theirs" / scheme))
        assert quantized(ours(source, scheme, tmp_path / "ours")) == theirs, scheme
