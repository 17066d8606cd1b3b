"""Compare the quality of quantized checkpoints with those of llm-compressor: same model, same text, same loader.

    python tests/reference/compare_quality.py [--write docs/quality.md]

Quality is the mean KL divergence of the next-token distribution from that of the bf16 model. The reference runs in an
environment of its own (`make .venv-reference/stamp`; `SHARDMILL_REFERENCE_PYTHON` names another interpreter): this file
is started there a second time, so only functions of this side import shardmill. The example checkpoint is kept in
`build/example`, or in the folder that `SHARDMILL_EXAMPLE` names.

Exits with 1 when a scheme is worse than `LARGEST_RATIO` allows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

ROOT: Final = Path(__file__).resolve().parents[2]
REFERENCE_PYTHON: Final = Path(
    os.environ.get("SHARDMILL_REFERENCE_PYTHON", ROOT / ".venv-reference" / "bin" / "python")
)
EXAMPLE: Final = Path(os.environ.get("SHARDMILL_EXAMPLE", ROOT / "build" / "example"))
TEXT: Final = Path(__file__).with_name("text.txt")
IGNORE: Final = ("lm_head", "re:.*embed_tokens")
WINDOW_TOKENS: Final = 512
THREADS: Final = 2

LARGEST_RATIO: Final = 1.1
"""Our divergence over theirs."""
BLOCK_TO_CHANNEL_RATIO: Final = 1.5
"""Divergence of FP8_BLOCK over that of FP8_DYNAMIC: what can be asked where the reference writes nothing."""

WEIGHTS: Final = "weights only"
AS_RUN: Final = "as run"
"""With activations quantized as at run time."""


@dataclass(frozen=True, slots=True)
class Case:
    """One scheme on the example checkpoint, whose matrices have 576, 192 and 1536 columns."""

    preset: str
    group_size: int | None = None
    quantizes_activations: bool = False

    @property
    def name(self) -> str:
        """For people, and for folders."""
        return f"{self.preset}-g{self.group_size}" if self.group_size else self.preset


CASES: Final = (
    Case("FP8_DYNAMIC", quantizes_activations=True),
    Case("FP8_BLOCK"),  # weights only: transformers cannot round 576 activations in the groups of 128 that it asks for
    Case("W8A8", quantizes_activations=True),
    Case("MXFP8", quantizes_activations=True),
    Case("MXFP8A16"),
    Case("NVFP4A16"),
    Case("MXFP4", quantizes_activations=True),
    Case("MXFP4A16"),
    Case("W8A16", 64),
    Case("W4A16", 64),
    Case("W4A16", 32),
    Case("W4A16_ASYM", 64),
    Case("W4A8", 64, quantizes_activations=True),
)
UNFIT: Final = (Case("W4A16"), Case("W8A16"), Case("W4A16_ASYM"))
"""Groups of 128 do not divide 576 columns."""


# ---- both sides -------------------------------------------------------------------------------------------------


def quantize_with_reference(cases: Iterable[Case], source: Path, folder: Path) -> dict[str, str]:
    """Quantize in the other environment, into `folder/<name>`; returns the error of each case, empty for none."""
    request = {"source": str(source), "folder": str(folder), "cases": [[c.name, c.preset, c.group_size] for c in cases]}
    done = subprocess.run(
        [REFERENCE_PYTHON, __file__, "--reference"],
        check=False,
        capture_output=True,
        text=True,
        input=json.dumps(request),
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"OMP_NUM_THREADS": str(THREADS)},
    )
    if done.returncode:
        raise RuntimeError(f"{REFERENCE_PYTHON} ended with {done.returncode}: {done.stderr[-2000:]}")
    errors: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return errors


def _reference_main() -> None:
    model_free_ptq: Any = importlib.import_module("llmcompressor").model_free_ptq
    preset_name_to_scheme: Any = importlib.import_module("compressed_tensors.quantization").preset_name_to_scheme
    request = json.load(sys.stdin)
    errors: dict[str, str] = {}
    for name, preset, group_size in request["cases"]:
        scheme = preset_name_to_scheme(preset, ["Linear"])
        if group_size:
            scheme.weights.group_size = group_size
        try:
            model_free_ptq(
                request["source"], Path(request["folder"], name), scheme=scheme, ignore=list(IGNORE), device="cpu"
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            errors[name] = f"{type(error).__name__}: {error}"
        else:
            errors[name] = ""
    sys.stdout.write("\n" + json.dumps(errors) + "\n")


def quantize_with_shardmill(case: Case, source: Path, destination: Path) -> None:
    """Quantize the checkpoint through all stages.

    Raises:
        Refused: the scheme does not fit.
    """
    from shardmill.core.recipe import uniform
    from shardmill.core.scheme import preset, with_group_size
    from shardmill.stages.pipeline import RunOptions, run
    from shardmill.stages.plan import Locations

    scheme = preset(case.preset)
    if case.group_size:
        scheme = with_group_size(scheme, case.group_size)
    locations = Locations(source=str(source), destination=str(destination))
    run(locations, uniform(scheme, ignore=IGNORE), RunOptions(device="cpu", workers=1))


# ---- the judge --------------------------------------------------------------------------------------------------


class Judge:
    """The bf16 model's opinion of the text, and how far another model's is from it."""

    def __init__(self, source: Path) -> None:
        from transformers import AutoTokenizer

        torch.set_num_threads(THREADS)
        tokens = AutoTokenizer.from_pretrained(source)(TEXT.read_text(encoding="utf-8"))["input_ids"]
        self.windows = torch.tensor(tokens).split(WINDOW_TOKENS)
        model = _load(source, AS_RUN)
        self.expected = [_log_probabilities(model, window) for window in self.windows]

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(len(window) - 1 for window in self.windows)

    def divergence(self, checkpoint: Path, mode: str) -> float:
        """Mean KL divergence in nats per token."""
        torch.set_num_threads(THREADS)
        model = _load(checkpoint, mode)
        total = 0.0
        for window, expected in zip(self.windows, self.expected, strict=True):
            found = _log_probabilities(model, window)
            total += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
        return total / self.tokens


def _load(checkpoint: Path, mode: str) -> Any:
    """Load a model, decompress it with a first call, and let it compute in float32.

    Some formats decompress to bf16 whatever dtype is asked for, so bf16 is asked for.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    quieten: Any = logging.disable_progress_bar
    quieten()
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.eval()
    if mode == WEIGHTS:
        for module in model.modules():
            module.quantization_enabled = False  # what compressed-tensors asks before it rounds activations
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    return torch.nn.Module.float(model)


