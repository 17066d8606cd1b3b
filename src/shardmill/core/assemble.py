"""What stands beside the shards of the output: config.json, index and manifest, from a plan and its receipts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from shardmill.core.digest import digest_json
from shardmill.core.findings import check_statistics
from shardmill.core.foreign import AUTO_MAP, without
from shardmill.core.index import encode_index
from shardmill.core.plan import DEQUANTIZE, Plan, ShardPlan, ShardSizes, TensorPlan
from shardmill.core.pretty import pretty
from shardmill.core.receipt import Receipt
from shardmill.core.recipe import recipe_to_json
from shardmill.core.scheme import group_entry
from shardmill.core.statistics import Statistics
from shardmill.errors import NON_FINITE, Problem, ShardmillError

CONFIG_NAME: Final = "config.json"
MANIFEST_NAME: Final = "shardmill.json"
PARAMS_NAME: Final = "params.json"
MANIFEST_SCHEMA: Final = 1
LAYOUT_VERSION: Final = "0.19.0"
"""compressed-tensors release whose on-disk layout is written."""
_STALE: Final = ("quantization_config", "compression_config")
_EXPERT_ALIASES: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Engines ask for the experts of w1/w2/w3 models under these names."""


def quantization_config(plan: Plan) -> dict[str, Any]:
    """Describe the result to loaders.

    One scheme: `Linear` with a complete ignore list, the only form that all readers resolve alike. Several: disjoint
    expressions that name every quantized module, since readers disagree on who wins when two groups match.
    """
    entries = [group_entry(group.scheme) for group in plan.recipe.groups]
    entries += [json.loads(kept.entry) for kept in plan.kept]
    groups = {
        f"group_{number:02d}": {"targets": targets, **entry}
        for number, (targets, entry) in enumerate(zip(_group_targets(plan), entries, strict=True))
        if targets
    }
    formats = [group["format"] for group in groups.values()]
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(set(formats)) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(plan.ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "transform_config": {},
        "version": LAYOUT_VERSION,
    }


def _quantized_modules(plan: Plan) -> dict[str, int]:
    """Group by quantized module, experts of split stacks included; kept groups after those of the recipe."""
    first = len(plan.recipe.groups)
    kept = {module: first + number for number, group in enumerate(plan.kept) for module in group.modules}
    found = {
        unit.module: tensor.scheme
        for shard in plan.shards
        for tensor in shard.tensors
        if tensor.scheme >= 0
        for unit in shard.units_of(tensor)
    }
    return found | kept


def _group_targets(plan: Plan) -> list[list[str]]:
    used = {tensor.scheme for shard in plan.shards for tensor in shard.tensors} - {-1}
    groups = len(plan.recipe.groups) + len(plan.kept)
    if len(used) == 1 and not plan.kept:
        return [["Linear"] if number in used else [] for number in range(groups)]
    return disjoint_targets(_quantized_modules(plan), groups)


def _template(module: str) -> tuple[str, tuple[str, ...]]:
    """The name from the component before its first number on, numbers taken out."""
    parts = module.split(".")
    first = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    tail = parts[max(0, first - 1) :] if first is not None else parts
    return ".".join("#" if part.isdigit() else part for part in tail), tuple(part for part in tail if part.isdigit())


def _expression(template: str, numbers: Sequence[str]) -> str:
    pieces = iter(numbers)
    body = r"\.".join(next(pieces) if part == "#" else re.escape(part) for part in template.split("."))
    return rf"re:.*(^|\.){body}$"


