"""What people read of a plan or a result: sizes, bits per weight, decisions under folded names, worst weights.

A plan and the manifest of its result give the same summary, but that only a result has measured errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from shardmill.core.assemble import totals
from shardmill.core.findings import check_statistics
from shardmill.core.folding import fold_names
from shardmill.core.input_scale import told_policies
from shardmill.core.manifest import Manifest, Totals, parse_manifest
from shardmill.core.plan import COPY, Plan, ShardPlan, TensorPlan
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import Recipe, recipe_to_json
from shardmill.core.table import resolve_table, table_document
from shardmill.errors import Problem, show

PLAN_SCHEMA: Final = 1
WORST_SHOWN: Final = 10
NAMES_SHOWN: Final = 8
WARNINGS_SHOWN: Final = 100
PROXY: Final = "weight error is a proxy: it does not measure the quality of the model's answers"
_UNITS: Final = ("bytes", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Tensors that are treated alike for one reason."""

    action: str
    reason: str
    scheme: str
    """Empty for none."""
    count: int
    names: tuple[str, ...]
    """Folded; a trailing `.weight` is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A plan or a result in figures."""

    totals: Totals
    shards: int
    decisions: tuple[Decision, ...]
    """Most tensors first; what is quantized before what is copied."""
    worst: tuple[WeightRecord, ...]
    """Largest relative error first; empty for a plan."""
    warnings: tuple[Problem, ...]
    inputs: tuple[str, ...] = ()
    """Where global scales of activations come from, one line for each policy; empty for schemes without."""

    @property
    def ratio(self) -> float:
        """Output bytes per source byte."""
        return self.totals.output_bytes / self.totals.source_bytes if self.totals.source_bytes else 1.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element of all tensors, scales included, headers left out."""
        sizes = self.totals
        return _bits(sizes.quantized_bytes + sizes.copied_bytes, sizes.quantized_weights + sizes.copied_weights)

    @property
    def quantized_bits_per_weight(self) -> float:
        """Stored bits per element of the quantized weights, scales included."""
        return _bits(self.totals.quantized_bytes, self.totals.quantized_weights)


def _bits(size: int, elements: int) -> float:
    return 8 * size / elements if elements else 0.0


def summarize(manifest: Mapping[str, Any]) -> Summary:
    """Summarize a result from its manifest.

    Raises:
        CheckpointInvalid: it is no manifest of this version.
    """
    return summarize_manifest(parse_manifest(manifest))


def summarize_manifest(manifest: Manifest) -> Summary:
    """Summarize a result from its parsed manifest."""
    weights = [(shard.name, weight) for shard in manifest.shards for weight in shard.weights]
    return Summary(
        totals=manifest.totals,
        shards=len(manifest.shards),
        decisions=_decisions(
            ((tensor.action, tensor.reason, tensor.scheme), tensor.name)
            for shard in manifest.shards
            for tensor in shard.tensors
        ),
        worst=tuple(by_error(weight for _, weight in weights)[:WORST_SHOWN]),
        warnings=tuple(dict.fromkeys((*manifest.warnings, *check_statistics(weights, manifest.recipe)))),
        inputs=_inputs(manifest.recipe),
    )


def summarize_plan(plan: Plan) -> Summary:
    """Summarize a plan that has no problems."""
    return Summary(
        totals=Totals(**totals(plan)),
        shards=len(plan.shards),
        decisions=_decisions(_decided(plan)),
        worst=(),
        warnings=plan.warnings,
        inputs=_inputs(plan.recipe),
    )


def _inputs(recipe: Recipe) -> tuple[str, ...]:
    return told_policies(group.scheme.input_scale for group in recipe.groups)


def _decided(plan: Plan) -> Iterator[tuple[tuple[str, str, str], str]]:
    for shard in plan.shards:
        labels = [scheme.label for scheme in shard.schemes] + [""]  # the last one is number -1
        for tensor in shard.tensors:
            yield (tensor.action, tensor.reason, labels[tensor.scheme]), tensor.spec.name


def _decisions(tensors: Iterable[tuple[tuple[str, str, str], str]]) -> tuple[Decision, ...]:
    """Group names by action, reason and scheme."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for decision, name in tensors:
        names.setdefault(decision, []).append(name)
    found = [
        Decision(
            action=action,
            reason=reason,
            scheme=scheme,
            count=len(group),
            names=fold_names(name.removesuffix(".weight") for name in group),
        )
        for (action, reason, scheme), group in names.items()
    ]
    return tuple(sorted(found, key=lambda d: (d.action == COPY, -d.count, d.action, d.reason, d.scheme)))


def by_error(weights: Iterable[WeightRecord]) -> list[WeightRecord]:
    """Sort weights, the largest relative error first; one that is not a number is the largest."""
    return sorted(weights, key=lambda weight: (-_error_key(weight), weight.module))


def _error_key(weight: WeightRecord) -> float:
    error = weight.statistics.relative_error
    return math.inf if math.isnan(error) else error


def human_bytes(size: float) -> str:
    """Write a number of bytes in decimal units.

    >>> human_bytes(999), human_bytes(269_100_000)
    ('999 bytes', '269.1 MB')
    """
    power = 0
    while round(size, 1) >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.1f} {_UNITS[power]}" if power else f"{size:.0f} {_UNITS[0]}"


def render(summary: Summary) -> str:
    """Write a summary for a terminal."""
    return "\n".join(
        [
            *_render_sizes(summary),
            *_render_decisions(summary.decisions),
            *_render_worst(summary.worst),
            *render_warnings(summary.warnings),
        ]
    )


