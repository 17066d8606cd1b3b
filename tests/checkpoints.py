"""Small checkpoints on disk, written by the safetensors library, and reading results back with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def gaussian(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 0.02) -> Tensor:
    """Reproducible Gaussian values."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def llama(
    layers: int = 2, hidden: int = 128, width: int = 256, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Weights of a small Llama with tied head."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{leaf}_proj.weight": (hidden, hidden) for leaf in "qo"}
        shapes |= {f"{prefix}.self_attn.{leaf}_proj.weight": (hidden // 2, hidden) for leaf in "kv"}
        shapes |= {f"{prefix}.mlp.{leaf}_proj.weight": (width, hidden) for leaf in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, width)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    return {name: gaussian(seed, *shape, dtype=dtype) for seed, (name, shape) in enumerate(shapes.items())}


def write(root: Path, parts: Sequence[Mapping[str, Tensor]], config: Mapping[str, Any] = LLAMA, **files: str) -> Path:
    """Write a checkpoint with one shard per part; `files` are further files by name."""
    root.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        save_file({k: v.contiguous() for k, v in part.items()}, root / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if len(parts) > 1:
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (root / name).write_text(text)
    return root


def deal(tensors: Mapping[str, Tensor], shards: int) -> list[dict[str, Tensor]]:
    """Cut a checkpoint into runs of about equal count, in order."""
    names = list(tensors)
    size = -(-len(names) // shards)
    return [{name: tensors[name] for name in names[n : n + size]} for n in range(0, len(names), size)]


def read(root: Path) -> dict[str, Tensor]:
    """Every tensor of every shard of a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  no iterator there
    return found


def names(path: Path) -> set[str]:
    """Names of the tensors of one shard."""
    with safe_open(path, "pt") as shard:
        return set(shard.keys())


def as_bytes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensors as values that compare bit by bit."""
    return {
        name: (
            str(tensor.dtype),
            tuple(tensor.shape),
            tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def poison(path: Path) -> bytes:
    """Make the first value of the first projection of a bf16 shard NaN; returns what was there."""
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    header: dict[str, Any] = json.loads(whole[8:data])
    begin = data + next(entry["data_offsets"][0] for name, entry in header.items() if name.endswith("_proj.weight"))
    path.write_bytes(whole[:begin] + b"\xff\x7f" + whole[begin + 2 :])
    return whole
