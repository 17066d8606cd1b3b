"""What stands beside the shards of the output: config.json, index and manifest, from a plan and its receipts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from shardmill.core.architectures import is_composite
from shardmill.core.digest import digest_json
from shardmill.core.experts import parse_stack
from shardmill.core.findings import check_statistics
from shardmill.core.foreign import AUTO_MAP, without
from shardmill.core.groups import Groups, Part, write_groups, write_section
from shardmill.core.index import encode_index
from shardmill.core.matching import split_name
from shardmill.core.plan import DEQUANTIZE, SPLIT, Plan, ShardPlan, ShardSizes, TensorPlan
from shardmill.core.pretty import pretty
from shardmill.core.receipt import Receipt
from shardmill.core.recipe import recipe_to_json
from shardmill.core.roles import TOWERS
from shardmill.core.scheme import group_entry
from shardmill.core.statistics import Statistics
from shardmill.core.targets import dense_expressions
from shardmill.errors import NON_FINITE, Problem, ShardmillError

CONFIG_NAME: Final = "config.json"
MANIFEST_NAME: Final = "shardmill.json"
PARAMS_NAME: Final = "params.json"
PARAMS_KEY: Final = "quantization"
MANIFEST_SCHEMA: Final = 1
_STALE: Final = ("quantization_config", "compression_config")
_KV_CACHE: Final = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def quantization_config(plan: Plan, groups: Groups | None = None) -> dict[str, Any]:
    """Describe the result to loaders; see `groups`.

    Args:
        groups: those of the plan, where they are known already.
    """
    found = groups or planned_groups(plan)
    ignore = [*plan.ignore, *_renamed(plan, found)]
    return write_section(found, ignore, _KV_CACHE if plan.recipe.kv_cache else None)


def _renamed(plan: Plan, groups: Groups) -> list[str]:
    """Expressions for what stays dense in models whose parts loaders rename; literal names would not be found."""
    config = json.loads(plan.config_text or "{}")
    if not (isinstance(config, Mapping) and is_composite(config)):
        return []
    numbers = {key: number for number, key in enumerate(groups.config_groups)}
    quantized = {module: numbers[key] for module, key in groups.planned.items()}
    return dense_expressions(plan.ignore, quantized, TOWERS)


def planned_groups(plan: Plan) -> Groups:
    """The groups of the written config, and that of every quantized module; those that keep their codes come last."""
    stays = {module for group in plan.kept for module in group.modules}
    members: list[list[str]] = [[] for _ in plan.recipe.groups]
    for module, number in quantized_modules(plan).items():
        if module not in stays:
            members[number].append(module)
    parts = [
        Part(entry=group_entry(group.scheme), modules=tuple(modules))
        for group, modules in zip(plan.recipe.groups, members, strict=True)
    ]
    return write_groups([*parts, *(Part(entry=json.loads(kept.entry), modules=kept.modules) for kept in plan.kept)])


def quantized_modules(plan: Plan) -> dict[str, int]:
    """Group by quantized module, experts of split stacks included."""
    found: dict[str, int] = {}
    for shard in plan.shards:
        for tensor in shard.tensors:
            if tensor.scheme >= 0:
                found.update(dict.fromkeys(_modules_of(tensor, shard), tensor.scheme))
    return found


def _modules_of(tensor: TensorPlan, shard: ShardPlan) -> Iterator[str]:
    if tensor.decode is not None:
        return (unit.module for unit in shard.units_of(tensor))
    stack = parse_stack(tensor.spec.name, tensor.spec.shape) if tensor.action == SPLIT else None
    if stack is None:
        return iter((split_name(tensor.spec.name)[0],))
    return (module for expert in range(tensor.spec.shape[0]) for module in stack.modules(expert))


def config_document(plan: Plan) -> dict[str, Any]:
    """The source's config.json in its own order, with our quantization_config at the end and no stale one."""
    source = json.loads(plan.config_text or "{}")
    stale = _STALE if plan.allow_code else (*_STALE, AUTO_MAP)
    plain: dict[str, Any] = without(source, stale)
    return plain if plan.recipe.dequantize else {**plain, "quantization_config": quantization_config(plan)}


def params_document(plan: Plan, params: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral's params.json in its own order; engines read the key `quantization` there."""
    gone = (*_STALE, *(() if plan.allow_code else (AUTO_MAP,)))
    kept = {key: value for key, value in without(params, gone).items() if key != PARAMS_KEY}
    return kept if plan.recipe.dequantize else {**kept, PARAMS_KEY: quantization_config(plan)}


def with_quantization(plan: Plan) -> tuple[tuple[str, str], ...]:
    """The files that are written anew, with the scheme in params.json where there is one."""
    return tuple(
        (name, encode_document(params_document(plan, json.loads(text))).decode() if name == PARAMS_NAME else text)
        for name, text in plan.rewritten
    )


def encode_document(document: Mapping[str, Any]) -> bytes:
    """Encode a JSON document for people and loaders."""
    return pretty(document).encode() + b"\n"


def output_index(plan: Plan, receipts: Mapping[str, Receipt] | None = None) -> tuple[str, bytes] | None:
    """Name and text of the index of the output, or None where the source has none.

    Args:
        receipts: of all shards, as the manifest was made of them; their names need not be derived again.
    """
    if plan.index_name is None:
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
    return plan.index_name, encode_index(weight_map, total)


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
