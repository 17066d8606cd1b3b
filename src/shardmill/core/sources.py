"""Which tensors of a checkpoint are parts of weights that are quantized already.

`core.formats` has the table of formats. What fits no row of it, or several, is a problem, and so is a weight without
its scale or a scale without its weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from shardmill.core.dtypes import COMPUTABLE
from shardmill.core.encoding import (
    CODES,
    E2M1,
    SCALE,
    Decode,
    TensorRef,
)
from shardmill.core.experts import HALVES, Stack
from shardmill.core.foreign import levels
from shardmill.core.formats import CODE_DTYPES, FORMATS, REFUSED, STATIC, Misfit, Params, SourceConfig
from shardmill.core.matching import split_name
from shardmill.core.plan import Checkpoint
from shardmill.core.written import PLAIN_CONFIG, WrittenConfig, parse_written_config
from shardmill.errors import Problem, show

_BLOCKS, _SCALES = "_blocks", "_scales"
"""Endings of an expert stack in MXFP4, as gpt-oss has it."""
_CODE_PARAMS: Final = frozenset(row.codes for row in FORMATS)
_SCALE_PARAMS: Final = frozenset(row.scale for row in FORMATS)
_OWN_PARAMS: Final = frozenset(p for row in FORMATS for p in row.params) - {"weight", "scale", "scales", "g_idx"} | {
    "qweight"
}
"""Params that nothing but a quantized weight has."""
_ORPHANS: Final = _OWN_PARAMS - frozenset(STATIC) - _CODE_PARAMS
"""Of these, those that mean nothing without a weight."""

_REFUSED_PARAMS: Final[Mapping[str, str]] = {
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes",
    "SCB": "bitsandbytes",
    "q_weight": "EXL2",
    "q_scale": "EXL2",
    "q_invperm": "EXL2",
    "trellis": "EXL3",
    "W_q": "HQQ",
    "codebooks": "AQLM",
}
"""Params that give a format away that is not read."""
_CONFIG_KEYS: Final = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class Sources:
    """The quantized weights of a checkpoint."""

    weights: Mapping[str, Decode] = field(default_factory=dict)
    """By name of the tensor that holds the codes."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Name of the tensor with the codes by name of another that belongs to it."""
    problems: tuple[Problem, ...] = ()
    groups: tuple[str, ...] = ()
    """JSON of the groups of the source's own config but for their targets, where it is compressed-tensors."""
    is_claimed: bool = False
    """Whether config.json says that the checkpoint is quantized."""


