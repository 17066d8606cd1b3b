"""Solve budgets on the example checkpoint and compare the results with uniform schemes of equal size.

    python tests/reference/compare_budget.py [--write docs/budget.md]

Every result is written through all stages. Its weights are given back by the formulas of `kernels.reference` in bf16,
and the model's next-token distributions on a text are compared with those of the bf16 model. `--write` replaces what
stands below the line `Measured` of a page.

Exits with 1 when a budget is missed by more than 1 %, when divergence does not fall as budgets rise, or when a uniform
scheme of no smaller size diverges less.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does

from reference.compare_quality import EXAMPLE, TEXT, THREADS, WINDOW_TOKENS
from reference.compare_search import tensors_of
from shardmill.core.budget import QUANTIZED, Budget, Wish, cost_of, parse_candidates
from shardmill.core.plan import Plan
from shardmill.core.recipe import Recipe, uniform
from shardmill.core.scheme import Scheme, parse_scheme
from shardmill.core.summary import summarize
from shardmill.example import prepare
from shardmill.kernels import reference
from shardmill.stages.budget import solve_budget
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.storage.location import open_folder
from shardmill.storage.source import open_source
from shardmill.storage.store import Store

OPTIONS: Final = RunOptions(device="cpu", workers=1)
WIDTHS: Final = ("W3A16:64", "W4A16:64", "W5A16:64", "W6A16:64", "W8A16:64")
"""Groups of 128 do not divide the 576 columns of the example checkpoint."""
SERVED: Final = ("NVFP4A16", "W4A16:64", "FP8_DYNAMIC", "W8A16:64")
"""The default candidates in groups that fit."""
BUDGETS: Final = (4.0, 5.0, 6.0)
TOLERANCE: Final = 0.01
"""Share of a budget by which a result may be smaller."""
HEADING: Final = "## Measured"


class Judge:
    """The bf16 model's opinion of some tokens, and how far other weights take it from there."""

    def __init__(self, source: Path) -> None:
        transformers: Any = importlib.import_module("transformers")
        torch.set_num_threads(THREADS)
        text = transformers.AutoTokenizer.from_pretrained(source)(TEXT.read_text(encoding="utf-8"))
        self.windows = torch.tensor(text["input_ids"]).split(WINDOW_TOKENS)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self.weights = {name.removesuffix(".weight"): value for name, value in self.model.named_parameters()}
        self.expected = self._opinion()

    @torch.no_grad()
    def _opinion(self) -> list[Tensor]:
        logits = [self.model(input_ids=window[None]).logits[0, :-1] for window in self.windows]
        return [torch.log_softmax(found.float(), -1) for found in logits]

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(len(window) - 1 for window in self.windows)

    def perplexity(self, opinion: Sequence[Tensor]) -> float:
        """Of the text."""
        pairs = zip(opinion, self.windows, strict=True)
        lost = [-found.gather(1, window[1:, None]).sum(dtype=torch.float64) for found, window in pairs]
        return math.exp(float(sum(lost)) / self.tokens)

    @torch.no_grad()
    def measure(self, checkpoint: Path, plan: Plan) -> tuple[float, float]:
        """Mean KL divergence in nats per token, and perplexity, of a result."""
        schemes = {
            unit.module: scheme
            for shard in plan.shards
            for unit in shard.units()
            if (scheme := unit.scheme) is not None
        }
        stored: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors_of(checkpoint).items():
            module, _, param = name.rpartition(".")
            stored.setdefault(module, {})[param] = tensor
        for module, scheme in schemes.items():
            self.weights[module].copy_(restored(stored[module], scheme, self.weights[module]))
        opinion = self._opinion()
        total = sum(
            float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
            for expected, found in zip(self.expected, opinion, strict=True)
        )
        return total / self.tokens, self.perplexity(opinion)


