"""Compare `--search mse` with min/max scales and with the observers of llm-compressor: error, divergence, time.

    python tests/reference/compare_search.py [--write docs/search.md]

Four results of each scheme on two checkpoints: the reference with min/max, the reference with its best observer,
shardmill with min/max, shardmill with `--search mse`. Environment and judge are those of `compare_quality.py`.

Exits with 1 when a weight has more error than any of the others leaves it, or when `--search mse` takes too long.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does; the other side imports nothing of it

IGNORE: Final = ("lm_head", "re:.*embed_tokens")
LARGEST_TIME_RATIO: Final = 3.0
"""Processor time of a run with the search over that of a run without."""
ROUNDING: Final = 1e-5
"""Share of an error that may be due to the rounding of sums."""
REPEATS: Final = 5
"""Runs of ours, in turns, of whose times the median counts: each takes less than a second."""
DRAWS: Final = 12
"""Mixtures of two results that show how much of a difference in divergence is chance."""
SEED: Final = 5
OBSERVERS: Final = ("memoryless_mse", "nvfp4_expanded_mse")


@dataclass(frozen=True, slots=True)
class Case:
    """One scheme; groups of 128 do not divide the 576 columns of the example checkpoint."""

    preset: str
    group_size: int | None = None

    @property
    def name(self) -> str:
        """For people, and for folders."""
        return f"{self.preset}-g{self.group_size}" if self.group_size else self.preset

    @property
    def observers(self) -> tuple[str, ...]:
        """Observers of the reference that search for a better scale."""
        return OBSERVERS if self.preset.startswith("NVFP4") else OBSERVERS[:1]


CASES: Final = (
    Case("FP8_DYNAMIC"),
    Case("FP8_BLOCK"),
    Case("W8A8"),
    Case("W4A16", 64),
    Case("W4A16", 32),
    Case("W4A16_ASYM", 64),
    Case("W4A16_ASYM", 32),
    Case("W3A16", 64),
    Case("NVFP4A16"),
    Case("MXFP4A16"),
    Case("MXFP8A16"),
)
VARIANTS: Final = ("reference min/max", "reference searched", "shardmill", "shardmill --search mse")
MINMAX_THEIRS, SEARCHED_THEIRS, MINMAX_OURS, SEARCHED_OURS = VARIANTS


# ---- the other side ---------------------------------------------------------------------------------------------


def _reference_main() -> None:
    """Quantize in the other environment; leaves error and processor seconds beside each result."""
    model_free_ptq: Any = importlib.import_module("llmcompressor").model_free_ptq
    preset_name_to_scheme: Any = importlib.import_module("compressed_tensors.quantization").preset_name_to_scheme
    request = json.load(sys.stdin)
    for folder, preset, group_size, observer in request["jobs"]:
        scheme = preset_name_to_scheme(preset, ["Linear"])
        if group_size:
            scheme.weights.group_size = group_size
        if observer:
            scheme.weights.observer = observer
        started, error = time.process_time(), ""
        try:
            model_free_ptq(request["source"], Path(folder), scheme=scheme, ignore=list(IGNORE), device="cpu")
        except Exception as failure:  # noqa: BLE001 - whatever it is, it is reported
            error = f"{type(failure).__name__}: {failure}"
        told = json.dumps([error, time.process_time() - started])
        _told(Path(folder)).write_text(told, encoding="utf-8")


def _told(folder: Path) -> Path:
    """Where error and seconds of a job are kept, so that it need not be done again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.with_name(f"{folder.name}.told.json")


def quantize_with_reference(jobs: Sequence[tuple[Path, Case, str]], source: Path) -> dict[Path, tuple[str, float]]:
    """Run jobs that are not done yet, each a folder to write, a case and an observer or nothing."""
    wanted = [
        [str(folder), case.preset, case.group_size, observer]
        for folder, case, observer in jobs
        if not _told(folder).exists()
    ]
    if wanted:
        _run_reference({"source": str(source), "jobs": wanted})
    found: dict[Path, tuple[str, float]] = {}
    for folder, _, _ in jobs:
        error, seconds = json.loads(_told(folder).read_text(encoding="utf-8"))
        found[folder] = error, seconds
    return found


def _run_reference(request: Mapping[str, Any]) -> None:
    from reference.compare_quality import REFERENCE_PYTHON, THREADS

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


# ---- our side ---------------------------------------------------------------------------------------------------


