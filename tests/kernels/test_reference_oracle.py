"""Bytes of the kernel against bytes of compressed-tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization.utils import generate_gparam
from torch import Tensor

from kernels.oracle import INPUTS, SOURCES, actual, compressor, differing_bytes, expected, sample
from shardmill.core.scheme import PRESETS, ActivationArgs, Scheme, WeightArgs
from shardmill.core.statistics import Extent
from shardmill.kernels import reference
from shardmill.kernels.ct_adapter import scheme_to_ct

TOKEN = ActivationArgs(num_bits=8)
TOKEN_FLOAT = ActivationArgs(type="float")
GRANULARITY: dict[str, dict[str, object]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 32},
    "block": {"strategy": "block", "block_structure": (32, 64)},
}
# Ragged in both directions of a 32x64 block, and no whole number of int32 words for any width.
RAGGED = {"tensor": (41, 203), "channel": (41, 203), "group": (41, 160), "block": (41, 203)}


def weight_args(strategy: str, **more: object) -> WeightArgs:
    return WeightArgs(**(GRANULARITY[strategy] | more))  # type: ignore[arg-type]


def int_schemes() -> list[Scheme]:
    found = [
        Scheme(weights=weight_args(strategy, num_bits=bits, symmetric=symmetric), input_activations=activations)
        for bits, strategy, symmetric, activations in itertools.product(
            range(2, 9), GRANULARITY, (True, False), (None, TOKEN)
        )
    ]
    assert {scheme.format for scheme in found} == {"pack-quantized", "int-quantized"}
    return found


def float_schemes() -> list[Scheme]:
    return [
        Scheme(weights=weight_args(strategy, type="float"), input_activations=activations)
        for strategy, activations in itertools.product(GRANULARITY, (None, TOKEN_FLOAT))
    ]


CUSTOM = {f"{scheme.label} {scheme.format}": scheme for scheme in int_schemes() + float_schemes()}


def is_quick(scheme: Scheme) -> bool:
    """3 bits straddle words and 4 do not; 8 is a whole byte."""
    return scheme.weights.type == "float" or scheme.weights.num_bits in (3, 4, 8)


def assert_same(scheme: Scheme, weight: Tensor) -> None:
    assert differing_bytes(actual(scheme, weight), expected(scheme, weight)) == {}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_the_bytes_of_compressed_tensors(name: str, kind: str, source: str) -> None:
    assert_same(PRESETS[name], sample(kind, SOURCES[source]))


@pytest.mark.parametrize("kind", ["gaussian", "holes", "tiny"])
@pytest.mark.parametrize("name", [name for name in CUSTOM if is_quick(CUSTOM[name])])
def test_custom_schemes_give_the_bytes_of_compressed_tensors(name: str, kind: str) -> None:
    assert_same(CUSTOM[name], sample(kind, torch.bfloat16, RAGGED[CUSTOM[name].weights.strategy]))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", CUSTOM)
def test_every_custom_scheme_gives_the_bytes_of_compressed_tensors(name: str, kind: str, source: str) -> None:
    assert_same(CUSTOM[name], sample(kind, SOURCES[source], RAGGED[CUSTOM[name].weights.strategy]))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_the_bytes_of_compressed_tensors_for_a_million_weights(name: str, source: str) -> None:
    assert_same(PRESETS[name], sample("gaussian", SOURCES[source], (512, 2048)))


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "W4A16_ASYM", "NVFP4A16", "MXFP8A16"])
def test_float64_weights_are_their_float32_values(name: str) -> None:
    weight = sample("gaussian", torch.float32)
    assert differing_bytes(actual(PRESETS[name], weight.double()), expected(PRESETS[name], weight)) == {}


@pytest.mark.parametrize("shape", [(1, 128), (17, 16), (129, 130), (128, 257)])
def test_ragged_blocks(shape: tuple[int, int]) -> None:
    assert_same(PRESETS["FP8_BLOCK"], sample("gaussian", torch.bfloat16, shape))


def test_a_fused_set_shares_its_global_scale() -> None:
    scheme, weight, amax = PRESETS["NVFP4A16"], sample("gaussian", torch.bfloat16), 3.25
    extent = reference.measure(weight).merge(Extent(low=-amax))
    assert differing_bytes(actual(scheme, weight, extent), expected(scheme, weight, amax)) == {}


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1.2e-38, 7.8e-36, 7.95e-36, 1e-20, 0.02, 1.75, 448.0, 3e38, 3.4028235e38])
def test_global_scale_is_that_of_compressed_tensors(amax: float) -> None:
    ours = reference.global_scale(Extent(low=-amax))
    assert ours.shape == (1,)
    assert torch.equal(ours, generate_gparam(-torch.tensor([amax]), torch.tensor([amax])))


def test_global_scale_is_that_of_compressed_tensors_for_many_values() -> None:
    values = torch.rand(2000, generator=torch.Generator().manual_seed(7)) * 4
    ours = torch.cat([reference.global_scale(Extent(high=value)) for value in values.tolist()])
    theirs = torch.cat([generate_gparam(-value, value) for value in values[:, None]])
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, 2688 / values.double()), "one division would do"


def test_global_scale_of_nonfinite_values_is_one() -> None:
    assert reference.global_scale(Extent(high=float("nan"))).item() == 1.0


@pytest.mark.parametrize("name", [*PRESETS, *CUSTOM])
def test_format_is_the_one_that_compressed_tensors_infers(name: str) -> None:
    scheme = PRESETS.get(name) or CUSTOM[name]
    inferred = infer_module_format(torch.nn.Linear, scheme_to_ct(scheme, ["Linear"])).value
    # Engines load integer weights with float activations packed; the library would infer unpacked codes.
    assert (scheme.format, inferred) == (
        ("pack-quantized", "int-quantized") if name == "W4AFP8" else (inferred, inferred)
    )


@pytest.mark.parametrize("source", ["BF16", "F32"])
@pytest.mark.parametrize("name", [*PRESETS, *(name for name in CUSTOM if is_quick(CUSTOM[name]))])
def test_decode_is_decompression_before_rounding(name: str, source: str) -> None:
    scheme = PRESETS.get(name) or CUSTOM[name]
    shape = (40, 256) if name in PRESETS else RAGGED[scheme.weights.strategy]
    stored = expected(scheme, sample("outlier", SOURCES[source], shape))
    theirs = compressor(scheme).decompress(stored, scheme_to_ct(scheme, ["Linear"]))["weight"]
    ours = reference.decode(stored, scheme.weights, format=scheme.format, shape=shape)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.to(theirs.dtype), theirs)
