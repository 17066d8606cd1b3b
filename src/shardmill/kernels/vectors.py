"""Vectors of numbers in registers, as a type of numba: what the loops of `kernels.compiled` are written in.

numba has scalars and arrays, and leaves it to LLVM to find vectors in loops over them. LLVM finds none that hold mixed
widths, and prefers short ones. `Lanes` are LLVM's own vectors: `load` makes one, operators take two of a type or one
and a scalar, and `store` puts it back. A processor without registers of that length uses several, or none: each
operation on a lane is the IEEE or integer one, and is the same everywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

COUNT: Final = 16
"""Lanes of a vector of 32-bit numbers that fills the longest registers."""

Vector = Any
"""A value of type `Lanes`, for annotations."""


class Lanes(types.Type):
    """`count` numbers of one type, or truth values."""

    def __init__(self, dtype: Any, count: int) -> None:
        super().__init__(name=f"Lanes({dtype}, {count})")
        self.dtype = dtype
        self.count = count


def _vector(context: Any, lanes: Lanes) -> ir.VectorType:
    element = ir.IntType(1) if lanes.dtype == types.boolean else context.get_value_type(lanes.dtype)
    return ir.VectorType(element, lanes.count)


class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        element = ir.IntType(1) if lanes.dtype == types.boolean else manager.lookup(lanes.dtype).get_value_type()
        super().__init__(manager, lanes, ir.VectorType(element, lanes.count))  # type: ignore[no-untyped-call]


register_model(Lanes)(_Model)


# Operators


def _spread(builder: Any, scalar: Any, count: int) -> Any:
    """Repeat a scalar in every lane."""
    kind = ir.VectorType(scalar.type, count)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)


def _template(operation: Any, result: Callable[[Lanes], Lanes]) -> Any:
    """Type `lanes operation lanes` and `lanes operation scalar`."""

    class Template(AbstractTemplate):
        key = operation

        def generic(self, operands: tuple[Any, ...], _named: Any) -> Any:
            if len(operands) != 2 or not isinstance(operands[0], Lanes):
                return None
            left, right = operands
            if isinstance(right, types.Number):
                return signature(result(left), left, left.dtype)
            return signature(result(left), left, left) if left == right else None

    return Template


def _define(operation: Any, result: Callable[[Lanes], Lanes], generate: Callable[[Any, bool, Any, Any], Any]) -> None:
    """Give a Python operator a meaning for lanes."""

    def lower(_context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        left, right = operands
        lanes = signature.args[0]
        if not isinstance(signature.args[1], Lanes):
            right = _spread(builder, right, lanes.count)
        return generate(builder, isinstance(lanes.dtype, types.Float), left, right)

    infer_global(operation)(_template(operation, result))
    lower_builtin(operation, Lanes, Lanes)(lower)
    lower_builtin(operation, Lanes, types.Number)(lower)


def _same(lanes: Lanes) -> Lanes:
    return lanes


def _truth(lanes: Lanes) -> Lanes:
    return Lanes(types.boolean, lanes.count)


_define(operator.add, _same, lambda b, is_float, x, y: b.fadd(x, y) if is_float else b.add(x, y))
_define(operator.sub, _same, lambda b, is_float, x, y: b.fsub(x, y) if is_float else b.sub(x, y))
_define(operator.mul, _same, lambda b, is_float, x, y: b.fmul(x, y) if is_float else b.mul(x, y))
_define(operator.truediv, _same, lambda b, _, x, y: b.fdiv(x, y))
_define(operator.and_, _same, lambda b, _, x, y: b.and_(x, y))
_define(operator.or_, _same, lambda b, _, x, y: b.or_(x, y))
_define(operator.lshift, _same, lambda b, _, x, y: b.shl(x, y))
_define(operator.rshift, _same, lambda b, _, x, y: b.lshr(x, y))


def _compare(sign: str) -> Callable[[Any, bool, Any, Any], Any]:
    return lambda b, is_float, x, y: (b.fcmp_ordered if is_float else b.icmp_unsigned)(sign, x, y)


for _sign, _operation in {"<": operator.lt, ">": operator.gt, "==": operator.eq}.items():
    _define(_operation, _truth, _compare(_sign))


# Memory


def _place(context: Any, builder: Any, array: Any, operands: Any, kind: Any) -> Any:
    data = context.make_array(array)(context, builder, operands[0]).data
    return builder.bitcast(builder.gep(data, [operands[1]]), kind.as_pointer())


def _generate_load(_typing: Any, array: Any, index: Any, count: Any) -> Any:
    """Read `count` elements of an array from `index` on; `count` is a number in the source text."""
    lanes = Lanes(array.dtype, count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        place = _place(context, builder, signature.args[0], operands, _vector(context, lanes))
        return builder.load(place, align=array.dtype.bitwidth // 8)

    return lanes(array, index, count), generate


def _generate_store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write lanes, or one number wider than the elements, to an array from `index` on."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        place = _place(context, builder, signature.args[0], operands, operands[2].type)
        builder.store(operands[2], place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, index, value), generate


def _generate_transpose(_typing: Any, source: Any, index: Any, stride: Any, target: Any, place: Any) -> Any:
    """Read `COUNT` rows of `COUNT` float32 numbers from `index` on, `stride` apart, and write their columns."""

    def generate(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        kind, number = ir.VectorType(ir.FloatType(), COUNT), operands[1].type
        first, step = operands[1], operands[2]
        rows = []
        for row in range(COUNT):
            at = builder.add(first, builder.mul(step, ir.Constant(number, row)))
            rows.append(builder.load(_place(context, builder, source, [operands[0], at], kind), align=4))
        low = [lane // 2 + COUNT * (lane % 2) for lane in range(COUNT)]
        high = [COUNT // 2 + lane for lane in low]
        for _ in range(COUNT.bit_length() - 1):  # as often as it can be halved, riffle the halves of the deck
            half = COUNT // 2
            pairs = [(rows[row], rows[row + half]) for row in range(half)]
            rows = [_shuffle(builder, *pair, order) for pair in pairs for order in (low, high)]
        for row, lanes in enumerate(rows):
            at = builder.add(operands[4], ir.Constant(operands[4].type, row * COUNT))
            builder.store(lanes, _place(context, builder, target, [operands[3], at], kind), align=4)
        return context.get_dummy_value()

    return types.none(source, index, stride, target, place), generate


def _generate_fetch(_typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of `array[index]` without waiting for it; it need not exist."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        place = _place(context, builder, signature.args[0], operands, ir.IntType(8))
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        )
        read, near, data = number(0), number(3), number(1)
        builder.call(prefetch, [place, read, near, data])
        return context.get_dummy_value()

    return types.none(array, index), generate


# Conversions


def _generate_splat(_typing: Any, scalar: Any, count: Any) -> Any:
    """Repeat a scalar in each of `count` lanes."""
    lanes = Lanes(scalar, count.literal_value)
    return lanes(scalar, count), lambda _context, builder, _, operands: _spread(builder, operands[0], lanes.count)


def _generate_bits(_typing: Any, lanes: Any) -> Any:
    """Bits of float32 lanes."""
    out = Lanes(types.uint32, lanes.count)
    return out(lanes), lambda context, builder, _, x: builder.bitcast(x[0], _vector(context, out))


def _generate_floats(_typing: Any, lanes: Any) -> Any:
    """Float32 numbers of which lanes hold the bits."""
    out = Lanes(types.float32, lanes.count)
    return out(lanes), lambda context, builder, _, x: builder.bitcast(x[0], _vector(context, out))


def _generate_words(_typing: Any, lanes: Any) -> Any:
    """Integer lanes as 32-bit ones."""
    out = Lanes(types.uint32, lanes.count)

    def generate(context: Any, builder: Any, _: Any, x: Any) -> Any:
        convert = builder.trunc if lanes.dtype.bitwidth > 32 else builder.zext
        return convert(x[0], _vector(context, out))

    return out(lanes), generate


def _generate_doubles(_typing: Any, lanes: Any) -> Any:
    """Float32 numbers, or 32-bit whole ones, as float64: all exactly."""
    out = Lanes(types.float64, lanes.count)

    def generate(context: Any, builder: Any, _: Any, x: Any) -> Any:
        convert = builder.fpext if isinstance(lanes.dtype, types.Float) else builder.uitofp
        return convert(x[0], _vector(context, out))

    return out(lanes), generate


def _generate_root(_typing: Any, lanes: Any) -> Any:
    """Square roots of float lanes, correctly rounded."""

    def generate(context: Any, builder: Any, _: Any, x: Any) -> Any:
        kind = _vector(context, lanes)
        name = f"llvm.sqrt.v{lanes.count}f{lanes.dtype.bitwidth}"
        root = builder.module.declare_intrinsic(name, (), ir.FunctionType(kind, [kind]))
        return builder.call(root, [x[0]])

    return lanes(lanes), generate


def _generate_power_of_two(_typing: Any, lanes: Any) -> Any:
    """Float64 numbers of which 32-bit lanes are the biased exponents."""
    out = Lanes(types.float64, lanes.count)

    def generate(context: Any, builder: Any, _: Any, x: Any) -> Any:
        wide = ir.VectorType(ir.IntType(64), lanes.count)
        shift = ir.Constant(wide, [52] * lanes.count)
        return builder.bitcast(builder.shl(builder.zext(x[0], wide), shift), _vector(context, out))

    return out(lanes), generate


def _generate_octets(_typing: Any, lanes: Any) -> Any:
    """Low bytes of lanes."""
    out = Lanes(types.uint8, lanes.count)
    return out(lanes), lambda context, builder, _, x: builder.trunc(x[0], _vector(context, out))


def _generate_twos(_typing: Any, lanes: Any) -> Any:
    """Each two adjacent lanes as one of twice the width, the first one low."""
    out = Lanes(getattr(types, f"uint{2 * lanes.dtype.bitwidth}"), lanes.count // 2)
    return out(lanes), lambda context, builder, _, x: builder.bitcast(x[0], _vector(context, out))


def _generate_lows(_typing: Any, lanes: Any) -> Any:
    """Low halves of lanes."""
    out = Lanes(getattr(types, f"uint{lanes.dtype.bitwidth // 2}"), lanes.count)
    return out(lanes), lambda context, builder, _, x: builder.trunc(x[0], _vector(context, out))


# Choosing and summing up


def _generate_select(_typing: Any, truth: Any, lanes: Any, other: Any) -> Any:
    """Take lanes where something is true, and those of another vector elsewhere."""
    return lanes(truth, lanes, other), lambda _context, builder, _, x: builder.select(*x)


def _larger(builder: Any, is_float: bool, x: Any, y: Any) -> Any:  # noqa: FBT001 - as the other operations
    return builder.select((builder.fcmp_ordered if is_float else builder.icmp_unsigned)(">", x, y), x, y)


def _generate_larger(_typing: Any, lanes: Any, other: Any) -> Any:
    """Larger numbers, lane by lane."""
    is_float = isinstance(lanes.dtype, types.Float)
    return lanes(lanes, other), lambda _context, builder, _, x: _larger(builder, is_float, *x)


def _generate_smaller(_typing: Any, lanes: Any, other: Any) -> Any:
    """Smaller numbers, lane by lane."""
    is_float = isinstance(lanes.dtype, types.Float)

    def generate(_context: Any, builder: Any, _: Any, x: Any) -> Any:
        return builder.select((builder.fcmp_ordered if is_float else builder.icmp_unsigned)("<", *x), *x)

    return lanes(lanes, other), generate


def _shuffle(builder: Any, x: Any, y: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))


def _generate_evens(_typing: Any, lanes: Any, other: Any) -> Any:
    """Every second lane of two vectors, from the first on."""
    order = list(range(0, 2 * lanes.count, 2))
    return lanes(lanes, other), lambda _context, builder, _, x: _shuffle(builder, x[0], x[1], order)


def _generate_odds(_typing: Any, lanes: Any, other: Any) -> Any:
    """Every second lane of two vectors, from the second on."""
    order = list(range(1, 2 * lanes.count, 2))
    return lanes(lanes, other), lambda _context, builder, _, x: _shuffle(builder, x[0], x[1], order)


def _reduce(builder: Any, x: Any, count: int, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all lanes, halves first: always in the same order."""
    while count > 1:
        count //= 2
        x = combine(_shuffle(builder, x, x, [*range(count)]), _shuffle(builder, x, x, [*range(count, 2 * count)]))
    return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))