def quantize_with_shardmill(case: Case, source: Path, destination: Path, search: str) -> float:
    """Quantize the checkpoint through all stages; returns the processor seconds."""
    from shardmill.core.recipe import uniform, with_search
    from shardmill.core.scheme import parse_search, preset, with_group_size
    from shardmill.stages.pipeline import RunOptions, run
    from shardmill.stages.plan import Locations

    scheme = preset(case.preset)
    if case.group_size:
        scheme = with_group_size(scheme, case.group_size)
    recipe = with_search(uniform(scheme, ignore=IGNORE), parse_search(search))
    started = time.process_time()
    run(Locations(source=str(source), destination=str(destination)), recipe, RunOptions(device="cpu", workers=1))
    return time.process_time() - started


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors by name."""
    from safetensors.torch import load_file

    return {
        name: tensor for path in sorted(checkpoint.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def restored_weights(source: Mapping[str, Tensor], checkpoint: Path, case: Case) -> Iterator[tuple[str, Tensor]]:
    """Name of each quantized module, and what compressed-tensors' formulas make of its stored bytes in float32."""
    from shardmill.core.scheme import preset, with_group_size
    from shardmill.kernels import reference

    scheme = preset(case.preset)
    if case.group_size:
        scheme = with_group_size(scheme, case.group_size)
    stored: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(checkpoint).items():
        module, _, param = name.rpartition(".")
        stored.setdefault(module, {})[param] = tensor
    for module, params in stored.items():
        if "weight_scale" in params:
            rows, cols = source[f"{module}.weight"].shape
            yield module, reference.decode(params, scheme.weights, format=scheme.format, shape=(rows, cols))


class Judge:
    """The bf16 model's opinion of some tokens, and how far it is from it with other weights."""

    def __init__(self, source: Path, tokens: Tensor) -> None:
        from reference import compare_quality

        torch.set_num_threads(compare_quality.THREADS)
        self._log_probabilities = compare_quality._log_probabilities
        self._model = compare_quality._load(source, compare_quality.WEIGHTS)
        self.windows = tokens.split(compare_quality.WINDOW_TOKENS)
        self.expected = self._opinion()
        self.perplexity = self._perplexity(self.expected)

    def _opinion(self) -> list[Tensor]:
        return [self._log_probabilities(self._model, window) for window in self.windows]

    def _perplexity(self, opinion: Sequence[Tensor]) -> float:
        pairs = zip(opinion, self.windows, strict=True)
        lost = [-found.gather(1, window[1:, None]).sum(dtype=torch.float64) for found, window in pairs]
        return math.exp(float(sum(lost)) / self.tokens)

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(len(window) - 1 for window in self.windows)

    def take(self, module: str, weight: Tensor) -> None:
        """Give the model another weight, rounded to bf16 as loaders do it."""
        self._model.get_submodule(module).weight.data.copy_(weight.to(torch.bfloat16))

    def measure(self) -> tuple[float, float]:
        """Mean KL divergence in nats per token, and perplexity, with the weights that were taken."""
        opinion = self._opinion()
        total = sum(
            float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
            for expected, found in zip(self.expected, opinion, strict=True)
        )
        return total / self.tokens, self._perplexity(opinion)


@dataclass(frozen=True, slots=True)
class Result:
    """One variant of one case."""

    errors: Mapping[str, float]
    """Squared error by weight."""
    divergence: float
    perplexity: float
    seconds: float
    place: Path
    failure: str = ""

    @property
    def error(self) -> float:
        """Squared error of all weights."""
        return math.fsum(self.errors.values())


