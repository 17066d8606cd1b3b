"""What compressed-tensors itself gives for a weight, with scales computed in float32 and rounded once.

Its functions take the arithmetic from the dtype of their arguments, so feeding them float32 (or 16-bit extremes, where
the division is done in float32 and rounded once anyway) turns the library into a judge of our bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from shardmill.core.dtypes import scale_dtype_for
from shardmill.core.scheme import Scheme
from shardmill.core.statistics import Extent
from shardmill.kernels import reference
from shardmill.kernels.ct_adapter import scheme_to_ct

SOURCES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def expected(scheme: Scheme, weight: Tensor, set_amax: float | None = None) -> dict[str, Tensor]:
    """Quantize a 2-D weight on the CPU with compressed-tensors.

    `set_amax` is the largest magnitude of the fused set, for schemes with a global scale.
    """
    source = weight if weight.dtype == torch.bfloat16 else weight.float()
    ct_scheme = scheme_to_ct(scheme, ["Linear"])
    args, low, high = ct_scheme.weights, *_extremes(source, ct_scheme.weights)
    state = {"weight": weight.float()}
    if args.strategy == "tensor_group":
        amax = torch.tensor([float(weight.float().abs().amax()) if set_amax is None else set_amax])
        state["weight_global_scale"] = generate_gparam(-amax, amax)
        scale, _ = calculate_qparams(low.float(), high.float(), args, global_scale=state["weight_global_scale"])
    elif args.scale_dtype == torch.uint8:
        scale, _ = calculate_qparams(low.float(), high.float(), args)
    elif args.symmetric:
        scale, _ = calculate_qparams(low, high, args)
    else:
        scale, state["weight_zero_point"] = _asymmetric(low.float(), high.float(), args, source.dtype)
    stored = compressor(scheme).compress(state | {"weight_scale": scale.float()}, ct_scheme)
    if args.scale_dtype is None:
        stored["weight_scale"] = scale
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def compressor(scheme: Scheme) -> Any:
    """The compressor of the scheme's format; a test says where that is not the one the library infers."""
    return BaseCompressor.get_value_from_registry(scheme.format)


def _extremes(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Smallest and largest value in the scope of each scale."""
    rows, cols = weight.shape
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "block":
        height, width = args.block_structure
        filled = torch.nn.functional.pad(weight, (0, -cols % width, 0, -rows % height))
        tiles = filled.reshape(-(-rows // height), height, -1, width)
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    groups = weight.reshape(rows, -1, args.group_size or cols)
    return groups.amin(2), groups.amax(2)


def _asymmetric(low: Tensor, high: Tensor, args: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale from float32 extremes; where it vanishes in `dtype`, eps and zero point 0: the library leaves that open."""
    unrounded, zero_point = calculate_qparams(low, high, args)
    steps = torch.tensor(2.0**args.num_bits - 1)
    vanishes = ((high.clamp(min=0) - low.clamp(max=0)) / steps).to(dtype) == 0
    scale = torch.where(vanishes, torch.tensor(torch.finfo(dtype).eps, dtype=dtype), unrounded.to(dtype))
    return scale, torch.where(vanishes, torch.zeros_like(zero_point), zero_point)


def actual(scheme: Scheme, weight: Tensor, extent: Extent | None = None) -> dict[str, Tensor]:
    """Quantize a 2-D weight with the kernel, in one row block, and add what belongs to the whole tensor."""
    args, whole = scheme.weights, extent or reference.measure(weight)
    scale_dtype = scale_dtype_for({dtype: name for name, dtype in reference.DTYPES.items()}[weight.dtype])
    stored = reference.encode(weight, args, format=scheme.format, scale_dtype=scale_dtype, whole=whole).tensors
    if scheme.format == "pack-quantized":
        stored["weight_shape"] = torch.tensor(weight.shape)
    if args.has_global_scale:
        stored["weight_global_scale"] = reference.global_scale(whole)
    return stored


def octets(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as uint8, in one dimension."""
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def differing_bytes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of different bytes by param name; all of them where name, dtype or shape differ."""
    found = {name: octets(tensor).numel() for name, tensor in {**one, **other}.items()}
    for name in one.keys() & other.keys():
        if (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape):
            found[name] = int((octets(one[name]) != octets(other[name])).sum())
    return {name: count for name, count in sorted(found.items()) if count}


def _normal(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _outlier(shape: tuple[int, int]) -> Tensor:
    weight = _normal(shape, 3) * 0.02
    weight[1, 5], weight[-1, -1] = 900.0, -7.0
    return weight


def _holes(shape: tuple[int, int]) -> Tensor:
    """Zero rows, zero groups, and zeros of either sign among other values."""
    weight = _normal(shape, 4) * 0.02
    weight[0], weight[3, : shape[1] // 2], weight[5, 1::3], weight[6, ::2] = 0.0, 0.0, -0.0, 0.0
    return weight


def _one_sided(shape: tuple[int, int]) -> Tensor:
    weight = _normal(shape, 5).abs() * 0.02 + 1e-4
    weight[1::2] *= -1
    weight[4] += 0.5
    return weight


def _tiny(shape: tuple[int, int]) -> Tensor:
    """Rows from 1 down to the smallest subnormal numbers of float32."""
    magnitudes = torch.logspace(0, -45, shape[0], dtype=torch.float64)
    return (_normal(shape, 6).double() * magnitudes[:, None]).float()


INPUTS: Final[Mapping[str, Callable[[tuple[int, int]], Tensor]]] = {
    "gaussian": lambda shape: _normal(shape, 1) * 0.02,
    "heavy tails": lambda shape: _normal(shape, 2) ** 5 * 0.01,
    "outlier": _outlier,
    "holes": _holes,
    "one-sided": _one_sided,
    "tiny": _tiny,
}


def sample(kind: str, dtype: torch.dtype, shape: tuple[int, int] = (40, 256)) -> Tensor:
    """A weight of the kind named in `INPUTS`, finite in `dtype`."""
    limit = torch.finfo(dtype).max if dtype == torch.float16 else math.inf
    return INPUTS[kind](shape).clamp(-limit, limit).to(dtype)
