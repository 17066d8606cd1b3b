"""Compare a finished checkpoint with its source, tensor by tensor, in bounded memory.

Which tensor of the result follows from which tensor of the source is told by a plan: the one that quantizes exactly
what is quantized in the result. Weights are given back by compressed-tensors' own code, not by ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from shardmill.core.encoding import Decode
from shardmill.core.findings import FAR_ABOVE, typical_error
from shardmill.core.layout import WORD_BITS, Unit, rows_per_block
from shardmill.core.plan import Plan, ShardPlan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import Group, Recipe, dequantizing
from shardmill.core.report import Histograms
from shardmill.core.scheme import Scheme, preset
from shardmill.core.statistics import Statistics
from shardmill.core.written import Located, WrittenGroup, check_modules, code_shape, unsafe_names
from shardmill.errors import Problem, Refused, show
from shardmill.kernels.threads import cores
from shardmill.stages.devices import limit_threads
from shardmill.stages.result import BLOCK_BYTES, INTAKE, Readers, Result, VerifyWatch, read_result, stored_shapes
from shardmill.storage.source import SourceFolder, open_source, read_checkpoint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

LARGEST_ERROR: Final = 0.5
"""Relative error that no scheme explains but those of two bits, which may err half as much again as they usually do."""
_TWO_BITS: Final = 1.5
_TOLERANCE: Final = 0.01
"""Share by which a measured error may differ from the one in the manifest."""
_TINY: Final = 1e-4
"""Difference of relative errors that rounding explains: some formats are given back in 16 bits."""
_BF16: Final = 2.0**-9
"""The same for weights that were quantized before: their few values are all rounded in one direction."""
_NOTHING: Final = "re:(?!)"
"""A pattern that matches no name."""
_EXPECTED_KINDS: Final = frozenset(
    {"pattern-unmatched", "nothing-matched", "fused-set-split", "config-unresolved", "weight-transposed"}
)
"""Findings about a plan that is made to compare a result with its source, not to be executed."""
_EXPERT_KINDS: Final = frozenset({"expert-layout", "experts-differ"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is left of one quantized weight, measured against the source."""

    module: str
    scheme: str
    statistics: Statistics
    typical: float
    """Relative error of a Gaussian weight under this scheme."""
    stated: float | None
    """Relative error in the manifest."""

    @property
    def is_unusual(self) -> bool:
        """Whether the error is far above the typical one."""
        return not self.statistics.relative_error <= FAR_ABOVE * self.typical


def verify_against(
    destination: str, source: str, watch: VerifyWatch | None = None
) -> tuple[tuple[Comparison, ...], list[Problem]]:
    """Compare a result with its source; return figures of every quantized weight, and every problem, sorted.

    A problem is a tensor that is missing or unexpected, a copied one that is not byte-identical, a relative error that
    no scheme explains, or one that differs by more than 1 % from what the manifest states. `verify` is the other half:
    what it finds is told here only as far as it stands in the way.

    Raises:
        Refused: the source is no sound checkpoint, or there is no such folder.
        SourceChanged: a file changed meanwhile.
    """
    told = watch or VerifyWatch()
    result = read_result(destination)
    if result.checkpoint.problems or result.config.problems:
        return (), sorted({*result.checkpoint.problems, *result.config.problems})
    origin = open_source(source, INTAKE)
    plan = plan_of(result, origin)
    told.on_total(plan.source_bytes)
    with ExitStack() as stack:
        stored = stored_shapes(result, Readers(result.folder, stack))
    problems = check_modules(result.config, result.modules, stored)
    damaged = {problem.tensor for problem in problems}
    shapes = {m: code_shape(params, stored) for m, params in result.modules.items() if m not in damaged}
    stated = _stated_errors(result)

    def compare(shard: ShardPlan) -> tuple[list[Comparison], list[Problem]]:
        with ExitStack() as stack:
            written, source = Readers(result.folder, stack), Readers(origin, stack)
            comparer = Comparer(
                shard=shard, result=result, shapes=shapes, written=written, source=source, stated=stated
            )
            rows = comparer.compare()
        told.on_bytes(shard.size)
        return rows, comparer.problems

    rows: list[Comparison] = []
    problems += [*_expert_problems(plan), *_unexpected(result, plan)]
    for found, defects in _in_parallel(compare, plan.shards):
        rows += found
        problems += defects
    return tuple(rows), sorted(set(problems))


