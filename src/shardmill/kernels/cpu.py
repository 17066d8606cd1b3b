"""Quantization on the CPU at the speed of its memory: the bytes of `kernels.reference`, without torch.

Neighbours: `kernels.compiled` holds the loops, and is imported by the first call that needs them; this module turns a
scheme into their parameters and their output into stored tensors.

Promise: byte for byte what `kernels.reference` gives for the same row block, and the same statistics; only sums of
squares differ, by rounding of some 1e-12. The first run on a machine compiles for some seconds; later processes load
what it kept: beside the package, or in the user's cache folder where that is read-only, or where NUMBA_CACHE_DIR says.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache, lru_cache
from math import isfinite, prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shardmill.core.dtypes import BITS, COMPUTABLE
from shardmill.core.scheme import Search, WeightArgs
from shardmill.core.search import code_bounds, moves_of
from shardmill.core.statistics import Extent, Statistics

if TYPE_CHECKING:
    from shardmill.kernels.compiled import Codec, Found, Outputs, Rule, Tiles, Tiling, Work

Array = npt.NDArray[Any]
Buffer = bytearray | memoryview | Array

LOGGER: Final = logging.getLogger(__name__)

_PACKED: Final = "pack-quantized"
_FP4_FORMATS: Final = frozenset({"nvfp4-pack-quantized", "mxfp4-pack-quantized"})
_FORMATS: Final = _FP4_FORMATS | {_PACKED, "int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized"}
_INFINITY: Final = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_UNSIGNED: Final = {8 * size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
"""By width in bits."""
_MX_OFFSET: Final = {4: 2, 8: 8}
"""floor(log2(largest value)) of E2M1 and E4M3."""


@cache
def _loops() -> ModuleType | None:
    """Import the compiled loops; None and a warning where that fails."""
    try:
        from numba.core import config

        if not getattr(config, "CACHE_DIR", ""):
            vars(config)["CACHE_DIR"] = _cache_folder(Path(__file__).parent)
        from shardmill.kernels import compiled
    except ImportError as error:
        LOGGER.warning("numba cannot be imported (%s): slower kernels do the work", error)
        return None
    return compiled


def _cache_folder(package: Path) -> str:
    """Where compiled code is kept if not beside the package; empty if there."""
    if os.access(package, os.W_OK):
        return ""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "shardmill" / "numba"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return tempfile.mkdtemp(prefix="shardmill-numba-")
    return str(home) if os.access(home, os.W_OK) else tempfile.mkdtemp(prefix="shardmill-numba-")


def is_available() -> bool:
    """Whether this machine can compile the loops; logs one warning when not."""
    return sys.byteorder == "little" and _loops() is not None


def supports(args: WeightArgs, format: str, dtype: str) -> bool:  # noqa: A002 - the glossary's word
    """Whether `encode` knows a scheme for a source dtype, numba or not.

    >>> supports(WeightArgs(), "int-quantized", "BF16"), supports(WeightArgs(), "int-quantized", "I8")
    (True, False)
    """
    return dtype in COMPUTABLE and format in _FORMATS and args.num_bits <= 8


def from_buffer(buffer: Buffer, dtype: str, shape: tuple[int, ...]) -> Array:
    """Read a tensor from little-endian bytes as unsigned integers of its width, read-only.

    It shares memory with `buffer`, unless that is misaligned.

    >>> [hex(bits) for bits in from_buffer(bytearray.fromhex("0000803f"), "F32", (1,)).tolist()]
    ['0x3f800000']
    """
    bits = _UNSIGNED[BITS[dtype]]
    array = np.frombuffer(buffer, bits).reshape(shape) if prod(shape) else np.empty(shape, bits)
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    return array


def to_bytes(array: Array) -> memoryview:
    """Return the elements of an array as little-endian bytes; shares memory with a contiguous one."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class Workspace:
    """Memory that is used for the codes of one row block after another: fresh pages cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._octets = np.empty(0, np.uint8)
        self._values = np.empty(0, np.float32)
        self._band: tuple[Tiles, Work] | None = None
        self._band_key: tuple[int, int, npt.DTypeLike] | None = None

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """Give `size` bytes of any content, the same as last time."""
        if self._octets.size < size:
            self._octets = np.empty(size, np.uint8)
        return self._octets[:size]

    def take_values(self, size: int) -> npt.NDArray[np.float32]:
        """As `take`, for `size` numbers beside the codes."""
        if self._values.size < size:
            self._values = np.empty(size, np.float32)
        return self._values[:size]

    def take_band(self, bits: Array, tiling: Tiling) -> tuple[Tiles, Work]:
        """Give room for one band of tiles of rows like these, the same as last time where they are alike."""
        key = tiling.cols, tiling.width, bits.dtype
        if self._band is None or key != self._band_key:
            loops = _compiled()
            tiles = loops.new_tiles(-(-tiling.cols // tiling.width))
            self._band, self._band_key = (tiles, loops.new_work(bits[: tiling.cols], tiling.width)), key
        return self._band


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A quantized row block, as `reference.Encoded`."""

    tensors: dict[str, Array]
    """By param name; shaped as they are stored. BF16 is uint16 here, and E4M3 uint8."""
    statistics: Statistics
    finite: bool
    """Whether every weight was finite as float32. If not, the codes and the statistics are unspecified."""