def _generate_largest(_typing: Any, lanes: Any) -> Any:
    """Largest of all lanes."""
    is_float = isinstance(lanes.dtype, types.Float)

    def generate(_context: Any, builder: Any, _: Any, x: Any) -> Any:
        return _reduce(builder, x[0], lanes.count, lambda low, high: _larger(builder, is_float, low, high))

    return lanes.dtype(lanes), generate


def _generate_total(_typing: Any, lanes: Any) -> Any:
    """Sum of float lanes."""
    return lanes.dtype(lanes), lambda _context, builder, _, x: _reduce(builder, x[0], lanes.count, builder.fadd)


def _generate_count(_typing: Any, truth: Any) -> Any:
    """How many lanes are true."""

    def generate(_context: Any, builder: Any, _: Any, x: Any) -> Any:
        return builder.zext(builder.ctpop(builder.bitcast(x[0], ir.IntType(truth.count))), ir.IntType(64))

    return types.int64(truth), generate


def _generate_add_squares(_typing: Any, totals: Any, lanes: Any) -> Any:
    """Add the squares of float32 lanes to float64 lanes; a square is exact, and a sum rounded once."""

    def generate(context: Any, builder: Any, _: Any, x: Any) -> Any:
        wide = builder.fpext(x[1], _vector(context, totals))
        return builder.fadd(x[0], builder.fmul(wide, wide, flags=("contract",)), flags=("contract",))

    return totals(totals, lanes), generate