def restored(params: Mapping[str, Tensor], scheme: Scheme, weight: Tensor) -> Tensor:
    """What a loader makes of a stored weight, in bf16."""
    shape = (weight.shape[0], weight.shape[1])
    return reference.decode(params, scheme.weights, format=scheme.format, shape=shape).to(torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result."""

    name: str
    asked: float | None
    bits: float
    overall: float
    divergence: float
    perplexity: float
    error: float
    """Costs of all weights, added up: what a budget minimises."""
    parts: str


class Bench:
    """Results of one checkpoint, side by side."""

    def __init__(self, folder: Path, kept: Path | None) -> None:
        self.source, self.folder = prepare(EXAMPLE, cache=EXAMPLE.parent / "cache"), folder
        self.store = (kept or folder) / "store"
        self.judge = Judge(self.source)

    def solved(self, bits: float, names: Sequence[str]) -> Row:
        """The result of a budget for quantized weights."""
        candidates = parse_candidates(names)
        wish = Wish(budget=Budget(bits, QUANTIZED), candidates=candidates, base=uniform(candidates[0]))
        store = Store(open_folder(str(self.store)))
        found = solve_budget(open_source(str(self.source)), store, wish, OPTIONS)
        counts = Counter(found.solution.scheme_of.values())
        parts = ", ".join(f"{counts[n]} {name}" for n, name in enumerate(names) if counts[n])
        return self._judged(f"budget {bits:g}", bits, found.recipe, parts)

    def uniform(self, name: str, scheme: Scheme) -> Row:
        """The result of one scheme."""
        return self._judged(name, None, uniform(scheme), "all")

    def _judged(self, name: str, asked: float | None, recipe: Recipe, parts: str) -> Row:
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            destination = Path(place, "result")
            locations = Locations(source=str(self.source), destination=str(destination), store=str(self.store))
            result = run(locations, recipe, OPTIONS)
            divergence, perplexity = self.judge.measure(destination, result.plan)
        summary = summarize(result.manifest)
        errors = [cost_of(w.statistics, None, w.module) for o in result.outcomes for w in o.receipt.weights]
        row = Row(
            name=name,
            asked=asked,
            bits=summary.quantized_bits_per_weight,
            overall=summary.bits_per_weight,
            divergence=divergence,
            perplexity=perplexity,
            error=math.fsum(errors),
            parts=parts,
        )
        sys.stdout.write(line(row) + "\n")
        sys.stdout.flush()
        return row


def line(row: Row) -> str:
    """Markdown of a result."""
    asked = "" if row.asked is None else f"{row.asked:.3f}"
    sizes = f"{asked} | {row.bits:.3f} | {row.overall:.3f}"
    return f"| {row.name} | {sizes} | {row.error:.2f} | {row.divergence:.4f} | {row.perplexity:.2f} | {row.parts} |"


def channel(bits: int) -> Scheme:
    """One scale for each row: the smallest uniform scheme of that many bits."""
    return parse_scheme({"weights": {"num_bits": bits, "strategy": "channel"}})


_TABLE: Final = (
    "| result | asked | bits per quantized weight | overall | error | KL | perplexity | weights |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
)


def compare(bench: Bench) -> Iterator[tuple[list[str], list[str]]]:
    """Markdown of results, part by part, and what of them is not as required."""
    widths = [bench.solved(bits, WIDTHS) for bits in BUDGETS]
    pairs = list(
        zip(widths, [bench.uniform(f"int{n}, a scale for each row", channel(n)) for n in (4, 5, 6)], strict=True)
    )
    title = f"Candidates {', '.join(WIDTHS)}, and uniform schemes with a scale for each row, which are as small:"
    yield table(title, [row for pair in pairs for row in pair]), [*missed(widths), *not_monotone(widths), *worse(pairs)]
    pairs = []
    for name in WIDTHS[1:3]:
        alone = bench.uniform(name, parse_candidates([name, "FP8_DYNAMIC"])[0])
        pairs.append((bench.solved(alone.bits, WIDTHS), alone))
    title = "The same candidates, to the size of uniform schemes in the same groups:"
    yield table(title, [row for pair in pairs for row in pair]), list(worse(pairs))
    served = [bench.solved(bits, SERVED) for bits in (5.0, 6.0, 7.0)]
    title = f"Candidates {', '.join(SERVED)}: the default, in groups that divide 576 columns:"
    yield table(title, served), [*missed(served), *not_monotone(served)]


def table(title: str, rows: Sequence[Row]) -> list[str]:
    """Markdown of results."""
    return [title, "", *_TABLE, *map(line, rows), ""]


def missed(rows: Sequence[Row]) -> Iterator[str]:
    """Budgets that are not used, or not kept to."""
    for row in rows:
        if row.asked is not None and not row.asked * (1 - TOLERANCE) <= row.bits <= row.asked * (1 + 1e-9):
            yield f"{row.name}: {row.bits:.4f} bits for {row.asked}"


def not_monotone(rows: Sequence[Row]) -> Iterator[str]:
    """Larger results that diverge no less."""
    for small, large in pairwise(rows):
        if large.divergence >= small.divergence:
            yield f"{large.name} ({large.parts}) diverges no less than {small.name}"


def worse(pairs: Sequence[tuple[Row, Row]]) -> Iterator[str]:
    """Budgets to which a uniform scheme is preferable."""
    for solved, alone in pairs:
        if solved.divergence > alone.divergence:  # equal where the choice is that scheme
            yield f"{solved.name}: KL {solved.divergence:.4f}, {alone.name} has {alone.divergence:.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Compare solved budgets with uniform schemes of equal size.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the tables into a page")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the store there, and use it")
    chosen = parser.parse_args(arguments)
    os.environ |= {"TQDM_DISABLE": "1"}  # read when transformers is imported
    text, bad = list[str](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), chosen.keep)
        opinion = f"Perplexity of the bf16 model: {bench.judge.perplexity(bench.judge.expected):.2f},"
        text += [f"{opinion} of {bench.judge.tokens} tokens.", ""]
        for part, wrong in compare(bench):
            text += part
            bad += wrong
            if chosen.write is not None:
                head = chosen.write.read_text(encoding="utf-8").partition(HEADING)[0]
                chosen.write.write_text(f"{head}{HEADING}\n\n" + "\n".join(text), encoding="utf-8")
    sys.stderr.writelines(f"not as required: {row}\n" for row in bad)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
