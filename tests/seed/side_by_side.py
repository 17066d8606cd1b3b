"""Run the functions of `shardmill.api` and those of llm-compressor 0.13 on the same files, and compare what they wrote.

    python tests/seed/side_by_side.py --table

The older system runs in an environment of its own (`make .venv-seed/stamp`; `SHARDMILL_SEED_PYTHON` names another
interpreter): this file is started there a second time, so only functions of this side import shardmill.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT: Final = Path(__file__).resolve().parents[2]
SEED_PYTHON: Final = Path(os.environ.get("SHARDMILL_SEED_PYTHON", ROOT / ".venv-seed" / "bin" / "python"))
PRESETS: Final = (
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "W8A8",
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "MXFP4A16",
    "MXFP8A16",
    "NVFP4A16",
)
IGNORE: Final = ("lm_head", "re:.*embed_tokens", r"re:.*mlp\.gate$")
EXPERTS: Final = "model.layers.1.mlp.experts"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PARTNERS: Final = tuple(
    f"model.layers.0.{name}.weight" for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
)
"""Members of fused sets that the second file holds and the first output shard gets."""
CODES: Final = ("weight", "weight_packed", "weight_zero_point")
SCALES: Final = ("weight_scale", "weight_global_scale")
MARGIN: Final = 1e-6
"""By which our relative error may exceed theirs where the stored scales are equal, and the mean always."""
OTHER_GRID: Final = 1e-3
"""Share of their error by which ours may exceed it where scales differ in rounding: such a grid moves either way."""
SHARED_GRID: Final = 5e-3
"""The same for half an expert, whose global scale is not its own."""
GLOBAL_SCALE_ROUNDING: Final = 2**-7
"""Largest relative difference of a global scale that they round to bf16 twice."""

D1: Final = "D1 gate and up of an expert share a global scale"
D9: Final = "D9 F16 sources store F32 scales"
D20: Final = "D20 ragged blocks are written"


@dataclass(frozen=True, slots=True)
class Job:
    """One call, as JSON can hold it."""

    function: str
    inverse_weight_map: Mapping[str, Sequence[str] | None]
    save_name: str
    scheme: str
    ignore: Sequence[str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned, or the error it raised."""

    total_bytes: int = 0
    weight_map: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    message: str = ""


# ---- the files --------------------------------------------------------------------------------------------------


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    return (values * (1 + seed % 3)).to(dtype)


def checkpoint() -> dict[str, dict[str, Tensor]]:
    """Tensors by file: a dense layer whose fused sets straddle the files, experts as stacks, three float dtypes."""
    first = {
        "model.embed_tokens.weight": _random(512, 256, seed=1),
        "model.layers.0.self_attn.q_proj.weight": _random(256, 256, seed=2),
        "model.layers.0.self_attn.q_proj.bias": _random(256, seed=3),
        "model.layers.0.self_attn.o_proj.weight": _random(256, 256, seed=4),
        "model.layers.0.mlp.gate_proj.weight": _random(512, 256, seed=5),
        "model.layers.0.mlp.down_proj.weight": _random(256, 512, seed=6),
        "model.layers.0.input_layernorm.weight": _random(256, seed=7),
    }
    second = {
        "model.layers.0.self_attn.k_proj.weight": _random(128, 256, seed=8),
        "model.layers.0.self_attn.v_proj.weight": _random(128, 256, seed=9),
        "model.layers.0.mlp.up_proj.weight": _random(512, 256, seed=10),
        f"{EXPERTS}.gate_up_proj": _random(3, 512, 384, seed=11) * torch.linspace(0.5, 2, 512).bfloat16()[:, None],
        f"{EXPERTS}.down_proj": _random(3, 384, 256, seed=12),
        "model.layers.1.mlp.gate.weight": _random(3, 256, seed=13),
        "model.layers.1.self_attn.o_proj.weight": _random(256, 256, seed=14, dtype=torch.float16),
        "model.layers.2.mlp.down_proj.weight": _random(256, 512, seed=15, dtype=torch.float32),
        "model.layers.2.rotary_emb.inv_freq": _random(64, seed=16, dtype=torch.float32),
        "model.layers.2.position_ids": torch.arange(16),
        "model.norm.weight": _random(256, seed=17),
        "lm_head.weight": _random(512, 256, seed=18),
    }
    return {FIRST: first, SECOND: second}