def source_config(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every description of a quantization in config.json, at whatever level, without repetitions.

    >>> source_config({"text_config": {"quantization_config": {"quant_method": "fp8"}}})
    [{'quant_method': 'fp8'}]
    """
    found: list[Mapping[str, Any]] = []
    for level in levels(config):
        for key in _CONFIG_KEYS:
            section = level.get(key)
            if isinstance(section, Mapping) and section and section not in found:
                found.append(section)
    return found


def recognise(checkpoint: Checkpoint) -> Sources:
    """Find every quantized weight of a checkpoint and the tensors that belong to it.

    Names, dtypes and shapes decide; nothing is read. What cannot be told for certain is a problem.
    """
    config = checkpoint.config
    sections = source_config(config)
    modules, stacks, refused = _collect(checkpoint)
    problems = [*_refusals(sections, refused)]
    if len(sections) > 1:
        message = f"config.json describes its quantization {len(sections)} times, and not alike"
        problems.append(Problem(file="config.json", kind="source-ambiguous", message=message, way_out="correct it"))
    if any(level.get(key) and not isinstance(level[key], Mapping) for level in levels(config) for key in _CONFIG_KEYS):
        message = "expected the description of a quantization as a JSON object, found something else"
        problems.append(Problem(file="config.json", kind="already-quantized", message=message, way_out="correct it"))
    section = sections[0] if sections else {}
    source = SourceConfig(section, _written(section))
    weights: dict[str, Decode] = {}
    parts: dict[str, str] = {}
    for module, params in modules.items():
        problems += _recognise_module(module, params, source, weights, parts)
    for name, params in stacks.items():
        problems += _recognise_stack(name, params, source, weights, parts)
    if modules and source.written is not None:
        problems += source.written.problems
    if weights:
        problems += _lone_codes(modules, weights)
    return Sources(
        weights=weights,
        parts=parts,
        problems=tuple(dict.fromkeys(problems)),
        groups=_group_entries(source),
        is_claimed=any(level.get(key) for level in levels(config) for key in _CONFIG_KEYS),
    )


def _written(section: Mapping[str, Any]) -> WrittenConfig | None:
    """The groups of a compressed-tensors config; older releases leave fields out that follow from others."""
    if not isinstance(section.get("config_groups"), Mapping):
        return None
    groups = {name: _completed(entry) for name, entry in section["config_groups"].items()}
    whole = {"format": section.get("format"), "quant_method": "compressed-tensors", "config_groups": groups}
    if sum(map(_expressions, groups.values())) > _MOST_EXPRESSIONS:
        message = f"more than {_MOST_EXPRESSIONS} expressions in the targets of the source's config_groups"
        problem = Problem(file="config.json", kind="source-ambiguous", message=message, way_out="name modules instead")
        return replace(PLAIN_CONFIG, problems=(problem,))
    return parse_written_config({"quantization_config": whole})


_MOST_EXPRESSIONS: Final = 1000
"""Each is matched with every module, and they come from somebody else."""


def _expressions(entry: Any) -> int:
    targets = entry.get("targets") if isinstance(entry, Mapping) else None
    return sum(str(target).startswith("re:") for target in targets) if isinstance(targets, list) else 0


def _group_entries(source: SourceConfig) -> tuple[str, ...]:
    """What the source says of its groups, without targets, which are patterns of somebody else."""
    entries = source.section.get("config_groups")
    if source.written is None or not isinstance(entries, Mapping):
        return ()
    named = {str(name): entry for name, entry in entries.items()}
    found = []
    for group in source.written.groups:
        fields = {key: _completed(named[group.name]).get(key) for key in _GROUP_FIELDS}
        found.append(json.dumps({**fields, "format": group.format}))
    return tuple(found)


_GROUP_FIELDS: Final = ("weights", "input_activations", "output_activations")


def _completed(entry: Any) -> Any:
    weights = entry.get("weights") if isinstance(entry, Mapping) else None
    if not isinstance(weights, Mapping):
        return entry
    is_fp4 = weights.get("type") == "float" and weights.get("num_bits") == 4
    if is_fp4 and not weights.get("scale_dtype"):
        dtype = "torch.float8_e4m3fn" if weights.get("strategy") == "tensor_group" else "torch.uint8"
        return {**entry, "weights": {**weights, "scale_dtype": dtype}}
    return entry


def _collect(
    checkpoint: Checkpoint,
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, dict[str, TensorRef]], dict[str, tuple[str, str]]]:
    """Params of modules that hold codes or what goes with them; expert stacks likewise; and formats that are not read.

    Returns:
        modules, stacks by name without its ending, and shard and tensor by name of a format that is not read.
    """
    wanted: set[str] = set()
    stacks: dict[str, dict[str, TensorRef]] = {}
    refused: dict[str, tuple[str, str]] = {}
    for shard in checkpoint.shards:
        for spec in shard.header.tensors:
            module, param = split_name(spec.name)
            if param in _OWN_PARAMS or (param == "weight" and spec.dtype in CODE_DTYPES):
                wanted.add(module)
            elif param in _REFUSED_PARAMS:
                refused.setdefault(_REFUSED_PARAMS[param], (shard.name, spec.name))
            elif spec.dtype == "U8" and param.endswith((_BLOCKS, _SCALES)):
                stem, _, ending = spec.name.rpartition("_")
                stacks.setdefault(stem, {})[f"_{ending}"] = TensorRef(shard.name, shard.header.data_start, spec)
    modules: dict[str, dict[str, TensorRef]] = {}
    if not wanted:
        return modules, stacks, refused
    for shard in checkpoint.shards:
        for spec in shard.header.tensors:
            module, param = split_name(spec.name)
            if module in wanted:
                modules.setdefault(module, {})[param] = TensorRef(shard.name, shard.header.data_start, spec)
    return modules, stacks, refused


def _refusals(sections: Iterable[Mapping[str, Any]], params: Mapping[str, tuple[str, str]]) -> Iterator[Problem]:
    way_out = "start from a checkpoint in one of the formats of docs/sources.md, or from the unquantized one"
    named = set()
    for section in sections:
        name = REFUSED.get(str(section.get("quant_method") or "").lower())
        if name is None and (section.get("load_in_4bit") or section.get("load_in_8bit")):
            name = "bitsandbytes"
        if name is not None:
            named.add(name)
            yield Problem(
                file="config.json",
                kind="source-unsupported",
                message=f"the checkpoint is quantized with {name}, which is not read",
                way_out=way_out,
            )
    for name, (shard, tensor) in params.items():
        if name not in named:
            message = f"it seems to be part of a weight quantized with {name}, which is not read"
            yield Problem(file=shard, tensor=tensor, kind="source-unsupported", message=message, way_out=way_out)


def _recognise_module(
    module: str, params: Params, source: SourceConfig, weights: dict[str, Decode], parts: dict[str, str]
) -> Iterator[Problem]:
    fitting = [row for row in FORMATS if row.fits(params)]
    if len(fitting) != 1:
        yield from _misfits(params, [row.name for row in fitting])
        return
    (row,) = fitting
    codes = params[row.codes]
    try:
        decode = row.build_checked(module, params, source)
    except Misfit as error:
        yield _problem(codes, error)
        return
    weights[codes.spec.name] = decode
    parts.update({ref.spec.name: codes.spec.name for param, ref in params.items() if param in row.params - {row.codes}})


def _problem(ref: TensorRef, error: Misfit) -> Problem:
    return Problem(file=ref.shard, tensor=ref.spec.name, kind=error.kind, message=error.message, way_out=error.way_out)


def _misfits(params: Params, fitting: list[str]) -> Iterator[Problem]:
    """What is wrong with tensors that fit no format, or several; FP8 codes alone are looked at later."""
    own = sorted(param for param in params if param in _ORPHANS)
    codes = sorted(p for p in params if p in _CODE_PARAMS and params[p].spec.dtype not in COMPUTABLE)
    if len(fitting) > 1:
        message = f"its tensors fit several formats: {', '.join(fitting)}"
        yield _problem(next(iter(params.values())), Misfit("source-ambiguous", message, "keep the tensors of one"))
    elif own and not any(param in params for param in _CODE_PARAMS):
        message = "a scale or zero point, and no weight that it belongs to"
        yield _problem(params[own[0]], Misfit("weight-missing", message, _AGAIN))
    elif codes and (own or codes != ["weight"]):
        ref = params[codes[0]]
        if not any(param in params for param in _SCALE_PARAMS):
            yield _problem(ref, Misfit("scale-missing", _NO_SCALE, _AGAIN))
            return
        found = ", ".join(f"{show(param)} {params[param].spec.dtype}" for param in own)
        message = f"{ref.spec.dtype} beside {found} is no format that is known"
        yield _problem(ref, Misfit("source-unknown", message, "see docs/sources.md for those that are read"))


_AGAIN: Final = "fetch the checkpoint again"
_NO_SCALE: Final = "codes of a quantized weight, and no scale for them"


def _lone_codes(modules: Mapping[str, Params], weights: Mapping[str, Decode]) -> Iterator[Problem]:
    """FP8 weights without a scale in a checkpoint whose other weights have theirs."""
    for params in modules.values():
        ref = params.get("weight")
        is_lone = ref is not None and ref.spec.dtype == "F8_E4M3" and not any(p in _ORPHANS for p in params)
        if ref is not None and is_lone and ref.spec.name not in weights:
            yield _problem(ref, Misfit("scale-missing", _NO_SCALE, _AGAIN))


def _recognise_stack(
    name: str, params: Params, source: SourceConfig, weights: dict[str, Decode], parts: dict[str, str]
) -> Iterator[Problem]:
    """Experts in MXFP4 as gpt-oss stores them: blocks `[E, N, K/32, 16]`, scales `[E, N, K/32]`."""
    prefix, _, leaf = name.rpartition(".")
    if leaf not in HALVES or prefix.rpartition(".")[2] != "experts":
        return
    blocks, scales = params.get(_BLOCKS), params.get(_SCALES)
    if blocks is None or scales is None:
        ref = blocks or scales
        if ref is not None:
            kind, lacks = ("scale-missing", _SCALES) if blocks is not None else ("weight-missing", _BLOCKS)
            yield _problem(ref, Misfit(kind, f"expected {show(leaf + lacks)} beside it, found none"))
        return
    shape = blocks.spec.shape
    if len(shape) != 4 or shape[3] != 16 or 0 in shape or scales.spec.shape != shape[:3]:
        message = f"expected blocks [E, N, K/32, 16] and scales [E, N, K/32], found {list(shape)} and"
        yield _problem(blocks, Misfit("scale-shape", f"{message} {list(scales.spec.shape)}"))
        return
    if leaf == "gate_up_proj" and shape[1] % 2:
        yield _problem(blocks, Misfit("expert-layout", f"gate and up cannot be told apart in {shape[1]} rows"))
        return
    weights[blocks.spec.name] = Decode(
        format="mxfp4",
        codes=E2M1,
        bits=4,
        rows=shape[0] * shape[1],
        cols=32 * shape[2],
        tile=(1, 32),
        parts=((CODES, blocks), (SCALE, scales)),
        stack=Stack(prefix, leaf, "weight"),
        experts=shape[0],
    )
    parts[scales.spec.name] = blocks.spec.name
    del source