def _in_parallel(
    compare: Callable[[ShardPlan], tuple[list[Comparison], list[Problem]]], shards: Sequence[ShardPlan]
) -> Iterator[tuple[list[Comparison], list[Problem]]]:
    """Compare shards side by side, one core each: threads within one operation mostly wait for each other."""
    workers = min(cores(), len(shards))
    limit_threads(["cpu"] * cores())
    with ThreadPoolExecutor(workers, thread_name_prefix="compare") as pool:
        yield from pool.map(compare, shards)


def plan_of(result: Result, origin: SourceFolder) -> Plan:
    """Plan what was done: quantize what is quantized in the result, copy the rest.

    Raises:
        Refused: the source is no sound unquantized checkpoint.
    """
    checkpoint = read_checkpoint(origin)
    plan = build_plan(checkpoint, _recipe_of(result))
    refused = {*checkpoint.problems, *(p for p in plan.problems if p.kind not in _EXPECTED_KINDS | _EXPERT_KINDS)}
    if refused:
        raise Refused(refused)
    return plan


def _expert_problems(plan: Plan) -> list[Problem]:
    return [problem for problem in plan.problems if problem.kind in _EXPERT_KINDS]


def _stated_errors(result: Result) -> dict[str, tuple[str, float]]:
    """Scheme and relative error by module, as the manifest states them."""
    shards = result.manifest.shards if result.manifest else ()
    return {w.module: (w.scheme, w.statistics.relative_error) for shard in shards for w in shard.weights}


def _recipe_of(result: Result) -> Recipe:
    """The recipe that names exactly what is quantized, group by group."""
    if result.manifest is not None and result.manifest.recipe.dequantize:
        return dequantizing()
    unsafe = unsafe_names(result.modules)
    members: dict[str, list[str]] = {}
    for module in result.modules:
        group = result.config.group_of(module)
        if group is not None and module not in unsafe:
            members.setdefault(group.name, []).append(module)
    groups = tuple(
        Group(targets=tuple(members[group.name]), scheme=_of_weights(group.scheme))
        for group in result.config.groups
        if group.name in members
    )
    return Recipe(
        groups=groups or (Group(targets=(_NOTHING,), scheme=preset("FP8_DYNAMIC")),),
        default_ignores=False,
        partial_fused=True,
        expert_layout=result.manifest.recipe.expert_layout if result.manifest else None,
    )


def _of_weights(scheme: Scheme) -> Scheme:
    """A scheme without activations whose scales are stored: they have no source tensor to compare them with."""
    return replace(scheme, input_activations=None) if scheme.needs_input_scale else scheme


def _unexpected(result: Result, plan: Plan) -> list[Problem]:
    """Tensors of the result that follow from no tensor of the source."""
    planned = {
        spec.name
        for shard in plan.shards
        for tensor in shard.tensors
        if _is_matrix_or_copied(tensor.scheme, tensor.spec.shape)
        for unit in shard.units_of(tensor)
        for spec in unit.outputs
    }
    extras = {param for group in result.config.groups for param in group.extras}
    message = "the source has nothing that it follows from"
    return [
        Problem(file=located.shard, tensor=name, kind="tensor-unexpected", message=message)
        for name, located in result.tensors.items()
        if name not in planned and name.rpartition(".")[2] not in extras
    ]


