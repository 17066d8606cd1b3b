"""Read a finished checkpoint back: for someone who has nothing but the result.

Names and shapes are checked in `core.written`, values in `kernels.compare`; here files are opened and read. Memory is a
small multiple of a row block, whatever the size of the checkpoint. Nothing is changed. `stages.compare` is the other
half, for who has the source too.
"""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final

from shardmill.core.assemble import CONFIG_NAME, MANIFEST_NAME, result_digest
from shardmill.core.digest import Digest
from shardmill.core.experts import read_sizes
from shardmill.core.foreign import PICKLE, WEIGHTS
from shardmill.core.fused import TABLE
from shardmill.core.input_scale import PARAM as INPUT_SCALE
from shardmill.core.manifest import Manifest
from shardmill.core.plan import SPLIT
from shardmill.core.serving import check_serving, read_setting
from shardmill.core.written import (
    Located,
    check_dense,
    check_global_scales,
    check_index,
    check_manifest,
    check_modules,
    check_readers,
    served_by_result,
)
from shardmill.errors import CheckpointInvalid, Problem, show
from shardmill.stages.compare import Comparison, verify_against
from shardmill.stages.result import Readers, Result, VerifyWatch, read_result, stored_shapes
from shardmill.storage.hashing import hash_file
from shardmill.storage.source import SourceFolder

__all__ = ["Comparison", "VerifyWatch", "serving_warnings", "verify", "verify_against"]

_HASHERS: Final = 4
_GLOBAL_SCALES: Final = ("weight_global_scale", INPUT_SCALE)
_SCALES: Final = ("weight_scale", *_GLOBAL_SCALES)


def verify(destination: str, watch: VerifyWatch | None = None) -> list[Problem]:
    """Check a finished checkpoint by what lies there alone; return every problem, sorted.

    A checkpoint of another tool has no manifest: what needs one is left out, and `watch.on_note` is told so.

    Raises:
        CheckpointInvalid: there is no such folder.
        SourceChanged: a file changed meanwhile.
    """
    told = watch or VerifyWatch()
    result = read_result(destination)
    problems = [*result.checkpoint.problems, *result.config.problems, *result.manifest_problems]
    problems += _check_unnamed(result, told)
    problems += check_index(result.checkpoint.index, result.checkpoint.shards)
    problems += check_dense(result.config, result.tensors, result.modules, is_strict=result.is_ours)
    problems += _check_library(result, told)
    problems += _check_readers(result, told)
    with ExitStack() as stack:
        problems += _check_values(result, Readers(result.folder, stack))
    if result.manifest is not None:
        is_complete = not result.checkpoint.problems
        problems += check_manifest(result.manifest, result.checkpoint.shards, is_complete=is_complete)
        problems += _check_bytes(result.manifest, result, told)
    elif not result.is_ours:
        told.on_note(f"there is no {MANIFEST_NAME}: sizes, digests and decisions have nothing to be compared with")
    return sorted(set(problems))


def _check_unnamed(result: Result, watch: VerifyWatch) -> list[Problem]:
    """Weight files that a loader may take although the index does not name them; other strangers are told of."""
    left_out = dict(result.checkpoint.left_out)
    ours = {name for name, _ in result.manifest.files} if result.manifest is not None else set()
    empty = {shard.name for shard in result.manifest.shards if shard.is_empty} if result.manifest is not None else set()
    weights = [n for n, reason in left_out.items() if reason in (WEIGHTS, PICKLE) and n not in ours | empty]
    if result.manifest is not None:
        known = {MANIFEST_NAME, *ours, *weights, *empty}
        others = sorted({*left_out, *result.checkpoint.files} - known)
        if others := [name for name in others if not name.startswith(".")]:
            watch.on_note(f"{len(others)} files that the manifest does not name, the first is {show(others[0])}")
    return [
        Problem(file=name, kind="file-unlisted", message="a weight file that the index does not name")
        for name in weights
    ]


def _check_library(result: Result, watch: VerifyWatch) -> list[Problem]:
    """compressed-tensors reads the config back as it stands; other tools may have used another release of it."""
    from shardmill.kernels.ct_adapter import check_config  # takes seconds to import

    section = result.checkpoint.config.get("quantization_config")
    differences = check_config(section) if isinstance(section, dict) else []  # `parse_written_config` tells the latter
    if result.is_ours:
        return [
            Problem(file=CONFIG_NAME, kind="config-not-read", message=f"quantization_config: {difference}")
            for difference in differences
        ]
    for difference in differences:
        watch.on_note(f"compressed-tensors reads the config differently: {difference}")
    return []


