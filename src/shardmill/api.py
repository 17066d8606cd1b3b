"""Quantize one output shard by call: the four functions of llm-compressor 0.11 to 0.13, for scripts that use them.

Names, order of parameters and results are theirs, so a script changes one import. Where they end in an assertion, in a
damaged file or in an obscure error, these raise a typed one that names the tensor (`Refused` is a `ValueError`). On
purpose different, besides the arithmetic, which `kernels.reference` describes:

- `scheme` may be the name of a preset, and a bare string in `ignore` is one entry.
- Fused sets are those of `core.fused`, gate and up of an expert included, and may lie in several files.
- A fused expert stack is split only when its experts are quantized, and then its bias with it; an ignored one keeps
  its bytes. Its layout follows from the config.json beside its file; without one it is taken for stacked rows.
- NaN, Inf, weights that are quantized already and names that would be written twice are refused.

Neighbours: `core.plan` decides, `kernels.shard` computes, `storage.local` writes. Without a converter memory stays a
small multiple of a row block; with one, all tensors of the call are in memory, because it is given all of them.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor

from shardmill.core.checks import check_shard
from shardmill.core.dtypes import COMPUTABLE
from shardmill.core.experts import HALVES, parse_stack
from shardmill.core.header import ShardHeader, TensorSpec
from shardmill.core.input_scale import parse_input_scale
from shardmill.core.limits import Intake
from shardmill.core.matching import Matcher, split_name
from shardmill.core.plan import COPY, SPLIT, Checkpoint, ShardPlan, SourceShard
from shardmill.core.planner import build_plan
from shardmill.core.recipe import EXPERT_LAYOUTS, Group, Recipe
from shardmill.core.scheme import Scheme, preset
from shardmill.core.sources import Sources
from shardmill.core.strict_json import parse_json
from shardmill.errors import CheckpointInvalid, NonFiniteWeight, Problem, RecipeInvalid, Refused, refuse, show
from shardmill.kernels import reference
from shardmill.kernels.shard import encode_shard
from shardmill.stages.input_scale import take_input_scales
from shardmill.storage.folder import Reader
from shardmill.storage.local import FileWriter, LocalFolder
from shardmill.storage.source import CONFIG_NAME, SourceFolder

InverseWeightMap: TypeAlias = Mapping[Any, Sequence[str] | None]
"""Path of a source file to the tensors that are read from it; None or an empty list stands for all of them."""
CtScheme: TypeAlias = Any
"""A `QuantizationScheme` of compressed-tensors: that library has no types, and only `kernels.ct_adapter` imports it."""
_Fill: TypeAlias = Callable[[int, memoryview], None]
"""Fills the view with bytes of a tensor, from an offset counted from its first byte."""

_LOG: Final = logging.getLogger(__name__)
_STACKED: Final = ("gate_up_proj", "down_proj")
"""Leaves of the stacks that llm-compressor's functions split; those of other architectures lie elsewhere."""
_NORMS: Final = "re:.*norm$"
"""Modules that are never quantized, whatever the targets say."""
_OF_WHOLE_CHECKPOINTS: Final = frozenset(
    {"pattern-unmatched", "nothing-matched", "already-quantized", "config-unresolved"}
)
"""Findings of the planner that say nothing about one file: patterns are for the whole checkpoint, as is its config."""
_BEFORE_CONVERSION: Final = frozenset({"already-quantized", "name-collision"})
"""Findings about single tensors that a converter is there to remove."""
_DTYPE_NAMES: Final = {dtype: name for name, dtype in reference.DTYPES.items()}


