"""What tests plan from: headers without files, and Hypothesis strategies for checkpoints, splits and recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from shardmill.core.dtypes import size_in_bytes
from shardmill.core.header import ShardHeader, TensorSpec
from shardmill.core.index import CheckpointIndex
from shardmill.core.plan import Checkpoint, SourceShard

Table = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> dtype and shape."""


def shard_of(name: str, tensors: Table) -> SourceShard:
    """A shard that exists as a header only."""
    specs: list[TensorSpec] = []
    begin = 0
    for tensor, (dtype, shape) in tensors.items():
        size = size_in_bytes(dtype, shape)
        assert size is not None
        specs.append(TensorSpec(tensor, dtype, shape, begin, begin + size))
        begin += size
    return SourceShard(name, 8 + begin, ShardHeader(tuple(specs), (), 8))


def checkpoint_of(shards: Sequence[Table], config: Mapping[str, Any] | None = None, **more: Any) -> Checkpoint:
    """A checkpoint that exists as headers, index and config only."""
    named = [shard_of(f"model-{n:05d}.safetensors", tensors) for n, tensors in enumerate(shards, 1)]
    weight_map = {spec.name: shard.name for shard in named for spec in shard.header.tensors}
    index = CheckpointIndex(weight_map) if len(named) > 1 else None
    text = json.dumps({"model_type": "llama"} if config is None else config)
    return Checkpoint(shards=tuple(named), index=index, config_text=text, **more)


def llama_table(layers: int = 2, hidden: int = 256, width: int = 512, dtype: str = "BF16") -> dict[str, Any]:
    """Names and shapes of a small Llama."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": (dtype, (64, hidden))}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for leaf, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            table[f"{prefix}.self_attn.{leaf}_proj.weight"] = (dtype, (rows, hidden))
        for leaf in ("gate", "up"):
            table[f"{prefix}.mlp.{leaf}_proj.weight"] = (dtype, (width, hidden))
        table[f"{prefix}.mlp.down_proj.weight"] = (dtype, (hidden, width))
        table[f"{prefix}.input_layernorm.weight"] = (dtype, (hidden,))
    table["model.norm.weight"] = (dtype, (hidden,))
    table["lm_head.weight"] = (dtype, (64, hidden))
    return table


def split_table(table: Table, cuts: Sequence[int]) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """Distribute a table over `max(cuts) + 1` shards; entry i of `cuts` is the shard of tensor i."""
    shards: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for (name, entry), cut in zip(table.items(), cuts, strict=True):
        shards.setdefault(cut, {})[name] = entry
    return [shards[cut] for cut in sorted(shards)]


@st.composite
def splits(draw: st.DrawFn, table: Table, most: int = 5) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """Any distribution of a table's tensors over up to `most` shards, in any order."""
    names = draw(st.permutations(list(table)))
    cuts = draw(st.lists(st.integers(0, most - 1), min_size=len(names), max_size=len(names)))
    return split_table({name: table[name] for name in names}, cuts)
