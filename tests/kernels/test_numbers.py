"""Numbers stay numbers: hard inputs, every bit pattern and odd shapes, read back by a decoder of our own.

`python tests/kernels/test_numbers.py --write docs/numbers.md` writes the table of what was measured.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))  # when it runs as a program

from kernels.plain_decoding import Floats, Stored, decode, numbers
from shardmill.core.checks import check_shard
from shardmill.core.findings import check_statistics
from shardmill.core.header import ShardHeader, TensorSpec
from shardmill.core.plan import Checkpoint, ShardPlan, SourceShard
from shardmill.core.planner import build_plan
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import uniform
from shardmill.core.scheme import PRESETS, Scheme
from shardmill.errors import NonFiniteWeight
from shardmill.kernels import reference
from shardmill.kernels.shard import encode_shard

DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
ROWS: Final = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4A16", "MXFP8A16")
"""One preset for each way to compute; the others differ in width or in activations."""
EVERY: Final = [pytest.param(name, marks=[] if name in ROWS else pytest.mark.slow) for name in sorted(PRESETS)]


def plan_of(preset: str, *weights: Tensor) -> ShardPlan:
    """The plan of a shard that holds these weights, which no rule joins."""
    specs, end = list[TensorSpec](), 0
    for number, weight in enumerate(weights):
        dtype = next(name for name, found in DTYPES.items() if found == weight.dtype)
        specs.append(TensorSpec(name_of(number), dtype, tuple(weight.shape), end, end + weight.nbytes))
        end += weight.nbytes
    shard = SourceShard("model.safetensors", end, ShardHeader(tuple(specs), (), 0))
    return build_plan(Checkpoint(shards=(shard,), index=None, config_text="{}"), uniform(preset)).shards[0]


def name_of(number: int) -> str:
    """What a weight is called; in the order of their numbers."""
    return f"m.{number:05d}.o_proj.weight"


def quantize(weight: Tensor, preset: str) -> tuple[Stored, WeightRecord]:
    """What is written for a weight, and what is known of it."""
    (found,) = quantize_all([weight], preset)
    return found


def quantize_all(weights: Sequence[Tensor], preset: str) -> list[tuple[Stored, WeightRecord]]:
    """What is written for each weight of a shard, and what is known of it."""
    plan, source = plan_of(preset, *weights), b"".join(reference.to_bytes(weight) for weight in weights)
    assert check_shard(plan, frozenset(map(name_of, range(len(weights))))) == []
    written = bytearray()

    def read(_shard: str, offset: int, view: memoryview) -> None:
        view[:] = source[offset : offset + len(view)]

    records = encode_shard(plan, read, written.extend)
    stored: list[dict[str, tuple[str, tuple[int, ...], bytes]]] = [{} for _ in weights]
    for placed in plan.layout().placed:
        module, _, param = placed.spec.name.rpartition(".")
        number = int(module.split(".")[1])
        stored[number][param] = placed.spec.dtype, placed.spec.shape, bytes(written[placed.begin : placed.end])
    assert [f"{record.module}.weight" for record in records] == list(map(name_of, range(len(weights))))
    return list(zip(stored, records, strict=True))


def read_back(stored: Stored, weight: Tensor, scheme: Scheme) -> Floats:
    """The values that were written; everything that makes them must be a number, and every scale above zero."""
    for param in ("weight_scale", "weight_global_scale"):
        if param in stored:
            scale = numbers(*stored[param])
            assert np.isfinite(scale).all(), param
            assert (scale > 0).all(), param
    block = scheme.weights.block_structure
    found = decode(stored, (weight.shape[0], weight.shape[1]), scheme.weights.num_bits, block and (block[0], block[1]))
    assert np.isfinite(found).all()
    assert found.shape == tuple(weight.shape)
    return found


def relative_error(weight: Tensor, found: Floats) -> float:
    exact = weight.double().numpy()
    size = math.sqrt(float(np.square(exact / (np.abs(exact).max() or 1)).sum()))
    return math.sqrt(float(np.square((found - exact) / (np.abs(exact).max() or 1)).sum())) / (size or 1)


def gaussian(std: float = 0.02, shape: tuple[int, int] = (256, 256), seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std


@dataclass(frozen=True)
class Input:
    """A weight that is hard on something."""

    make: Callable[[torch.dtype], Tensor]
    is_finite: bool = True
    warns: bool = False
    """Whether people must be told, whatever the preset."""


def _with(*values: float) -> Callable[[torch.dtype], Tensor]:
    def make(dtype: torch.dtype) -> Tensor:
        weight = gaussian().to(dtype)
        for number, value in enumerate(values):
            weight[3 + number, 5] = min(value, torch.finfo(dtype).max) if math.isfinite(value) else value
        return weight

    return make


def _zero_rows(dtype: torch.dtype) -> Tensor:
    weight = gaussian().to(dtype)
    weight[0], weight[1] = 0.0, -0.0
    weight[2, ::2] = torch.finfo(dtype).smallest_normal / 4
    weight[2, 1::2] = 0.0
    return weight


def _denormals(dtype: torch.dtype) -> Tensor:
    """Multiples of the smallest number of the dtype, or of float32 where that is larger."""
    least = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 2.0**-149)
    return (gaussian(4.0).round() * least).to(dtype)


def _scaled(std: float) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: gaussian(std).to(dtype)


INPUTS: Final = {
    "gaussian": Input(_scaled(0.02)),
    "one NaN": Input(_with(math.nan), is_finite=False),
    "one Inf": Input(_with(math.inf), is_finite=False),
    "one -Inf": Input(_with(-math.inf), is_finite=False),
    "one 3e38": Input(_with(3e38), warns=True),
    "one 1e4": Input(_with(1e4), warns=True),
    "zeros, -0.0, denormal row": Input(_zero_rows),
    "all zero": Input(lambda dtype: torch.zeros(256, 256, dtype=dtype)),
    "denormals only": Input(_denormals),
    "largest of the dtype": Input(
        lambda dtype: torch.full((256, 256), min(torch.finfo(dtype).max, 3.4028234663852886e38), dtype=dtype)
    ),
    "amax 0.036": Input((gaussian(1.0) / gaussian(1.0).abs().max() * 0.036).to),
    "amax 0.0045": Input((gaussian(1.0) / gaussian(1.0).abs().max() * 0.0045).to),
    "std 1e-5": Input(_scaled(1e-5)),
    "std 2e-6": Input(_scaled(2e-6)),
}
"""The table of hard inputs; F16 rounds the smallest of them to a few of its steps."""


def farthest(scheme: Scheme) -> float:
    """How far the largest value may move, as a factor.

    E8M0 scales and E2M1 may round up by a quarter. Of two bits the lowest code is -2, and the scale A / 1.5.
    """
    return 4 / 3 + 0.01 if is_two_bits(scheme) else 1.26


def is_two_bits(scheme: Scheme) -> bool:
    """Whether most of a Gaussian vanishes, which people are told."""
    return (scheme.weights.type, scheme.weights.num_bits) == ("int", 2)


@pytest.mark.parametrize("preset", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_numbers_is_written_for_hard_inputs(preset: str, dtype: str) -> None:
    for name, entry in INPUTS.items():
        weight = entry.make(DTYPES[dtype])
        if not entry.is_finite:
            with pytest.raises(NonFiniteWeight, match=r"1 in its first bad row block, first at index \[3, 5\]"):
                quantize(weight, preset)
            continue
        stored, record = quantize(weight, preset)
        found = read_back(stored, weight, PRESETS[preset])
        exact = np.abs(weight.double().numpy())
        peak = exact.max()
        assert np.abs(found).max() <= max(peak * farthest(PRESETS[preset]), 2.0**-100), name
        assert (found[exact == 0] == 0).all() or not PRESETS[preset].weights.symmetric, name
        if name == "gaussian":
            assert relative_error(weight, found) == pytest.approx(record.statistics.relative_error, rel=1e-3)
        told = {problem.kind for problem in check_statistics([("s", record)], uniform(preset))}
        assert ("outlier" in told) == entry.warns, name
        if name == "gaussian":
            assert told == ({"zeroed"} if is_two_bits(PRESETS[preset]) else set())


@pytest.mark.parametrize("value", [1e300, -1e39, 3.5e38])
@pytest.mark.parametrize("preset", ROWS)
def test_what_float32_cannot_hold_is_refused(preset: str, value: float) -> None:
    weight = gaussian()
    weight[7, 9] = value
    with pytest.raises(NonFiniteWeight, match=r"first at index \[7, 9\]"):
        quantize(weight, preset)


# ---- half precision ---------------------------------------------------------------------------------------------

MAGNITUDES: Final = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def errors_of_halves(preset: str, std: float, *, is_exact: bool) -> tuple[float, float]:
    """Error of the F16 and of the BF16 copy of a weight, against the float32 weight or else against the copy itself."""
    exact = gaussian(std).float()
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        weight = exact.to(dtype)
        stored = read_back(quantize(weight, preset)[0], weight, PRESETS[preset])
        found.append(relative_error(exact if is_exact else weight, stored))
    return found[0], found[1]


def rounding_of_halves(std: float) -> float:
    """Error of F16 itself, which no arithmetic undoes: below 6e-5 its steps do not shrink any more."""
    exact = gaussian(std).float()
    return relative_error(exact, exact.half().double().numpy())


@pytest.mark.parametrize("preset", ROWS)
def test_half_precision_costs_nothing_beyond_its_own_rounding(preset: str) -> None:
    for std in MAGNITUDES:
        half, bfloat = errors_of_halves(preset, std, is_exact=False)
        assert half <= 1.1 * bfloat, std
        half, bfloat = errors_of_halves(preset, std, is_exact=True)
        assert half <= 1.1 * math.hypot(bfloat, rounding_of_halves(std)), std
        if std >= 1e-5:
            assert half <= 1.1 * bfloat, std


# ---- every bit pattern ------------------------------------------------------------------------------------------


def patterns(dtype: torch.dtype, cols: int = 128) -> Iterator[Tensor]:
    """One-row tensors that together hold each of the 65,536 patterns, one in each of them among equal ones."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    return iter(every.reshape(-1, 1, cols))


