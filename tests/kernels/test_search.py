"""Scales that are searched: the same from both kernels, never worse than min/max, and the best there is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.oracle import INPUTS, sample
from kernels.test_cpu import NAMES, bits_of, described, every_pattern
from shardmill.core.dtypes import scale_dtype_for
from shardmill.core.scheme import PRESETS, Scheme, Search, WeightArgs, with_group_size
from shardmill.core.search import INT_RATIOS, moves_of
from shardmill.kernels import cpu, reference

MSE = Search()
# One of each kind of code with each kind of scale, and groups that fill no vector, and more than the narrow kind.
SCHEMES = {
    name: PRESETS[name]
    for name in ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4", "MXFP8")
} | {
    "W3A16 24": with_group_size(PRESETS["W3A16"], 24),
    "W2A16 384": with_group_size(PRESETS["W2A16"], 384),
    "W5A16 asymmetric 40": Scheme(
        weights=WeightArgs(num_bits=5, strategy="group", group_size=40, symmetric=False), input_activations=None
    ),
    "INT6 48x40": Scheme(weights=WeightArgs(num_bits=6, strategy="block", block_structure=(48, 40), symmetric=False)),
}


def options(scheme: Scheme, weight: Tensor) -> dict[str, Any]:
    return {
        "format": scheme.format,
        "scale_dtype": scale_dtype_for(NAMES[weight.dtype]),
        "whole": reference.measure(weight),
    }


def both(scheme: Scheme, weight: Tensor, search: Search = MSE) -> tuple[reference.Encoded, cpu.Encoded]:
    more = options(scheme, weight) | {"search": search}
    fast = cpu.encode(bits_of(weight), NAMES[weight.dtype], scheme.weights, **more)
    return reference.encode(weight, scheme.weights, **more), fast


def assert_same(scheme: Scheme, weight: Tensor, search: Search = MSE) -> None:
    slow, fast = both(scheme, weight, search)
    assert described(fast.tensors, cpu.to_bytes) == described(slow.tensors, reference.to_bytes)
    numbers, expected = asdict(fast.statistics), asdict(slow.statistics)
    for field in ("squared_error", "squared_weight"):
        assert numbers.pop(field) == pytest.approx(expected.pop(field), rel=1e-12, abs=0)
    assert numbers == expected


def fit(scheme: Scheme, weight: Tensor) -> Tensor:
    """As many columns as groups divide."""
    size = scheme.weights.group_size or 1
    return weight[:, : weight.shape[1] // size * size].contiguous()


def group_errors(scheme: Scheme, weight: Tensor, search: Search | None, norm: float = 2.0) -> Tensor:
    """Error of what is stored, by tile, in float64."""
    found = reference.encode(weight, scheme.weights, **options(scheme, weight), search=search).tensors
    if scheme.weights.has_global_scale:
        found["weight_global_scale"] = reference.global_scale(reference.measure(weight))
    rows, cols = weight.shape
    restored = reference.decode(found, scheme.weights, format=scheme.format, shape=(rows, cols))
    lost = (restored - weight.float()).abs().double() ** norm
    height, width = scheme.weights.block_structure or (1, scheme.weights.group_size or cols)
    tiles = torch.nn.functional.pad(lost, (0, -cols % width, 0, -rows % height))
    summed: Tensor = tiles.view(-1, height, tiles.shape[1] // width, width).sum((1, 3))
    return summed


# ---- the same everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=NAMES.get)
@pytest.mark.parametrize("name", SCHEMES)
def test_both_kernels_choose_alike(name: str, source: torch.dtype) -> None:
    for kind in INPUTS:
        assert_same(SCHEMES[name], fit(SCHEMES[name], sample(kind, source, (37, 400))))


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4", "MXFP8", "FP8_DYNAMIC"])
def test_both_kernels_choose_alike_for_numbers_of_every_size(name: str) -> None:
    assert_same(SCHEMES[name], every_pattern("BF16"))


@given(st.data())
@settings(max_examples=60)
def test_both_kernels_choose_alike_whatever_the_weight(data: st.DataObject) -> None:
    scheme = SCHEMES[data.draw(st.sampled_from(sorted(SCHEMES)))]
    width = scheme.weights.group_size or data.draw(st.integers(1, 70))
    shape = data.draw(st.integers(1, 5)), width * data.draw(st.integers(1, 3))
    count = shape[0] * shape[1]
    values = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.75, 1.5, 1.75, 6.0, 7.0]), min_size=1, max_size=12))
    signs = data.draw(st.lists(st.sampled_from([-1.0, 1.0, 1e-3]), min_size=1, max_size=5))
    flat = [values[n % len(values)] * signs[n % len(signs)] for n in range(count)]
    assert_same(scheme, torch.tensor(flat).reshape(shape).to(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [1.0, 1.5, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("name", SCHEMES)
def test_both_kernels_choose_alike_by_other_norms(name: str, norm: float) -> None:
    assert_same(SCHEMES[name], fit(SCHEMES[name], sample("heavy tails", torch.bfloat16, (37, 400))), Search(norm=norm))


def test_both_kernels_choose_alike_by_another_norm() -> None:
    assert_same(SCHEMES["W4A16"], sample("heavy tails", torch.bfloat16, (37, 256)), Search(norm=2.5))


@pytest.mark.parametrize("name", SCHEMES)
def test_row_blocks_choose_what_the_whole_does(name: str) -> None:
    scheme, weight = SCHEMES[name], fit(SCHEMES[name], sample("heavy tails", torch.bfloat16, (144, 400)))
    step = {"FP8_BLOCK": 128, "INT6 48x40": 48}.get(name, 32)
    more = options(scheme, weight) | {"search": MSE}
    whole = reference.encode(weight, scheme.weights, **more).tensors
    parts = [reference.encode(rows, scheme.weights, **more).tensors for rows in weight.split(step)]
    for param, tensor in whole.items():
        joined = torch.cat([part[param].view(torch.uint8) for part in parts])
        assert torch.equal(joined, tensor.view(torch.uint8))


# ---- never worse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "outlier"])
@pytest.mark.parametrize("name", SCHEMES)
def test_no_tile_has_more_error_than_min_max_leaves_it(name: str, kind: str) -> None:
    scheme = SCHEMES[name]
    weight = fit(scheme, sample(kind, torch.bfloat16, (96, 400)))
    before, after = group_errors(scheme, weight, None), group_errors(scheme, weight, MSE)
    assert bool((after <= before * (1 + 1e-12)).all())
    assert float(after.sum()) < float(before.sum()) or name == "MXFP8"


@pytest.mark.parametrize("norm", [1.0, 3.5])
def test_another_norm_is_what_is_made_small(norm: float) -> None:
    scheme, weight = SCHEMES["W4A16"], sample("heavy tails", torch.bfloat16, (64, 256))
    by_norm, by_squares = (group_errors(scheme, weight, search, norm).sum() for search in (Search(norm=norm), MSE))
    assert float(by_norm) < float(by_squares)
    assert float(by_norm) < float(group_errors(scheme, weight, None, norm).sum())


# ---- the best there is ------------------------------------------------------------------------------------------


def least_errors(scheme: Scheme, weight: Tensor, steps: Tensor) -> Tensor:
    """Least squared error of groups over the given steps [candidates, groups], by brute force in float64."""
    values = torch.tensor(reference.E2M1_VALUES, dtype=torch.float64)
    groups = weight.double().abs().unflatten(1, (-1, scheme.weights.group_size or 0)).flatten(0, 1)
    grids = steps.double()[..., None, None] * values
    least: Tensor = (groups[None, ..., None] - grids).abs().amin(-1).square().sum(-1).amin(0)
    return least


def test_nvfp4_finds_the_best_code_there_is() -> None:
    scheme, weight = SCHEMES["NVFP4A16"], sample("heavy tails", torch.bfloat16, (48, 256))
    scale = reference.global_scale(reference.measure(weight))
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    best = least_errors(scheme, weight, (codes / scale)[:, None])
    found = group_errors(scheme, weight, MSE).flatten()
    near = torch.isclose(found, best, rtol=1e-4, atol=0)
    assert float(near.double().mean()) > 0.999  # the window is bounded; beyond it hardly anything is
    assert float(found.sum()) == pytest.approx(float(best.sum()), rel=1e-4)


def test_mxfp4_finds_the_best_exponent_there_is() -> None:
    scheme, weight = SCHEMES["MXFP4"], sample("heavy tails", torch.bfloat16, (48, 256))
    best = least_errors(scheme, weight, torch.exp2(torch.arange(-30.0, 10.0))[:, None])
    assert torch.allclose(group_errors(scheme, weight, MSE).flatten(), best, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", INT_RATIOS)
def test_integers_come_near_the_best_of_all_stored_scales(bits: int) -> None:
    scheme = Scheme(weights=WeightArgs(num_bits=bits, strategy="group", group_size=64))
    weight = sample("heavy tails", torch.bfloat16, (16, 256))
    groups = weight.double().unflatten(1, (-1, 64)).flatten(0, 1)
    start = groups.abs().amax(1) / scheme.weights.code_max
    best = torch.full_like(start, torch.inf)
    for ratio in np.arange(0.25, 1.3, 1 / 512):
        scale = (start * ratio).bfloat16().double()[:, None]
        restored = (groups / scale).clamp(*scheme.weights.code_range).round() * scale
        best = torch.minimum(best, (restored - groups).square().sum(1))
    before, found = (float(group_errors(scheme, weight, search).sum()) for search in (None, MSE))
    gained = (before - found) / (before - float(best.sum()))
    assert gained > (0.97 if bits < 5 else 0.6)


def test_four_over_six_is_found_where_it_fits() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :16] = torch.tensor([1.0, 1.5, 2, 3, 4] * 3 + [-4])  # exact if the largest becomes 4, and not if 6
    weight[0, 16:] = 10.5  # 2688 over it is a power of two, so local scales are exact
    scheme = SCHEMES["NVFP4A16"]
    assert float(group_errors(scheme, weight, None)[0, 0]) > 0.1
    assert float(group_errors(scheme, weight, MSE)[0, 0]) == 0


def test_zero_groups_are_left_alone() -> None:
    for name, scheme in SCHEMES.items():
        weight = fit(scheme, torch.zeros(3, 400, dtype=torch.bfloat16))
        before = reference.encode(weight, scheme.weights, **options(scheme, weight)).tensors
        after = reference.encode(weight, scheme.weights, **options(scheme, weight), search=MSE).tensors
        assert described(after, reference.to_bytes) == described(before, reference.to_bytes), name


def test_moves_are_few_enough_for_a_search_in_streams() -> None:
    assert max(len(moves_of(scheme.weights).moves) for scheme in SCHEMES.values()) <= 40


# ---- importance -------------------------------------------------------------------------------------------------


def importance_for(weight: Tensor) -> Tensor:
    """Some columns count a thousand times as much as others, and a stretch of them nothing."""
    found = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(3)).abs() ** 4
    found[: weight.shape[1] // 3] *= 1e-30
    found[-50:-20] = 0
    return found


_SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("W4A16_ASYM", "FP8_BLOCK")]  # more to compile


@pytest.mark.parametrize("name", ["NVFP4A16", "W8A8", *_SLOWLY])
def test_errors_in_important_columns_are_made_small(name: str) -> None:
    scheme, weight = SCHEMES[name], fit(SCHEMES[name], sample("gaussian", torch.bfloat16, (60, 400)))
    importance = importance_for(weight)
    more = options(scheme, weight) | {"search": MSE}
    slow = reference.encode(weight, scheme.weights, **more, importance=importance)
    fast = cpu.encode(bits_of(weight), "BF16", scheme.weights, **more, importance=importance.numpy())
    assert described(fast.tensors, cpu.to_bytes) == described(slow.tensors, reference.to_bytes)
    errors = []
    for found in (slow.tensors, reference.encode(weight, scheme.weights, **more).tensors):
        if scheme.weights.has_global_scale:
            found["weight_global_scale"] = reference.global_scale(reference.measure(weight))
        restored = reference.decode(
            found, scheme.weights, format=scheme.format, shape=(weight.shape[0], weight.shape[1])
        )
        errors.append(float(((restored - weight.float()).double().square() * importance).sum()))
    assert errors[0] < errors[1]


def test_equal_importance_is_none() -> None:
    scheme, weight = SCHEMES["W4A16"], sample("gaussian", torch.bfloat16, (60, 256))
    more = options(scheme, weight) | {"search": MSE}
    equal = reference.encode(weight, scheme.weights, **more, importance=torch.full((256,), 2.0**-100))
    assert described(equal.tensors, reference.to_bytes) == described(
        reference.encode(weight, scheme.weights, **more).tensors, reference.to_bytes
    )