def _generate_lane(_typing: Any, lanes: Any, index: Any) -> Any:
    """One lane."""
    return lanes.dtype(lanes, index), lambda _context, builder, _, x: builder.extract_element(x[0], x[1])


load: Final[Any] = intrinsic(prefer_literal=True)(_generate_load)
store: Final[Any] = intrinsic(_generate_store)
transpose: Final[Any] = intrinsic(_generate_transpose)
fetch: Final[Any] = intrinsic(_generate_fetch)
splat: Final[Any] = intrinsic(prefer_literal=True)(_generate_splat)
bits: Final[Any] = intrinsic(_generate_bits)
floats: Final[Any] = intrinsic(_generate_floats)
words: Final[Any] = intrinsic(_generate_words)
doubles: Final[Any] = intrinsic(_generate_doubles)
power_of_two: Final[Any] = intrinsic(_generate_power_of_two)
root: Final[Any] = intrinsic(_generate_root)
octets: Final[Any] = intrinsic(_generate_octets)
twos: Final[Any] = intrinsic(_generate_twos)
lows: Final[Any] = intrinsic(_generate_lows)
select: Final[Any] = intrinsic(_generate_select)
larger: Final[Any] = intrinsic(_generate_larger)
smaller: Final[Any] = intrinsic(_generate_smaller)
evens: Final[Any] = intrinsic(_generate_evens)
odds: Final[Any] = intrinsic(_generate_odds)
largest: Final[Any] = intrinsic(_generate_largest)
total: Final[Any] = intrinsic(_generate_total)
count: Final[Any] = intrinsic(_generate_count)
add_squares: Final[Any] = intrinsic(_generate_add_squares)
lane: Final[Any] = intrinsic(_generate_lane)