def _render_sizes(summary: Summary) -> Iterator[str]:
    sizes = summary.totals
    for name, size, note in [
        ("in", sizes.source_bytes, f"{summary.shards} shards"),
        ("out", sizes.output_bytes, f"{summary.ratio:.1%} of the source"),
    ]:
        yield f"{name:5} {size:>16,} bytes  {human_bytes(size):>9}  {note}"
    quantized = f"{summary.quantized_bits_per_weight:.2f} of {sizes.quantized_weights:,} quantized weights"
    yield f"bits per weight: {summary.bits_per_weight:.2f} overall, {quantized}"
    yield from summary.inputs


def _render_decisions(decisions: Iterable[Decision]) -> Iterator[str]:
    for decision in decisions:
        yield ""
        scheme = f" {decision.scheme}" if decision.scheme else ""
        yield f"{decision.action}{scheme}: {decision.count} tensors, {_plain(decision.reason)}"
        yield from (f"    {_plain(name)}" for name in decision.names[:NAMES_SHOWN])
        if len(decision.names) > NAMES_SHOWN:
            yield f"    … and {len(decision.names) - NAMES_SHOWN} more names"


def _plain(text: str) -> str:
    """Foreign text without control characters, cut, and without the quotes of `show`."""
    return show(text.replace("`", "'"), 200)[1:-1]


def _render_worst(worst: Sequence[WeightRecord]) -> Iterator[str]:
    if not worst:
        return
    yield ""
    yield "largest relative errors:"
    for weight in worst:
        found = weight.statistics
        zeroed = f"{found.zeroed / found.nonzero:6.1%} zeroed" if found.nonzero else ""
        name = f"{_plain(weight.module)} ({_plain(weight.scheme)})"
        yield f"  {found.relative_error:.4f}  {found.sqnr_db:5.1f} dB  {zeroed}  {name}"
    yield PROXY


def render_warnings(warnings: Sequence[Problem]) -> Iterator[str]:
    """Write one line for each of the first hundred warnings."""
    if warnings:
        yield ""
    yield from (f"WARNING {warning}" for warning in warnings[:WARNINGS_SHOWN])
    if len(warnings) > WARNINGS_SHOWN:
        yield f"… and {len(warnings) - WARNINGS_SHOWN} more warnings"


def problem_document(problem: Problem) -> dict[str, str]:
    """Describe a problem or a warning for machines.

    >>> problem_document(Problem(kind="k", message="m"))["kind"]
    'k'
    """
    return asdict(problem)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def summary_document(summary: Summary) -> dict[str, Any]:
    """Describe a summary for machines; None stands for what is not finite."""
    return {
        "totals": asdict(summary.totals),
        "ratio": summary.ratio,
        "bits_per_weight": summary.bits_per_weight,
        "quantized_bits_per_weight": summary.quantized_bits_per_weight,
        "shards": summary.shards,
        "inputs": list(summary.inputs),
        "decisions": [asdict(decision) | {"names": list(decision.names)} for decision in summary.decisions],
        "worst": [
            {
                "module": weight.module,
                "scheme": weight.scheme,
                "relative_error": _finite(weight.statistics.relative_error),
                "sqnr_db": _finite(weight.statistics.sqnr_db),
            }
            for weight in summary.worst
        ],
        "warnings": [problem_document(problem) for problem in summary.warnings],
    }


def plan_document(plan: Plan, problems: Sequence[Problem] | None = None) -> dict[str, Any]:
    """Describe a whole plan for machines: every tensor of every shard, and what it becomes at which offsets.

    Offsets are those of the output shard's data section. A plan with problems has decisions and no outputs.

    Args:
        problems: all of them when more were found than the plan itself holds.
    """
    found = plan.problems if problems is None else tuple(problems)
    summary = None if found else summarize_plan(plan)
    return {
        "schema": PLAN_SCHEMA,
        "problems": [problem_document(problem) for problem in found],
        "warnings": [problem_document(problem) for problem in plan.warnings],
        "totals": asdict(summary.totals) if summary else None,
        "bits_per_weight": summary.bits_per_weight if summary else None,
        "quantized_bits_per_weight": summary.quantized_bits_per_weight if summary else None,
        "recipe": recipe_to_json(plan.recipe),
        "architecture": table_document(resolve_table(plan)),
        "ignore": list(plan.ignore),
        "files": list(plan.files),
        "files_not_copied": [{"file": name, "reason": reason} for name, reason in plan.left_out],
        "shards": [_shard_document(shard, is_sound=not found) for shard in plan.shards],
    }


def _shard_document(shard: ShardPlan, *, is_sound: bool) -> dict[str, Any]:
    outputs: dict[str, list[dict[str, Any]]] = {}
    size: int | None = None
    if is_sound:
        layout = shard.layout()
        size = len(layout.header()) + layout.data_bytes
        for placed in layout.placed:
            spec = placed.spec
            entry = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
            source = layout.units[placed.unit].tensor.name
            outputs.setdefault(source, []).append(entry | {"data_offsets": [placed.begin, placed.end]})
    return {
        "name": shard.name,
        "source_bytes": shard.size,
        "output_bytes": size,
        "reads": list(shard.sources),
        "tensors": [_tensor_document(tensor, shard, outputs) for tensor in shard.tensors],
    }


def _tensor_document(
    tensor: TensorPlan, shard: ShardPlan, outputs: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    return {
        "name": tensor.spec.name,
        "dtype": tensor.spec.dtype,
        "shape": list(tensor.spec.shape),
        "action": tensor.action,
        "reason": tensor.reason,
        "scheme": shard.schemes[tensor.scheme].label if tensor.scheme >= 0 else None,
        "layout": tensor.layout,
        "fused": [ref.spec.name for ref in tensor.fused],
        "outputs": outputs.get(tensor.spec.name, []),
    }