@torch.no_grad()
def _log_probabilities(model: Any, window: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=window[None]).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1)


# ---- the table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One scheme in one mode."""

    case: Case
    mode: str
    ours: float
    theirs: float | None
    """None if the reference failed."""
    remark: str = ""

    @property
    def ratio(self) -> float | None:
        """Our divergence over theirs."""
        return None if self.theirs is None else self.ours / self.theirs

    def __str__(self) -> str:
        theirs, ratio = ("-" if value is None else f"{value:.4f}" for value in (self.theirs, self.ratio))
        return f"| {self.case.name} | {self.mode} | {self.ours:.4f} | {theirs} | {ratio} | {self.remark} |"


@dataclass(frozen=True, slots=True)
class Bench:
    """The checkpoint, its judge, and what the reference made of it."""

    source: Path
    folder: Path
    judge: Judge
    errors: Mapping[str, str]

    @classmethod
    def prepare(cls, folder: Path) -> Bench:
        """Get the example checkpoint and let the reference quantize it in every scheme."""
        from shardmill.example import prepare

        source = prepare(EXAMPLE, cache=EXAMPLE.parent / "cache")
        errors = quantize_with_reference([*CASES, *UNFIT], source, folder / "reference")
        return cls(source, folder, Judge(source), errors)

    def rows(self, case: Case) -> Iterator[Row]:
        """Quantize on our side, and measure both."""
        ours = self.folder / "ours" / case.name
        quantize_with_shardmill(case, self.source, ours)
        error = self.errors[case.name]
        theirs = None if error else self.folder / "reference" / case.name
        for mode in (WEIGHTS, AS_RUN) if case.quantizes_activations else (WEIGHTS,):
            divergence = None if theirs is None else self.judge.divergence(theirs, mode)
            remark = f"reference: {_in_short(error)}" if error else ""
            yield Row(case, mode, self.judge.divergence(ours, mode), divergence, remark)

    def refusal(self, case: Case) -> str:
        """What our side says to a scheme that does not fit; empty if it fits."""
        from shardmill.errors import Refused

        try:
            quantize_with_shardmill(case, self.source, self.folder / "ours" / case.name)
        except Refused as refused:
            return str(refused)
        return ""