MISFITS: Final[Mapping[str, tuple[str, Mapping[str, Tensor]]]] = {
    "a vector": ("FP8_DYNAMIC", {"model.ln_1.weight": _random(64, seed=1)}),
    "a convolution": ("W8A8", {"model.conv1d.weight": _random(64, 1, 4, seed=1)}),
    "100 columns in groups of 128": ("W4A16", {"model.q_proj.weight": _random(64, 100, seed=1)}),
    "64 columns in groups of 128": ("W4A16_ASYM", {"model.q_proj.weight": _random(64, 64, seed=1)}),
    "40 columns in groups of 16": ("NVFP4A16", {"model.q_proj.weight": _random(64, 40, seed=1)}),
    "48 columns in groups of 32": ("MXFP4A16", {"model.q_proj.weight": _random(64, 48, seed=1)}),
    "a misfit among others": (
        "W8A16",
        {"model.a.weight": _random(64, 128, seed=1), "model.b.weight": _random(64, 130, seed=2)},
    ),
    "ragged blocks": ("FP8_BLOCK", {"model.q_proj.weight": _random(200, 150, seed=1)}),
    "a vector that is ignored": ("FP8_DYNAMIC", {"lm_head.weight": _random(64, seed=1)}),
    "a vector of a norm": ("FP8_DYNAMIC", {"model.layernorm.weight": _random(64, seed=1)}),
}
"""Inputs of `validate_file`, each a file of its own; the tensors that do not fit, if any, are bf16."""
RAGGED: Final = "ragged blocks"


def write_files(folder: Path) -> None:
    """Write the checkpoint and every misfit."""
    folder.mkdir(parents=True)
    for name, tensors in checkpoint().items():
        save_file(tensors, folder / name)
    for number, (_, misfit) in enumerate(MISFITS.values()):
        save_file(dict(misfit), folder / f"misfit-{number}.safetensors")


def jobs(folder: Path) -> dict[str, Job]:
    """Every call by name."""
    rest = [name for name in checkpoint()[SECOND] if name not in PARTNERS]
    maps: dict[str, dict[str, list[str] | None]] = {
        FIRST: {str(folder / FIRST): None, str(folder / SECOND): list(PARTNERS)},
        SECOND: {str(folder / SECOND): rest},
    }
    found: dict[str, Job] = {}
    for scheme in PRESETS:
        function = "process_file_microscale_scheme" if scheme == "NVFP4A16" else "process_file"
        for shard, weight_map in maps.items():
            found[f"{scheme}/{shard}"] = Job(function, weight_map, f"{scheme}-{shard}", scheme, IGNORE)
            found[f"validate {scheme}/{shard}"] = Job("validate_file", weight_map, "unused", scheme, IGNORE)
    for number, (case, (scheme, _)) in enumerate(MISFITS.items()):
        path = str(folder / f"misfit-{number}.safetensors")
        found[f"validate {case}"] = Job("validate_file", {path: None}, "unused", scheme, IGNORE)
        if case == RAGGED:
            found[RAGGED] = Job("process_file", {path: None}, "ragged.safetensors", scheme, IGNORE)
    return found


# ---- both sides -------------------------------------------------------------------------------------------------


def perform(functions: Any, entries: Mapping[str, Job], folder: Path) -> dict[str, Answer]:
    """Do every job with the functions of one side, on the CPU, with scheme objects of its compressed-tensors."""
    from compressed_tensors.quantization import preset_name_to_scheme

    folder.mkdir(parents=True)
    answers: dict[str, Answer] = {}
    for name, job in entries.items():
        function: Callable[..., Any] = getattr(functions, job.function)
        scheme = preset_name_to_scheme(job.scheme, ["Linear"])
        try:
            result = function(job.inverse_weight_map, folder / job.save_name, scheme, job.ignore, "cpu")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is compared
            answers[name] = Answer(error=type(error).__name__, message=str(error))
        else:
            answers[name] = Answer(*(result or ()))
    return answers