def measure(rows: Array, dtype: str) -> Extent:
    """Find the extent of a tensor; NaN, Inf and float64 values beyond float32 show in `amax`.

    >>> measure(from_buffer(bytearray.fromhex("803f00c0"), "BF16", (2,)), "BF16")
    Extent(low=-2.0, high=1.0)
    """
    bits, kind = _as_bits(rows, dtype)
    if not bits.size:
        return Extent()
    high, low = _compiled().measure(bits)
    if max(high, low) > _INFINITY[kind]:
        return Extent(low=float("nan"), high=float("nan"))
    return Extent().merge(Extent(low=-_value(low, kind), high=_value(high, kind)))


def first_nonfinite(rows: Array, dtype: str) -> tuple[int, tuple[int, ...]] | None:
    """Count the values that are not finite as float32, and find the index of the first; None when all are."""
    bits, kind = _as_bits(rows, dtype)
    found = (bits & bits.dtype.type((1 << BITS[kind] - 1) - 1)) >= _INFINITY[kind]
    if not found.any():
        return None
    return int(found.sum()), tuple(int(index) for index in np.unravel_index(found.argmax(), rows.shape))


def is_finite(rows: Array, dtype: str) -> bool:
    """Whether no value is NaN or Inf in its own dtype, which holds more than float32 where it is F64.

    >>> is_finite(from_buffer(bytearray.fromhex("803f807f"), "BF16", (2,)), "BF16")
    False
    """
    if dtype == "F64":
        return bool(np.isfinite(rows.view(np.float64)).all())
    return isfinite(measure(rows, dtype).amax)


def global_scale(extent: Extent) -> npt.NDArray[np.float32]:
    """Choose the second-level scale of NVFP4 as `reference.global_scale` does.

    >>> global_scale(Extent(high=1.75)).item()
    1536.0001220703125
    """
    with np.errstate(all="ignore"):
        amax = np.maximum(np.array([extent.amax], np.float32), np.finfo(np.float32).tiny)
        scale = np.float32(1) / amax * np.float32(2688)
    return np.where(np.isfinite(scale), scale, np.float32(1)).astype(np.float32)


def encode(
    rows: Array,
    dtype: str,
    args: WeightArgs,
    *,
    format: str,  # noqa: A002 - the glossary's word
    scale_dtype: str,
    whole: Extent | None = None,
    search: Search | None = None,
    importance: npt.NDArray[np.float32] | None = None,
    workspace: Workspace | None = None,
) -> Encoded:
    """Quantize one row block of a weight, as `reference.encode`.

    Args:
        rows: bits of the block [R, K], as `from_buffer` gives them.
        dtype: F16, BF16, F32 or F64, as in the source.
        args: how to quantize; groups divide K.
        format: as `Scheme.format`.
        scale_dtype: safetensors name of the dtype of FP8 and INT scales.
        whole: extent of the tensor (strategy `tensor`) or of its fused set (`tensor_group`).
        search: how scales are chosen; None: from the extremes of each tile alone.
        importance: for a search, what errors in each column are multiplied with; [K].
        workspace: the codes returned lie in its memory and last until its next use.

    Raises:
        ValueError: `whole` is missing, or groups do not divide K.
    """
    loops = _compiled()
    bits, kind = _as_bits(rows, dtype)
    tiling, codec, rule, stride, grid = _way(args, format, scale_dtype, rows.shape, kind, whole)
    workspace = workspace or Workspace()
    room = workspace.take(tiling.rows * stride + loops.SLACK)
    octets = room[: -loops.SLACK]
    is_narrow = args.scale_dtype is not None
    out = loops.Outputs(
        room,
        np.empty(0 if is_narrow else prod(grid), np.uint32),
        np.empty(prod(grid) if is_narrow else 0, np.uint8),
        np.empty(0 if args.symmetric else prod(grid), np.int8),
    )
    tiles, work = workspace.take_band(bits, tiling)
    found: Found = loops.encode(bits, tiling, codec, rule, tiles, work, out)
    if search is not None:
        _search(bits, tiling, codec, rule, args, search, importance, workspace, out)
        found = loops.encode(bits, tiling, codec, rule._replace(is_given=True), tiles, work, out)
    name, codes = _codes(octets, args, format, tiling)
    tensors = {name: codes, "weight_scale": out.exponents if is_narrow else _scales(out.scales, scale_dtype)}
    if not args.symmetric:
        tensors["weight_zero_point"] = out.zero_points
    for param in tensors.keys() - {name}:
        tensors[param] = tensors[param][:1] if args.strategy == "tensor" else tensors[param].reshape(grid)
    if not args.symmetric and format == _PACKED and args.strategy in ("group", "channel"):
        tensors["weight_zero_point"] = _packed_zero_points(tensors["weight_zero_point"], args.num_bits)
    return Encoded(
        tensors=tensors,
        statistics=_statistics(found, rows.size, kind),
        finite=int(found.largest) < _INFINITY[kind],
    )


