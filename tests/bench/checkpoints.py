"""Synthetic checkpoints of the shapes that are measured: written once, kept in a folder, found again by their digest.

Values are normal with a standard deviation of about 0.02. They are drawn once, rounded to bf16 at a few scales, and
used again from another place for every tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

Table = Mapping[str, tuple[int, ...]]
"""Shapes of a shard's tensors by name, in the order of the file."""

INDEX_NAME: Final = "model.safetensors.index.json"
STD: Final = 0.02
_SEED: Final = 20_250_101
_SCALES: Final = (1.0, 1.19, 0.84, 1.41)
_POOL: Final = 16_777_213
"""Values drawn; prime, so that no two rows of a weight are the same."""
_STRIDE: Final = 7_368_787
"""How far from each other in the pool two tensors begin."""
_WIDTHS: Final = {"BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A checkpoint to be written."""

    name: str
    shards: Sequence[Table]
    config: Mapping[str, Any]
    dtype: str = "BF16"
    has_data: bool = True
    """Without it, shards are headers in front of sparse files."""

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_WIDTHS[self.dtype] * math.prod(shape) for table in self.shards for shape in table.values())

    @property
    def tensors(self) -> int:
        """How many tensors there are."""
        return sum(map(len, self.shards))

    def as_float32(self) -> Spec:
        """The same shapes in another dtype."""
        return replace(self, dtype="F32")


# ---- shapes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Dimensions of the models that are measured."""

    hidden: int
    kv: int
    """Rows of k and v."""
    width: int
    """Rows of gate and up."""
    vocabulary: int
    layers_per_shard: int
    moe_hidden: int
    moe_width: int
    experts: int
    large_layers: int
    """Layers of the single large shard."""
    large_rows: int
    large_cols: int
    many: int
    """Shards of the checkpoint of tiny shards."""
    flow: int
    """Shards that the flow and the loop are compared on."""
    planned: tuple[int, ...]
    """Shards of a thousand tensors, for the planner."""


FULL: Final = Size(
    hidden=4096,
    kv=1024,
    width=14336,
    vocabulary=8192,
    layers_per_shard=2,
    moe_hidden=2048,
    moe_width=768,
    experts=128,
    large_layers=12,
    large_rows=91_520,
    large_cols=16_384,
    many=1000,
    flow=500,
    planned=(125, 250, 500, 1000),
)
TOY: Final = Size(
    hidden=256,
    kv=128,
    width=512,
    vocabulary=128,
    layers_per_shard=1,
    moe_hidden=256,
    moe_width=128,
    experts=4,
    large_layers=3,
    large_rows=1024,
    large_cols=1024,
    many=5,
    flow=3,
    planned=(1, 2),
)