def perform_in_seed(entries: Mapping[str, Job], folder: Path) -> dict[str, Answer]:
    """Do every job in the other environment."""
    request = {"folder": str(folder), "jobs": {name: _fields(job) for name, job in entries.items()}}
    done = subprocess.run(
        [SEED_PYTHON, __file__, "--seed"],
        check=False,
        capture_output=True,
        text=True,
        input=json.dumps(request),
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{SEED_PYTHON} ended with {done.returncode}: {done.stderr[-2000:]}")
    return {name: Answer(**fields) for name, fields in json.loads(done.stdout.splitlines()[-1]).items()}


def _fields(value: Job | Answer) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _seed_main() -> None:
    process = importlib.import_module("llmcompressor.entrypoints.model_free.process")
    request = json.load(sys.stdin)
    entries = {name: Job(**fields) for name, fields in request["jobs"].items()}
    answers = perform(process, entries, Path(request["folder"]))
    sys.stdout.write("\n" + json.dumps({name: _fields(answer) for name, answer in answers.items()}) + "\n")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answers and files of both sides."""

    folder: Path
    jobs: Mapping[str, Job]
    ours: Mapping[str, Answer]
    theirs: Mapping[str, Answer]

    def stored(self, side: str, name: str) -> dict[str, Tensor]:
        """Load what one side wrote for a job."""
        return load_file(self.folder / side / self.jobs[name].save_name)


def run(folder: Path) -> Outcome:
    """Write the files and let both sides work on them."""
    from shardmill import api

    write_files(folder / "source")
    entries = jobs(folder / "source")
    theirs = perform_in_seed(entries, folder / "theirs")
    return Outcome(folder, entries, perform(api, entries, folder / "ours"), theirs)


# ---- the comparison ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Comparison:
    """What two shards have in common."""

    differences: list[str] = field(default_factory=list)
    """That no rule allows."""
    divergences: set[str] = field(default_factory=set)
    """Intended ones that were met."""
    weights: int = 0
    elements: int = 0
    other_codes: int = 0
    scales: int = 0
    other_scales: int = 0
    errors: list[tuple[float, float]] = field(default_factory=list)
    """`(ours, theirs)` of every weight, relative to it."""

    def mean_errors(self) -> tuple[float, float]:
        """Ours and theirs."""
        ours, theirs = (sum(errors) / self.weights for errors in zip(*self.errors, strict=True))
        return ours, theirs

    def add(self, other: Comparison) -> None:
        """Take the findings of another shard in."""
        self.differences += other.differences
        self.divergences |= other.divergences
        self.errors += other.errors
        for name in ("weights", "elements", "other_codes", "scales", "other_scales"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def compare(outcome: Outcome, name: str) -> Comparison:
    """Compare one output shard of both sides, tensor by tensor."""
    found = Comparison()
    ours, theirs = outcome.stored("ours", name), outcome.stored("theirs", name)
    modules = sorted({tensor.rpartition(".")[0] for tensor in ours if tensor.endswith(".weight_scale")})
    dense = {tensor: value for shard in checkpoint().values() for tensor, value in _split(shard).items()}
    sources = {f"{module}.weight": dense[f"{module}.weight"] for module in modules}
    if set(ours) != set(theirs):
        found.differences.append(f"names: {sorted(set(ours) ^ set(theirs))}")
        return found
    widened = sum(ours[tensor].nbytes - theirs[tensor].nbytes for tensor in ours)
    mine, other = outcome.ours[name], outcome.theirs[name]
    if mine.weight_map != other.weight_map or mine.total_bytes != other.total_bytes + widened:
        found.differences.append(f"returned: {mine.total_bytes} bytes, theirs {other.total_bytes}, {widened} expected")
    for tensor in sorted(ours):
        _compare_tensor(found, tensor, ours[tensor], theirs[tensor], sources, outcome.jobs[name].scheme)
    for module in modules:
        _compare_error(found, module, ours, theirs, sources[f"{module}.weight"], outcome.jobs[name].scheme)
    return found


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from shardmill.api import split_fused_moe_experts

    return split_fused_moe_experts(tensors)


def _compare_tensor(
    found: Comparison, name: str, ours: Tensor, theirs: Tensor, sources: Mapping[str, Tensor], scheme: str
) -> None:
    """Compare one stored tensor; `sources` are the weights that were quantized."""
    module, _, param = name.rpartition(".")
    source = sources[f"{module}.weight"].dtype if f"{module}.weight" in sources else None
    if ours.dtype != theirs.dtype and (source, param, theirs.dtype) == (torch.float16, "weight_scale", torch.float16):
        found.divergences.add(D9)
        ours = ours.to(torch.float16)
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        found.differences.append(f"{name}: {ours.dtype} {list(ours.shape)}, theirs {theirs.dtype} {list(theirs.shape)}")
    elif source is None or param not in (*CODES, *SCALES):
        if not torch.equal(_integers(ours), _integers(theirs)):
            found.differences.append(f"{name}: other values")
    elif param in CODES:
        _compare_codes(found, name, ours, theirs, source, scheme)
    else:
        _compare_scales(found, name, ours, theirs, source, scheme)


def _compare_codes(
    found: Comparison, name: str, ours: Tensor, theirs: Tensor, source: torch.dtype, scheme: str
) -> None:
    bits = 4 if "4A16" in scheme else 8
    mine, other = (_integers(tensor.contiguous().reshape(-1).view(torch.uint8)) for tensor in (ours, theirs))
    unequal = sum(
        int(((mine >> shift & (1 << bits) - 1) != (other >> shift & (1 << bits) - 1)).sum())
        for shift in range(0, 8, bits)
    )
    found.elements += mine.numel() * 8 // bits
    found.other_codes += unequal
    if unequal and (source == torch.float32 or scheme.startswith("MX")):
        found.differences.append(f"{name}: {unequal} codes differ, and both sides compute in float32")


def _compare_scales(
    found: Comparison, name: str, ours: Tensor, theirs: Tensor, source: torch.dtype, scheme: str
) -> None:
    unequal = int((_integers(ours) != _integers(theirs)).sum())
    found.scales += ours.numel()
    found.other_scales += unequal
    if not unequal:
        return
    if scheme == "NVFP4A16" and _is_expert_half(name):
        found.divergences.add(D1)
    if defect := _scale_defect(name, ours, theirs, source, scheme):
        found.differences.append(f"{name}: {unequal} of {ours.numel()} differ: {defect}")


def _integers(tensor: Tensor) -> Tensor:
    """Bit patterns; those of positive floats are in the order of their values."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize]).to(torch.int64)


def _is_expert_half(name: str) -> bool:
    return name.startswith(EXPERTS) and name.split(".")[-2] in ("gate_proj", "up_proj")


def _scale_defect(name: str, ours: Tensor, theirs: Tensor, source: torch.dtype, scheme: str) -> str:
    """Say what is wrong with scales that differ; empty where theirs are rounded to 16 bits once more than ours."""
    sixteen_bits = source in (torch.bfloat16, torch.float16)
    steps = int((_integers(ours) - _integers(theirs)).abs().max())
    if scheme == "W4A16_ASYM" and sixteen_bits:
        return "" if steps <= 1 else f"{steps} steps of {ours.dtype}"
    if scheme != "NVFP4A16":
        return "no rule allows it"
    is_global, is_half = name.endswith("global_scale"), _is_expert_half(name)
    if is_half and not is_global:
        return ""  # another global scale, so other local ones; `_compare_error` judges the product
    if not sixteen_bits:
        return "no rule allows it for float32"
    if is_global:
        ratio = float(ours / theirs)
        too_small = ratio < 1 - GLOBAL_SCALE_ROUNDING and not is_half  # a divisor: that of a larger amax is smaller
        return f"ratio {ratio}" if too_small or ratio > 1 + GLOBAL_SCALE_ROUNDING else ""
    return "" if steps <= 1 else f"{steps} steps of float8"


def _compare_error(
    found: Comparison,
    module: str,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    source: Tensor,
    scheme: str,
) -> None:
    one, two = (_relative_error(tensors, module, source, scheme) for tensors in (ours, theirs))
    found.weights += 1
    found.errors.append((one, two))
    if one > two + _margin(module, ours, theirs, two, scheme):
        found.differences.append(f"{module}: error {one:.8f}, theirs {two:.8f}")


def _margin(module: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], error: float, scheme: str) -> float:
    scales = [f"{module}.{param}" for param in (*SCALES, "weight_zero_point")]
    if all(torch.equal(ours[name], theirs[name]) for name in scales if name in ours):
        return MARGIN
    return error * (SHARED_GRID if scheme == "NVFP4A16" and _is_expert_half(f"{module}.weight") else OTHER_GRID)