HEAD: Final = """# Quality beside the reference

SmolLM2-135M-Instruct, the example checkpoint, quantized by shardmill and by llm-compressor's `model_free_ptq`. Both
results are loaded by transformers and read the same text, {tokens} tokens. Numbers are the mean KL divergence of the
next-token distribution from that of the bf16 model, in nats: 0 is the same model. `as run` also rounds activations as
an engine would. The ratio is required to be at most {ratio}. What `--search mse` gains is in [search.md](search.md).

Written by `python tests/reference/compare_quality.py --write docs/quality.md`.
Versions: {versions}; reference: {reference}.

"""


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Markdown, line by line."""
    yield "| scheme | measured | shardmill | reference | ratio | remark |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    yield from map(str, rows)


def refusals(bench: Bench) -> Iterator[str]:
    """Markdown about schemes that do not fit."""
    yield "Groups of 128 do not divide the 576 columns of this model:"
    yield ""
    for case in UNFIT:
        refusal, error = bench.refusal(case), bench.errors[case.name]
        first = refusal.splitlines()[0] if refusal else "fits"
        yield f"- {case.name}, shardmill before any work, {len(refusal.splitlines())} tensors: {first}"
        yield f"- {case.name}, reference: {_in_short(error) if error else 'fits'}"


def _in_short(error: str) -> str:
    """The error of the reference up to the name of the tensor, which is another one each time."""
    return error.splitlines()[0].partition(": `")[0].partition(" `")[0]


def too_bad(rows: Sequence[Row]) -> list[str]:
    """Rows that break a requirement."""
    found = [str(row) for row in rows if row.ratio is not None and row.ratio > LARGEST_RATIO]
    by_name = {(row.case.name, row.mode): row.ours for row in rows}
    for mode in (WEIGHTS, AS_RUN):
        block, channel = (by_name.get((name, mode)) for name in ("FP8_BLOCK", "FP8_DYNAMIC"))
        if block is not None and channel is not None and block > BLOCK_TO_CHANNEL_RATIO * channel:
            found.append(f"FP8_BLOCK {mode}: {block:.4f}, FP8_DYNAMIC {channel:.4f}")
    return found


def head(bench: Bench) -> str:
    """What stands above the table in the document."""
    names = ("compressed-tensors", "torch", "transformers")
    asked = subprocess.run(
        [
            REFERENCE_PYTHON,
            "-c",
            "from importlib.metadata import version as v; print('llmcompressor', v('llmcompressor'))",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return HEAD.format(
        tokens=bench.judge.tokens,
        ratio=LARGEST_RATIO,
        versions=", ".join(f"{name} {version(name)}" for name in names),
        reference=asked.stdout.strip(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or be the other side."""
    parser = argparse.ArgumentParser(description="Compare the quality of results with the reference system.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table, as Markdown")
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.reference:
        _reference_main()
        return 0
    os.environ |= {
        "LOGURU_LEVEL": "ERROR",
        "TQDM_DISABLE": "1",
    }  # read when transformers is imported, which comes later
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.prepare(Path(folder))
        rows = [row for case in CASES for row in bench.rows(case)]
        text = "\n".join([*table(rows), "", *refusals(bench)]) + "\n"
        introduction = head(bench)
    sys.stdout.write(text)
    if chosen.write is not None:
        chosen.write.write_text(introduction + text, encoding="utf-8")
    bad = too_bad(rows)
    sys.stderr.writelines(f"worse than required: {line}\n" for line in bad)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
