"""Quantized checkpoints that shardmill had no hand in: layers in the layouts of other tools, and what those read back.

Each maker gives the tensors of one layer by param name, and its values in float32 as an independent reader gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter, ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor
from torch.nn.functional import pad
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from checkpoints import LLAMA, llama

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Layer:
    """One weight as a tool stores it."""

    tensors: dict[str, Tensor]
    """By param name."""
    values: Tensor
    """Float32, as an independent reader gives them."""


def tiles(weight: Tensor, height: int, width: int) -> Tensor:
    """Cut a matrix into `[rows, height, columns, width]`, padded with zeros."""
    rows, cols = weight.shape
    padded = pad(weight.float(), (0, -cols % width, 0, -rows % height))
    cut: Tensor = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width))
    return cut


def _read_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What transformers makes of FP8 or FP4 and its scales."""
    reader: Any = Fp8Dequantize
    read: Tensor = reader(None)._dequantize_one(codes, scales, dtype)
    return read


def block_fp8(
    weight: Tensor,
    scale_param: str = "weight_scale_inv",
    block: tuple[int, int] = (128, 128),
    scale: Any = torch.float32,
) -> Layer:
    """DeepSeek's layout: E4M3 codes, one multiplier per block; read by transformers."""
    rows, cols = weight.shape
    cut = tiles(weight, *block)
    scales = cut.abs().amax((1, 3)).clamp(min=1e-12) / 448
    if scale is torch.float8_e8m0fnu:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    scales = scales.to(scale)
    codes = (cut / scales.float()[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :cols].to(torch.float8_e4m3fn)
    whole = pad(codes.float(), (0, -cols % block[1], 0, -rows % block[0]))
    read = _read_fp8(whole.to(torch.float8_e4m3fn), scales.float(), torch.float32)
    return Layer({"weight": codes, scale_param: scales}, read[:rows, :cols].contiguous())


def deepseek_fp4(weight: Tensor) -> Layer:
    """DeepSeek-V4's experts: E2M1 in pairs, one power of two per 32 columns under `scale`; read by transformers."""
    made = mx("MXFP4A16", weight)
    codes, exponents = made.tensors["weight_packed"].view(torch.int8), made.tensors["weight_scale"]
    scale = exponents.view(torch.float8_e8m0fnu)
    return Layer({"weight": codes, "scale": scale}, _read_fp8(codes, scale.float(), torch.float32))


def _bounds(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.block_structure:
        cut = tiles(weight, *args.block_structure)
        return cut.amin((1, 3)), cut.amax((1, 3))
    grouped = weight.unflatten(-1, (-1, args.group_size or weight.shape[1]))
    return grouped.amin(-1), grouped.amax(-1)


def scheme_of(preset: str | None = None, **weights: Any) -> QuantizationScheme:
    """A scheme of compressed-tensors by preset, or with weights only."""
    if preset is not None:
        return preset_name_to_scheme(preset, ["Linear"])
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def compressed(
    weight: Tensor, scheme: QuantizationScheme, form: str | None = None, order: Tensor | None = None
) -> Layer:
    """Whatever compressed-tensors writes for a scheme, by its own compressor and read by it."""
    args = scheme.weights
    assert args is not None
    form = form or infer_module_format(torch.nn.Linear, scheme).value
    compressor = BaseCompressor.get_value_from_registry(form)
    values = weight.float()
    low, high = _bounds(values, args)
    state = {"weight": values}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(values.amin().reshape(1), values.amax().reshape(1))
        scale, zero = calculate_qparams(low, high, args, global_scale=state["weight_global_scale"])
    else:
        scale, zero = calculate_qparams(low, high, args)
    state["weight_scale"] = scale
    if not args.symmetric:
        state["weight_zero_point"] = zero
    if order is not None:
        state["weight_g_idx"] = order
    stored = {name: tensor.contiguous() for name, tensor in compressor.compress(dict(state), scheme).items()}
    read = compressor.decompress(dict(stored), scheme)["weight"]
    if args.strategy == "tensor_group":  # it is read as bf16; the same in float32, by the formula of its readers
        exact = fp4_pairs(stored["weight_packed"]) * (scale.float() / state["weight_global_scale"]).repeat_interleave(
            16, 1
        )
        assert torch.equal(exact.bfloat16(), read)
        return Layer(stored, exact)
    return Layer(stored, read.float().contiguous())


def fp4_pairs(packed: Tensor) -> Tensor:
    """Values of E2M1 codes, the low half of each byte first."""
    return torch.stack([E2M1[(packed & 15).long()], E2M1[(packed >> 4).long()]], -1).flatten(1)


def mx(preset: str, weight: Tensor) -> Layer:
    """MXFP4 or MXFP8 of compressed-tensors."""
    return compressed(weight, scheme_of(preset))


def modelopt_fp8(weight: Tensor, per: str = "tensor") -> Layer:
    """ModelOpt's FP8: a scale per tensor, a static input scale; or one per row, as a vector."""
    amax = weight.float().abs().amax() if per == "tensor" else weight.float().abs().amax(1)
    scale = amax / 448
    spread = scale if per == "tensor" else scale[:, None]
    codes = (weight.float() / spread).to(torch.float8_e4m3fn)
    found = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.01)}
    return Layer(found, codes.float() * spread)


