"""The model card of a result: README.md for the Hub, with what the Hub reads in front and what people read behind.

Names of tensors and files are foreign text: they stand in code, where nothing is a link, an image or HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from shardmill.core.markdown import code
from shardmill.core.recipe import recipe_to_json
from shardmill.core.report import Part, Report, share
from shardmill.core.reproduce import RECIPE_FILE, run_command
from shardmill.core.shell import quote
from shardmill.core.summary import PROXY, human_bytes
from shardmill.pages.page import decibels, percent

MARK: Final = "---\n# written by `shardmill report --card`\n"
"""How every card begins, so that it can be told from one that somebody else wrote."""
WORST_SHOWN: Final = 5
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SCHEME_TAGS: Final = ("fp8", "nvfp4", "mxfp4", "mxfp8", "int8", "w4a16", "w8a8")


def render_card(report: Report) -> str:
    """Write a model card."""
    base = report.origin.base_model
    sections = [
        f"# {_heading(report.origin.title)}",
        f"{_linked(base)} quantized with shardmill: {', '.join(code(label) for label in report.schemes)}.",
        _table(("", ""), _totals(report)),
        "## Precision",
        _table(
            ("part", "tensors", "quantized", "size", "bits per weight", "SQNR", "clipped", "zeroed"),
            map(_part, report.parts),
            "lrrrrrrr",
        ),
        f"The {PROXY}. SQNR is the signal to quantization noise ratio.",
    ]
    sections += [f"In NVFP4, {line}." for line in report.summary.inputs]
    if report.worst:
        rows = [
            (code(w.module), f"{w.statistics.relative_error:.4f}", decibels(w.statistics))
            for w in report.worst[:WORST_SHOWN]
        ]
        sections += ["Largest errors:", _table(("weight", "relative error", "SQNR"), rows, "lrr")]
    sections += ["## Use", "With vLLM:", _fence("bash", f"vllm serve {quote(_served(report))}")]
    sections += ["## How it was made", _fence("bash", _command(report)), *_recipe(report)]
    versions = ", ".join(f"{code(name)} {code(version)}" for name, version in report.manifest.versions)
    sections += [f"Versions: {versions}. `shardmill.json` lists the digests of all sources and of every output shard."]
    return f"{MARK}{_front_matter(report)}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(report: Report) -> str:
    from huggingface_hub import ModelCardData  # takes a moment to import

    labels = [label.lower() for label in report.schemes]
    tags = [tag for tag in _SCHEME_TAGS if any(label.startswith(tag) for label in labels)]
    facts: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["compressed-tensors", "quantized", "shardmill", "vllm", *tags],
    }
    if _REPOSITORY.fullmatch(report.origin.base_model):
        facts |= {"base_model": report.origin.base_model, "base_model_relation": "quantized"}
    return f"{ModelCardData(**facts).to_yaml()}\n"


def _heading(text: str) -> str:
    """A title as words where it is nothing more than words."""
    is_word = _WORD.fullmatch(text) and "__" not in text
    return text if is_word else code(text)


def _linked(base: str) -> str:
    if _REPOSITORY.fullmatch(base):
        return f"[{base}](https://huggingface.co/{base})"
    return code(base) or "A checkpoint"


def _totals(report: Report) -> Iterator[tuple[str, str]]:
    totals, summary = report.summary.totals, report.summary
    yield "size", f"{human_bytes(totals.output_bytes)}, {summary.ratio:.1%} of {human_bytes(totals.source_bytes)}"
    quantized = f"{summary.quantized_bits_per_weight:.2f} in quantized weights, scales included"
    yield "bits per weight", f"{summary.bits_per_weight:.2f}; {quantized}"
    elements = totals.quantized_weights + totals.copied_weights
    yield "quantized", f"{share(totals.quantized_weights, elements):.1%} of {elements:,} elements"
    yield "SQNR of all quantized weights", decibels(report.statistics)


def _part(part: Part) -> tuple[str, ...]:
    found = part.statistics
    measured = (
        decibels(found),
        percent(share(found.clipped, found.count)),
        percent(share(found.zeroed, found.nonzero)),
    )
    return (
        part.name,
        f"{part.tensors:,}",
        f"{part.quantized:,}",
        human_bytes(part.nbytes) if part.nbytes is not None else "",
        f"{part.bits_per_weight:.2f}" if part.bits_per_weight is not None else "",
        *(measured if part.quantized else ("", "", "")),
    )


def _served(report: Report) -> str:
    """What vLLM is given: a repository has the name of the folder, below an organization that is not known here."""
    return f"ORGANIZATION/{report.origin.title}"


def _command(report: Report) -> str:
    base = report.origin.base_model
    return run_command(report.manifest.recipe, f"hf://{base}" if base else "SRC", report.origin.title)


def _recipe(report: Report) -> list[str]:
    """The recipe, where the command asks for a file."""
    if RECIPE_FILE not in _command(report):
        return []
    return [f"`{RECIPE_FILE}`:", _fence("json", json.dumps(recipe_to_json(report.manifest.recipe), indent=2))]


def _fence(language: str, text: str) -> str:
    """A block of code that its own content cannot end."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    rules = [{"l": ":--", "r": "--:"}[letter] for letter in align or "l" * len(header)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rules, *rows))
