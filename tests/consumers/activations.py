"""Write the table of docs/activations.md: what assumed and calibrated scales of activations make of the example.

    python tests/consumers/activations.py [--write docs/activations.md]

The judge is that of docs/quality.md. transformers loads the weights; activations are rounded by the formulas, which
`test_activations.py` holds against a slower reader, since compressed-tensors takes minutes for a row.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from torch import Tensor

from consumers.bench import input_scales
from reference.compare_quality import AS_RUN, EXAMPLE, IGNORE, WEIGHTS, Judge, _load, _log_probabilities
from shardmill.core.input_scale import global_scale_of
from shardmill.core.recipe import uniform
from shardmill.example import prepare
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations

HEAD: Final = Path(__file__).with_name("activations-head.md")
CONSTANTS: Final = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
CALIBRATED: Final = "calibrated"
LEARNED_FROM: Final = ("README.md", "LICENSE")
"""Files of the example from which activations are learned; the text of the judge is another one."""
LEARNED_TOKENS: Final = 2048


@dataclass(frozen=True, slots=True)
class Row:
    """One way to scale activations."""

    name: str
    divergence: float
    """Mean KL from the bf16 model, in nats."""
    perplexity: float

    def __str__(self) -> str:
        perplexity = f"{self.perplexity:.2f}" if self.perplexity < 10_000 else f"{self.perplexity:.0e}"
        return f"| {self.name} | {self.divergence:.4f} | {perplexity} |"


class Scales:
    """The example in NVFP4, and what its activations were seen to reach."""

    def __init__(self, home: Path) -> None:
        self.source = prepare(EXAMPLE, cache=EXAMPLE.parent / "cache")
        self.judge = Judge(self.source)
        self.amax = learn(self.source)
        donor = home / "donor"
        donor.mkdir()
        save_file(
            {f"{name}.input_global_scale": torch.tensor([global_scale_of(v)]) for name, v in self.amax.items()},
            donor / "model.safetensors",
        )
        self.result = home / "calibrated"
        recipe = uniform("NVFP4", IGNORE, input_scale=f"donor:{donor}")
        run(Locations(source=str(self.source), destination=str(self.result)), recipe, RunOptions(device="cpu"))

    def rows(self) -> Iterator[Row]:
        """Weights alone, the donor, and every constant; a constant differs in nothing but those numbers."""
        yield self._row("bf16", _load(self.source, AS_RUN))
        yield self._row("weights only, as NVFP4A16", _load(self.result, WEIGHTS))
        model, scales = _load(self.result, WEIGHTS), input_scales(self.result)
        for name, module in model.named_modules():
            if name in scales:
                module.register_forward_pre_hook(lambda _m, inputs, name=name: (rounded(inputs[0], scales[name]),))
        yield self._row(CALIBRATED, model)
        for constant in CONSTANTS:
            scales.update(dict.fromkeys(scales, global_scale_of(constant)))
            yield self._row(f"`constant:{constant}`", model)

    @torch.no_grad()
    def _row(self, name: str, model: Any) -> Row:
        divergence = surprise = 0.0
        for window, expected in zip(self.judge.windows, self.judge.expected, strict=True):
            found = _log_probabilities(model, window)
            divergence += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
            surprise -= float(found.gather(1, window[1:, None]).sum(dtype=torch.float64))
        tokens = self.judge.tokens
        return Row(name, divergence / tokens, float(torch.tensor(surprise / tokens).exp()))


_BETWEEN: Final = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Where E2M1 changes; a tie goes to the even code, which is the upper one at 0.75, 1.75 and 3.5."""
_EDGES: Final = torch.where(torch.arange(7) % 2 == 1, torch.nextafter(_BETWEEN, torch.zeros(7)), _BETWEEN)
_E2M1: Final = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def rounded(values: Tensor, scale: float) -> Tensor:
    """Activations as an engine with 4 bits has them, in float32."""
    groups = values.reshape(-1, 16)
    most = groups.abs().amax(1, keepdim=True)
    local = (scale * (most / 6)).clamp(max=448).to(torch.float8_e4m3fn).float() / scale
    wanted = torch.where(local > 0, groups.abs() / local, 0)
    return (_E2M1[torch.bucketize(wanted, _EDGES)] * groups.sign() * local).reshape(values.shape)


@torch.no_grad()
def learn(source: Path) -> Mapping[str, float]:
    """The largest activation that enters each linear layer, over the beginning of a text."""
    from transformers import AutoTokenizer

    text = "\n".join((source / name).read_text(encoding="utf-8") for name in LEARNED_FROM)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(source)(text)["input_ids"][:LEARNED_TOKENS])
    model, found = _load(source, AS_RUN), dict[str, float]()

    def watch(name: str, inputs: tuple[Tensor, ...]) -> None:
        found[name] = max(found.get(name, 0.0), float(inputs[0].abs().max()))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _module, inputs, name=name: watch(name, inputs))
    for window in tokens.split(512):
        model(input_ids=window[None])
    return found


def render(rows: Sequence[Row], amax: Mapping[str, float], tokens: int) -> str:
    """The document."""
    names = ("compressed-tensors", "torch", "transformers")
    reach = sorted(amax.values())
    head = HEAD.read_text().format(
        versions=", ".join(f"{name} {version(name)}" for name in names),
        tokens=tokens,
        learned=LEARNED_TOKENS,
        least=f"{reach[0]:.3g}",
        median=f"{reach[len(reach) // 2]:.3g}",
        most=f"{reach[-1]:.4g}",
        largest=max(amax, key=lambda name: amax[name]),
    )
    return "\n".join([head, "| scale of activations | KL | perplexity |", "| --- | ---: | ---: |", *map(str, rows), ""])


def main(arguments: Sequence[str]) -> int:
    """Measure, and write or print the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        scales = Scales(Path(scratch))
        rows = []
        for row in scales.rows():
            sys.stderr.write(f"{row}\n")
            rows.append(row)
        document = render(rows, scales.amax, scales.judge.tokens)
    if chosen.write:
        chosen.write.write_text(document)
    else:
        sys.stdout.write(document)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