class Converter(Protocol):
    """Turns the tensors of one output shard into others, such as those of another format into plain ones."""

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors to go on with."""

    def validate(self, tensors: dict[str, Tensor]) -> object:
        """Raise unless `process` could take these; may return what it would give, all of them without data."""


def process_file(
    inverse_weight_map: InverseWeightMap,
    save_path: str | os.PathLike[str],
    scheme: CtScheme | str,
    ignore: Iterable[str],
    device: str | torch.device,
    converter: Converter | None = None,
) -> tuple[int, dict[str, str]]:
    """Quantize the tensors of one output shard and write it.

    Args:
        inverse_weight_map: what to read, `{file: names}`; None or an empty list stands for all tensors of a file.
        save_path: the shard to write; it appears complete or not at all, and may replace one of the files read.
        scheme: of compressed-tensors, or the name of a preset; never changed. Without targets, or with `Linear` among
            them, it is for every `*.weight`; modules whose name ends in `norm` are left alone.
        ignore: modules to leave alone, by full name or `re:` expression.
        device: where to compute.
        converter: changes the tensors first; it gets them on `device`, with expert stacks split already.

    Returns:
        Bytes of all tensors that were written, and the file name of each.

    Raises:
        RecipeInvalid: the scheme has global scales, needs calibration data, or is none.
        Refused: tensors that are missing or cannot be quantized; every one of them, and nothing was written.
        NonFiniteWeight: NaN or Inf in a weight that is to be quantized.
        StorageFailed: reading or writing failed.
    """
    request = _parse_request(scheme, ignore)
    if request.scheme.weights.has_global_scale:
        message = f"scheme {show(request.scheme.label)} has global scales that fused sets share"
        raise _recipe_invalid(message, "use `process_file_microscale_scheme`")
    return _process(inverse_weight_map, Path(save_path), request, device, converter)


def process_file_microscale_scheme(
    inverse_weight_map: InverseWeightMap,
    save_path: str | os.PathLike[str],
    scheme: CtScheme | str,
    ignore: Iterable[str],
    device: str | torch.device,
    converter: Converter | None = None,
    *,
    input_scale: str | None = None,
) -> tuple[int, dict[str, str]]:
    """Quantize as `process_file`, with a scheme that has a global scale per fused set (NVFP4).

    The members of a fused set share one global scale if they are read by the same call, from whatever files. All of
    them are written into this shard, also those that another file holds: build the index from what is returned.

    Args:
        input_scale: for NVFP4 with quantized activations, `constant:V` or `donor:LOCATION`; see `core.input_scale`.

    Raises:
        RecipeInvalid: the scheme has no global scales, needs calibration data, or is none.
        Refused: as `process_file`; likewise the others.
    """
    request = _parse_request(scheme, ignore, input_scale)
    if not request.scheme.weights.has_global_scale:
        message = f"scheme {show(request.scheme.label)} has no global scales"
        raise _recipe_invalid(message, "use `process_file`")
    return _process(inverse_weight_map, Path(save_path), request, device, converter)


def validate_file(
    inverse_weight_map: InverseWeightMap,
    save_path: str | os.PathLike[str],  # noqa: ARG001 - the three functions are called with the same arguments
    scheme: CtScheme | str,
    ignore: Iterable[str],
    device: str | torch.device,  # noqa: ARG001 - as above
    converter: Converter | None = None,
    *,
    input_scale: str | None = None,
) -> None:
    """Find out from headers alone whether the tensors of one output shard can be quantized; write nothing.

    Fused expert stacks are judged by the matrices they are split into. A converter gets tensors without data; if it
    returns what it would make of them, that is judged, else what it was given.

    Raises:
        RecipeInvalid: the scheme needs calibration data, or is none.
        Refused: every tensor that is missing, no matrix, or does not fit the group size; a `ValueError`.
    """
    request = _parse_request(scheme, ignore, input_scale)
    with ExitStack() as stack:
        source = _open(inverse_weight_map, stack)
        passed_over: frozenset[str] = frozenset()
        if converter is not None:
            tensors = dict(_split_tensors(source, request, "meta"))
            validated = converter.validate(tensors)
            passed_over = frozenset() if isinstance(validated, Mapping) else _BEFORE_CONVERSION
            source = _from_tensors(validated if isinstance(validated, Mapping) else tensors, source)
        _, problems = _decide(source, request)
    if found := [problem for problem in problems if problem.kind not in passed_over]:
        raise Refused(found)


def split_fused_moe_experts(tensors: Mapping[str, Tensor], layout: str = "rows") -> dict[str, Tensor]:
    """Split fused expert stacks into one matrix per expert and projection; other tensors pass through.

    A stack is three-dimensional and called `gate_up_proj` or `down_proj`, with or without `.weight`. Its matrices are
    views, `[out, in]`, called `<expert>.gate_proj.weight` and so on below the module that held the stack.

    Args:
        tensors: by name; not changed.
        layout: how gate and up are stored; see `core.experts`.

    Raises:
        RecipeInvalid: unknown layout.
        CheckpointInvalid: gate and up differ in size, a name holds both keys, or one would stand twice.

    >>> parts = split_fused_moe_experts({"experts.gate_up_proj": torch.zeros(1, 6, 4)})
    >>> [(name, list(part.shape)) for name, part in parts.items()]
    [('experts.0.gate_proj.weight', [3, 4]), ('experts.0.up_proj.weight', [3, 4])]
    """
    if layout not in EXPERT_LAYOUTS:
        raise _recipe_invalid(f"layout must be one of {', '.join(EXPERT_LAYOUTS)}, found {show(str(layout))}")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for part, view in _parts(name, tensor, layout):
            if part in found:
                raise refuse("name-collision", "an expert of a stack has the name of another tensor", tensor=part)
            found[part] = view
    return found


def _parts(name: str, tensor: Tensor, layout: str) -> Iterator[tuple[str, Tensor]]:
    """Name and view of every matrix of a stack; a tensor that is none, as it is."""
    keys = [leaf for leaf in _STACKED if leaf in name]
    if len(keys) > 1:
        raise refuse("expert-name", f"expected only one of {' and '.join(map(show, keys))} in a name", tensor=name)
    prefix, dot, leaf = name.removesuffix(".weight").rpartition(".")
    if leaf not in _STACKED or tensor.ndim != 3:
        yield name, tensor
        return
    for expert, half, view in _expert_views(name, tensor, leaf, layout):
        yield f"{prefix}{dot}{expert}.{half}.weight", view


def _expert_views(name: str, stack: Tensor, leaf: str, layout: str) -> Iterator[tuple[int, str, Tensor]]:
    """Expert, projection and values, `[out, in]`, of a stack `[E, ..]`; `[out]` of the stack of its biases."""
    halves = HALVES[leaf]
    oriented = stack.transpose(1, 2) if layout != "rows" and stack.ndim == 3 else stack
    rows, rest = divmod(oriented.shape[1], len(halves))
    if rest:
        message = f"gate and up cannot be told apart: {oriented.shape[1]} output features, shape {list(stack.shape)}"
        raise refuse("expert-layout", message, tensor=name)
    for expert, matrix in enumerate(oriented):
        for number, half in enumerate(halves):
            interleaved = layout == "interleaved" and len(halves) > 1
            view = matrix[number :: len(halves)] if interleaved else matrix[number * rows : (number + 1) * rows]
            yield expert, half, view


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What all modules of a call are judged by."""

    scheme: Scheme
    targets: tuple[str, ...]
    ignore: tuple[str, ...]