def modelopt_nvfp4(weight: Tensor) -> Layer:
    """ModelOpt's NVFP4, where the second scale is a multiplier; checked against its published formula."""
    made = compressed(weight, scheme_of("NVFP4A16"))
    second = (1 / made.tensors["weight_global_scale"]).reshape(())
    codes, scale = made.tensors["weight_packed"], made.tensors["weight_scale"]
    values = fp4_pairs(codes) * (scale.float() * second).repeat_interleave(16, 1)
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": second, "input_scale": torch.tensor(0.02)}
    return Layer(tensors, values)


def _signed(words: Tensor) -> Tensor:
    """Words of 32 bits, held in 64, as their type has them."""
    return (words - ((words >> 31) << 32)).to(torch.int32)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq_words(fields: Tensor) -> Tensor:
    """Pack `[rows, columns]` as AutoAWQ packs: the n-th four bits of a word hold column `AWQ_ORDER[n]` of eight."""
    words = torch.zeros(fields.shape[0], fields.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(AWQ_ORDER):
        words |= fields[:, column::8].long() << 4 * place
    return _signed(words)


def awq(weight: Tensor, group: int = 32) -> Layer:
    """AutoAWQ's GEMM layout; read by the converter and the compressor of compressed-tensors."""
    cut = weight.float().unflatten(1, (-1, group))
    low, high = cut.amin(-1).clamp(max=0), cut.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-5).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = ((cut / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15).flatten(1)
    tensors = {
        "qweight": _awq_words(codes.T),
        "qzeros": _awq_words(zero.T),
        "scales": scale.T.contiguous(),
    }
    converted = AutoAWQConverter(group_size=group).process({f"m.{name}": tensor for name, tensor in tensors.items()})
    scheme = scheme_of(num_bits=4, symmetric=False, strategy="group", group_size=group)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    params = {name.removeprefix("m."): tensor for name, tensor in converted.items()}
    params["weight_scale"] = params["weight_scale"].float()
    return Layer(tensors, compressor.decompress(params, scheme)["weight"].float())


def _stream_down(fields: Tensor, bits: int) -> Tensor:
    """Pack `[K, columns]` into words that run down each column, value by value, low bits first."""
    flat = (fields.long()[:, None, :] >> torch.arange(bits)[None, :, None] & 1).flatten(0, 1)
    words = (flat.unflatten(0, (-1, 32)) << torch.arange(32)[None, :, None]).sum(1)
    return _signed(words)


def gptq(
    weight: Tensor, bits: int = 4, group: int = 32, *, version: int = 1, act_order: bool = False, seed: int = 0
) -> Layer:
    """GPTQ's layout, written from its published formula: `w[n, k] = (q - z) * s[g_idx[k]]`."""
    cols = weight.shape[1]
    top = (1 << bits) - 1
    order = torch.arange(cols) // group
    if act_order:
        order = order[torch.randperm(cols, generator=torch.Generator().manual_seed(seed))]
    values = weight.float()
    low = torch.stack([values[:, order == g].amin(1) for g in range(cols // group)]).clamp(max=0)
    high = torch.stack([values[:, order == g].amax(1) for g in range(cols // group)]).clamp(min=0)
    scale = ((high - low) / top).clamp(min=1e-5).half()
    zero = (-low / scale.float()).round().clamp(1, top)
    codes = ((values.T / scale.float()[order]).round() + zero[order]).clamp(0, top)
    tensors = {
        "qweight": _stream_down(codes, bits),
        "qzeros": _stream_down((zero - (2 - version)).T, bits).T.contiguous(),
        "scales": scale,
        "g_idx": order.to(torch.int32),
    }
    return Layer(tensors, ((codes - zero[order]) * scale.float()[order]).T.contiguous())


def modelopt_as_compressed(layer: Layer) -> Tensor:
    """What compressed-tensors reads of ModelOpt's NVFP4: it takes a reciprocal, which rounds once more."""
    converter = ModelOptNvfp4Converter(targets=["re:m$"])
    params = converter.process({f"m.{name}": tensor for name, tensor in layer.tensors.items()})
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    stored = {n.removeprefix("m."): t for n, t in params.items() if "input" not in n}
    stored["weight_global_scale"] = stored["weight_global_scale"].reshape(1)
    read: Tensor = compressor.decompress(stored, scheme_of("NVFP4A16"))["weight"]
    return read.float()


Maker = Callable[[Tensor], Layer]


def encode_all(
    tensors: Mapping[str, Tensor], maker: Maker, keep: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint whose projections are stored by a maker, and the same with their values in float32."""
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, param = name.rpartition(".")
        if param == "weight" and module.endswith("_proj") and not (keep and keep in module):
            layer = maker(tensor)
            stored |= {f"{module}.{key}": value.contiguous() for key, value in layer.tensors.items()}
            plain[name] = layer.values
        else:
            stored[name] = plain[name] = tensor
    return stored, plain


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt"}
AWQ_SECTION = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def ct(scheme: Any, form: str) -> dict[str, Any]:
    """The section of config.json that compressed-tensors would write for one group."""
    group = {**scheme.model_dump(mode="json", exclude_none=True), "format": form, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": []}


def ints(bits: int, **fields: Any) -> Any:
    weights: dict[str, Any] = {"strategy": "group", "group_size": 32} | fields
    return scheme_of(num_bits=bits, type="int", **weights)


def _ct_case(scheme: Any, form: str) -> tuple[Maker, dict[str, Any]]:
    return partial(compressed, scheme=scheme, form=form), ct(scheme, form)


def _ordered(weight: Tensor) -> Layer:
    """Columns whose groups are mixed, as older releases of compressed-tensors store them; newer ones refuse to."""
    rows, cols = weight.shape
    order = torch.arange(cols) // 32
    order = order[torch.randperm(cols, generator=torch.Generator().manual_seed(5))]
    values = weight.float()
    amax = torch.stack([values[:, order == group].abs().amax(1) for group in range(cols // 32)], 1)
    scale = (amax / 7.5).clamp(min=1e-6).bfloat16()
    spread = scale.float()[:, order]
    codes = (values / spread).round().clamp(-8, 7).to(torch.int8)
    tensors = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": scale,
        "weight_g_idx": order.to(torch.int32),
        "weight_shape": torch.tensor([rows, cols]),
    }
    return Layer(tensors, codes.float() * spread)


def _ordered_section() -> dict[str, Any]:
    section = ct(ints(4), "pack-quantized")
    section["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    return section


def _fp4_dtype(weight: Tensor) -> Layer:
    made = deepseek_fp4(weight)
    codes = made.tensors["weight"].view(torch.float4_e2m1fn_x2)
    return Layer({**made.tensors, "weight": codes}, made.values)


CASES: dict[str, tuple[Maker, dict[str, Any]]] = {
    "fp8 blocks": (block_fp8, FP8),
    "fp8 blocks, bf16 scales": (partial(block_fp8, scale=torch.bfloat16), FP8),
    "fp8 blocks, E8M0 scales": (partial(block_fp8, scale_param="scale", scale=torch.float8_e8m0fnu), FP8),
    "fp8 blocks of 64x32": (partial(block_fp8, block=(64, 32)), FP8 | {"weight_block_size": [64, 32]}),
    "DeepSeek fp4": (deepseek_fp4, FP8),
    "DeepSeek fp4 under its own dtype": (_fp4_dtype, FP8),
    "ModelOpt fp8": (modelopt_fp8, MODELOPT),
    "ModelOpt fp8 per channel": (partial(modelopt_fp8, per="channel"), MODELOPT),
    "ModelOpt nvfp4": (modelopt_nvfp4, MODELOPT),
    "CT fp8 channel": _ct_case(scheme_of("FP8_DYNAMIC"), "float-quantized"),
    "CT fp8 tensor": _ct_case(scheme_of(num_bits=8, type="float", strategy="tensor"), "naive-quantized"),
    "CT fp8 block": _ct_case(scheme_of("FP8_BLOCK"), "float-quantized"),
    "CT int8 channel": _ct_case(scheme_of("W8A8"), "int-quantized"),
    "CT int8 group, asymmetric": _ct_case(ints(8, symmetric=False), "int-quantized"),
    "CT int4 group unpacked": _ct_case(ints(4), "int-quantized"),
    **{f"CT packed int{bits}": _ct_case(ints(bits), "pack-quantized") for bits in (2, 3, 4, 5, 8)},
    "CT packed int4 asymmetric": _ct_case(ints(4, symmetric=False), "pack-quantized"),
    "CT packed int3 asymmetric": _ct_case(ints(3, symmetric=False), "pack-quantized"),
    "CT packed int8 channel": _ct_case(ints(8, strategy="channel", group_size=None), "pack-quantized"),
    "CT packed int4, act-order": (_ordered, _ordered_section()),
    "CT nvfp4": _ct_case(scheme_of("NVFP4A16"), "nvfp4-pack-quantized"),
    "CT mxfp4": _ct_case(scheme_of("MXFP4A16"), "mxfp4-pack-quantized"),
    "CT mxfp8": _ct_case(scheme_of("MXFP8A16"), "mxfp8-quantized"),
    "AWQ": (awq, AWQ_SECTION),
    **{
        f"GPTQ int{bits}, {'with' if order else 'without'} act-order, v{version}": (
            partial(gptq, bits=bits, version=version, act_order=order),
            {
                "quant_method": "gptq",
                "bits": bits,
                "group_size": 32,
                "desc_act": order,
                "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
            },
        )
        for bits in (2, 3, 4, 8)
        for version, order in ((1, False), (2, True))
    },
}
"""Maker and `quantization_config` by name."""


def config_of(section: Mapping[str, Any]) -> dict[str, Any]:
    return {**LLAMA, "quantization_config": dict(section)}


def small() -> dict[str, Tensor]:
    """One layer with ragged blocks, of which some parts are fused."""
    leaves = ("q_proj", "k_proj", "down_proj", "norm", "embed_tokens")
    weights = llama(layers=1, hidden=192, width=288)
    return {name: tensor for name, tensor in weights.items() if name.split(".")[-2].endswith(leaves)}