def make_heavy_tailed(folder: Path, seed: int) -> tuple[Path, Tensor]:
    """Write a small Llama whose weights have the tails of Student's t with 4 degrees, and tokens for it to read."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    tails = torch.distributions.StudentT(4.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                weight.copy_(tails.sample(weight.shape) * 0.7 * weight.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder, torch.randint(0, 512, (1024,))


class Bench:
    """A checkpoint, its judge, and all results of its cases."""

    def __init__(
        self, title: str, source: Path, tokens: Tensor, folder: Path, kept: Path, cases: Sequence[Case]
    ) -> None:
        self.title, self.source, self.folder, self.kept, self.cases = title, source, folder, kept, cases
        self.judge = Judge(source, tokens)
        self.weights = tensors_of(source)
        jobs = [
            (self.kept / (observer or "minmax") / case.name, case, observer)
            for case in cases
            for observer in ("", *case.observers)
        ]
        self.theirs = quantize_with_reference(jobs, source)

    def _place(self, case: Case, variant: str) -> Path:
        return self.folder / variant / case.name

    def results(self, case: Case) -> dict[str, Result]:
        """Measure all variants of a case."""
        found = {
            MINMAX_THEIRS: self._their(case, "minmax"),
            SEARCHED_THEIRS: min(
                (self._their(case, observer) for observer in case.observers),
                key=lambda result: math.inf if result.failure else result.error,
            ),
        }
        searches = {MINMAX_OURS: "none", SEARCHED_OURS: "mse"}
        seconds: dict[str, list[float]] = {search: [] for search in searches.values()}
        for number in range(1 + REPEATS):  # kernels are compiled, or loaded, the first time
            for search, taken in seconds.items():
                place = self._place(case, f"search-{search}-{number}")
                taken.append(quantize_with_shardmill(case, self.source, place, search))
        for variant, search in searches.items():
            place = self._place(case, f"search-{search}-{REPEATS}")
            found[variant] = self._judged(case, place, median(seconds[search][1:]))
        return found

    def mixtures(self, case: Case, one: Result, other: Result) -> list[float]:
        """Divergence where each weight is, at random, as one result has it or as the other."""
        pairs = list(
            zip(
                restored_weights(self.weights, one.place, case),
                restored_weights(self.weights, other.place, case),
                strict=True,
            )
        )
        found = []
        for draw in range(DRAWS):
            picks = torch.randint(2, (len(pairs),), generator=torch.Generator().manual_seed(draw))
            for pair, pick in zip(pairs, picks.tolist(), strict=True):
                self.judge.take(*pair[pick])
            found.append(self.judge.measure()[0])
        return found

    def _their(self, case: Case, variant: str) -> Result:
        place = self.kept / variant / case.name
        failure, seconds = self.theirs[place]
        if failure:
            return Result({}, math.nan, math.nan, seconds, place, failure.splitlines()[0])
        return self._judged(case, place, seconds)

    def _judged(self, case: Case, place: Path, seconds: float) -> Result:
        errors: dict[str, float] = {}
        for module, weight in restored_weights(self.weights, place, case):
            lost = weight - self.weights[f"{module}.weight"].float()
            errors[module] = float(lost.square().sum(dtype=torch.float64))
            self.judge.take(module, weight)
        return Result(errors, *self.judge.measure(), seconds, place)

    @property
    def squared_weights(self) -> float:
        """Of the weights that are quantized."""
        matrices = [t for name, t in self.weights.items() if name.endswith("_proj.weight")]
        return math.fsum(float(t.double().square().sum()) for t in matrices)


def rows(bench: Bench, case: Case, results: Mapping[str, Result]) -> Iterator[str]:
    """Markdown of one case."""
    least = min(result.divergence for result in results.values() if not math.isnan(result.divergence))
    for variant, result in results.items():
        if result.failure:
            yield f"| {case.name} | {variant} | - | - | - | - | {result.failure[:60]} |"
            continue
        relative = math.sqrt(result.error / bench.squared_weights)
        mark = "**" if result.divergence == least else ""
        yield (
            f"| {case.name} | {variant} | {relative:.5f} | {mark}{result.divergence:.4f}{mark} |"
            f" {result.perplexity:.2f} | {_seconds(result)} | {remark(variant, results)} |"
        )


def explained(bench: Bench, case: Case, results: Mapping[str, Result]) -> Iterator[str]:
    """Where another variant has the least divergence: how far chance alone moves it."""
    ours = results[SEARCHED_OURS]
    name, least = min(
        ((name, result) for name, result in results.items() if not result.failure),
        key=lambda entry: entry[1].divergence,
    )
    if least.divergence >= ours.divergence:
        return
    mixed = bench.mixtures(case, ours, least)
    yield (
        f"{case.name}: {name} has {least.divergence:.5f}, `--search mse` {ours.divergence:.5f}. With each weight at"
        f" random from one of the two, {DRAWS} draws: {min(mixed):.5f} to {max(mixed):.5f}, mean"
        f" {sum(mixed) / len(mixed):.5f}."
    )


def _seconds(result: Result) -> str:
    return "-" if math.isnan(result.seconds) else f"{result.seconds:.2f}"


def remark(variant: str, results: Mapping[str, Result]) -> str:
    """Ratios of times, and how many weights have less error than anything else gives them."""
    if variant != SEARCHED_OURS:
        return ""
    ours, theirs = results[SEARCHED_OURS], results[SEARCHED_THEIRS]
    worse = worse_weights(results)
    of_ours = f"time x{ours.seconds / results[MINMAX_OURS].seconds:.2f} of min/max"
    of_theirs = (
        ""
        if theirs.failure or math.isnan(theirs.seconds)
        else f", x{ours.seconds / theirs.seconds:.3f} of the reference's search"
    )
    return f"{of_ours}{of_theirs}; {len(worse)} of {len(ours.errors)} weights worse than another variant"


def worse_weights(results: Mapping[str, Result]) -> list[str]:
    """Weights to which some other variant does better."""
    ours = results[SEARCHED_OURS].errors
    others = [result.errors for variant, result in results.items() if variant != SEARCHED_OURS and result.errors]
    return [name for name, error in ours.items() if any(error > other[name] * (1 + ROUNDING) for other in others)]


def too_bad(case: Case, results: Mapping[str, Result]) -> Iterator[str]:
    """Requirements that a case breaks."""
    yield from (f"{case.name}: {name} has more error than elsewhere" for name in worse_weights(results))
    ratio = results[SEARCHED_OURS].seconds / results[MINMAX_OURS].seconds
    if ratio > LARGEST_TIME_RATIO:
        yield f"{case.name}: the search takes {ratio:.2f} times the time"


HEAD: Final = Path(__file__).with_name("search-head.md")
_TABLE: Final = (
    "| scheme | scales | weight error | KL | perplexity | CPU s | |",
    "| --- | --- | ---: | ---: | ---: | ---: | --- |",
)


def report(bench: Bench) -> tuple[list[str], list[str]]:
    """Markdown about a checkpoint, and what is not as required."""
    text = [f"## {bench.title}", "", f"Perplexity of the bf16 model: {bench.judge.perplexity:.2f}.", "", *_TABLE]
    bad: list[str] = []
    notes: list[str] = []
    for case in bench.cases:
        results = bench.results(case)
        lines = list(rows(bench, case, results))
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        text += lines
        notes += explained(bench, case, results)
        bad += too_bad(case, results)
    return [*text, "", *(f"- {note}" for note in notes), *([""] if notes else [])], bad


def benches(folder: Path, kept: Path, only: str | None, cases: Sequence[Case], seed: int) -> Iterator[Bench]:
    """Both checkpoints, or one."""
    from transformers import AutoTokenizer

    from reference.compare_quality import EXAMPLE, TEXT
    from shardmill.example import prepare

    if only in (None, "smollm2"):
        source = prepare(EXAMPLE, cache=EXAMPLE.parent / "cache")
        tokens = torch.tensor(AutoTokenizer.from_pretrained(source)(TEXT.read_text(encoding="utf-8"))["input_ids"])
        yield Bench("SmolLM2-135M-Instruct", source, tokens, folder / "smollm2", kept / "smollm2", cases)
    if only in (None, "heavy-tailed"):
        source, tokens = make_heavy_tailed(folder / "heavy-tailed-source", seed)
        place = "heavy-tailed" if seed == SEED else f"heavy-tailed-{seed}"
        yield Bench("Heavy tails", source, tokens, folder / place, kept / place, cases)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or be the other side."""
    parser = argparse.ArgumentParser(description="Compare the search for scales with the reference system.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the tables, as Markdown")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the reference's results there, and use them")
    parser.add_argument("--only", choices=("smollm2", "heavy-tailed"), help="one of the checkpoints")
    parser.add_argument("--case", action="append", metavar="NAME", help="one of the schemes; may be repeated")
    parser.add_argument("--seed", type=int, default=SEED, help="of the second checkpoint (%(default)s)")
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.reference:
        _reference_main()
        return 0
    os.environ |= {"LOGURU_LEVEL": "ERROR", "TQDM_DISABLE": "1"}  # read when transformers is imported
    cases = [case for case in CASES if not chosen.case or case.name in chosen.case]
    text: list[str] = []
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for bench in benches(Path(folder), chosen.keep or Path(folder), chosen.only, cases, chosen.seed):
            lines, worse = report(bench)
            text += lines
            bad += worse
    if chosen.write is not None:
        chosen.write.write_text(HEAD.read_text(encoding="utf-8") + "\n".join(text), encoding="utf-8")
    sys.stderr.writelines(f"worse than required: {line}\n" for line in bad)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