def _parse_request(scheme: CtScheme | str, ignore: Iterable[str], input_scale: str | None = None) -> _Request:
    parsed, targets = _parse_scheme(scheme)
    if input_scale is not None:
        parsed = replace(parsed, input_scale=parse_input_scale(input_scale))
    entries = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if wrong := [entry for entry in entries if not isinstance(entry, str)]:
        raise _recipe_invalid(f"ignore takes patterns, found {wrong[0]!r}"[:200])
    return _Request(scheme=parsed, targets=targets, ignore=(*dict.fromkeys(entries), _NORMS))


def _parse_scheme(scheme: CtScheme | str) -> tuple[Scheme, tuple[str, ...]]:
    """Our description of the scheme, and its targets."""
    if isinstance(scheme, str):
        return preset(scheme), ()
    if not hasattr(scheme, "model_dump"):
        raise _recipe_invalid(f"expected a QuantizationScheme or the name of a preset, found {type(scheme).__name__}")
    from shardmill.kernels.ct_adapter import scheme_from_ct  # whoever has such an object has paid for the import

    return scheme_from_ct(scheme), tuple(scheme.targets)


def _recipe_invalid(message: str, way_out: str = "") -> RecipeInvalid:
    return RecipeInvalid([Problem(kind="scheme", message=message, way_out=way_out)])


