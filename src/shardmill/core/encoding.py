"""How values come out of weights that are quantized already: data that names what to read, and what each code means.

Every source format is one formula, `value = (code - zero) * scale`, and differs in how its parts are stored. A `Decode`
says that for one weight, as numbers and names; `core.sources` makes it from headers, `kernels.decode` follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

from shardmill.core.experts import Stack
from shardmill.core.header import TensorSpec

CODES: Final = "codes"
SCALE: Final = "scale"
GLOBAL_SCALE: Final = "global_scale"
ZERO_POINT: Final = "zero_point"
ORDER: Final = "g_idx"
SHAPE: Final = "shape"
"""Roles of the tensors that make up a weight."""

E4M3: Final = "e4m3"
E2M1: Final = "e2m1"
INT8: Final = "int8"
WORDS: Final = "words"
AWQ: Final = "awq"
GPTQ: Final = "gptq"
TRANSPOSED: Final = frozenset({AWQ, GPTQ})
"""Codes that are stored `[in, out]`."""


class TensorRef(NamedTuple):
    """A tensor of some shard: what is needed to read it."""

    shard: str
    data_start: int
    spec: TensorSpec
    decode: Decode | None = None
    """Where it holds codes: what its values are made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """One weight `[rows, cols]` that is stored as codes; of an expert stack, the rows of all experts.

    value[r, c] = (code[r, c] - zero[r // tile rows, g(c)]) * scale[r // tile rows, g(c)], in float32 and rounded once,
    where g(c) = c // tile cols, or what the tensor in the role `g_idx` says. A global scale multiplies or divides the
    scale first, which rounds once more.
    """

    format: str
    """Name of the source format, for people."""
    codes: str
    """How codes are stored: `e4m3` and `int8` one per byte; `e2m1` two per byte, even columns in the low half; `words`
    as one little-endian stream of bits per row; `awq` and `gptq` transposed, see `kernels.decode`."""
    bits: int
    rows: int
    cols: int
    tile: tuple[int, int]
    """Rows and columns that share a scale."""
    parts: tuple[tuple[str, TensorRef], ...]
    """Role and tensor of all that is read; codes first."""
    bias: int = 0
    """What is added to an integer code, and to its zero point, before it is stored."""
    zero_offset: int = 0
    """What is subtracted from a zero point before it is stored, beside the bias."""
    divides: bool = False
    """Whether the global scale is a divisor."""
    stack: Stack | None = None
    experts: int = 1
    scheme: int = -1
    """Number of the group of the source's own config, where it has groups."""
    stays: bool = False
    """Whether its codes are written again whatever they hold, because the recipe leaves them alone."""

    def ref(self, role: str) -> TensorRef | None:
        """The tensor in a role, if there is one."""
        return next((ref for name, ref in self.parts if name == role), None)

    @property
    def is_transposed(self) -> bool:
        """Whether rows of the weight are columns of what is stored."""
        return self.codes in TRANSPOSED

    def describe(self) -> list[Any]:
        """All that its values depend on, as JSON: no names of shards, no places, no word for people."""
        parts = [[role, ref.spec.name, ref.spec.dtype, list(ref.spec.shape)] for role, ref in self.parts]
        numbers = [self.bits, self.rows, self.cols, list(self.tile), self.bias, self.zero_offset, self.divides]
        return [self.codes, *numbers, self.experts, self.stays, parts]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What weights of one kind have in common, as far as sizes depend on it."""
        return (self.format, self.rows, self.cols, self.experts)

    def virtual(self, dtype: str) -> TensorSpec:
        """The weight as if it were stored decoded; its bytes are those of the codes."""
        return _virtual(self.parts[0][1].spec, dtype, self.rows, self.cols)


@lru_cache(maxsize=4096)
def _virtual(spec: TensorSpec, dtype: str, rows: int, cols: int) -> TensorSpec:
    return spec._replace(dtype=dtype, shape=(rows, cols))