def _compiled() -> ModuleType:
    loops = _loops()
    if loops is None:
        raise ImportError("the compiled kernels need numba; install it or use the reference kernels")
    return loops


def _as_bits(rows: Array, dtype: str) -> tuple[Array, str]:
    """Flatten to read-only bits of one of the dtypes that the loops read; F64 is rounded to F32."""
    flat = np.ascontiguousarray(rows).reshape(-1)
    if dtype == "F64":
        with np.errstate(all="ignore"):
            flat, dtype = flat.view(np.float64).astype(np.float32).view(np.uint32), "F32"
    flat = flat[:]
    flat.flags.writeable = False
    return flat, dtype


def _value(bits: int, kind: str) -> float:
    """Value of raw bits."""
    if kind == "F16":
        return float(np.uint16(bits).view(np.float16))
    return float(np.uint32(bits << (16 if kind == "BF16" else 0)).view(np.float32))


class _Way(NamedTuple):
    """How row blocks of one shape become codes."""

    tiling: Tiling
    codec: Codec
    rule: Rule
    stride: int
    """Bytes of a row of codes."""
    grid: tuple[int, int]
    """Tiles along each side."""


@lru_cache(maxsize=64)
def _way(
    args: WeightArgs,
    format: str,  # noqa: A002 - as in encode
    scale_dtype: str,
    shape: tuple[int, int],
    kind: str,
    whole: Extent | None,
) -> _Way:
    """Translate a scheme; kept, because a weight has many row blocks and this takes as long as a small one."""
    tiling = _tiling(args, shape, kind)
    stride, width = _row_bytes(args, format, tiling.cols)
    codec = _codec(args, width, is_packed=format == _PACKED)
    grid = -(-tiling.rows // tiling.height), -(-tiling.cols // tiling.width)
    return _Way(tiling, codec, _rule(args, scale_dtype, whole), stride, grid)


def _tiling(args: WeightArgs, shape: tuple[int, ...], kind: str) -> Tiling:
    rows, cols = shape
    height, width = args.block_structure or (1, args.group_size or cols)
    if args.strategy in ("group", "tensor_group") and cols % width:
        raise ValueError(f"group_size {width} does not divide {cols} columns")
    tiling: Tiling = _compiled().Tiling(rows, cols, height, width, kind == "F16")
    return tiling


def _row_bytes(args: WeightArgs, format: str, cols: int) -> tuple[int, int]:  # noqa: A002 - as in encode
    """Bytes of a row of codes, and bits of a code."""
    if format == _PACKED:
        return -(-cols * args.num_bits // 32) * 4, args.num_bits
    return (cols // 2, 4) if format in _FP4_FORMATS else (cols, 8)


def _codec(args: WeightArgs, width: int, *, is_packed: bool) -> Codec:
    loops = _compiled()
    low, high = args.code_range
    is_int, is_fp4 = args.type == "int", args.type == "float" and args.num_bits == 4
    kind = loops.FLOAT4 if is_fp4 else loops.FLOAT8
    if is_int:
        kind = loops.INTEGER if args.symmetric else loops.SHIFTED
    margin = 1.0 if is_int or is_fp4 else 16.0
    codec: Codec = loops.Codec(
        kind=kind,
        bits=width,
        bias=np.uint32(1 << (args.num_bits - 1) if is_packed else 0),
        low=np.float32(low),
        high=np.float32(high),
        clip_low=np.float32(low - margin),
        clip_high=np.float32(high + margin),
    )
    return codec


def _rule(args: WeightArgs, scale_dtype: str, whole: Extent | None) -> Rule:
    loops = _compiled()
    is_fixed = args.strategy == "tensor"
    if whole is None and (is_fixed or args.has_global_scale):
        raise ValueError(f"strategy `{args.strategy}` needs the extent of the whole tensor or fused set")
    extent = whole or Extent()
    kind = loops.TO_BF16 if scale_dtype == "BF16" else loops.TO_F32
    if args.scale_dtype is not None:
        kind = loops.TO_MX if args.is_mx else loops.TO_NVFP4
    rule: Rule = loops.Rule(
        kind=kind,
        code_max=np.float32(args.code_max),
        shared=global_scale(extent)[0] if args.has_global_scale else np.float32(1),
        mx_offset=np.uint32(_MX_OFFSET.get(args.num_bits, 0)),
        is_fixed=is_fixed,
        low=np.float32(extent.low),
        high=np.float32(extent.amax if args.symmetric else extent.high),
        is_given=False,
    )
    return rule


def _search(
    bits: Array,
    tiling: Tiling,
    codec: Codec,
    rule: Rule,
    args: WeightArgs,
    search: Search,
    importance: npt.NDArray[np.float32] | None,
    workspace: Workspace,
    out: Outputs,
) -> None:
    """Replace the min/max scales of a row block in `out` by better ones."""
    from shardmill.kernels import compiled_search as hunting  # compiles for seconds, and few ask for it

    moves, halves = moves_of(args), round(2 * search.norm)
    is_wide = args.strategy in ("channel", "block") or tiling.width > hunting.NARROW
    magic, (first, last) = np.float32(moves.magic), code_bounds(args)
    hunt = hunting.Hunt(
        moves=np.array(moves.moves, np.int32),
        unit=np.float32(moves.unit),
        magic=magic,
        most=np.nextafter(magic, np.float32(0)),
        halves=halves,
        first=np.uint32(first),
        span=np.uint32(last - first + 1),
    )
    values = workspace.take_values(bits.size)
    _compiled().widen(bits, tiling.is_half, values)
    weights = np.empty(0, np.float32) if importance is None else _scaled(importance, tiling.width)
    run = hunting.searcher(codec.kind, halves == 4 and importance is None)
    run(values, tiling, is_wide, rule, codec, hunt, hunting.new_bench(tiling, is_wide, weights), out)


def _scaled(importance: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
    """As `reference_search.scaled`, in one dimension."""
    tiles = np.pad(importance, (0, -len(importance) % width)).reshape(-1, width)
    exponents = tiles.max(1, keepdims=True).view(np.uint32) >> np.uint32(23)
    factors = np.maximum(254 - exponents.astype(np.int32), 1).astype(np.uint32) << np.uint32(23)
    scaled: npt.NDArray[np.float32] = (tiles * factors.view(np.float32)).reshape(-1)[: len(importance)]
    return scaled


def _codes(octets: Array, args: WeightArgs, format: str, tiling: Tiling) -> tuple[str, Array]:  # noqa: A002 - as above
    """Name, dtype and shape of the codes."""
    if format == _PACKED:
        return "weight_packed", octets.view(np.int32).reshape(tiling.rows, -1)
    rows = octets.reshape(tiling.rows, -1)
    if format in _FP4_FORMATS:
        return "weight_packed", rows
    return "weight", rows.view(np.int8) if args.type == "int" else rows


def _scales(words: npt.NDArray[np.uint32], scale_dtype: str) -> Array:
    return words.astype(np.uint16) if scale_dtype == "BF16" else words.view(np.float32)


def _packed_zero_points(zero_points: Array, bits: int) -> Array:
    packed = np.zeros((-(-len(zero_points) * bits // 32), zero_points.shape[1]), np.uint32)
    _compiled().pack_rows(zero_points, bits, packed)
    return packed.view(np.int32)


def _statistics(found: Found, count: int, kind: str) -> Statistics:
    return Statistics(
        count=count,
        squared_error=found.squared_error,
        squared_weight=found.squared_weight,
        max_error=_value(int(found.worst), "F32"),
        amax=_value(int(found.largest), kind),
        clipped=found.clipped,
        zeroed=found.zeroed,
        nonzero=found.nonzero,
    )
