"""When codes need not be decoded: a scheme in which the very codes of a weight can be written again, without loss.

Code, scale and zero point keep their values; how they are laid out, and the dtype of the scale, may change. Whether a
weight can be treated so follows from its header. Some conditions lie in values, such as scales that are no zero; where
they do not hold, rows are quantized like any others, which has the same layout.
"""

from __future__ import annotations

from typing import Final

from shardmill.core.encoding import (
    AWQ,
    E2M1,
    E4M3,
    GLOBAL_SCALE,
    GPTQ,
    INT8,
    ORDER,
    SCALE,
    WORDS,
    ZERO_POINT,
    Decode,
)
from shardmill.core.scheme import PRESETS, Scheme, WeightArgs

_EXPONENTS: Final = frozenset({"F8_E8M0", "U8"})
_INTEGERS: Final = {WORDS, AWQ, GPTQ, INT8}


def can_recode(decode: Decode, scheme: Scheme) -> bool:
    """Tell whether the codes of a weight are codes of a scheme.

    >>> from shardmill.core.encoding import TensorRef
    >>> from shardmill.core.header import TensorSpec
    >>> from shardmill.core.scheme import preset
    >>> ref = TensorRef("s", 0, TensorSpec("w", "U8", (2, 16), 0, 32))
    >>> decode = Decode(
    ...     format="", codes=E2M1, bits=4, rows=2, cols=32, tile=(1, 32), parts=(("codes", ref), ("scale", ref))
    ... )
    >>> (
    ...     can_recode(decode, preset("MXFP4A16")),
    ...     can_recode(decode, preset("NVFP4A16")),
    ...     can_recode(decode, preset("W4A16")),
    ... )
    (True, True, False)
    """
    args = scheme.weights
    if args.type == "int":
        return _can_recode_integers(decode, args)
    if args.num_bits == 4:
        if decode.codes != E2M1:
            return False
        if args.has_global_scale:
            return is_raised(decode, scheme) or (decode.tile == (1, 16) and decode.ref(GLOBAL_SCALE) is not None)
        return decode.tile == (1, 32) and _has_exponents(decode)
    if decode.codes != E4M3:
        return False
    return decode.tile == _tile(decode, args) and (_has_exponents(decode) or not args.is_mx)


def is_raised(decode: Decode, scheme: Scheme) -> bool:
    """Tell whether MXFP4 is to be written as NVFP4: its powers of two become local scales, if their range allows."""
    return (
        scheme.weights.has_global_scale and decode.codes == E2M1 and decode.tile == (1, 32) and _has_exponents(decode)
    )


def _has_exponents(decode: Decode) -> bool:
    scale = decode.ref(SCALE)
    return scale is not None and scale.spec.dtype in _EXPONENTS


def _tile(decode: Decode, args: WeightArgs) -> tuple[int, int]:
    """Rows and columns that share a scale of a scheme."""
    if args.strategy == "tensor":
        return decode.rows, decode.cols
    if args.block_structure:
        return args.block_structure
    return 1, args.group_size or decode.cols


def _can_recode_integers(decode: Decode, args: WeightArgs) -> bool:
    if decode.codes not in _INTEGERS or decode.bits != args.num_bits or decode.tile != _tile(decode, args):
        return False
    if decode.tile[0] != 1 or (decode.ref(ORDER) is not None and decode.codes != GPTQ):
        return False
    has_zeros = decode.ref(ZERO_POINT) is not None
    return not (args.symmetric and has_zeros) or decode.codes == GPTQ


def natural_scheme(decode: Decode) -> Scheme | None:
    """The scheme in which a weight that is left alone can be written again; None where there is none.

    Static scales of activations are given up for dynamic ones, which every engine has.
    """
    if decode.stack is not None or decode.ref(ORDER) is not None:
        return None
    found = _natural(decode)
    return found if found is not None and can_recode(decode, found) else None


def _natural(decode: Decode) -> Scheme | None:
    if decode.codes == E4M3:
        return _natural_fp8(decode)
    if decode.codes == E2M1:
        return PRESETS["MXFP4A16" if _has_exponents(decode) else "NVFP4A16"]
    if decode.codes in (AWQ, GPTQ):
        symmetric = decode.ref(ZERO_POINT) is None
        args = WeightArgs(num_bits=decode.bits, strategy="group", group_size=decode.tile[1], symmetric=symmetric)
        return Scheme(weights=args)
    return None


def _natural_fp8(decode: Decode) -> Scheme | None:
    channel, blocks = PRESETS["FP8_DYNAMIC"], PRESETS["FP8_BLOCK"]
    if decode.tile == (decode.rows, decode.cols):
        return Scheme(weights=WeightArgs(type="float", strategy="tensor"), input_activations=channel.input_activations)
    if decode.tile == (1, 32) and _has_exponents(decode):
        return PRESETS["MXFP8"]
    if decode.tile == (1, decode.cols):
        return channel
    if decode.tile[0] == 1:
        return None
    args = WeightArgs(type="float", strategy="block", block_structure=decode.tile)
    return blocks if args == blocks.weights else Scheme(weights=args, input_activations=blocks.input_activations)