def disjoint_targets(modules: Mapping[str, int], groups: int) -> list[list[str]]:
    r"""Name every module of each group by expressions that match no module of another group.

    >>> disjoint_targets({"model.layers.0.a": 0, "model.layers.1.a": 0, "model.layers.0.b": 1}, 2)
    [['re:.*(^|\\.)layers\\.\\d+\\.a$'], ['re:.*(^|\\.)layers\\.\\d+\\.b$']]
    """
    by_template: dict[str, dict[int, list[tuple[str, ...]]]] = {}
    for module, group in modules.items():
        template, numbers = _template(module)
        by_template.setdefault(template, {}).setdefault(group, []).append(numbers)
    targets: list[list[str]] = [[] for _ in range(groups)]
    for template, owners in sorted(by_template.items()):
        for group, members in owners.items():
            patterns = _number_patterns(members, exact=len(owners) > 1)
            targets[group] += [_expression(name, pattern) for pattern in patterns for name in _spellings(template)]
    return targets


def _number_patterns(numbers: Sequence[tuple[str, ...]], *, exact: bool) -> list[tuple[str, ...]]:
    """Any number where one group owns the template; otherwise its layers, and all further numbers, spelled out."""
    if not exact:
        return [(r"\d+",) * len(numbers[0])]
    by_rest: dict[tuple[str, ...], list[str]] = {}
    for first, *rest in (entry for entry in numbers if entry):
        by_rest.setdefault(tuple(rest), []).append(first)
    by_layers: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for rest_numbers, layers in by_rest.items():
        by_layers.setdefault(tuple(sorted(set(layers), key=int)), []).append(rest_numbers)
    found: list[tuple[str, ...]] = []
    for layer_group, rests in by_layers.items():
        single = len(rests[0]) == 1
        tails = [(_either(sorted({rest[0] for rest in rests}, key=int)),)] if single else sorted(rests)
        found += [(_either(layer_group), *tail) for tail in tails]
    return found or [()]


def _either(numbers: Sequence[str]) -> str:
    return f"({'|'.join(numbers)})"


def _spellings(template: str) -> list[str]:
    head, _, leaf = template.rpartition(".")
    alias = _EXPERT_ALIASES.get(leaf) if ".experts.#" in f".{head}" else None
    return [template, f"{head}.{alias}"] if alias else [template]


def config_document(plan: Plan) -> dict[str, Any]:
    """The source's config.json in its own order, with our quantization_config at the end and no stale one."""
    source = json.loads(plan.config_text or "{}")
    stale = _STALE if plan.allow_code else (*_STALE, AUTO_MAP)
    plain: dict[str, Any] = without(source, stale)
    return plain if plan.recipe.dequantize else {**plain, "quantization_config": quantization_config(plan)}


def encode_document(document: Mapping[str, Any]) -> bytes:
    """Encode a JSON document for people and loaders."""
    return pretty(document).encode() + b"\n"


def output_index(plan: Plan, receipts: Mapping[str, Receipt] | None = None) -> bytes | None:
    """The index of the output, or None where the source has none.

    Args:
        receipts: of all shards, as the manifest was made of them; their names need not be derived again.
    """
    if not plan.is_indexed:
        return None
    weight_map: dict[str, str] = {}
    total = 0
    for shard in plan.shards:
        if receipts is not None:
            sizes = shard.sizes()
            total += sizes.quantized_bytes + sizes.copied_bytes
            weight_map.update(dict.fromkeys(receipts[shard.name].tensors, shard.name))
            continue
        layout = shard.layout()
        total += layout.data_bytes
        weight_map.update({placed.spec.name: shard.name for placed in layout.placed})
    return encode_index(weight_map, total)


def plan_digest(plan: Plan, keys: Mapping[str, str], file_digests: Mapping[str, str]) -> str:
    """Name the whole result: equal digests give equal folders.

    Args:
        keys: job key by shard name.
        file_digests: digest of every other file that is copied.
    """
    return result_digest(keys, file_digests, config_document(plan))