def llama(size: Size, shards: int = 4) -> Spec:
    """Dense layers, as many in each shard; embedding and head in the first and last shard."""
    tables: list[dict[str, tuple[int, ...]]] = [
        {
            name: shape
            for layer in range(first, first + size.layers_per_shard)
            for name, shape in _dense_layer(size, layer).items()
        }
        for first in range(0, shards * size.layers_per_shard, size.layers_per_shard)
    ]
    tables[0] = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)} | tables[0]
    tables[-1] |= {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocabulary, size.hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.width,
        "num_attention_heads": size.hidden // 128,
        "num_key_value_heads": size.kv // 128,
        "num_hidden_layers": shards * size.layers_per_shard,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Spec(name="llama", shards=tables, config=config)


def _dense_layer(size: Size, layer: int) -> dict[str, tuple[int, ...]]:
    prefix, hidden = f"model.layers.{layer}", size.hidden
    return {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.mlp.down_proj.weight": (hidden, size.width),
        f"{prefix}.mlp.gate_proj.weight": (size.width, hidden),
        f"{prefix}.mlp.up_proj.weight": (size.width, hidden),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.k_proj.weight": (size.kv, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
        f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
        f"{prefix}.self_attn.v_proj.weight": (size.kv, hidden),
    }


def experts(size: Size) -> Spec:
    """One layer of a mixture of experts in two shards, one weight per expert and projection."""
    prefix, hidden, width = "model.layers.0", size.moe_hidden, size.moe_width
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, hidden)}
    table |= {f"{prefix}.self_attn.q_proj.weight": (2 * hidden, hidden)}
    table |= {f"{prefix}.self_attn.{leaf}_proj.weight": (hidden // 2, hidden) for leaf in "kv"}
    table |= {f"{prefix}.self_attn.o_proj.weight": (hidden, 2 * hidden), f"{prefix}.input_layernorm.weight": (hidden,)}
    table |= {f"{prefix}.self_attn.{leaf}_norm.weight": (128,) for leaf in "qk"}
    table |= {
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.mlp.gate.weight": (size.experts, hidden),
    }
    halves = [
        {
            f"{prefix}.mlp.experts.{expert}.{leaf}_proj.weight": shape
            for expert in numbers
            for leaf, shape in shapes.items()
        }
        for numbers in (range(size.experts // 2), range(size.experts // 2, size.experts))
    ]
    last = {"model.norm.weight": (hidden,), "lm_head.weight": (size.vocabulary, hidden)}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "num_experts": size.experts,
        "num_hidden_layers": 1,
        "torch_dtype": "bfloat16",
    }
    return Spec(name="experts", shards=(table | halves[0], halves[1] | last), config=config)


def one_shard(size: Size, layers: int) -> Spec:
    """Dense layers in a single file."""
    whole = llama(replace(size, layers_per_shard=layers), shards=1)
    return replace(whole, name=f"shard-of-{layers}-layers")


def one_tensor(size: Size) -> Spec:
    """A single weight."""
    table = {"model.layers.0.mlp.up_proj.weight": (size.large_rows, size.large_cols)}
    return Spec(name="one-tensor", shards=(table,), config={"model_type": "llama"})


def tiny_shards(count: int) -> Spec:
    """As many shards of one small weight each."""
    tables = [{f"model.layers.{number}.mlp.down_proj.weight": (256, 512)} for number in range(count)]
    return Spec(name=f"tiny-{count}", shards=tables, config={"model_type": "llama", "num_hidden_layers": count})


def headers(shards: int) -> Spec:
    """Shards of a thousand tensors each, a layer of 330 experts, without the values: planning reads none."""
    tables = [_wide_layer(layer) for layer in range(shards)]
    return Spec(name=f"headers-{shards}", shards=tables, config={"model_type": "qwen3_moe"}, has_data=False)


def _wide_layer(layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}"
    table: dict[str, tuple[int, ...]] = {
        f"{prefix}.mlp.experts.{expert}.{leaf}_proj.weight": (768, 2048)
        for expert in range(330)
        for leaf in ("gate", "up")
    }
    table |= {f"{prefix}.mlp.experts.{expert}.down_proj.weight": (2048, 768) for expert in range(330)}
    table |= {f"{prefix}.self_attn.{leaf}_proj.weight": (2048, 2048) for leaf in "qkvo"}
    table |= {f"{prefix}.mlp.shared_expert.{leaf}_proj.weight": (768, 2048) for leaf in ("gate", "up")}
    table |= {f"{prefix}.mlp.shared_expert.down_proj.weight": (2048, 768), f"{prefix}.mlp.gate.weight": (330, 2048)}
    table |= {f"{prefix}.{norm}_layernorm.weight": (2048,) for norm in ("input", "post_attention")}
    return table


# ---- files ------------------------------------------------------------------------------------------------------


class Noise:
    """Normal values, drawn at first use."""

    @cached_property
    def _pools(self) -> tuple[NDArray[np.float32], ...]:
        values = np.random.default_rng(_SEED).standard_normal(_POOL, dtype=np.float32)
        return tuple(values * np.float32(STD * scale) for scale in _SCALES)

    @cached_property
    def _rounded(self) -> tuple[NDArray[np.uint16], ...]:
        return tuple(_to_bf16(pool) for pool in self._pools)

    def pieces(self, tensor: int, count: int, dtype: str) -> Iterator[memoryview]:
        """The bytes of a tensor's values, which depend on its number in the checkpoint."""
        pools: Sequence[NDArray[Any]] = self._rounded if dtype == "BF16" else self._pools
        pool, begin = pools[tensor % len(pools)], tensor * _STRIDE % _POOL
        while count:
            piece = pool[begin : begin + count]
            yield piece.data.cast("B")
            count -= len(piece)
            begin = 0


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def prepare(spec: Spec, home: Path, noise: Noise) -> Path:
    """The folder of a checkpoint, written if it is not there."""
    described = json.dumps(asdict(spec), sort_keys=True).encode()
    folder = home / f"{spec.name}-{hashlib.sha256(described).hexdigest()[:12]}"
    if not folder.exists():
        partial = home / f"{folder.name}.partial-"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(spec, partial, noise)
        partial.rename(folder)
    return folder


def _write(spec: Spec, folder: Path, noise: Noise) -> None:
    weight_map: dict[str, str] = {}
    for number, table in enumerate(spec.shards, 1):
        single = len(spec.shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(spec.shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            _write_shard(file, table, spec, noise, len(weight_map))
        weight_map |= dict.fromkeys(table, name)
    if len(spec.shards) > 1:
        index = {"metadata": {"total_size": spec.source_bytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(spec.config))


def _write_shard(file: IO[bytes], table: Table, spec: Spec, noise: Noise, first: int) -> None:
    entries, end = {}, 0
    for name, shape in table.items():
        begin, end = end, end + _WIDTHS[spec.dtype] * math.prod(shape)
        entries[name] = {"dtype": spec.dtype, "shape": list(shape), "data_offsets": [begin, end]}
    body = json.dumps(entries).encode()
    body += b" " * (-len(body) % 8)
    file.write(len(body).to_bytes(8, "little") + body)
    if not spec.has_data:
        file.truncate(8 + len(body) + end)
        return
    for number, shape in enumerate(table.values(), first):
        for piece in noise.pieces(number, math.prod(shape), spec.dtype):
            file.write(piece)


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a checkpoint by name."""
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry, _ in _entries(folder)}


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a small checkpoint by name."""
    return {name: (entry["dtype"], tuple(entry["shape"]), data) for name, entry, data in _entries(folder, whole=True)}


def _entries(folder: Path, *, whole: bool = False) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                file.seek(start + begin)
                yield name, entry, file.read(end - begin) if whole else b""
