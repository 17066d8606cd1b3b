"""Write docs/zoo.md from the battery: every architecture with every scheme, and the mixed recipe.

.venv/bin/python tests/zoo/table.py --write docs/zoo.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zoo.battery import LARGEST_DIFFERENCE, SCHEMES, ZOO, Cell, Zoo, check_cell
from zoo.mixed import MODELS as MIXED
from zoo.mixed import Row, check_mixed

HEADER = f"""# Architectures

Tiny models with random weights, written by transformers' own `save_pretrained`, converted with default ignores alone.
Written by `tests/zoo/table.py`; `make test-all` runs the same checks. Each cell means that all of this held:

- `shardmill verify` found no problem; every copied tensor has the bytes of the source.
- Nothing one-dimensional, no convolution, router, embedding, head, image tower or projector is quantized.
- compressed-tensors' `apply_quantization_config` gives a scheme to the quantized modules and to no other.
- The live model's head is in `ignore`, whether a tensor of it is on disk or not.
- Codes and scales of experts split from a stack are, byte for byte, what compressed-tensors gives for the true slice.
- NVFP4: members of every set that engines merge have one global scale in the written bytes (`sets`).
- Logits of the weights as an own reader of the formats has them differ by at most {LARGEST_DIFFERENCE:g}
  from those of the same weights as the `oracle` has them: `transformers` loads the result itself (weights only, in
  BF16); `compressed-tensors` decompresses every module, where transformers does not put split experts together, drops
  the global scale of NVFP4 experts (huggingface/transformers#48371), does not know Mistral's names, reads `weight` of
  packed layers (mamba2, modernbert, falcon, t5) or computes in no dtype but float32 (deepseek_v4).

`loss` is how far logits are from those of the source: tiny random models amplify every error, real ones do not.
"""
_MIXED = """
## Several schemes

FP8 for attention, NVFP4 for experts, INT4 in groups of 32 for shared experts, everything else as it is: which scheme
each module has for compressed-tensors, and in transformers' live model (for experts by its `get_experts_scheme`).
"""


def render(cells: Iterable[Cell], rows: Iterable[Row]) -> str:
    """The document."""
    return "\n".join([HEADER, *_cells(cells), _MIXED, *_rows(rows), ""])


def _cells(cells: Iterable[Cell]) -> Iterator[str]:
    yield "| architecture | scheme | outcome | quantized | dense | sets | oracle | difference | loss |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for cell in cells:
        figures = [
            cell.quantized,
            cell.dense,
            cell.sets or "",
            cell.oracle,
            f"{cell.difference:.1e}",
            f"{cell.loss:.2f}",
        ]
        told = figures if cell.outcome == "ok" else [""] * len(figures)
        yield f"| {cell.model} | {cell.scheme} | {cell.outcome} | {' | '.join(map(str, told))} |"


def _rows(rows: Iterable[Row]) -> Iterator[str]:
    yield "| architecture | modules | intended | compressed-tensors | transformers |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        yield f"| {row.model} | `{row.modules}` | {row.intended} | {row.compressed_tensors} | {row.transformers} |"


def main(arguments: Sequence[str]) -> None:
    """Run everything and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    target = parser.parse_args(arguments).write
    with tempfile.TemporaryDirectory() as home:
        zoo = Zoo(Path(home) / "zoo")
        cells = [check_cell(zoo, name, scheme) for name in ZOO for scheme in SCHEMES]
        apart = Zoo(Path(home) / "mixed")
        rows = [row for name in MIXED for row in check_mixed(apart, name)]
    target.write_text(render(cells, rows))
    print(f"{len(cells)} cells, {len(rows)} rows")


if __name__ == "__main__":
    main(sys.argv[1:])