def result_digest(keys: Mapping[str, str], file_digests: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Name a whole result by what lies there; see `plan_digest`.

    Raises:
        ValueError: the config holds a number that is not finite.
    """
    return digest_json({"keys": dict(keys), "files": dict(file_digests), "config": dict(config)})


def manifest(
    plan: Plan,
    receipts: Mapping[str, Receipt],
    *,
    digest: str,
    sources: Mapping[str, str],
    file_digests: Mapping[str, str],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Describe where the result comes from; no paths, times or host names, so that equal runs write equal manifests.

    Raises:
        ShardmillError: a shard has no receipt, or its receipt names other tensors than the plan.
    """
    for shard in plan.shards:
        receipt = receipts.get(shard.name)
        planned = tuple(placed.spec.name for placed in shard.layout().placed)
        if receipt is None or receipt.tensors != planned:
            raise ShardmillError(f"`{shard.name}`: receipt and plan do not agree; run again with an empty store")
    return {
        "schema": MANIFEST_SCHEMA,
        "plan": digest,
        "versions": dict(versions),
        "recipe": recipe_to_json(plan.recipe),
        "sources": dict(sources),
        "files": dict(file_digests),
        "files_not_copied": [{"file": name, "reason": reason} for name, reason in plan.left_out],
        "warnings": [
            _warning(problem)
            for problem in (*plan.warnings, *copied_nonfinite(plan, receipts), *_measured(plan, receipts))
        ],
        "totals": totals(plan),
        "shards": [_shard_entry(plan, receipts[shard.name], number) for number, shard in enumerate(plan.shards)],
    }


def _measured(plan: Plan, receipts: Mapping[str, Receipt]) -> list[Problem]:
    """Warnings about what was measured, as far as a receipt tells: a fresh one and one from the store alike."""
    weights = [
        (shard.name, replace(weight, statistics=Statistics.from_json(weight.statistics.to_json())))
        for shard in plan.shards
        for weight in receipts[shard.name].weights
    ]
    return check_statistics(weights, plan.recipe)


def copied_nonfinite(plan: Plan, receipts: Mapping[str, Receipt]) -> Iterator[Problem]:
    """One warning for every tensor that was copied and holds NaN or Inf; masks hold some on purpose.

    Those that are copied for that very reason are in the warnings of the plan.
    """
    told = {problem.tensor for problem in plan.warnings if problem.kind == NON_FINITE}
    for shard in plan.shards:
        for found in receipts[shard.name].nonfinite:
            if found.tensor not in told:
                message = (
                    f"{found.count} values are NaN or Inf, the first at index {list(found.first)}; copied as it is"
                )
                yield Problem(file=shard.name, tensor=found.tensor, kind=NON_FINITE, message=message)


def totals(plan: Plan) -> dict[str, int]:
    """Add up all shards: bytes in and out with their headers, then elements and bytes by what becomes of them.

    `quantized_bytes` counts codes, scales and all else that replaces a weight. The plan must be free of problems: a
    tensor that cannot be treated as decided has no output.
    """
    found = dict.fromkeys(ShardSizes._fields, 0)
    for shard in plan.shards:
        for name, value in shard.sizes()._asdict().items():
            found[name] += value
    return {"source_bytes": plan.source_bytes, **found}


def _warning(problem: Problem) -> dict[str, str]:
    return {"code": problem.kind, "file": problem.file, "tensor": problem.tensor, "message": problem.message}


def _names(shard: ShardPlan, tensor: TensorPlan) -> list[str]:
    return [spec.name for unit in shard.units_of(tensor) for spec in unit.outputs]


def _shard_entry(plan: Plan, receipt: Receipt, number: int) -> dict[str, Any]:
    shard = plan.shards[number]
    return {
        "name": shard.name,
        "key": receipt.key,
        "size": receipt.blob.size,
        "digest": str(receipt.blob.whole),
        "tensors": [
            {"name": t.spec.name, "action": t.action, "reason": t.reason}
            | ({"scheme": shard.schemes[t.scheme].label} if t.scheme >= 0 else {})
            | ({"outputs": _names(shard, t)} if t.action == DEQUANTIZE else {})
            for t in shard.tensors
        ],
        "weights": [{"module": w.module, "scheme": w.scheme, **w.statistics.to_json()} for w in receipt.weights],
    }