def _relative_error(tensors: Mapping[str, Tensor], module: str, source: Tensor, scheme: str) -> float:
    from shardmill.core.scheme import PRESETS as SCHEMES
    from shardmill.kernels import reference

    own = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.rpartition(".")[0] == module}
    chosen, shape = SCHEMES[scheme], (source.shape[0], source.shape[1])
    decoded = reference.decode(own, chosen.weights, format=chosen.format, shape=shape)
    return float((decoded.double() - source.double()).norm() / source.double().norm())


def compare_scheme(outcome: Outcome, scheme: str) -> Comparison:
    """Compare both output shards of a scheme."""
    found = Comparison()
    for shard in (FIRST, SECOND):
        found.add(compare(outcome, f"{scheme}/{shard}"))
    mine, other = found.mean_errors()
    if mine > other + MARGIN:
        found.differences.append(f"mean error {mine:.8f}, theirs {other:.8f}")
    return found


# ---- the table --------------------------------------------------------------------------------------------------


def table(outcome: Outcome) -> Iterator[str]:
    """One line per scheme, then the ragged shard and the validations, as Markdown."""
    yield "| scheme | weights | other codes | other scales | error | theirs | largest excess | on purpose | verdict |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |"
    for scheme in PRESETS:
        found = compare_scheme(outcome, scheme)
        mine, other = found.mean_errors()
        excess = max(one - two for one, two in found.errors)
        cells = [scheme, f"{found.weights}", f"{found.other_codes / found.elements:.2%}"]
        cells += [f"{found.other_scales / found.scales:.2%}", f"{mine:.6f}", f"{other:.6f}", f"{excess:+.1e}"]
        cells += ["; ".join(sorted(found.divergences)), "; ".join(found.differences) or "as required"]
        yield f"| {' | '.join(cells)} |"
    ours, theirs = (side[RAGGED].error or "written" for side in (outcome.ours, outcome.theirs))
    verdict = "as required" if ours == "written" else "refused"
    yield f"| FP8_BLOCK, ragged | 1 | | | {ours} | {theirs} | | {D20} | {verdict} |"
    yield ""
    yield "| `validate_file` | ours | theirs |"
    yield "| --- | --- | --- |"
    for case in MISFITS:
        name = f"validate {case}"
        yield f"| {case} | {outcome.ours[name].error or 'fits'} | {outcome.theirs[name].error or 'fits'} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or be the other side."""
    parser = argparse.ArgumentParser(description="Compare with llm-compressor 0.13, file by file.")
    parser.add_argument("--table", action="store_true", help="print the comparison as Markdown")
    parser.add_argument("--seed", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.seed:
        _seed_main()
    elif chosen.table:
        logging.disable(logging.WARNING)
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write("\n".join(table(run(Path(folder)))) + "\n")
    else:
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