def _parse_device(device: str | torch.device) -> str:
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise _recipe_invalid(f"device {show(str(device))} is unknown to torch") from error
    if parsed.type == "meta":
        raise _recipe_invalid("device `meta` cannot compute")
    return str(parsed)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor and where its bytes come from."""

    spec: TensorSpec
    fill: _Fill
    file: str
    """Name of its source file; empty for a tensor that a converter made."""


@dataclass(frozen=True, slots=True)
class _Source:
    """Tensors of several files or of memory, in one address space, so that they look like a single shard."""

    shard: SourceShard
    pieces: tuple[_Piece, ...]
    begins: tuple[int, ...]
    """First byte of every piece in the common address space."""
    folders: tuple[Path, ...]
    """Of the source files."""

    @classmethod
    def assemble(cls, pieces: Sequence[_Piece], folders: Iterable[Path]) -> _Source:
        """Place the pieces one after another."""
        begins, specs, end = [], [], 0
        for piece in pieces:
            begins.append(end)
            end += piece.spec.nbytes
            specs.append(piece.spec._replace(begin=begins[-1], end=end))
        shard = SourceShard(pieces[0].file if pieces else "", end, ShardHeader(tuple(specs), (), 0))
        return cls(shard, tuple(pieces), tuple(begins), tuple(dict.fromkeys(folders)))

    def read(self, _shard: str, offset: int, view: memoryview) -> None:
        """Fill the view, which may span several small tensors."""
        number = bisect_right(self.begins, offset) - 1
        while len(view):
            begin, piece = self.begins[number], self.pieces[number]
            part = view[: max(0, begin + piece.spec.nbytes - offset)]
            if len(part):
                piece.fill(offset - begin, part)
            view, offset, number = view[len(part) :], offset + len(part), number + 1

    def locate(self, problems: Iterable[Problem]) -> list[Problem]:
        """Name the file that holds the tensor of each problem."""
        files = {piece.spec.name: piece.file for piece in self.pieces}
        return sorted({replace(problem, file=files.get(problem.tensor) or problem.file) for problem in problems})


def _open(inverse_weight_map: InverseWeightMap, stack: ExitStack) -> _Source:
    """Open every file and find the tensors that are asked for; the files stay open until the stack is closed."""
    pieces: list[_Piece] = []
    problems: list[Problem] = []
    for path, names in inverse_weight_map.items():
        real = Path(path).resolve()
        folder = SourceFolder(LocalFolder(real.parent))
        reader = stack.enter_context(folder.open(real.name))
        header = folder.read_header(real.name).header
        pieces += [
            _Piece(spec, partial(_fill_from_file, reader, header.data_start + spec.begin), Path(path).name)
            for spec in _select(header, names, Path(path).name, problems)
        ]
    problems += _find_duplicates(pieces)
    if problems:
        raise CheckpointInvalid(problems)
    return _Source.assemble(pieces, (Path(path).absolute().parent for path in inverse_weight_map))


def _fill_from_file(reader: Reader, start: int, offset: int, view: memoryview) -> None:
    reader.read_into(start + offset, view)


def _select(
    header: ShardHeader, names: Sequence[str] | None, file: str, problems: list[Problem]
) -> Iterator[TensorSpec]:
    """Tensors of a file that are asked for, each once, in the order of the names."""
    by_name = {spec.name: spec for spec in header.tensors}
    for name in dict.fromkeys((names,) if isinstance(names, str) else names or by_name):
        if name in by_name:
            yield by_name[name]
        else:
            message = "expected it in this file, which does not have it"
            problems.append(Problem(file=file, tensor=name, kind="tensor-missing", message=message))


def _find_duplicates(pieces: Iterable[_Piece]) -> Iterator[Problem]:
    owner: dict[str, str] = {}
    for piece in pieces:
        if piece.spec.name in owner:
            message = f"the same name stands in {show(owner[piece.spec.name])}"
            yield Problem(file=piece.file, tensor=piece.spec.name, kind="duplicate-tensor", message=message)
        owner[piece.spec.name] = piece.file


def _from_tensors(tensors: Mapping[str, Tensor], origin: _Source) -> _Source:
    """Make a source of tensors in memory; those without data can be planned, not read."""
    files = {piece.spec.name: piece.file for piece in origin.pieces}
    pieces: list[_Piece] = []
    for name, tensor in tensors.items():
        dtype = _DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise refuse("dtype", f"dtype {show(str(tensor.dtype))} cannot be stored", tensor=name)
        spec = TensorSpec(name, dtype, tuple(tensor.shape), 0, tensor.nbytes)
        data = memoryview(b"") if tensor.is_meta else reference.to_bytes(tensor)
        pieces.append(_Piece(spec, partial(_fill_from_memory, data), files.get(name, "")))
    return _Source.assemble(pieces, origin.folders)


def _fill_from_memory(data: memoryview, offset: int, view: memoryview) -> None:
    view[:] = data[offset : offset + len(view)]


def _decide(source: _Source, request: _Request) -> tuple[ShardPlan, list[Problem]]:
    """Plan one output shard, and find everything that stands against it."""
    config = _read_config(source)
    recipe = Recipe(
        groups=(Group(targets=request.targets, scheme=request.scheme),),
        ignore=request.ignore,
        default_ignores=False,
        partial_fused=True,
        expert_layout=None if config else "rows",
    )
    checkpoint = Checkpoint(shards=(source.shard,), index=None, config_text=config)
    plan = build_plan(checkpoint, recipe, sources=Sources())  # other formats are for converters here
    plan, lacking = take_input_scales(plan, Intake())
    shard = plan.shards[0]
    if not config and (stacks := [tensor.spec.name for tensor in shard.tensors if tensor.action == SPLIT]):
        _LOG.warning("no %s beside the source: stacks such as %s are split by rows", CONFIG_NAME, show(stacks[0]))
    problems = [problem for problem in plan.problems if problem.kind not in _OF_WHOLE_CHECKPOINTS]
    problems += lacking
    problems += check_shard(shard, frozenset(tensor.spec.name for tensor in shard.tensors))
    problems += _check_rank(shard, request)
    return shard, source.locate(map(_reword, problems))


def _read_config(source: _Source) -> str:
    """Text of the config.json beside the first source file that has one; only fused expert stacks need it."""
    if all(parse_stack(spec.name, spec.shape) is None for spec in source.shard.header.tensors):
        return ""
    found = next((path for folder in source.folders if (path := folder / CONFIG_NAME).exists()), None)
    if found is None:
        return ""
    real = found.resolve()
    data = SourceFolder(LocalFolder(real.parent)).read_text(real.name, "json_bytes")
    parse_json(data, file=CONFIG_NAME, kind="config-invalid")
    return data.decode("utf-8")


def _check_rank(shard: ShardPlan, request: _Request) -> Iterator[Problem]:
    """Weights that are meant and are no matrix; a catch-all target does mean them here."""
    matcher = Matcher.build([request.targets], request.ignore)
    for tensor in shard.tensors:
        if tensor.action == COPY and len(tensor.spec.shape) != 2 and _is_meant(tensor.spec, matcher):
            message = f"expected a matrix, or a stack below a module `experts`, found shape {list(tensor.spec.shape)}"
            yield Problem(tensor=tensor.spec.name, kind="wrong-rank", message=message, way_out="ignore it")


def _is_meant(spec: TensorSpec, matcher: Matcher) -> bool:
    if parse_stack(spec.name, spec.shape) is not None:
        return False
    module, param = split_name(spec.name)
    modules = [module] if param == "weight" else []
    prefix, dot, leaf = spec.name.removesuffix(".weight").rpartition(".")
    if len(spec.shape) == 3:
        modules += [f"{prefix}{dot}0.{half}" for half in (HALVES[leaf] if leaf in _STACKED else ())]
    return any(matcher.ignored_by(name) is None and matcher.target_of(name) is not None for name in modules)


def _reword(problem: Problem) -> Problem:
    """Name a way out that a caller of these functions has."""
    if problem.kind != "expert-layout":
        return problem
    return replace(problem, way_out="ignore it, or split it first: `split_fused_moe_experts` takes a layout")


def _process(
    inverse_weight_map: InverseWeightMap,
    target: Path,
    request: _Request,
    device: str | torch.device,
    converter: Converter | None,
) -> tuple[int, dict[str, str]]:
    where = _parse_device(device)
    with ExitStack() as stack:
        source = _open(inverse_weight_map, stack)
        if converter is not None:
            converted = converter.process(dict(_split_tensors(source, request, where)))
            source = _from_tensors(converted, source)
        shard, problems = _decide(source, request)
        if problems:
            raise Refused(problems)
        return _write(shard, source, target, where, stack)


def _split_tensors(source: _Source, request: _Request, device: str) -> Iterator[tuple[str, Tensor]]:
    """Load every tensor, expert stacks that are to be quantized in parts; what else is wrong shows later.

    Device `meta` gives tensors without data.
    """
    shard, _ = _decide(source, request)
    for tensor in shard.tensors:
        loaded = _load(source, tensor.spec, device)
        stack = parse_stack(tensor.spec.name, tensor.spec.shape)
        if stack is None or tensor.layout is None or tensor.spec.dtype not in COMPUTABLE:
            yield tensor.spec.name, loaded
            continue
        for expert, half, view in _expert_views(tensor.spec.name, loaded, stack.leaf, tensor.layout):
            yield f"{stack.prefix}.{expert}.{half}.{stack.param}", view


def _load(source: _Source, spec: TensorSpec, device: str) -> Tensor:
    if spec.dtype not in reference.DTYPES:
        raise refuse("dtype", f"torch has no dtype {spec.dtype} that a converter could be given", tensor=spec.name)
    if device == "meta":
        return torch.empty(spec.shape, dtype=reference.DTYPES[spec.dtype], device=device)
    data = bytearray(spec.nbytes)
    source.read(source.shard.name, spec.begin, memoryview(data))
    return reference.from_buffer(data, spec.dtype, spec.shape, device)


def _write(
    shard: ShardPlan, source: _Source, target: Path, device: str, stack: ExitStack
) -> tuple[int, dict[str, str]]:
    """Compute the shard straight into its file; the file appears when all sources are found unchanged."""
    layout = shard.layout()
    header = layout.header()
    with FileWriter(target.parent, target.name, len(header) + layout.data_bytes) as writer:
        writer.write(memoryview(header))
        try:
            encode_shard(shard, source.read, writer.write, device=device)
        except NonFiniteWeight as error:
            raise NonFiniteWeight(source.locate(error.problems)) from error
        stack.close()
        writer.commit()
    return layout.data_bytes, {placed.spec.name: target.name for placed in layout.placed}
