"""The table of source formats: params that make up one weight, their dtypes, and what makes a `Decode` of them.

A format is a row of `FORMATS`. It is recognised by names, dtypes and shapes; config.json is asked only for what those
do not tell.

Formulas: compressed-tensors (pack-quantized, int-, float- and naive-quantized, nvfp4, mxfp4, mxfp8), DeepSeek's block
FP8 and FP4, OCP Microscaling 1.0 (E8M0, E2M1), ModelOpt, AutoAWQ's GEMM layout, GPTQ's layout (`gptq` stores zero
points minus one, `gptq_v2` as they are).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardmill.core.encoding import (
    AWQ,
    E2M1,
    E4M3,
    GPTQ,
    INT8,
    WORDS,
    Decode,
    TensorRef,
)
from shardmill.core.matching import split_name
from shardmill.core.written import WrittenConfig, WrittenGroup
from shardmill.errors import RecipeInvalid, show

_FLOATS: Final = frozenset({"F32", "BF16", "F16"})
_EXPONENTS: Final = frozenset({"F8_E8M0", "U8"})
CODE_DTYPES: Final = frozenset({"F8_E4M3", "I8", "U8", "F4"})
_BLOCK: Final = (128, 128)
_WORD: Final = 32


REFUSED: Final[Mapping[str, str]] = {
    "bitsandbytes": "bitsandbytes",
    "gguf": "GGUF",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "eetq": "EETQ",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "higgs": "HIGGS",
    "bitnet": "BitNet",
    "torchao": "torchao",
    "quanto": "Quanto",
    "auto-round": "AutoRound",
}
"""Values of `quant_method` that are not read, and what they are called."""


class Misfit(Exception):
    """Tensors that look like a format and cannot be it."""

    def __init__(self, kind: str, message: str, way_out: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.way_out = kind, message, way_out


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """What config.json says of the quantization of the checkpoint."""

    section: Mapping[str, Any]
    written: WrittenConfig | None
    """Groups and patterns, where it is compressed-tensors."""

    @property
    def method(self) -> str:
        """`quant_method`, lower case; empty where there is none."""
        return str(self.section.get("quant_method") or "").lower()

    def group_of(self, module: str) -> tuple[int, WrittenGroup | None]:
        """Number and entry of the module's group; its patterns are matched in bounded time."""
        if self.written is None:
            return -1, None
        try:
            target = self.written.matcher.target_of(module)
        except RecipeInvalid as error:  # a pattern of the source that cannot be matched in bounded time
            raise Misfit("source-ambiguous", error.problems[0].message, "correct the source's config.json") from error
        return (target.group, self.written.groups[target.group]) if target is not None else (-1, None)


