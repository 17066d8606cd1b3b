"""The plan as a value: what will be read, computed and written for every shard, and why.

The law: every source tensor is in exactly one output shard, the one of the same name; its decision has a reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from math import prod
from typing import Any, Final, NamedTuple

from shardmill.core.digest import STAGE_VERSIONS, canonical_json, digest_json
from shardmill.core.encoding import Decode, TensorRef
from shardmill.core.experts import HALVES, parse_stack
from shardmill.core.header import ShardHeader, TensorSpec, text_bytes
from shardmill.core.index import CheckpointIndex
from shardmill.core.input_scale import DONOR
from shardmill.core.layout import (
    OutputSpec,
    Pattern,
    ShardLayout,
    Unit,
    pattern_of,
    place,
    quantized_outputs,
    shard_bytes,
)
from shardmill.core.limits import Intake
from shardmill.core.matching import split_name
from shardmill.core.recipe import Recipe, recipe_to_json
from shardmill.core.scheme import Scheme, search_to_json, weight_args_to_json
from shardmill.errors import Problem

COPY: Final = "copy"
QUANTIZE: Final = "quantize"
SPLIT: Final = "split"
"""A fused expert stack becomes one tensor (or one quantized weight) per expert and projection."""
DEQUANTIZE: Final = "dequantize"
"""A weight that is quantized already becomes BF16."""
PART: Final = "part"
"""A tensor that is read with the codes that it belongs to; nothing of its own is written."""
DECODED: Final = "F32"
"""Dtype in which decoded values are quantized, without another rounding."""
PLAIN: Final = "BF16"
"""Dtype to which they are rounded where nothing quantizes them."""


@dataclass(frozen=True, slots=True)
class SourceShard:
    """One shard of the source as its header describes it."""

    name: str
    size: int
    header: ShardHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A source checkpoint without its tensor bytes."""

    shards: tuple[SourceShard, ...]
    index: CheckpointIndex | None
    """None for a single file."""
    config_text: str
    """config.json as it stands there."""
    files: tuple[str, ...] = ()
    """Other files that are copied."""
    left_out: tuple[tuple[str, str], ...] = ()
    """`(file, reason)` of what is not copied."""
    rewritten: tuple[tuple[str, str], ...] = ()
    """`(file, text)` of other files that are written anew, without what refers to code."""
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    intake: Intake = field(default_factory=Intake)

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        parsed = json.loads(self.config_text or "{}")
        return parsed if isinstance(parsed, dict) else {}


class TensorPlan(NamedTuple):
    """The decision for one source tensor."""

    spec: TensorSpec
    action: str
    reason: str
    scheme: int = -1
    """Number of the group whose scheme applies; -1 for none."""
    layout: str | None = None
    """Layout of a fused expert stack that is split."""
    fused: tuple[TensorRef, ...] = ()
    """All members of its fused set, itself included, when they share a global scale."""
    decode: Decode | None = None
    """Where it holds codes: what its values are made of."""