def _is_matrix_or_copied(scheme: int, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has units: a name that is quantized in the result may be a vector in the source."""
    return scheme < 0 or len(shape) > 1


@dataclass(slots=True, kw_only=True)
class Comparer:
    """The state of comparing one shard."""

    shard: ShardPlan
    result: Result
    shapes: Mapping[str, tuple[int, int] | None]
    """Of the quantized weights that can be given back."""
    written: Readers
    source: Readers
    stated: Mapping[str, tuple[str, float]]
    problems: list[Problem] = field(default_factory=list)
    slab: tuple[int, Tensor] | None = None
    """The expert read last by its offset, as `[out, in]`: gate and up share one."""

    def compare(self) -> list[Comparison]:
        """Compare every unit of the shard; figures of the quantized ones, in order."""
        rows = []
        for tensor in self.shard.tensors:
            if _is_matrix_or_copied(tensor.scheme, tensor.spec.shape):
                rows += [self._compare_unit(unit) for unit in self.shard.units_of(tensor)]
        return [row for row in rows if row is not None]

    def _compare_unit(self, unit: Unit) -> Comparison | None:
        missing = [spec.name for spec in unit.outputs if spec.name not in self.result.tensors]
        if missing:
            self._report(unit, missing[0], "tensor-missing", "the result does not have it")
        elif unit.scheme is None:
            self._compare_copied(unit)
        elif unit.module in self.shapes:
            return self._compare_quantized(unit, unit.scheme, self.shapes[unit.module])
        return None

    def _report(self, unit: Unit, name: str, kind: str, message: str) -> None:
        origin = f" (source: {show(unit.tensor.name)} of {show(self.shard.name)})" if name != unit.tensor.name else ""
        self.problems.append(Problem(tensor=name, kind=kind, message=message + origin))

    def _compare_copied(self, unit: Unit) -> None:
        """Equal dtype, shape and bytes."""
        spec, located = unit.outputs[0], self.result.tensors[unit.outputs[0].name]
        found = located.spec
        if (found.dtype, found.shape) != (spec.dtype, spec.shape):
            message = f"expected {spec.dtype} {list(spec.shape)}, found {found.dtype} {list(found.shape)}"
            self._report(unit, spec.name, "copy-differs", f"{message}: it is neither copied nor quantized")
            return
        position = 0
        for block in self.written.blocks(located):
            expected = self._copied_bytes(unit, position, len(block))
            if block != expected:
                first = next(n for n, pair in enumerate(zip(block, expected, strict=True)) if pair[0] != pair[1])
                message = f"expected the bytes of the source, found others from byte {position + first} on"
                self._report(unit, spec.name, "copy-differs", message)
                return
            position += len(block)

    def _copied_bytes(self, unit: Unit, position: int, length: int) -> bytes | bytearray:
        """What a copied tensor must hold; one that was split off a stack is read whole."""
        from shardmill.kernels.reference import to_bytes  # torch takes seconds to import

        if unit.decode is not None:
            return self._rounded_bytes(unit, unit.decode, position, length)
        if unit.outputs[0].shape == unit.tensor.shape:
            return self.source.read(self.shard.name, self.shard.data_start + unit.begin + position, length)
        return bytes(to_bytes(self._rows(unit, 0, unit.rows))[position : position + length])

    def _rounded_bytes(self, unit: Unit, decode: Decode, position: int, length: int) -> bytes:
        """What a weight that was decoded and rounded must hold; experts are transposed."""
        import numpy as np

        from shardmill.kernels.decode import to_bf16

        step = 1 if decode.stack is None else decode.rows // decode.experts
        row_bytes = 2 * unit.cols
        first = position // (step * row_bytes) * step
        last = -(-(position + length) // (step * row_bytes)) * step
        bits = to_bf16(self._decoded(decode, range(first, last)))
        if decode.stack is not None:
            bits = np.ascontiguousarray(bits.reshape(-1, step, unit.cols).transpose(0, 2, 1))
        skipped = position - first * row_bytes
        return bits.tobytes()[skipped : skipped + length]

    def _decoded(self, decode: Decode, rows: range) -> npt.NDArray[np.float32]:
        from shardmill.kernels.decode import decode_rows, read_rows

        def read(shard: str, offset: int, view: memoryview) -> None:
            view[:] = self.source.read(shard, offset, len(view))

        return decode_rows(decode, read_rows(decode, rows, read), rows)

    def _rows(self, unit: Unit, first: int, count: int) -> Tensor:
        """Rows of the source, `[count, cols]`."""
        if unit.decode is not None:
            import torch

            begin = unit.first + first * unit.step
            return torch.from_numpy(self._decoded(unit.decode, range(begin, begin + count * unit.step, unit.step)))
        if unit.is_contiguous:
            begin = unit.begin + (unit.first + first) * unit.row_bytes
            return self._tensor(begin, unit, (count, unit.cols))
        if self.slab is None or self.slab[0] != unit.begin:
            stored = self._tensor(unit.begin, unit, unit.slab)
            self.slab = (unit.begin, stored.T.contiguous() if unit.transposed else stored)
        begin = unit.first + first * unit.step
        return self.slab[1][begin : begin + count * unit.step : unit.step].contiguous()

    def _tensor(self, begin: int, unit: Unit, shape: tuple[int, int]) -> Tensor:
        from shardmill.kernels.reference import from_buffer  # torch takes seconds to import

        length = shape[0] * shape[1] * unit.row_bytes // unit.cols
        return from_buffer(
            self.source.read(self.shard.name, self.shard.data_start + begin, length), unit.tensor.dtype, shape
        )

    def _compare_quantized(self, unit: Unit, scheme: Scheme, shape: tuple[int, int] | None) -> Comparison | None:
        from shardmill.kernels.compare import compare  # torch takes seconds to import

        group = self.result.config.group_of(unit.module)
        if group is None:
            raise AssertionError(f"{unit.module} was planned by a group and has none")
        if shape != (unit.rows, unit.cols):
            message = f"expected shape {[unit.rows, unit.cols]} as in the source, found {list(shape or ())}"
            self._report(unit, unit.module, "shape-differs", message)
            return None
        found = Statistics()
        for weight, restored in self._blocks(unit, scheme, group):
            found = found.merge(compare(weight, restored))
        label, stated = self.stated.get(unit.module, (group.scheme.label, None))
        typical = typical_error(scheme.weights)
        row = Comparison(module=unit.module, scheme=label, statistics=found, typical=typical, stated=stated)
        for kind, message in _defects(row, _TINY if unit.decode is None else _BF16):
            self._report(unit, unit.module, kind, message)
        return row

    def _blocks(self, unit: Unit, scheme: Scheme, group: WrittenGroup) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the source, and the same as the result gives them back."""
        step = rows_per_block(unit, scheme.weights, BLOCK_BYTES)
        for first in range(0, unit.rows, step):
            count = min(step, unit.rows - first)
            yield self._rows(unit, first, count), self._restored(unit, group, first, count)

    def histograms(self, unit: Unit, known: Statistics, bins: int) -> Histograms:
        """Count the values of a quantized weight, and its errors, in bins of equal width.

        Args:
            known: where the extent of the weight and its largest error stand.
        """
        from shardmill.kernels.compare import histogram  # torch takes seconds to import

        group = self.result.config.group_of(unit.module)
        if group is None or unit.scheme is None:
            raise AssertionError(f"{unit.module} was planned by a group and has none")
        weights, errors = [0] * bins, [0] * bins
        for weight, restored in self._blocks(unit, unit.scheme, group):
            weights = histogram(weight, known.amax, weights)
            errors = histogram(weight.float() - restored.float(), known.max_error, errors)
        return Histograms(
            weight=tuple(weights), error=tuple(errors), weight_reach=known.amax, error_reach=known.max_error
        )

    def _restored(self, unit: Unit, group: WrittenGroup, first: int, count: int) -> Tensor:
        """Some rows of a weight as compressed-tensors gives them back."""
        import torch

        from shardmill.kernels.compare import widen_scales
        from shardmill.kernels.ct_adapter import decompress

        tensors = {
            param: self._param_rows(located, group, first, count)
            for param, located in self.result.modules[unit.module].items()
            if param.startswith("weight") and param != "weight_shape"
        }
        if "weight_shape" in self.result.modules[unit.module]:
            tensors["weight_shape"] = torch.tensor([count, unit.cols])
        return decompress(widen_scales(tensors), group.entry)

    def _param_rows(self, located: Located, group: WrittenGroup, first: int, count: int) -> Tensor:
        """The part of a stored param that belongs to some rows of the weight."""
        from shardmill.kernels.reference import from_buffer

        spec = located.spec
        if spec.shape in ((), (1,)):
            return from_buffer(self.written.whole(located), spec.dtype, spec.shape)
        begin, end = param_range(spec.name, spec.dtype, group, first, count)
        row_bytes = spec.nbytes // spec.shape[0]
        offset = located.data_start + spec.begin + begin * row_bytes
        data = self.written.read(located.shard, offset, (end - begin) * row_bytes)
        return from_buffer(data, spec.dtype, (end - begin, *spec.shape[1:]))


def param_range(name: str, dtype: str, group: WrittenGroup, first: int, count: int) -> tuple[int, int]:
    """Rows of a param, from and to, that belong to rows of its weight.

    Exact where `first` is a multiple of `layout.row_alignment`, as it is for the first row of every block.
    """
    args = group.scheme.weights
    param = name.rpartition(".")[2]
    if param == "weight_zero_point" and dtype == "I32":
        return first * args.num_bits // WORD_BITS, -(-(first + count) * args.num_bits // WORD_BITS)
    if param in ("weight_scale", "weight_zero_point") and args.block_structure is not None:
        height = args.block_structure[0]
        return first // height, -(-(first + count) // height)
    return first, first + count


def _defects(row: Comparison, slack: float) -> Iterator[tuple[str, str]]:
    measured = row.statistics.relative_error
    if not measured <= max(LARGEST_ERROR, _TWO_BITS * row.typical):
        message = f"expected a relative error of about {row.typical:.2g} ({row.scheme}), found {measured:.3g}"
        yield "error-too-large", message
    if row.stated is not None and not abs(measured - row.stated) <= _TOLERANCE * row.stated + slack:
        message = f"expected the relative error {row.stated:.6g} that the manifest states, found {measured:.6g}"
        yield "statistics-disagree", message
