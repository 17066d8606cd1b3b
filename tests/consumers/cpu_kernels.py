"""Test-only kernels for formats that vLLM loads but cannot compute on CPU: NVFP4A16, MXFP4 and MXFP8.

Weights are decoded once, after vLLM has loaded and merged them, and activations stay as they are. So vLLM's own reading
of the config, its matching of modules, its merging of q, k, v and gate, up, and the one global scale that it keeps of
the merged members are what is put to the test. For NVFP4 with quantized activations vLLM has an emulation of its own,
which it offers on accelerators only; here it runs on CPU. Imported inside vLLM's environment only, which has no
shardmill.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final

import torch
from torch import Tensor
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearKernel
from vllm.model_executor.kernels.linear.mxfp8.Mxfp8LinearKernel import Mxfp8LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4 as nvfp4
from vllm.platforms import PlatformEnum

_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of E2M1, by the three low bits of a code; the fourth is the sign."""


def e2m1_pairs(octets: Tensor) -> Tensor:
    """`[rows, bytes]` to `[rows, 2 * bytes]`, the low half of each byte first."""
    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    codes = octets.view(torch.uint8).long()
    return table[torch.stack((codes % 16, codes // 16), dim=-1)].flatten(1)


def powers_of_two(exponents: Tensor) -> Tensor:
    """E8M0: a bare exponent with bias 127."""
    return torch.exp2(exponents.view(torch.uint8).float() - 127)


def _spread(scales: Tensor, values: Tensor) -> Tensor:
    """One scale for each value of a row, whose groups are equally wide."""
    return scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)


class _Decoding(ABC):
    """A kernel that multiplies by decoded weights in the dtype of the activations."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        del compute_capability
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        del config
        return True, None

    @abstractmethod
    def decode(self, layer: Any) -> Tensor:
        """`[out, in]`, float32."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = torch.nn.Parameter(self.decode(layer).to(torch.bfloat16), requires_grad=False)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, layer.weight.to(x.dtype), bias)


class DecodingNvFp4(_Decoding, NvFp4LinearKernel):
    def decode(self, layer: Any) -> Tensor:
        values = e2m1_pairs(layer.weight.data)
        scales = layer.weight_scale.data.float() * layer.weight_global_scale.float()  # vLLM keeps the reciprocal
        return values * _spread(scales, values)


class DecodingMxFp4(_Decoding, MxFp4LinearKernel):
    def decode(self, layer: Any) -> Tensor:
        values = e2m1_pairs(layer.weight.data)
        return values * _spread(powers_of_two(layer.weight_scale.data), values)


class DecodingMxFp8(_Decoding, Mxfp8LinearKernel):
    def decode(self, layer: Any) -> Tensor:
        values: Tensor = layer.weight.data.float()
        return values * _spread(powers_of_two(layer.weight_scale.data), values)


def nvfp4_kernel(*, use_a16: bool = False) -> NvFp4LinearKernel:
    """What computes a layer in NVFP4: for W4A4 vLLM's own emulation, which rounds activations as its kernels do."""
    kernel = DecodingNvFp4 if use_a16 else EmulationNvFp4LinearKernel
    return kernel(NvFp4LinearLayerConfig())


def install() -> None:
    """Make vLLM choose these kernels."""
    linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [DecodingNvFp4, EmulationNvFp4LinearKernel]
    linear._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CPU] = [DecodingMxFp4]
    linear._POSSIBLE_MXFP8_KERNELS[PlatformEnum.CPU] = [DecodingMxFp8]
    nvfp4.init_nvfp4_linear_kernel = nvfp4_kernel