class ShardSizes(NamedTuple):
    """What an output shard holds; `quantized_bytes` counts codes, scales and all else that replaces a weight."""

    output_bytes: int
    """With its header."""
    quantized_weights: int
    quantized_bytes: int
    copied_weights: int
    copied_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """Everything one worker needs to know to write one output shard."""

    number: int
    name: str
    """Of the source shard and of the output shard."""
    size: int
    """Of the source shard in bytes."""
    data_start: int
    tensors: tuple[TensorPlan, ...]
    schemes: tuple[Scheme, ...] = field(repr=False)
    """Of the recipe's groups, in order."""
    input_scales: tuple[tuple[str, float], ...] = field(default=(), repr=False)
    """Global scale of activations by module, sorted, where a donor tells it."""
    _keys: dict[tuple[str, ...], str] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Job keys by the digests they were asked for with: a run asks several times."""

    def units(self) -> Iterator[Unit]:
        """Derive the output weights in source order."""
        for tensor in self.tensors:
            yield from units_of(tensor, self.schemes)

    def units_of(self, tensor: TensorPlan) -> Iterator[Unit]:
        """Derive the output weights of one of its tensors."""
        return units_of(tensor, self.schemes)

    def input_scale_finder(self) -> Callable[[Unit], float]:
        """What tells the global scale of the activations of an output weight."""
        known = dict(self.input_scales)

        def find(unit: Unit) -> float:
            policy = unit.scheme.input_scale if unit.scheme else None
            constant = policy.constant if policy else None
            return known[unit.module] if constant is None else constant

        return find

    def layout(self) -> ShardLayout:
        """Derive the exact bytes of the output shard, data excepted."""
        return place(tuple(self.units()))

    def sizes(self) -> ShardSizes:
        """Add up what the output shard will hold, as its layout has it, from one weight of each kind.

        Takes a shard without problems: a tensor that cannot be treated as decided has no output.
        """
        kinds: dict[tuple[Any, ...], _Alike] = {}
        single: list[_Alike] = []
        patterns: list[Pattern] = []
        for tensor in self.tensors:
            (name, dtype, shape, _, _), action, _, scheme, _, _, decode = tensor
            if action == PART:
                continue
            if action == SPLIT or name == _BARE_WEIGHT:
                alike = [_Alike(unit, [], pattern_of(unit.outputs)) for unit in self.units_of(tensor)]
                single += alike
                patterns += [entry.pattern for entry in alike]
                continue
            kind = (scheme, dtype, shape, decode.kind if decode else None)
            found = kinds.get(kind)
            if found is None:
                unit = next(self.units_of(tensor))
                found = kinds[kind] = _Alike(unit, [], pattern_of(unit.outputs))
            found.names.append(name)
            patterns.append(found.pattern)
        return _add_up([*kinds.values(), *single], patterns)

    @property
    def sources(self) -> tuple[str, ...]:
        """Shards that are read: its own, then those of fused partners and of what codes go with."""
        return tuple(dict.fromkeys((self.name, *(ref.shard for ref in self.refs()))))

    def refs(self) -> Iterator[TensorRef]:
        """Every tensor that is read beside its own: fused partners, and scales and the like wherever they lie."""
        for tensor in self.tensors:
            for ref in tensor.fused:
                yield from [part for _, part in ref.decode.parts] if ref.decode else [ref]
            if tensor.decode is not None:
                yield from [part for _, part in tensor.decode.parts]

    @property
    def quantized_tensors(self) -> int:
        """Source tensors that are not merely copied."""
        return sum(tensor.action != COPY for tensor in self.tensors)

    def job(self) -> dict[str, Any]:
        """Describe the work without paths, names of shards or patterns: equal jobs give equal bytes."""
        schemes = self._schemes_json()
        return self._job([_describe(tensor, schemes) for tensor in self.tensors])

    def shape(self) -> str:
        """Name the work without its sources: only jobs of one shape can have one key."""
        return self._digest(())

    def outline(self) -> str:
        """Name what was decided about a known source: as telling as `shape` then, and far cheaper."""
        decisions = [
            (tensor.spec.name, tensor.action, tensor.scheme, tensor.layout, *_decoded(tensor))
            for tensor in self.tensors
        ]
        sets = [[ref.spec.name for ref in fused] for fused in dict.fromkeys(tensor.fused for tensor in self.tensors)]
        told = [STAGE_VERSIONS["quantize"], self._schemes_json(), decisions, sets]
        return digest_json([*told, self.input_scales] if self.input_scales else told)

    def job_key(self, digests: Mapping[str, str]) -> str:
        """Name the work by content: SHA-256 over the job and the digests of the shards it reads.

        Args:
            digests: `algorithm:value` by shard name, for every name in `sources`.
        """
        return self._digest(tuple([digests[name] for name in self.sources]))

    def _digest(self, sources: tuple[str, ...]) -> str:
        """SHA-256 of the canonical JSON of the job, with the digests of its sources if any."""
        if sources not in self._keys:
            frame = canonical_json(self._job(None) | ({"sources": sources} if sources else {}))
            job = frame.replace(b'"tensors":null', f'"tensors":[{self._tensors_text()}]'.encode(), 1)
            self._keys[sources] = hashlib.sha256(job).hexdigest()
        return self._keys[sources]

    def _job(self, tensors: list[Any] | None) -> dict[str, Any]:
        return {
            "stage": "quantize",
            "version": STAGE_VERSIONS["quantize"],
            "tensors": tensors,
            "header": self._header_digest(),
            **({"input_scales": self.input_scales} if self.input_scales else {}),
        }

    def _header_digest(self) -> str:
        if _HEADER not in self._keys:
            self._keys[_HEADER] = hashlib.sha256(self.layout().header()).hexdigest()
        return self._keys[_HEADER]

    def _tensors_text(self) -> str:
        """Canonical JSON of the tensors of the job, put together from what tensors of one kind have in common."""
        schemes = self._schemes_json()
        kinds: dict[tuple[Any, ...], str] = {}
        partners: dict[tuple[TensorRef, ...], str] = {(): "[]"}
        found: list[str] = []
        for tensor in self.tensors:
            spec, fused = tensor.spec, tensor.fused
            if tensor.decode is not None or any(ref.decode for ref in fused):
                found.append(canonical_json(_describe(tensor, schemes)).decode())
                continue
            kind = (spec.dtype, spec.shape, tensor.action, tensor.scheme, tensor.layout)
            if kind not in kinds:
                kinds[kind] = canonical_json(_describe(tensor, schemes)[1:-1])[1:-1].decode()
            if fused not in partners:
                partners[fused] = (
                    f"[{','.join([_ref_text(ref.spec.name, ref.spec.dtype, ref.spec.shape) for ref in fused])}]"
                )
            found.append(f"[{encode_basestring_ascii(spec.name)},{kinds[kind]},{partners[fused]}]")
        return ",".join(found)

    def _schemes_json(self) -> list[dict[str, Any]]:
        return [
            weight_args_to_json(scheme.weights)
            | {"format": scheme.format}
            | (search_to_json(scheme) | {"search_version": STAGE_VERSIONS["search"]} if scheme.search else {})
            | ({"input_scale": scheme.input_scale.to_key()} if scheme.input_scale else {})
            for scheme in self.schemes
        ]


_HEADER: Final = ("header of the output",)
"""Where the digest of that header is kept among the job keys, which have digests of sources there."""
_BARE_WEIGHT: Final = ".weight"
"""The one weight whose outputs do not begin as it does: a module without a name writes none of the dot."""


class _Alike(NamedTuple):
    """One weight, and the names of all source tensors of its kind; none where it stands for itself alone."""

    unit: Unit
    names: list[str]
    pattern: Pattern

    @property
    def names_bytes(self) -> int:
        """What the names of the outputs take in a header."""
        outputs = self.unit.outputs
        if not self.names:
            return text_bytes(spec.name for spec in outputs)
        own = len(self.unit.tensor.name)
        return len(outputs) * text_bytes(self.names) + len(self.names) * sum(len(spec.name) - own for spec in outputs)


def _add_up(rows: Sequence[_Alike], patterns: Sequence[Pattern]) -> ShardSizes:
    elements, sizes = {True: 0, False: 0}, {True: 0, False: 0}
    for unit, names, pattern in rows:
        is_copy, times = unit.scheme is None, len(names) or 1
        elements[is_copy] += times * (prod(unit.outputs[0].shape) if is_copy else unit.rows * unit.cols)
        sizes[is_copy] += times * sum(pattern.sizes)
    return ShardSizes(
        output_bytes=shard_bytes(patterns, sum(row.names_bytes for row in rows)),
        quantized_weights=elements[False],
        quantized_bytes=sizes[False],
        copied_weights=elements[True],
        copied_bytes=sizes[True],
    )


def _describe(tensor: TensorPlan, schemes: Sequence[dict[str, Any]]) -> list[Any]:
    spec = tensor.spec
    scheme = schemes[tensor.scheme] if tensor.scheme >= 0 else None
    fused = _describe_fused(tensor.fused)
    return [spec.name, spec.dtype, list(spec.shape), tensor.action, scheme, tensor.layout, fused, *_decoded(tensor)]


def _decoded(tensor: TensorPlan) -> list[Any]:
    """What its values are made of, and how; nothing for a tensor that holds values."""
    if tensor.decode is None and not any(ref.decode for ref in tensor.fused):
        return []
    partners = [ref.decode.describe() if ref.decode else None for ref in tensor.fused]
    return [tensor.decode.describe() if tensor.decode else None, partners]


def _ref_text(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    return f'[{encode_basestring_ascii(name)},"{dtype}",{_shape_text(shape)}]'


@lru_cache(maxsize=4096)
def _shape_text(shape: tuple[int, ...]) -> str:
    return canonical_json(shape).decode()


def _describe_fused(fused: Sequence[TensorRef]) -> list[Any]:
    return [[ref.spec.name, ref.spec.dtype, list(ref.spec.shape)] for ref in fused]


class KeptGroup(NamedTuple):
    """Weights that are quantized already and stay so."""

    entry: str
    """JSON of the group but for its targets."""
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole conversion as a value: names and numbers, no handles, no tensors."""

    recipe: Recipe
    shards: tuple[ShardPlan, ...]
    index_name: str | None
    """Of the output, as the source's; None where it has no index."""
    config_text: str
    model_types: tuple[str, ...]
    files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    ignore: tuple[str, ...]
    """Module names for the written config: every linear layer that stays dense."""
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    rewritten: tuple[tuple[str, str], ...] = ()
    """`(file, text)` of other files that are written anew."""
    allow_code: bool = False
    """Whether what refers to code is kept in config.json."""
    kept: tuple[KeptGroup, ...] = ()
    """Groups of the written config for weights that stay as quantized as they were."""
    source_state: str = ""
    """Names the state of the source's listing when the plan was made; empty where a later write could go unnoticed."""

    @property
    def source_bytes(self) -> int:
        """Size of all source shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def made_of(self) -> str:
        """What the result is made of, see `made_of`."""
        return made_of(self.source_state, self.recipe, allow_code=self.allow_code)


def made_of(source_state: str, recipe: Recipe, *, allow_code: bool = False) -> str:
    """Name what a result is made of, without reading anything: the state of a listing and a recipe.

    Unlike a plan it says nothing of content, and nothing of the release that computes; empty where the state is, and
    where a file of importance or a donor of scales is to be read first.
    """
    schemes = [group.scheme for group in recipe.groups]
    if any(s.search is not None and s.search.importance_file and not s.search.importance for s in schemes):
        return ""
    if any(s.input_scale is not None and s.input_scale.kind == DONOR and not s.input_scale.digest for s in schemes):
        return ""
    request = [recipe_to_json(recipe), *(["code"] if allow_code else [])]
    return digest_json([source_state, *request]) if source_state else ""


def units_of(tensor: TensorPlan, schemes: Sequence[Scheme]) -> Iterator[Unit]:
    """Derive the output weights of one source tensor; one for most, two per expert for a gate and up stack."""
    spec = tensor.spec
    scheme = schemes[tensor.scheme] if tensor.scheme >= 0 else None
    module, _ = split_name(spec.name)
    if tensor.action == PART:
        return
    if tensor.decode is not None:
        yield from _decoded_units(tensor, tensor.decode, scheme)
    elif tensor.action == COPY:
        copied = (OutputSpec(spec.name, spec.dtype, spec.shape),)
        yield Unit(tensor=spec, module=module, rows=1, cols=1, outputs=copied, begin=spec.begin, slab=(1, 1))
    elif tensor.action == QUANTIZE and scheme is not None:
        rows, cols = spec.shape
        outputs = quantized_outputs(module, scheme, rows, cols, spec.dtype)
        yield Unit(
            tensor=spec,
            module=module,
            rows=rows,
            cols=cols,
            outputs=outputs,
            scheme=scheme,
            begin=spec.begin,
            slab=(rows, cols),
        )
    else:
        yield from _expert_units(tensor, scheme)


def _expert_units(tensor: TensorPlan, scheme: Scheme | None) -> Iterator[Unit]:
    spec = tensor.spec
    stack = parse_stack(spec.name, spec.shape)
    if stack is None or tensor.layout is None:
        raise AssertionError(f"no expert stack to split: {tensor!r}")
    slab = (spec.shape[1], spec.shape[2] if len(spec.shape) == 3 else 1)
    transposed = tensor.layout != "rows" and stack.param == "weight"
    out, cols = slab[::-1] if transposed else slab
    halves = HALVES[stack.leaf]
    rows = out // len(halves)
    step = len(halves) if tensor.layout == "interleaved" else 1
    slab_bytes = spec.nbytes // spec.shape[0]
    for expert in range(spec.shape[0]):
        for number, module in enumerate(stack.modules(expert)):
            if scheme is not None:
                outputs = quantized_outputs(module, scheme, rows, cols, spec.dtype)
            else:
                shape = (rows, cols) if stack.param == "weight" else (rows,)
                outputs = (OutputSpec(f"{module}.{stack.param}", spec.dtype, shape),)
            yield Unit(
                tensor=spec,
                module=module,
                rows=rows,
                cols=cols,
                outputs=outputs,
                scheme=scheme,
                begin=spec.begin + expert * slab_bytes,
                slab=slab,
                first=number if step > 1 else number * rows,
                step=step,
                transposed=transposed,
            )


def _decoded_units(tensor: TensorPlan, decode: Decode, scheme: Scheme | None) -> Iterator[Unit]:
    """Units whose values are decoded; their rows are rows of `decode`."""
    stack, module = decode.stack, split_name(tensor.spec.name)[0]
    if scheme is None:
        yield _decoded_unit(decode, PLAIN, module, (_dequantized(decode, module),), None, range(decode.rows))
        return
    if stack is None:
        outputs = quantized_outputs(module, scheme, decode.rows, decode.cols, DECODED)
        yield _decoded_unit(decode, DECODED, module, outputs, scheme, range(decode.rows))
        return
    halves, height = len(HALVES[stack.leaf]), decode.rows // decode.experts
    for expert in range(decode.experts):
        for number, half in enumerate(stack.modules(expert)):
            rows = range(expert * height + number, (expert + 1) * height, halves)
            outputs = quantized_outputs(half, scheme, len(rows), decode.cols, DECODED)
            yield _decoded_unit(decode, DECODED, half, outputs, scheme, rows)


def _dequantized(decode: Decode, module: str) -> OutputSpec:
    """What a weight becomes that nothing quantizes; experts are transposed, as models hold them."""
    stack = decode.stack
    if stack is None:
        return OutputSpec(f"{module}.weight" if module else "weight", PLAIN, (decode.rows, decode.cols))
    shape = (decode.experts, decode.cols, decode.rows // decode.experts)
    return OutputSpec(f"{stack.prefix}.{stack.leaf}", PLAIN, shape)


def _decoded_unit(
    decode: Decode,
    dtype: str,
    module: str,
    outputs: tuple[OutputSpec, ...],
    scheme: Scheme | None,
    rows: range,
) -> Unit:
    spec = decode.virtual(dtype)
    return Unit(
        tensor=spec,
        module=module,
        rows=len(rows),
        cols=decode.cols,
        outputs=outputs,
        scheme=scheme,
        begin=spec.begin,
        slab=(decode.rows, decode.cols),
        first=rows.start,
        step=rows.step,
        decode=decode,
    )