def _check_readers(result: Result, watch: VerifyWatch) -> list[Problem]:
    """All readers agree on what is quantized how; what is found of other tools' results is told and no problem."""
    section = result.checkpoint.config.get("quantization_config")
    if result.config.problems or not isinstance(section, dict):
        return []
    recipe = result.manifest.recipe if result.manifest else None
    found = check_readers(
        section,
        result.config,
        result.modules,
        result.tensors,
        recipe.fused_table if recipe else TABLE,
        runs_merged=not (recipe and recipe.partial_fused),
    )
    if result.is_ours:
        return found
    for problem in found:
        watch.on_note(str(problem))
    return []


def serving_warnings(destination: str, tp: int = 1) -> list[Problem]:
    """What may keep an engine from loading a finished checkpoint; nothing of it is wrong.

    Raises:
        CheckpointInvalid: there is no such folder.
    """
    result = read_result(destination)
    if result.checkpoint.problems or result.config.problems:
        return []
    with ExitStack() as stack:
        stored = stored_shapes(result, Readers(result.folder, stack))
    recipe = result.manifest.recipe if result.manifest else None
    config = result.checkpoint.config
    told = result.manifest.shards if result.manifest else ()
    splits = any(tensor.action == SPLIT for shard in told for tensor in shard.tensors)
    setting = read_setting(config, tp, read_sizes(config).model_types, split_experts=splits)
    served = served_by_result(result.config, result.modules, result.tensors, stored)
    return check_serving(served, setting, recipe.fused_table if recipe else TABLE)


def _check_values(result: Result, readers: Readers) -> list[Problem]:
    """What takes a look at small tensors: shapes, scales, and global scales of fused sets."""
    problems: list[Problem] = []
    if not result.config.problems:
        problems += check_modules(result.config, result.modules, stored_shapes(result, readers))
    damaged = {problem.tensor for problem in problems}
    global_scales: dict[str, dict[str, float]] = {param: {} for param in _GLOBAL_SCALES}
    for module, params in result.modules.items():
        if module not in damaged:
            for param in _SCALES:
                problems += _check_scale(params[param], readers) if param in params else []
        for param in _GLOBAL_SCALES:
            scale = params.get(param)
            if scale is not None and scale.spec.dtype == "F32" and scale.spec.nbytes == 4:
                global_scales[param][module] = struct.unpack("<f", readers.whole(scale))[0]
    table = result.manifest.recipe.fused_table if result.manifest else TABLE
    for param, values in global_scales.items():
        problems += check_global_scales(result.modules, values, table, param)
    return problems


def _check_scale(located: Located, readers: Readers) -> list[Problem]:
    from shardmill.kernels.compare import scale_defect  # torch takes seconds to import

    for block in readers.blocks(located):
        if defect := scale_defect(block, located.spec.dtype):
            return [Problem(file=located.shard, tensor=located.spec.name, kind="scale-unsound", message=defect)]
    return []


def _check_bytes(manifest: Manifest, result: Result, watch: VerifyWatch) -> list[Problem]:
    """Sizes and digests of shards and other files, and of the result as a whole."""
    expected = {shard.name: shard.digest for shard in manifest.shards} | dict(manifest.files)
    sizes = {shard.name: shard.size for shard in manifest.shards}
    watch.on_total(sum(sizes.values()))

    def check(name: str) -> list[Problem]:
        found = _check_file(result.folder, name, sizes.get(name), expected[name])
        watch.on_bytes(sizes.get(name, 0))
        return found

    with ThreadPoolExecutor(_HASHERS) as pool:
        problems = [problem for found in pool.map(check, expected) for problem in found]
    return problems + _check_whole(manifest, result)


def _check_file(folder: SourceFolder, name: str, size: int | None, digest: Digest) -> list[Problem]:
    try:
        folder.check(name)
    except CheckpointInvalid as error:
        return list(error.problems)
    if digest.algorithm != "blake3":
        message = f"expected a blake3 digest in {MANIFEST_NAME}, found {show(digest.algorithm)}"
        return [Problem(file=name, kind="manifest-invalid", message=message)]
    found, _ = hash_file(folder.folder, name)
    if size is not None and found.size != size:
        message = f"expected {size} bytes, found {found.size}"
        return [Problem(file=name, kind="size-differs", message=message, way_out="fetch the file again")]
    if found.whole != digest:
        message = f"expected blake3 {digest.value[:16]}…, found {found.whole.value[:16]}…"
        return [Problem(file=name, kind="digest-differs", message=message, way_out="fetch the file again")]
    return []


def _check_whole(manifest: Manifest, result: Result) -> list[Problem]:
    """config.json is the one that was published with this manifest."""
    config = result.checkpoint.config
    if not config:
        return []  # told by `read_checkpoint`
    keys = {shard.name: shard.key for shard in manifest.shards}
    files = {name: str(digest) for name, digest in manifest.files}
    if result_digest(keys, files, config) == manifest.plan:
        return []
    message = f"expected the one that was published with this {MANIFEST_NAME}, found another"
    return [Problem(file=CONFIG_NAME, kind="config-changed", message=message, way_out="fetch both files again")]
