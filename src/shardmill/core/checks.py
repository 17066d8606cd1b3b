"""Checks of single tensors against their decision; they return every problem and change nothing."""

from __future__ import annotations

from collections.abc import Collection

from shardmill.core.dtypes import COMPUTABLE
from shardmill.core.experts import HALVES, parse_stack
from shardmill.core.layout import GENERATED_PARAMS
from shardmill.core.plan import COPY, DEQUANTIZE, PART, QUANTIZE, SPLIT, Plan, ShardPlan, TensorPlan, units_of
from shardmill.core.scheme import Scheme
from shardmill.errors import Problem

_SHOWN_DIVISORS = 6


def divisors(width: int, limit: int = 512) -> tuple[int, ...]:
    """Group sizes that would work for `width` input features, largest first.

    >>> divisors(576)[:4]
    (288, 192, 144, 96)
    """
    return tuple(
        size for size in range(min(width, limit), 7, -1) if width % size == 0 and size % 4 == 0 and size != width
    )


def check_shard(shard: ShardPlan, taken: Collection[str] = ()) -> list[Problem]:
    """Find every tensor of a shard that cannot be treated as decided.

    Args:
        taken: source names of the checkpoint with which a generated name may collide, see `source_names`.
    """
    problems: list[Problem] = []
    sound: set[tuple[object, ...]] = set()
    for tensor in shard.tensors:
        if tensor.action in (COPY, PART):
            continue
        kind = (tensor.scheme, tensor.spec.dtype, tensor.spec.shape, tensor.decode and tensor.decode.kind)
        is_plain = tensor.action == QUANTIZE
        check = _check_decoded if tensor.decode is not None else _check_tensor
        found = [] if is_plain and kind in sound else check(tensor, shard.schemes)
        if is_plain and not found:
            sound.add(kind)
        problems += found or (_check_names(tensor, shard.schemes, taken) if taken else [])
    return [
        Problem(file=shard.name, tensor=p.tensor, kind=p.kind, message=p.message, way_out=p.way_out)
        for p in sorted(problems)
    ]


def source_names(plan: Plan) -> frozenset[str]:
    """Names of source tensors that a generated name may equal.

    A quantized weight keeps its name or gets one that ends in a generated param; but where a stack is split, or a
    module has no name, any name may be generated. What belongs to a weight that is decoded does not stay.
    """
    names = [t.spec.name for shard in plan.shards for t in shard.tensors if t.action != PART]
    moves = any(tensor.action in (SPLIT, DEQUANTIZE) for shard in plan.shards for tensor in shard.tensors)
    if moves or ".weight" in names:
        return frozenset(names)
    return frozenset([name for name in names if name.endswith(GENERATED_PARAMS)])


def check_plan(plan: Plan) -> list[Problem]:
    """Every problem of the plan and of all its shards, sorted."""
    taken = source_names(plan)
    found = [problem for shard in plan.shards for problem in check_shard(shard, taken)]
    return sorted({*plan.problems, *found})


def _check_decoded(tensor: TensorPlan, schemes: tuple[Scheme, ...]) -> list[Problem]:
    """Problems of a weight that is quantized already; what it is made of was checked when it was recognised."""
    if tensor.decode is None or tensor.scheme < 0:
        return []
    return _check_width(tensor, schemes[tensor.scheme], tensor.decode.cols)


def _check_tensor(tensor: TensorPlan, schemes: tuple[Scheme, ...]) -> list[Problem]:
    spec = tensor.spec
    if tensor.action != SPLIT and len(spec.shape) != 2:
        message = f"expected a matrix, found shape {list(spec.shape)}"
        return [
            Problem(
                tensor=spec.name,
                kind="wrong-rank",
                message=message,
                way_out="drop the target that names it, or ignore it",
            )
        ]
    if tensor.scheme >= 0 and spec.dtype not in COMPUTABLE:
        message = (
            f"expected F16, BF16, F32 or F64, found {spec.dtype}: it seems to be quantized already, without a scale"
        )
        return [Problem(tensor=spec.name, kind="already-quantized", message=message, way_out="add it to `ignore`")]
    if tensor.action == SPLIT and (problem := _check_halves(tensor)):
        return [problem]
    if tensor.scheme < 0:
        return []
    if tensor.action == SPLIT:
        unit = next(units_of(tensor, schemes), None)
        return _check_width(tensor, schemes[tensor.scheme], unit.cols if unit else 0)
    return _check_width(tensor, schemes[tensor.scheme], spec.shape[1])


def _check_halves(tensor: TensorPlan) -> Problem | None:
    spec = tensor.spec
    stack = parse_stack(spec.name, spec.shape)
    halves = len(HALVES[stack.leaf]) if stack else 1
    axis = 2 if tensor.layout != "rows" and len(spec.shape) == 3 else 1
    if spec.shape[axis] % halves == 0:
        return None
    message = f"gate and up cannot be told apart: axis {axis} of shape {list(spec.shape)} is odd"
    return Problem(tensor=spec.name, kind="expert-layout", message=message, way_out="check expert_layout")


def _check_width(tensor: TensorPlan, scheme: Scheme, width: int) -> list[Problem]:
    size = scheme.weights.group_size
    if not size or width % size == 0:
        return []
    working = ", ".join(map(str, divisors(width)[:_SHOWN_DIVISORS]))
    advice = (
        f"set group_size to a divisor ({working})"
        if scheme.weights.strategy == "group" and not scheme.weights.is_mx
        else ""
    )
    way_out = " or ".join(part for part in ("add it to `ignore`", advice if working else "") if part)
    shape = [tensor.decode.rows, tensor.decode.cols] if tensor.decode else list(tensor.spec.shape)
    message = f"group_size {size} does not divide in_features {width} (shape {shape})"
    return [Problem(tensor=tensor.spec.name, kind="group-indivisible", message=message, way_out=way_out)]


def _check_names(tensor: TensorPlan, schemes: tuple[Scheme, ...], taken: Collection[str]) -> list[Problem]:
    clashes = [
        spec.name
        for unit in units_of(tensor, schemes)
        for spec in unit.outputs
        if spec.name != tensor.spec.name and spec.name in taken
    ]
    return [
        Problem(
            tensor=name,
            kind="name-collision",
            message="quantization would write this name, and the source has it already",
        )
        for name in clashes
    ]
