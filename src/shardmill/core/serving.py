"""Will it load: what serving engines demand of shapes, groups and names, as rules with their sources.

Nothing here changes what is written, and nothing is refused: engines differ, and change. A finding names a tensor and
the rule that it breaks. Wrong numbers, which no engine would notice, are problems elsewhere (`planner`, `written`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from shardmill.core.architectures import past_last_layer
from shardmill.core.fused import TABLE, FusedTable
from shardmill.core.plan import SPLIT, Plan
from shardmill.core.resolve import Layer, representatives, runtime_layers
from shardmill.core.roles import MTP, role_of
from shardmill.core.scheme import Scheme
from shardmill.errors import Problem, show

_VLLM: Final = "https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/"
_VLLM_ISSUES: Final = "https://github.com/vllm-project/vllm/issues/"
MARLIN_GROUPS: Final = (32, 64, 128)
_MARLIN_ROWS, _MARLIN_COLS = 64, 128


@dataclass(frozen=True, slots=True)
class Rule:
    """One demand of an engine."""

    name: str
    says: str
    """What the engine demands."""
    source: str
    """Where that is written down."""


RULES: Final[Mapping[str, Rule]] = {
    rule.name: rule
    for rule in (
        Rule(
            "merged-one-scheme",
            "all members of a layer that vLLM merges have one scheme, or are all ignored",
            _VLLM + "layers/quantization/compressed_tensors/utils.py",
        ),
        Rule(
            "merged-input-scale",
            "members of a layer that vLLM merges have one input_global_scale: it keeps the largest and clips others",
            _VLLM + "layers/quantization/compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py",
        ),
        Rule(
            "experts-one-scheme",
            "all projections of all experts of a layer have one scheme, that of the first expert",
            _VLLM + "layers/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py",
        ),
        Rule(
            "experts-named",
            "experts are called gate_proj, up_proj and down_proj, or w1, w3 and w2",
            _VLLM + "layers/fused_moe/layer.py",
        ),
        Rule(
            "experts-equal-shapes",
            "experts of one layer have equal shapes",
            _VLLM + "layers/fused_moe/layer.py",
        ),
        Rule(
            "experts-split",
            "vLLM's loader of this architecture takes stacked experts; one by one only in some formats and releases",
            "https://github.com/vllm-project/vllm/pull/29315",
        ),
        Rule(
            "block-merged-rows",
            "FP8 blocks: each part of a merged layer but the last has a multiple of the block's rows",
            _VLLM + "layers/quantization/utils/fp8_utils.py",
        ),
        Rule(
            "block-partition",
            "FP8 blocks: what a rank holds is a multiple of the block along the axis that is split",
            _VLLM + "layers/quantization/utils/fp8_utils.py",
        ),
        Rule(
            "block-expert-width",
            "FP8 blocks: the expert width of a rank is a multiple of the block",
            _VLLM + "layers/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_w8a8_fp8.py",
        ),
        Rule(
            "group-partition",
            "the input features that a rank holds of o_proj, down_proj and their like are a multiple of the group size",
            _VLLM + "layers/quantization/utils/marlin_utils.py",
        ),
        Rule(
            "tensor-parallel",
            "ranks divide the rows of q, k, v, gate and up, and the columns of o and down",
            _VLLM + "layers/linear.py",
        ),
        Rule(
            "marlin-shape",
            "packed integers run in Marlin, where a rank has a multiple of 64 rows and of 128 columns",
            _VLLM + "layers/quantization/utils/marlin_utils.py",
        ),
        Rule(
            "marlin-group",
            "packed integers run in Marlin with groups of 32, 64 or 128, or one per row",
            _VLLM + "layers/quantization/utils/marlin_utils.py",
        ),
        Rule(
            "packed-bits",
            "packed integers have 4 or 8 bits; other widths need a recent release",
            _VLLM + "layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py",
        ),
        Rule(
            "run-dense",
            "engines run this kind of layer dense, and may take its codes for values",
            _VLLM_ISSUES + "45535",
        ),
        Rule(
            "mtp-one-scheme",
            "engines build layers for multi-token prediction from the model's config: quantize all of them or none",
            _VLLM_ISSUES + "43304",
        ),
    )
}
"""By name."""

_ROW_SPLIT: Final = frozenset(
    {"o_proj", "wo", "down_proj", "w2", "out_proj", "fc2", "dense_4h_to_h", "wo_b", "output_linear"}
)
"""Leaves of which a rank holds part of the columns."""
_COLUMN_SPLIT: Final = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "wq", "wk", "wv", "qkv_proj", "query_key_value"),
        *("q_b_proj", "kv_b_proj", "wq_b", "wkv_b", "in_proj_qkvz", "in_proj_qkv", "in_proj_z"),
        *("gate_proj", "up_proj", "w1", "w3", "gate_up_proj", "fc1"),
    }
)
"""Leaves of which a rank holds part of the rows."""
_KEY_VALUE: Final = frozenset({"k_proj", "v_proj", "wk", "wv"})
_EXPERT_LEAVES: Final = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_STACKED_ONLY: Final = frozenset({"gpt_oss"})


class Served(NamedTuple):
    """A linear module of the result."""

    module: str
    rows: int
    cols: int
    scheme: Scheme | None
    """None for a dense one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What besides the modules decides how an engine splits them."""

    tp: int = 1
    """Ranks that share every layer (`--tensor-parallel-size`)."""
    kv_heads: int | None = None
    model_types: tuple[str, ...] = ()
    past_last: frozenset[int] = frozenset()
    split_experts: bool = False
    """Whether expert stacks of the source were split."""


class Finding(NamedTuple):
    """One tensor that breaks a rule."""

    rule: str
    module: str
    message: str


def served_by(plan: Plan) -> Iterator[Served]:
    """The linear modules of the result of a plan, experts of split stacks included."""
    for shard in plan.shards:
        for tensor in shard.tensors:
            spec = tensor.spec
            scheme = shard.schemes[tensor.scheme] if tensor.scheme >= 0 else None
            if tensor.action == SPLIT and scheme is not None:
                yield from (Served(unit.module, unit.rows, unit.cols, scheme) for unit in shard.units_of(tensor))
            elif len(spec.shape) == 2 and spec.name.endswith(".weight"):
                yield Served(spec.name.removesuffix(".weight"), *spec.shape, scheme)


def setting_of(plan: Plan, tp: int) -> Setting:
    """What besides the modules matters, for the result of a plan."""
    config = json.loads(plan.config_text or "{}")
    splits = any(tensor.action == SPLIT for shard in plan.shards for tensor in shard.tensors)
    return read_setting(config if isinstance(config, dict) else {}, tp, plan.model_types, split_experts=splits)


def check_plan_serving(plan: Plan, tp: int = 1) -> list[Problem]:
    """What may keep an engine from loading the result of a plan without problems."""
    return check_serving(served_by(plan), setting_of(plan, tp), plan.recipe.fused_table)


def read_setting(config: Mapping[str, Any], tp: int, model_types: Sequence[str], *, split_experts: bool) -> Setting:
    """Take what matters from config.json and its nested configs.

    >>> read_setting({"text_config": {"num_key_value_heads": 2}}, 4, [], split_experts=False).kv_heads
    2
    """
    levels = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    heads = [n for level in levels if isinstance(n := level.get("num_key_value_heads"), int) and n > 0]
    return Setting(
        tp=tp,
        kv_heads=heads[0] if heads else None,
        model_types=tuple(model_types),
        past_last=past_last_layer(config),
        split_experts=split_experts,
    )


def check_serving(modules: Iterable[Served], setting: Setting, table: FusedTable = TABLE) -> list[Problem]:
    """Warn of everything that breaks a rule of an engine; one warning for each rule.

    >>> from shardmill.core.scheme import preset
    >>> qkv = [Served(f"a.{leaf}_proj", 192, 576, preset("FP8_BLOCK")) for leaf in "qkv"]
    >>> [problem.kind for problem in check_serving(qkv, Setting())]
    ['serving-block-merged-rows']
    """
    every = {served.module: served for served in modules}
    counts = representatives({name: (*served[1:], _is_past_last(name, setting)) for name, served in every.items()})
    by_name = {name: every[name] for name in counts}
    layers = list(runtime_layers(by_name, table))
    found: dict[str, list[Finding]] = defaultdict(list)
    for check in _CHECKS:
        for finding in check(by_name, layers, setting):
            found[finding.rule].append(finding)
    return [_warning(RULES[rule], findings, counts) for rule, findings in sorted(found.items())]


def _warning(rule: Rule, findings: Sequence[Finding], counts: Mapping[str, int]) -> Problem:
    first = findings[0]
    others = sum(counts[finding.module] for finding in findings) - 1
    more = f"; so it is {others} times more" if others else ""
    return Problem(
        tensor=first.module, kind=f"serving-{rule.name}", message=f"{first.message}{more} (rule: {rule.says})"
    )


_Modules = Mapping[str, Served]


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _is_experts(layer: Layer) -> bool:
    return len(layer.names) > 1


def _one_scheme(modules: _Modules, layers: Sequence[Layer], _setting: Setting) -> Iterator[Finding]:
    for layer in layers:
        schemes = {modules[member].scheme for member in layer.members}
        policies = {scheme.input_scale for scheme in schemes if scheme}
        if len({scheme and replace(scheme, input_scale=None) for scheme in schemes}) == 1 < len(policies):
            told = ", ".join(sorted(policy.told() for policy in policies if policy))
            yield Finding("merged-input-scale", layer.members[0], f"activations of one layer are {told}"[:200])
        elif len(schemes) > 1:
            labels = ", ".join(sorted(scheme.label if scheme else "dense" for scheme in schemes))
            rule = "experts-one-scheme" if _is_experts(layer) else "merged-one-scheme"
            yield Finding(rule, layer.members[0], f"modules become one layer and are {labels}")


def _experts(modules: _Modules, layers: Sequence[Layer], setting: Setting) -> Iterator[Finding]:
    is_stacked_only = setting.split_experts and not _STACKED_ONLY.isdisjoint(setting.model_types)
    for layer in filter(_is_experts, layers):
        if all(modules[member].scheme is None for member in layer.members):
            continue
        shapes: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for member in layer.members:
            shapes[_leaf(member)].add(modules[member][1:3])
        first = layer.members[0]
        if unknown := sorted(shapes.keys() - _EXPERT_LEAVES):
            yield Finding("experts-named", first, f"projections are called {', '.join(map(show, unknown))}")
        if uneven := sorted(leaf for leaf, found in shapes.items() if len(found) > 1):
            yield Finding("experts-equal-shapes", first, f"shapes of {', '.join(map(show, uneven))} differ")
        if is_stacked_only:
            yield Finding("experts-split", first, "its experts were stacked in the source and are one matrix each here")


def _partition(served: Served, setting: Setting) -> tuple[int, int] | None:
    """Rows and columns that one rank holds; None where ranks do not divide them."""
    leaf, ranks = _leaf(served.module), setting.tp
    if leaf in _KEY_VALUE and setting.kv_heads is not None:
        ranks = min(ranks, setting.kv_heads)  # heads are repeated where there are more ranks
    rows = ranks if leaf in _COLUMN_SPLIT else 1
    cols = ranks if leaf in _ROW_SPLIT else 1
    if served.rows % rows or served.cols % cols:
        return None
    return served.rows // rows, served.cols // cols


def _shapes(modules: _Modules, _layers: Sequence[Layer], setting: Setting) -> Iterator[Finding]:
    """Rules that look at one module."""
    for served in modules.values():
        if served.scheme is None:
            continue
        part = _partition(served, setting)
        if part is None:
            message = f"shape {[served.rows, served.cols]} is not divided by {setting.tp} ranks"
            yield Finding("tensor-parallel", served.module, message)
            continue
        args = served.scheme.weights
        size = args.group_size
        if size and part[1] % size:
            message = f"{part[1]} of {served.cols} columns on each of {setting.tp} ranks, groups of {size}"
            yield Finding("group-partition", served.module, message)
        if served.scheme.format == "pack-quantized":
            yield from _packed(served, served.scheme, part)


def _packed(served: Served, scheme: Scheme, part: tuple[int, int]) -> Iterator[Finding]:
    args = scheme.weights
    if args.num_bits not in (4, 8):
        yield Finding("packed-bits", served.module, f"{args.num_bits} bits")
        return
    if part[0] % _MARLIN_ROWS or part[1] % _MARLIN_COLS:
        yield Finding("marlin-shape", served.module, f"a rank has {part[0]} rows and {part[1]} columns")
    if args.group_size and args.group_size not in MARLIN_GROUPS:
        yield Finding("marlin-group", served.module, f"groups of {args.group_size}")


def _blocks(modules: _Modules, layers: Sequence[Layer], setting: Setting) -> Iterator[Finding]:
    for layer in layers:
        members = [modules[member] for member in layer.members]
        scheme = members[0].scheme
        block = scheme.weights.block_structure if scheme else None
        if block is None or any(member.scheme != scheme for member in members):
            continue
        parts = [part for member in members if (part := _partition(member, setting))]
        if len(parts) < len(members):
            continue  # told by `tensor-parallel`
        if _is_experts(layer):
            yield from _block_experts(members, parts, block, setting)
        else:
            yield from _block_parts(members, parts, block, setting)


def _block_experts(
    members: Sequence[Served], parts: Sequence[tuple[int, int]], block: tuple[int, int], setting: Setting
) -> Iterator[Finding]:
    for member, (rows, cols) in zip(members, parts, strict=True):
        leaf = _leaf(member.module)
        width = cols if leaf in _ROW_SPLIT else rows
        size = block[1] if leaf in _ROW_SPLIT else block[0]
        if width % size and (leaf not in _ROW_SPLIT or setting.tp > 1):
            yield Finding("block-expert-width", member.module, f"a rank has width {width}, blocks of {size}")


def _block_parts(
    members: Sequence[Served], parts: Sequence[tuple[int, int]], block: tuple[int, int], setting: Setting
) -> Iterator[Finding]:
    is_split = setting.tp > 1
    for number, (member, (rows, cols)) in enumerate(zip(members, parts, strict=True)):
        leaf, is_last = _leaf(member.module), number == len(members) - 1
        if is_split and ((leaf in _ROW_SPLIT and cols % block[1]) or (leaf in _COLUMN_SPLIT and rows % block[0])):
            message = f"a rank has shape {[rows, cols]}, blocks of {block[0]}x{block[1]}"
            yield Finding("block-partition", member.module, message)
        elif not is_split and not is_last and rows % block[0]:
            message = f"{rows} rows in front of other parts of a merged layer, blocks of {block[0]} rows"
            yield Finding("block-merged-rows", member.module, message)


def _roles(modules: _Modules, _layers: Sequence[Layer], setting: Setting) -> Iterator[Finding]:
    """Modules that engines run dense, and layers for multi-token prediction of which only a part is quantized."""
    mtp: dict[bool, list[str]] = {True: [], False: []}
    for served in modules.values():
        role = role_of(served.module)
        if _is_past_last(served.module, setting) or (role is not None and role.name == MTP):
            mtp[served.scheme is not None].append(served.module)
        elif served.scheme is not None and role is not None:
            yield Finding("run-dense", served.module, f"it is quantized, and its name is that of: {role.name}")
    if mtp[True] and mtp[False]:
        yield Finding("mtp-one-scheme", mtp[True][0], f"{show(mtp[False][0])} beside it is not quantized")


def _is_past_last(module: str, setting: Setting) -> bool:
    if not setting.past_last:
        return False
    parts = module.split(".")
    at = parts.index("layers") + 1 if "layers" in parts else len(parts)
    return at < len(parts) and parts[at].isdecimal() and int(parts[at]) in setting.past_last


_CHECKS: Final[tuple[Callable[[_Modules, Sequence[Layer], Setting], Iterator[Finding]], ...]] = (
    _one_scheme,
    _experts,
    _shapes,
    _blocks,
    _roles,
)


def rules_document(warnings: Iterable[Problem]) -> list[dict[str, str]]:
    """The rules that warnings speak of, with their sources, for machines.

    >>> rules_document([Problem(kind="serving-packed-bits", message="m")])[0]["name"]
    'packed-bits'
    """
    names = sorted({problem.kind.removeprefix("serving-") for problem in warnings} & RULES.keys())
    return [{"name": name, "says": RULES[name].says, "source": RULES[name].source} for name in names]