@pytest.mark.parametrize("preset", ROWS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_bit_pattern_is_quantized_or_refused(preset: str, dtype: str) -> None:
    """Neighbouring patterns together in one row: 512 rows, of which those with the largest exponent are refused."""
    refused = 0
    for row in patterns(DTYPES[dtype]):
        if torch.isfinite(row).all():
            read_back(quantize(row, preset)[0], row, PRESETS[preset])
        else:
            refused += 1
            with pytest.raises(NonFiniteWeight):
                quantize(row, preset)
    assert refused == {"BF16": 2, "F16": 16}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ROWS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_bit_pattern_alone_in_a_row(preset: str, dtype: str) -> None:
    """65,536 one-row tensors, each filled with one pattern; in one matrix where no scale spans rows."""
    width = PRESETS[preset].weights.group_size or 16
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    finite = torch.isfinite(every)
    rows = every[:, None].expand(-1, width).contiguous()
    spans_rows = PRESETS[preset].weights.strategy in ("block", "tensor_group", "tensor")
    alone = rows[finite].split(1 if spans_rows else 8192)
    for start in range(0, len(alone), 1024):
        weights = alone[start : start + 1024]
        for weight, (stored, _) in zip(weights, quantize_all(weights, preset), strict=True):
            read_back(stored, weight, PRESETS[preset])
    for row in rows[~finite][:: 1 if dtype == "BF16" else 7]:
        with pytest.raises(NonFiniteWeight):
            quantize(row[None], preset)


# ---- shapes -----------------------------------------------------------------------------------------------------


def check_shapes(preset: str, count: int) -> tuple[int, int]:
    """Round trips and refusals of the plan among `count` shapes of 1..300 x 1..300."""
    scheme, done, refused = PRESETS[preset], 0, 0
    chance = random.Random(preset)  # noqa: S311  shapes, not secrets
    for _ in range(count):
        shape = chance.randint(1, 300), chance.randint(1, 300)
        size = scheme.weights.group_size
        if size and chance.random() < 0.5:
            shape = shape[0], -(-shape[1] // size) * size
        weight = gaussian(shape=shape, seed=shape[0]).to(torch.bfloat16)
        problems = check_shard(plan_of(preset, weight), frozenset([name_of(0)]))
        if problems:
            refused += 1
            assert [problem.kind for problem in problems] == ["group-indivisible"]
            assert size is not None
            assert shape[1] % size
            continue
        done += 1
        stored, record = quantize(weight, preset)
        error = relative_error(weight, read_back(stored, weight, scheme))
        assert error == pytest.approx(record.statistics.relative_error, rel=1e-3, abs=1e-6)
        assert error < {2: 0.8, 3: 0.5, 4: 0.3, 5: 0.15, 6: 0.08, 7: 0.05, 8: 0.05}[scheme.weights.num_bits], shape
    return done, refused


@pytest.mark.parametrize("preset", ROWS)
def test_odd_shapes_come_back_or_are_refused_in_the_plan(preset: str) -> None:
    done, refused = check_shapes(preset, 25)
    assert (done >= 10, refused > 0) == (True, PRESETS[preset].weights.group_size is not None)


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_500_shapes_come_back_or_are_refused_in_the_plan(preset: str) -> None:
    assert sum(check_shapes(preset, 500)) == 500


# ---- the table --------------------------------------------------------------------------------------------------


def cell(preset: str, dtype: str, entry: Input) -> str:
    weight = entry.make(DTYPES[dtype])
    if not entry.is_finite:
        try:
            quantize(weight, preset)
        except NonFiniteWeight:
            return "refused"
        return "WRITTEN"
    stored, record = quantize(weight, preset)
    error = relative_error(weight, read_back(stored, weight, PRESETS[preset]))
    return f"{error:.3g}" + ("!" if check_statistics([("s", record)], uniform(preset)) else "")


def tables() -> Iterator[str]:
    """Measure everything and write it as Markdown."""
    for dtype in DTYPES:
        yield f"\n## {dtype}\n"
        yield f"| input | {' | '.join(ROWS)} |\n| --- |{' --- |' * len(ROWS)}"
        for name, entry in INPUTS.items():
            yield f"| {name} | {' | '.join(cell(preset, dtype, entry) for preset in ROWS)} |"
    yield from halves()


def halves() -> Iterator[str]:
    """The errors of F16 beside those of BF16, and their ratio."""
    head = f"| std | F16's own rounding | {' | '.join(ROWS)} |\n| --- | --- |{' --- |' * len(ROWS)}"
    yield "\n## F16 beside BF16\n\nError against the weight as the source holds it: F16 / BF16, and their ratio.\n"
    yield from [head, *(halves_row(std, is_exact=False) for std in MAGNITUDES)]
    yield "\nThe same against the float32 weight from which both copies were made. The steps of F16 do not shrink below"
    yield "6e-8, so a weight of standard deviation 1e-6 was rounded before it came, which no arithmetic undoes.\n"
    yield from [head, *(halves_row(std, is_exact=True) for std in MAGNITUDES)]


def halves_row(std: float, *, is_exact: bool) -> str:
    pairs = [errors_of_halves(preset, std, is_exact=is_exact) for preset in ROWS]
    cells = [f"{half:.3g} / {bfloat:.3g} = {half / bfloat:.2f}" for half, bfloat in pairs]
    return f"| {std:g} | {rounding_of_halves(std):.2g} | {' | '.join(cells)} |"


HEAD: Final = """# Numbers

Relative error (L2) of what is written against the source, read back by a decoder that shares nothing with the
package. The source is 256 x 256 values, Gaussian of standard deviation 0.02 unless the row says otherwise. `!` marks a
warning to people; `refused` is a typed error that names tensor and index (`--allow-nonfinite` copies such a weight).
Written by `python tests/kernels/test_numbers.py --write docs/numbers.md`; the same on every machine.

Every scale is finite and above zero, no E8M0 scale is 255, and no NaN or Inf is written: the tests of the same file
hold all presets to it, and try all 65,536 patterns of F16 and BF16 and 500 shapes for each preset.

One large value is a warning whatever the relative error says: it dominates that figure, and what shares its scale is
lost, with NVFP4 the whole fused set.
"""

if __name__ == "__main__":
    text = "\n".join([HEAD, *tables()]) + "\n"
    if sys.argv[1:2] == ["--write"]:
        Path(sys.argv[2]).write_text(text)
    else:
        print(text)