Params = Mapping[str, TensorRef]
"""Tensors of one module by param name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFormat:
    """One way to store a weight: params by role, and what makes a `Decode` of them."""

    name: str
    codes: str
    """Param that holds the codes."""
    code_dtypes: frozenset[str]
    scale: str
    scale_dtypes: frozenset[str]
    needs: tuple[str, ...] = ()
    """Further params without which it is not this format."""
    may_have: tuple[str, ...] = ()
    methods: frozenset[str] = frozenset()
    """Values of `quant_method` that go with it, beside none."""
    build: Callable[[str, Params, SourceConfig], Decode]

    @property
    def params(self) -> frozenset[str]:
        """Every param that may belong to it."""
        return frozenset((self.codes, self.scale, *self.needs, *self.may_have))

    def fits(self, params: Params) -> bool:
        """Whether names and dtypes are those of the format."""
        return (
            self.codes in params
            and params[self.codes].spec.dtype in self.code_dtypes
            and self.scale in params
            and params[self.scale].spec.dtype in self.scale_dtypes
            and all(name in params for name in self.needs)
        )

    def build_checked(self, module: str, params: Params, source: SourceConfig) -> Decode:
        """Make the `Decode` of a module whose params fit.

        Raises:
            Misfit: config.json says otherwise, or shapes do not go together.
        """
        if source.method and source.method not in self.methods and source.method not in REFUSED:
            message = f"{show(self.codes)} and {show(self.scale)} are not those of quant_method {show(source.method)}"
            raise Misfit("source-ambiguous", message, "correct the source's config.json")
        return self.build(module, params, source)


def _matrix(ref: TensorRef) -> tuple[int, int]:
    shape = ref.spec.shape
    if len(shape) != 2 or 0 in shape:
        raise Misfit("codes-shape", f"expected codes of a matrix, found shape {list(shape)}")
    return shape[0], shape[1]


def _bad_scale(ref: TensorRef, rows: int, cols: int, expected: str) -> Misfit:
    message = f"{show(split_name(ref.spec.name)[1])} of shape {list(ref.spec.shape)} does not scale [{rows}, {cols}]"
    return Misfit("scale-shape", f"{message}; expected {expected}")


def _tile(scale: TensorRef, rows: int, cols: int, block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale, by its shape: tensor, channel, group, or blocks as told."""
    shape = scale.spec.shape
    if shape in ((), (1,), (1, 1)):
        return rows, cols
    if shape in ((rows,), (rows, 1)):
        return 1, cols
    if len(shape) == 2 and shape[0] == rows and cols % shape[1] == 0:
        return 1, cols // shape[1]
    if shape == (-(-rows // block[0]), -(-cols // block[1])):
        return block
    raise _bad_scale(scale, rows, cols, f"one per tensor, row, group or block of {block[0]}x{block[1]}")


def _block_of(module: str, source: SourceConfig) -> tuple[int, int]:
    """Rows and columns of a block, as config.json says; 128x128 where it does not."""
    _, group = source.group_of(module)
    if group is not None and group.scheme.weights.block_structure:
        return group.scheme.weights.block_structure
    value = source.section.get("weight_block_size")
    if value is None:
        return _BLOCK
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise Misfit("scale-shape", f"expected weight_block_size as two positive integers, found {value!r}"[:200])
    return value[0], value[1]


def _roles(params: Params, **roles: str) -> tuple[tuple[str, TensorRef], ...]:
    return tuple((role, params[param]) for role, param in roles.items() if param in params)


def _fp8(module: str, params: Params, source: SourceConfig, scale: str) -> Decode:
    rows, cols = _matrix(params["weight"])
    found = params[scale]
    tile = (1, 32) if found.spec.dtype == "U8" and scale == "weight_scale" else None
    if tile and found.spec.shape != (rows, -(-cols // 32)):
        raise _bad_scale(found, rows, cols, "one exponent per 32 columns")
    tile = tile or _tile(found, rows, cols, _block_of(module, source))
    name = "mxfp8" if tile == (1, 32) and found.spec.dtype in _EXPONENTS else "fp8"
    return Decode(
        format=f"{name} {_granularity(tile, rows, cols)}",
        codes=E4M3,
        bits=8,
        rows=rows,
        cols=cols,
        tile=tile,
        parts=_roles(params, codes="weight", scale=scale),
        scheme=source.group_of(module)[0],
    )


def _granularity(tile: tuple[int, int], rows: int, cols: int) -> str:
    if tile == (rows, cols):
        return "per tensor"
    if tile[0] == 1:
        return "per channel" if tile[1] == cols else f"per group of {tile[1]}"
    return f"in blocks of {tile[0]}x{tile[1]}"


def _fp4_pairs(
    module: str, params: Params, source: SourceConfig, codes: str, scale: str, group: int
) -> tuple[int, int]:
    del module, source
    rows, cols = _matrix(params[codes])
    cols = cols if params[codes].spec.dtype == "F4" else 2 * cols
    if params[scale].spec.shape != (rows, -(-cols // group)):
        raise _bad_scale(params[scale], rows, cols, f"one per {group} columns")
    return rows, cols


def _mxfp4(module: str, params: Params, source: SourceConfig, codes: str, scale: str) -> Decode:
    rows, cols = _fp4_pairs(module, params, source, codes, scale, 32)
    return Decode(
        format="mxfp4",
        codes=E2M1,
        bits=4,
        rows=rows,
        cols=cols,
        tile=(1, 32),
        parts=_roles(params, codes=codes, scale=scale),
        scheme=source.group_of(module)[0],
    )


def _nvfp4(module: str, params: Params, source: SourceConfig, codes: str, second: str) -> Decode:
    rows, cols = _fp4_pairs(module, params, source, codes, "weight_scale", 16)
    if params[second].spec.shape not in ((), (1,)):
        raise _bad_scale(params[second], rows, cols, "one per tensor")
    return Decode(
        format="nvfp4" if second == "weight_global_scale" else "ModelOpt nvfp4",
        codes=E2M1,
        bits=4,
        rows=rows,
        cols=cols,
        tile=(1, 16),
        parts=_roles(params, codes=codes, scale="weight_scale", global_scale=second),
        divides=second == "weight_global_scale",
        scheme=source.group_of(module)[0],
    )


def _check_zero_point(ref: TensorRef | None, expected: tuple[int, ...], rows: int, cols: int) -> None:
    if ref is not None and ref.spec.shape != expected and not (len(expected) == 2 and ref.spec.shape == expected[:1]):
        raise _bad_scale(ref, rows, cols, f"shape {list(expected)}")


def _int8(module: str, params: Params, source: SourceConfig) -> Decode:
    rows, cols = _matrix(params["weight"])
    tile = _tile(params["weight_scale"], rows, cols, _block_of(module, source))
    zero = params.get("weight_zero_point")
    if zero is not None and (zero.spec.shape != params["weight_scale"].spec.shape or zero.spec.dtype != "I8"):
        raise _bad_scale(zero, rows, cols, "zero points in I8, one for each scale")
    if "weight_g_idx" in params:
        _check_order(params["weight_g_idx"], cols)
    return Decode(
        format=f"int8 codes {_granularity(tile, rows, cols)}",
        codes=INT8,
        bits=8,
        rows=rows,
        cols=cols,
        tile=tile,
        parts=_roles(
            params, codes="weight", scale="weight_scale", zero_point="weight_zero_point", g_idx="weight_g_idx"
        ),
        scheme=source.group_of(module)[0],
    )


def _check_order(ref: TensorRef, cols: int) -> None:
    if ref.spec.shape != (cols,) or ref.spec.dtype not in ("I32", "I64"):
        raise Misfit("scale-shape", f"expected group numbers of {cols} columns, found shape {list(ref.spec.shape)}")


def _packed(module: str, params: Params, source: SourceConfig) -> Decode:
    number, group = source.group_of(module)
    if group is None or group.format != "pack-quantized":
        message = "expected a pack-quantized group of quantization_config that tells its bits, found none"
        raise Misfit("source-ambiguous", message, "complete the source's config.json")
    args = group.scheme.weights
    bits, scale = args.num_bits, params["weight_scale"]
    rows, words = _matrix(params["weight_packed"])
    shape = scale.spec.shape
    cols = words * _WORD // bits
    if args.strategy == "group" and args.group_size and len(shape) == 2:
        cols = shape[1] * args.group_size
    if -(-cols * bits // _WORD) != words:
        raise Misfit("codes-shape", f"{words} words of {bits}-bit codes do not hold rows of {cols}")
    tile = _tile(scale, rows, cols, _BLOCK)
    groups = cols // tile[1] if tile[0] == 1 else 1
    zero = params.get("weight_zero_point")
    if zero is not None:
        expected = (-(-rows * bits // _WORD), groups) if zero.spec.dtype == "I32" else shape
        _check_zero_point(zero, expected, rows, cols)
    if "weight_g_idx" in params:
        _check_order(params["weight_g_idx"], cols)
    return Decode(
        format=f"int{bits} packed {_granularity(tile, rows, cols)}",
        codes=WORDS,
        bits=bits,
        rows=rows,
        cols=cols,
        tile=tile,
        bias=1 << (bits - 1),
        parts=_roles(
            params,
            codes="weight_packed",
            scale="weight_scale",
            zero_point="weight_zero_point",
            g_idx="weight_g_idx",
            shape="weight_shape",
        ),
        scheme=number,
    )


def _transposed(module: str, params: Params, source: SourceConfig) -> Decode:
    """AWQ and GPTQ, told apart by the shapes of codes and scales."""
    del module
    inner, outer = _matrix(params["qweight"])
    groups, rows = _matrix(params["scales"])
    if outer * 8 == rows:
        return _awq(params, source, rows, inner, groups)
    if outer == rows:
        return _gptq(params, source, rows, inner, groups)
    message = f"qweight {[inner, outer]} and scales {[groups, rows]} are those of neither AWQ (GEMM) nor GPTQ"
    raise Misfit("codes-shape", message, "start from a checkpoint in one of these layouts")


def _awq(params: Params, source: SourceConfig, rows: int, cols: int, groups: int) -> Decode:
    version = str(source.section.get("version") or "gemm").lower()
    if version != "gemm" or source.section.get("bits", 4) != 4:
        raise Misfit("source-unsupported", "AWQ is read in its 4-bit GEMM layout alone", "convert it to that first")
    zero = params.get("qzeros")
    if cols % groups:
        raise _bad_scale(params["scales"], rows, cols, "whole groups of columns")
    if zero is not None:
        _check_zero_point(zero, (groups, rows // 8), rows, cols)
    _check_method(source, "awq")
    return Decode(
        format=f"AWQ int4 per group of {cols // groups}",
        codes=AWQ,
        bits=4,
        rows=rows,
        cols=cols,
        tile=(1, cols // groups),
        bias=8 if zero is None else 0,
        parts=_roles(params, codes="qweight", scale="scales", zero_point="qzeros"),
    )


def _check_method(source: SourceConfig, expected: str) -> None:
    if source.method not in ("", expected):
        message = f"the tensors are those of {expected}, quant_method in config.json is {show(source.method)}"
        raise Misfit("source-ambiguous", message, "correct the source's config.json")


def _gptq(params: Params, source: SourceConfig, rows: int, inner: int, groups: int) -> Decode:
    _check_method(source, "gptq")
    layout = str(source.section.get("checkpoint_format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise Misfit("source-unsupported", f"GPTQ layout {show(layout)} is not read", "save it as gptq or gptq_v2")
    bits = _gptq_bits(params, source, rows)
    if inner * _WORD % bits:
        raise Misfit("codes-shape", f"{inner} words do not hold whole {bits}-bit codes")
    cols = inner * _WORD // bits
    if cols % groups:
        raise _bad_scale(params["scales"], rows, cols, "whole groups of columns")
    if "g_idx" in params:
        _check_order(params["g_idx"], cols)
    has_zeros = "qzeros" in params
    return Decode(
        format=f"GPTQ int{bits} per group of {cols // groups}",
        codes=GPTQ,
        bits=bits,
        rows=rows,
        cols=cols,
        tile=(1, cols // groups),
        bias=0 if has_zeros else 1 << (bits - 1),
        zero_offset=1 if layout == "gptq" and has_zeros else 0,
        parts=_roles(params, codes="qweight", scale="scales", zero_point="qzeros", g_idx="g_idx"),
    )


def _gptq_bits(params: Params, source: SourceConfig, rows: int) -> int:
    """Bits of a code: as wide as a zero point; where there is none, as config.json says."""
    said = source.section.get("bits")
    if "qzeros" not in params:
        if said not in (2, 3, 4, 8):
            raise Misfit("source-ambiguous", "neither zero points nor config.json tell the bits of a code")
        return int(said)
    groups, words = _matrix(params["qzeros"])
    bits, rest = divmod(words * _WORD, rows)
    if rest or bits not in (2, 3, 4, 8) or groups != params["scales"].spec.shape[0]:
        raise _bad_scale(params["qzeros"], rows, 0, "zero points of 2, 3, 4 or 8 bits, one for each scale")
    if said not in (None, bits):
        message = f"the tensors hold {bits}-bit codes, config.json says {said!r}"[:200]
        raise Misfit("source-ambiguous", message, "correct the source's config.json")
    return bits


STATIC: Final = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")
"""Static scales of activations: they belong to the old quantization, and go with it."""

FORMATS: Final[tuple[SourceFormat, ...]] = (
    SourceFormat(
        name="fp8",
        codes="weight",
        code_dtypes=frozenset({"F8_E4M3"}),
        scale="weight_scale_inv",
        scale_dtypes=_FLOATS | _EXPONENTS,
        may_have=STATIC,
        methods=frozenset({"fp8"}),
        build=lambda module, params, source: _fp8(module, params, source, "weight_scale_inv"),
    ),
    SourceFormat(
        name="fp8",
        codes="weight",
        code_dtypes=frozenset({"F8_E4M3"}),
        scale="scale",
        scale_dtypes=_FLOATS | _EXPONENTS,
        may_have=STATIC,
        methods=frozenset({"fp8"}),
        build=lambda module, params, source: _fp8(module, params, source, "scale"),
    ),
    SourceFormat(
        name="fp4",
        codes="weight",
        code_dtypes=frozenset({"F4", "I8", "U8"}),
        scale="scale",
        scale_dtypes=_EXPONENTS,
        methods=frozenset({"fp8"}),
        build=lambda module, params, source: _mxfp4(module, params, source, "weight", "scale"),
    ),
    SourceFormat(
        name="fp8",
        codes="weight",
        code_dtypes=frozenset({"F8_E4M3"}),
        scale="weight_scale",
        scale_dtypes=_FLOATS | _EXPONENTS,
        may_have=STATIC,
        methods=frozenset({"compressed-tensors", "modelopt", "fp8", "fbgemm_fp8"}),
        build=lambda module, params, source: _fp8(module, params, source, "weight_scale"),
    ),
    SourceFormat(
        name="int8",
        codes="weight",
        code_dtypes=frozenset({"I8"}),
        scale="weight_scale",
        scale_dtypes=_FLOATS,
        may_have=("weight_zero_point", "weight_g_idx", *STATIC),
        methods=frozenset({"compressed-tensors"}),
        build=_int8,
    ),
    SourceFormat(
        name="pack-quantized",
        codes="weight_packed",
        code_dtypes=frozenset({"I32"}),
        scale="weight_scale",
        scale_dtypes=_FLOATS,
        may_have=("weight_zero_point", "weight_g_idx", "weight_shape", *STATIC),
        methods=frozenset({"compressed-tensors"}),
        build=_packed,
    ),
    SourceFormat(
        name="nvfp4",
        codes="weight_packed",
        code_dtypes=frozenset({"U8"}),
        scale="weight_scale",
        scale_dtypes=frozenset({"F8_E4M3"}),
        needs=("weight_global_scale",),
        may_have=("input_global_scale", *STATIC),
        methods=frozenset({"compressed-tensors"}),
        build=lambda module, params, source: _nvfp4(module, params, source, "weight_packed", "weight_global_scale"),
    ),
    SourceFormat(
        name="mxfp4",
        codes="weight_packed",
        code_dtypes=frozenset({"U8"}),
        scale="weight_scale",
        scale_dtypes=_EXPONENTS,
        may_have=STATIC,
        methods=frozenset({"compressed-tensors"}),
        build=lambda module, params, source: _mxfp4(module, params, source, "weight_packed", "weight_scale"),
    ),
    SourceFormat(
        name="ModelOpt nvfp4",
        codes="weight",
        code_dtypes=frozenset({"U8"}),
        scale="weight_scale",
        scale_dtypes=frozenset({"F8_E4M3"}),
        needs=("weight_scale_2",),
        may_have=STATIC,
        methods=frozenset({"modelopt", "modelopt_fp4"}),
        build=lambda module, params, source: _nvfp4(module, params, source, "weight", "weight_scale_2"),
    ),
    SourceFormat(
        name="AWQ or GPTQ",
        codes="qweight",
        code_dtypes=frozenset({"I32"}),
        scale="scales",
        scale_dtypes=_FLOATS,
        may_have=("qzeros", "g_idx"),
        methods=frozenset({"awq", "gptq"}),
        build=_transposed,
    ),
)
