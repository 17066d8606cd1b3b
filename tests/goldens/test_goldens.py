"""Job keys and output digests of three tiny checkpoints.

They move only together with a stage version: a change of bytes without one would serve old results for new work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from asked import recipe_of
from shardmill.core.digest import STAGE_VERSIONS
from shardmill.core.scheme import PRESETS
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations

GOLDEN = Path(__file__).parent / "bytes.json"


def counted(*shape: int) -> torch.Tensor:
    """Values that no random generator has a part in."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (torch.sin(count * 0.7) * torch.cos(count * 0.013) * 0.05).reshape(shape).to(torch.bfloat16)


def dense() -> list[dict[str, torch.Tensor]]:
    return [{name: counted(*tensor.shape) for name, tensor in checkpoints.llama(layers=1).items()}]


def split() -> list[dict[str, torch.Tensor]]:
    return checkpoints.deal({f"model.layers.0.self_attn.{leaf}_proj.weight": counted(64, 128) for leaf in "qkv"}, 3)


def experts() -> list[dict[str, torch.Tensor]]:
    prefix = "model.layers.0.mlp.experts"
    return [{f"{prefix}.gate_up_proj": counted(2, 256, 128), f"{prefix}.down_proj": counted(2, 128, 128)}]


CHECKPOINTS = {"dense": dense, "split": split, "experts": experts}
CONFIG = checkpoints.LLAMA | {"model_type": "qwen3_moe", "hidden_size": 128, "moe_intermediate_size": 128}


def convert(tmp_path: Path, name: str, scheme: str) -> dict[str, Any]:
    source = checkpoints.write(tmp_path / "src", CHECKPOINTS[name](), CONFIG)
    locations = Locations(source=str(source), destination=str(tmp_path / scheme))
    result = run(locations, recipe_of(scheme), RunOptions(device="cpu", workers=1))
    return {o.shard: [o.receipt.key, str(o.receipt.blob.whole)] for o in result.outcomes}


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_keys_and_bytes_stand_still(tmp_path: Path, name: str, *, update_goldens: bool) -> None:
    found = {scheme: convert(tmp_path, name, scheme) for scheme in sorted(PRESETS)}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if update_goldens:
        golden |= {"versions": dict(STAGE_VERSIONS), name: found}
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    assert golden["versions"] == STAGE_VERSIONS, "the stage version moved: write the goldens anew and tell users"
    assert golden[name] == found, "bytes or keys moved: bump STAGE_VERSIONS, tell users, write the goldens anew"
