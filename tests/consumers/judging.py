"""One format, judged by one consumer; a row of docs/consumers.md."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from consumers.bench import Bench, Heard, dense_copy, input_scales, without_activations
from consumers.cases import CASES, FAR_OFF, MARGIN, UNSHARED, Case
from zoo.battery import relative

LARGEST_DIFFERENCE: Final = 1e-2
"""Of logits of the same weights, read by two readers: norm of the difference over norm."""
FEW_LAYERS: Final = 2
LARGEST_DISTANCE: Final = 0.1
"""Between log-probabilities of vLLM, which computes in BF16, and those of the same weights elsewhere, in nats."""
LARGEST_DISTANCE_ROUNDED: Final = 0.3
"""The same where vLLM rounds activations to 8 bits, too, which the other side does not."""

LARGEST_DISTANCE_EMULATED: Final = 0.7
"""The same where both sides round activations to 4 bits: a last bit of BF16 decides between codes far apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InTransformers:
    """A result as transformers loads it, beside a dense copy that the independent reader made."""

    case: Case
    difference: float
    """Of logits, relative."""

    @property
    def problems(self) -> list[str]:
        found = []
        if not self.difference <= LARGEST_DIFFERENCE:
            found.append(f"{self.case.name}: logits differ by {self.difference}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class InVllm:
    """A result as vLLM loads it."""

    case: Case
    found: Heard
    whole: Heard
    """With the source."""
    distance: float
    """From the dense copy in transformers, in nats."""
    reference: Heard | None = None
    """With what llm-compressor makes of the source in the same format; asked for where the limit is passed."""

    @property
    def ratio(self) -> float:
        """Perplexity over that of the source."""
        return self.found.perplexity / self.whole.perplexity

    @property
    def reference_ratio(self) -> float | None:
        """The same of llm-compressor's result."""
        return None if self.reference is None else self.reference.perplexity / self.whole.perplexity

    @property
    def problems(self) -> list[str]:
        found = []
        limit = max(self.case.limit, self.reference_ratio or 0)
        if not self.ratio <= limit * MARGIN:
            found.append(f"{self.case.name}: {self.ratio} times the perplexity of the source, limit {limit}")
        largest = LARGEST_DISTANCE_ROUNDED if self.case.rounds_activations else LARGEST_DISTANCE
        largest = LARGEST_DISTANCE_EMULATED if self.case.is_emulated else largest
        if not self.distance <= largest:
            found.append(f"{self.case.name}: {self.distance} nats from the same weights elsewhere")
        return found


def kept(file: Path, ask: Callable[[], Any]) -> Any:
    """The JSON value of a file, which is asked for when the file is not there."""
    if not file.exists():
        file.write_text(json.dumps(ask()))
    return json.loads(file.read_text())


class Judge:
    """Judges cases. Every answer is kept in `home`, and asked for once."""

    def __init__(self, home: Path) -> None:
        self.bench = Bench(home)
        self.few_layers = Bench(home / "few-layers", layers=FEW_LAYERS)
        self.few_layers.home.mkdir(exist_ok=True)

    def in_transformers(self, case: Case) -> InTransformers:
        """Compare two readers of a result, for the first layers: each layer holds every kind of matrix."""
        difference = kept(self.few_layers.home / f"{case.name}.json", lambda: self._difference(case))
        return InTransformers(case=case, difference=difference)

    def in_vllm(self, case: Case) -> InVllm:
        """Let vLLM read the text with a result."""
        found = self._kept(f"{case.name}-vllm", lambda: self.bench.in_vllm(self.bench.result(case), case.kernels))
        dense = self._kept(f"{case.name}-dense", lambda: self._dense(case))
        row = InVllm(case=case, found=found, whole=self.whole(case), distance=found.distance(dense))
        if row.ratio <= case.limit * MARGIN or case.is_awq or case.is_emulated or case is UNSHARED:
            return row
        return replace(row, reference=self.reference(case))

    def reference(self, case: Case) -> Heard:
        """What vLLM says with llm-compressor's result."""
        return self._kept(
            f"{case.name}-reference", lambda: self.bench.in_vllm(self.bench.of_reference(case), case.kernels)
        )

    def whole(self, case: Case) -> Heard:
        """What vLLM says with the source of a case."""
        name = "AWQ" if case.is_awq else "BF16"
        return self._kept(f"{name}-vllm", lambda: self.bench.in_vllm(self.bench.whole(case)))

    def noise(self) -> float:
        """How far vLLM is from transformers with one and the same BF16 checkpoint."""
        bench = self.bench
        elsewhere = self._kept("BF16-dense", lambda: bench.heard(bench.in_transformers(bench.source)))
        return self.whole(CASES[0]).distance(elsewhere)

    def _difference(self, case: Case) -> float:
        result = self.few_layers.result(case)
        with tempfile.TemporaryDirectory(dir=self.few_layers.home) as scratch:
            ours = self.few_layers.in_transformers(dense_copy(result, Path(scratch) / "dense"))
            theirs = self.few_layers.in_transformers(without_activations(result, Path(scratch) / "weights"))
        return relative(theirs, ours)

    def _dense(self, case: Case) -> Heard:
        with tempfile.TemporaryDirectory(dir=self.bench.home) as scratch:
            result = self.bench.result(case)
            copy = dense_copy(result, Path(scratch) / "dense")
            scales = input_scales(result) if case.is_emulated else {}
            return self.bench.heard(self.bench.in_transformers(copy, scales))

    def with_activations(self, case: Case) -> InTransformers:
        """Compare what transformers makes of activations of 4 bits with what the formulas make of them."""
        asked = self.few_layers.home / f"{case.name}-activations.json"
        return InTransformers(case=case, difference=kept(asked, lambda: self._activations(case)))

    def _activations(self, case: Case) -> float:
        result = self.few_layers.result(case)
        with tempfile.TemporaryDirectory(dir=self.few_layers.home) as scratch:
            copy = dense_copy(result, Path(scratch) / "dense")
            ours = self.few_layers.in_transformers(copy, input_scales(result))
        return relative(self.few_layers.in_transformers(result), ours)

    def _kept(self, name: str, ask: Callable[[], Heard]) -> Heard:
        return Heard(**kept(self.bench.home / f"{name}.json", lambda: asdict(ask())))


def control_problems(row: InVllm) -> list[str]:
    """What is wrong with the negative control: nothing if everything is."""
    return [] if row.ratio >= FAR_OFF and row.distance > LARGEST_DISTANCE else [f"{row.case.name}: {row.ratio}"]
