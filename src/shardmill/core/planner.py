"""From index, headers, config and recipe to a plan: the decision for every tensor, and checks of the whole.

Names and numbers in, a value out; nothing is opened and nothing is raised.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from shardmill.core.architectures import loaded_names, past_last_layer, runtime_heads, transposed_leaves
from shardmill.core.assemble import planned_groups, quantization_config, with_quantization
from shardmill.core.dtypes import CODES, COMPUTABLE
from shardmill.core.encoding import Decode, TensorRef
from shardmill.core.experts import Sizes, Stack, choose_layout, parse_stack, read_sizes
from shardmill.core.findings import check_copies, check_partners
from shardmill.core.fused import TABLE, FusedTable, fused_leaves, may_fuse
from shardmill.core.header import TensorSpec
from shardmill.core.kv_cache import check_kv_scales
from shardmill.core.limits import Limits, above
from shardmill.core.matching import Matcher, PatternSet, split_name, templates
from shardmill.core.nonfinite import VALUES_UNKNOWN, Kept
from shardmill.core.plan import (
    COPY,
    DEQUANTIZE,
    PART,
    PLAIN,
    QUANTIZE,
    SPLIT,
    Checkpoint,
    KeptGroup,
    Plan,
    ShardPlan,
    SourceShard,
    TensorPlan,
)
from shardmill.core.recipe import Recipe
from shardmill.core.recode import can_recode, natural_scheme
from shardmill.core.resolve import check_resolution
from shardmill.core.roles import MTP, Role, has_digit_word, role_named, role_of
from shardmill.core.scheme import Scheme, group_entry
from shardmill.core.sources import Sources, recognise
from shardmill.core.targets import dense_spellings
from shardmill.errors import Problem, show


@lru_cache(maxsize=65_536)
def _role_of_template(template: str, off: frozenset[str]) -> Role | None:
    return role_of(template, off)


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_ADDED = Role("added by the recipe", "the recipe says so")


@dataclass(frozen=True, slots=True)
class _Roles:
    """The table of roles as it holds for one checkpoint."""

    off: frozenset[str]
    added: PatternSet
    past_last: re.Pattern[str] | None
    """Finds the layers for multi-token prediction; None where there are none."""

    @classmethod
    def build(cls, checkpoint: Checkpoint, recipe: Recipe) -> _Roles:
        off = frozenset(recipe.architecture.roles_off)
        numbers = sorted(past_last_layer(checkpoint.config)) if MTP not in off else []
        pattern = re.compile(rf"(?:^|\.)layers\.(?:{'|'.join(map(str, numbers))})\.") if numbers else None
        return cls(off, PatternSet(list(recipe.architecture.roles_add)), pattern)

    @property
    def sees_digits(self) -> bool:
        """Whether names of one template may have different roles."""
        return self.past_last is not None or self.added.sees_digits

    def mark(self, module: str) -> tuple[object, ...]:
        """What tells modules of one template apart."""
        return (self.past_last is not None and bool(self.past_last.search(module)), self.added.digit_hits(module))

    def of(self, module: str) -> Role | None:
        """The role of a module. Roles of the table do not depend on layer numbers; digits in words count."""
        if self.added.match(module) is not None:
            return _ADDED
        if self.past_last is not None and self.past_last.search(module):
            return role_named(MTP)
        return _role_of_template(_NUMBER.sub("0", module), self.off)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What the patterns and roles say of one module."""

    group: int
    """-1 for none."""
    reason: str
    pattern: str | None = None
    """The target that names it; None for a catch-all."""
    by_role: bool = False


def _is_demanded(shape: tuple[int, ...], choice: _Choice) -> bool:
    """Whether a target insists on a tensor that is no matrix, so that leaving it out would be a surprise.

    An expression that covers a layer also meets its norms and biases; nobody means those.
    """
    if choice.pattern is None or 0 in shape:
        return False
    return len(shape) > 1 or not choice.pattern.startswith("re:")


class _Decision(NamedTuple):
    """What becomes of a tensor, and what else follows from it; one value for all tensors of a kind."""

    action: str
    reason: str
    group: int = -1
    layout: str | None = None
    is_dense: bool = False
    """Whether it is a matrix that stays dense."""
    by_role: bool = False
    fused_at: int = 0
    """Characters of leaf and param where engines may fuse the module with others; 0 where they never do."""
    decode: Decode | None = None


_Kind = tuple[object, ...]
"""All that a decision depends on: template, dtype, shape, and the patterns that see digits and match."""


@dataclass(slots=True)
class _Planner:
    """The state of one planning pass."""

    recipe: Recipe
    sizes: Sizes
    matcher: Matcher
    limits: Limits
    roles: _Roles
    table: FusedTable
    transposed_leaves: frozenset[str]
    layouts: dict[str, str | None] = field(default_factory=dict)
    """Layout of the expert stacks below a prefix."""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    linear_modules: list[str] = field(default_factory=list)
    """Modules whose weight is a matrix that stays dense."""
    known: dict[_Kind, _Decision] = field(default_factory=dict)
    """Decisions that hold for every tensor of their kind."""
    fused_groups: set[int] = field(default_factory=set)
    """Groups of modules that may be fused."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Why a tensor is copied whatever else holds, by name."""
    transposed: list[tuple[str, str]] = field(default_factory=list)
    """`(shard, tensor)` of what would be quantized and is stored `[in, out]`."""
    split: dict[Stack, str] = field(default_factory=dict)
    """Tensor by the stack that its name stands for: with and without `.weight` are the same."""
    sources: Sources = field(default_factory=Sources)
    """What is quantized already."""
    encoded: dict[str, _Decision] = field(default_factory=dict)
    """Decisions about it by name of the tensor with the codes."""
    stay: dict[str, list[str]] = field(default_factory=dict)
    """Modules that keep their codes by the JSON of their group in the written config."""
    schemes: list[Scheme] = field(default_factory=list)
    """Of the recipe's groups, and then those in which codes are written that stay."""

    def decide_all(self, shard: SourceShard) -> list[_Decision]:
        """Choose what happens to every tensor of a shard, and why.

        Patterns and roles are asked once for each kind of tensor: no answer depends on digits but through the patterns
        that see them, and the roles that have some in their words. A fused expert stack is decided by itself.
        """
        hits = self.matcher.digit_hits()
        found: list[_Decision] = []
        specs = shard.header.tensors
        for spec, template in zip(specs, templates([spec.name for spec in specs]), strict=True):
            kind: _Kind = (template, spec.dtype, spec.shape)
            if hits is not None:
                kind = (*kind, hits(split_name(spec.name)[0]))
            if self.roles.sees_digits:
                kind = (*kind, self.roles.mark(split_name(spec.name)[0]))
            if has_digit_word(template):
                kind = (*kind, spec.name)
            encoded = self._decide_encoded(spec) if self.sources.weights else None
            decision = encoded or self.known.get(kind) or self._decide_anew(spec, kind, shard.name)
            if spec.name in self.kept and decision.action != COPY:
                decision = self._keep(spec, decision)
            if decision.action == QUANTIZE and self._is_transposed(spec.name):
                self.transposed.append((shard.name, spec.name))
            if decision.is_dense:
                self.linear_modules.append(split_name(spec.name)[0])
            found.append(decision)
        return found

    def _decide_anew(self, spec: TensorSpec, kind: _Kind, shard: str) -> _Decision:
        stack = parse_stack(spec.name, spec.shape)
        if stack is not None:
            return self._decide_stack(spec, stack, shard)
        self.known[kind] = self._decide(spec)
        return self.known[kind]

    def _is_transposed(self, name: str) -> bool:
        return bool(self.transposed_leaves) and split_name(split_name(name)[0])[1] in self.transposed_leaves

    def _decide_encoded(self, spec: TensorSpec) -> _Decision | None:
        """Choose for a tensor that is part of a weight which is quantized already; None for any other."""
        codes = self.sources.parts.get(spec.name, spec.name)
        decode = self.sources.weights.get(codes)
        if decode is None:
            return None
        if codes not in self.encoded:
            first = decode.parts[0][1]
            self.encoded[codes] = self._decide_codes(first.spec, decode, first.shard)
        found = self.encoded[codes]
        if spec.name == codes:
            return found
        if found.action == COPY:
            return _Decision(COPY, "stays with its codes")
        return _Decision(PART, "read with its codes")

    def _decide_codes(self, spec: TensorSpec, decode: Decode, shard: str) -> _Decision:
        """Choose for a weight that is quantized already, under the name of its codes."""
        module = split_name(spec.name)[0]
        if decode.stack is not None:
            found = self._decide_stack(spec, decode.stack, shard)
        else:
            found = self._decide_weight(decode.virtual(PLAIN), module, self._resolve(module))
        if found.action != COPY:
            stays = found.group >= 0 and can_recode(decode, self.schemes[found.group])
            origin = f"from {decode.format}{', whose codes are kept' if stays else ''}"
            return found._replace(reason=f"{found.reason}; {origin}", decode=decode)
        if self.recipe.dequantize:
            return found._replace(action=DEQUANTIZE, reason=f"{decode.format} becomes {PLAIN}", decode=decode)
        if decode.scheme >= 0:
            self.stay.setdefault(self.sources.groups[decode.scheme], []).append(module)
            return found._replace(reason=f"{found.reason}; stays {decode.format}", is_dense=False)
        scheme = natural_scheme(decode)
        if scheme is not None:
            self.stay.setdefault(json.dumps(group_entry(scheme)), []).append(module)
            if scheme not in self.schemes:
                self.schemes.append(scheme)
            return found._replace(
                action=QUANTIZE,
                reason=f"{found.reason}; stays {decode.format}, as {scheme.format}",
                group=self.schemes.index(scheme),
                is_dense=False,
                decode=replace(decode, stays=True),
            )
        reason = f"{found.reason}; {decode.format} becomes {PLAIN}"
        return found._replace(action=DEQUANTIZE, reason=reason, decode=decode)

    def kept_groups(self) -> tuple[KeptGroup, ...]:
        """Groups of the written config for modules that keep their codes, with explicit names."""
        return tuple(KeptGroup(entry, tuple(sorted(modules))) for entry, modules in sorted(self.stay.items()))

    def _keep(self, spec: TensorSpec, decision: _Decision) -> _Decision:
        """Copy a tensor that would be quantized or split; its modules stay dense."""
        stack = decision.decode.stack if decision.decode else parse_stack(spec.name, spec.shape)
        if stack is not None and stack.param == "weight":
            self.linear_modules += [stack.whole, *stack.modules(0)]
        is_dense = decision.action == QUANTIZE
        action = DEQUANTIZE if decision.decode else COPY
        return decision._replace(action=action, reason=self.kept[spec.name], group=-1, layout=None, is_dense=is_dense)

    def _decide(self, spec: TensorSpec) -> _Decision:
        module, param = split_name(spec.name)
        choice = self._resolve(module)
        if param != "weight":
            return _Decision(COPY, "not a weight")
        return self._decide_weight(spec, module, choice)

    def _decide_weight(self, spec: TensorSpec, module: str, choice: _Choice) -> _Decision:
        group, reason = choice.group, choice.reason
        is_matrix = len(spec.shape) == 2 and 0 not in spec.shape
        if group >= 0 and not is_matrix and not _is_demanded(spec.shape, choice):
            group, reason = -1, f"not a matrix: shape {list(spec.shape)}"
        if group >= 0 and spec.dtype not in COMPUTABLE | CODES:
            group, reason = -1, f"dtype {spec.dtype} is not quantized"
        if group >= 0 and is_matrix and self.recipe.indivisible == "copy":
            size = self.recipe.groups[group].scheme.weights.group_size
            if size and spec.shape[1] % size:
                group, reason = -1, f"group_size {size} does not divide {spec.shape[1]}"
        fused_at = 0
        if len(spec.shape) == 2 and may_fuse(templates([module])[0], self.table):
            fused_at = len(spec.name) - len(module.rpartition(".")[0]) - bool(module.rpartition(".")[0])
            self.fused_groups.add(group)
        return _Decision(
            action=COPY if group < 0 else QUANTIZE,
            reason=reason,
            group=group,
            is_dense=group < 0 and is_matrix,
            by_role=choice.by_role,
            fused_at=fused_at,
        )

    def _resolve(self, module: str) -> _Choice:
        """Choose by name alone; notes every pattern that matches."""
        if self.recipe.dequantize:
            return _Choice(-1, "nothing is quantized")
        ignored = self.matcher.ignored_by(module)
        target = self.matcher.target_of(module)
        if ignored is not None:
            return _Choice(-1, f"ignored by {show(ignored)}")
        if target is None:
            return _Choice(-1, "no target matches")
        role = self.roles.of(module) if self.recipe.default_ignores else None
        if role is not None and not target.explicit:
            return _Choice(-1, f"default: {role.name} ({role.why})", by_role=True)
        return _Choice(target.group, f"target {show(target.pattern)}", target.pattern if target.explicit else None)

    def _decide_stack(self, spec: TensorSpec, stack: Stack, shard: str) -> _Decision:
        """Split a stack when every expert in it is quantized alike; copy it when none is."""
        if spec.shape[0] > self.limits.stack_experts:
            what = f"a stack of {spec.shape[0]} experts"
            self.problems.append(above("stack_experts", what, self.limits, file=shard, tensor=spec.name))
            return _Decision(COPY, "too many experts")
        whole = stack.whole
        ignored = self.matcher.ignored_by(whole)
        found = {self._resolve(module) for expert in range(spec.shape[0]) for module in stack.modules(expert)}
        groups = {choice.group for choice in found}
        reason = min((choice.reason for choice in found), default="no experts")
        if ignored is not None or groups <= {-1}:
            self.linear_modules += [whole, *stack.modules(0)] if stack.param == "weight" else []
            return _Decision(COPY, f"ignored by {show(ignored)}" if ignored else reason)
        if len(groups) > 1:
            self._refuse(
                shard,
                spec,
                "experts-differ",
                "its experts are not all treated alike",
                "name all experts of a layer, or none",
            )
            return _Decision(COPY, "experts are not treated alike")
        layout = self.layouts.get(stack.prefix, self.recipe.expert_layout)
        if layout is None:
            sizes = f"hidden_size {sorted(self.sizes.hidden)}, widths {sorted(self.sizes.widths)}"
            self._refuse(
                shard,
                spec,
                "expert-layout",
                f"layout of fused experts {list(spec.shape)} cannot be told from {sizes}",
                "set expert_layout to rows, columns or interleaved, or ignore it",
            )
            return _Decision(COPY, "layout of fused experts unknown")
        first = self.split.setdefault(stack, spec.name)
        if first != spec.name:
            self._refuse(
                shard,
                spec,
                "name-collision",
                f"its experts would have the names of those of {show(first)}",
                "ignore both",
            )
        return _Decision(SPLIT, reason, groups.pop() if stack.param == "weight" else -1, layout)

    def _refuse(self, shard: str, spec: TensorSpec, kind: str, message: str, way_out: str = "") -> None:
        self.problems.append(Problem(file=shard, tensor=spec.name, kind=kind, message=message, way_out=way_out))


def build_plan(
    checkpoint: Checkpoint, recipe: Recipe, kept: Kept | None = None, *, sources: Sources | None = None
) -> Plan:
    """Decide about every tensor of a checkpoint; problems are collected in the plan, never raised.

    Checks that need the whole checkpoint are made here; those of single tensors by `checks.check_shard`.

    Args:
        kept: what is copied because of its values, where they were looked at; see `nonfinite.keep`.
        sources: what is quantized already, where that is not to be found out here.
    """
    sizes = read_sizes(checkpoint.config)
    matcher = Matcher.build([g.targets for g in recipe.groups], recipe.ignore)
    planner = _Planner(
        recipe,
        sizes,
        matcher,
        checkpoint.intake.limits,
        _Roles.build(checkpoint, recipe),
        recipe.fused_table,
        transposed_leaves(sizes.model_types),
    )
    planner.kept = kept.reasons if kept is not None else {}
    planner.sources = recognise(checkpoint) if sources is None else sources
    planner.schemes = [group.scheme for group in recipe.groups]
    planner.layouts = _stack_layouts(checkpoint, sizes, recipe, planner.sources)
    decided = [planner.decide_all(shard) for shard in checkpoint.shards]
    schemes = tuple(planner.schemes)
    refs = _share_global_scales(checkpoint, decided, planner, schemes)
    shards = tuple(
        ShardPlan(
            number=number,
            name=shard.name,
            size=shard.size,
            data_start=shard.header.data_start,
            tensors=_tensor_plans(shard, decisions, refs),
            schemes=schemes,
        )
        for number, (shard, decisions) in enumerate(zip(checkpoint.shards, decided, strict=True))
    )
    heads = runtime_heads(sizes.model_types, recipe.architecture.heads)
    problems = [
        *checkpoint.problems,
        *planner.problems,
        *_check_transposed(checkpoint, decided, planner),
        *(check_kv_scales(checkpoint.shards) if recipe.kv_cache else ()),
        *_check_index(checkpoint),
        *_check_coverage(planner, shards, heads),
    ]
    problems += _check_config(planner.sources)
    dense = {*planner.linear_modules, *heads, *loaded_names(planner.linear_modules, sizes.model_types)}
    known = planner.sources.weights.keys() | planner.sources.parts.keys()
    cautions = [*check_copies(shards, known), *check_partners(_fusable(checkpoint, decided), planner.table)]
    found = kept.warnings if kept is not None else VALUES_UNKNOWN if recipe.allow_nonfinite else ()
    plan = Plan(
        recipe=recipe,
        shards=shards,
        index_name=None if checkpoint.index is None else checkpoint.index.name,
        config_text=checkpoint.config_text,
        model_types=sizes.model_types,
        files=checkpoint.files,
        left_out=checkpoint.left_out,
        rewritten=checkpoint.rewritten,
        allow_code=checkpoint.intake.allow_code,
        kept=planner.kept_groups(),
        ignore=_dense_modules(dense_spellings(dense), shards),
        problems=tuple(sorted(set(problems))),
        warnings=tuple(sorted({*checkpoint.warnings, *planner.warnings, *_partial_blocks(shards), *cautions, *found})),
    )
    if plan.problems:
        return plan
    plan = replace(plan, problems=tuple(sorted(_check_config_resolves(plan, planner.linear_modules))))
    return replace(plan, rewritten=with_quantization(plan))


def _check_config_resolves(plan: Plan, dense: Iterable[str]) -> list[Problem]:
    """Whether all readers find what was planned in the config that will be written."""
    groups = planned_groups(plan)
    rest = [module for module in dense if module and module not in groups.planned]
    return check_resolution(
        quantization_config(plan, groups),
        groups.planned,
        rest,
        table=plan.recipe.fused_table,
        runs_merged=not plan.recipe.partial_fused,
    )


def _check_transposed(
    checkpoint: Checkpoint, decided: Sequence[Sequence[_Decision]], planner: _Planner
) -> list[Problem]:
    """Refuse weights that are stored `[in, out]`: known ones, and those with a bias as long as their rows."""
    found = planner.transposed or list(_transposed_by_bias(checkpoint, decided))
    if not found:
        return []
    shard, tensor = found[0]
    message = f"expected weights stored [out, in], found [in, out] in this one and {len(found) - 1} more"
    way_out = "ignore them, or convert the checkpoint to plain linear layers first"
    return [Problem(file=shard, tensor=tensor, kind="weight-transposed", message=message, way_out=way_out)]


def _transposed_by_bias(checkpoint: Checkpoint, decided: Sequence[Sequence[_Decision]]) -> Iterator[tuple[str, str]]:
    biases = {
        spec.name.removesuffix("bias"): spec.shape[0]
        for shard in checkpoint.shards
        for spec in shard.header.tensors
        if spec.name.endswith(".bias") and len(spec.shape) == 1
    }
    if not biases:
        return
    for shard, decisions in zip(checkpoint.shards, decided, strict=True):
        for spec, decision in zip(shard.header.tensors, decisions, strict=True):
            if decision.action == QUANTIZE and len(spec.shape) == 2:
                length = biases.get(spec.name.removesuffix("weight"))
                if length is not None and length != spec.shape[0] and length == spec.shape[1]:
                    yield shard.name, spec.name


def _tensor_plans(
    shard: SourceShard, decisions: Iterable[_Decision], refs: Mapping[str, tuple[TensorRef, ...]]
) -> tuple[TensorPlan, ...]:
    rows = zip(shard.header.tensors, decisions, strict=True)
    return tuple(
        [TensorPlan(spec, d.action, d.reason, d.group, d.layout, refs.get(spec.name, ()), d.decode) for spec, d in rows]
    )


def _dense_modules(modules: set[str], shards: Iterable[ShardPlan]) -> tuple[str, ...]:
    """Those modules that no shard quantizes, sorted.

    The names of a split stack's experts never collide with modules that stay dense.
    """
    weights = {name for module in modules for name in ([f"{module}.weight"] if module else ["weight", ".weight"])}
    found = [
        t.spec.name
        for s in shards
        for t in s.tensors
        if t.action == QUANTIZE and (t.spec.name in weights or t.decode is not None)
    ]
    return tuple(sorted(modules.difference(split_name(name)[0] for name in found)))


def _partial_blocks(shards: Iterable[ShardPlan]) -> list[Problem]:
    """One warning for all weights that blocks do not tile; they are padded, and engines may refuse them."""
    found = [
        (shard.name, tensor.spec, block)
        for shard in shards
        if any(scheme.weights.block_structure for scheme in shard.schemes)
        for tensor in shard.tensors
        if tensor.action == QUANTIZE and (block := shard.schemes[tensor.scheme].weights.block_structure)
        if len(tensor.spec.shape) == 2 and any(n % size for n, size in zip(tensor.spec.shape, block, strict=True))
    ]
    if not found:
        return []
    name, spec, block = found[0]
    message = (
        f"blocks of {block[0]}x{block[1]} do not tile {list(spec.shape)}, nor {len(found) - 1} other weights;"
        " they are padded, and engines may refuse partial blocks"
    )
    return [
        Problem(
            file=name,
            tensor=spec.name,
            kind="partial-blocks",
            message=message,
            way_out="take FP8_DYNAMIC if yours does",
        )
    ]


def _stack_layouts(checkpoint: Checkpoint, sizes: Sizes, recipe: Recipe, sources: Sources) -> dict[str, str | None]:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for shard in checkpoint.shards:
        for spec in [spec for spec in shard.header.tensors if len(spec.shape) == 3]:
            stack = parse_stack(spec.name, spec.shape)
            if stack is not None:
                shapes.setdefault(stack.prefix, {})[stack.leaf] = spec.shape
    found = {prefix: recipe.expert_layout or choose_layout(found, sizes) for prefix, found in shapes.items()}
    stacks = {decode.stack.prefix for decode in sources.weights.values() if decode.stack is not None}
    return found | dict.fromkeys(stacks, "interleaved")  # as every checkpoint in blocks is


_Row = tuple[SourceShard, TensorSpec, _Decision]


def _share_global_scales(
    checkpoint: Checkpoint, decided: Sequence[Sequence[_Decision]], planner: _Planner, schemes: Sequence[Scheme]
) -> dict[str, tuple[TensorRef, ...]]:
    """Members of each fused set that share a global scale, by tensor name; reports sets whose members disagree."""
    shared: dict[str, tuple[TensorRef, ...]] = {}
    scaled = frozenset(group for group in planner.fused_groups - {-1} if schemes[group].weights.has_global_scale)
    if len(planner.fused_groups) < 2 and not scaled:
        return shared
    for members in _fused_members(checkpoint, decided, planner.table):
        groups = {decision.group for _, _, decision in members}
        if len(groups) > 1:
            _check_fused(members, planner)
        for group in groups & scaled:
            refs = tuple(
                [
                    TensorRef(s.name, s.header.data_start, spec, d.decode)
                    for s, spec, d in members
                    if d.group == group and not (d.decode and d.decode.stays)
                ]
            )
            if len(refs) > 1:
                for ref in refs:
                    shared[ref.spec.name] = refs
    return shared


def _fused_members(
    checkpoint: Checkpoint, decided: Sequence[Sequence[_Decision]], table: FusedTable
) -> Iterator[list[_Row]]:
    """Every fused set of two or more members, sorted by name."""
    below: defaultdict[str, list[_Row]] = defaultdict(list)
    for shard, decisions in zip(checkpoint.shards, decided, strict=True):
        for spec, decision in zip(shard.header.tensors, decisions, strict=True):
            if decision.fused_at:
                below[spec.name[: -decision.fused_at]].append((shard, spec, decision))
    for parent, rows in below.items():
        if len(rows) > 1:
            start = len(parent)
            for positions in _fused_positions(tuple([spec.name[start:] for _, spec, _ in rows]), table):
                yield [rows[position] for position in positions]


def _fusable(checkpoint: Checkpoint, decided: Sequence[Sequence[_Decision]]) -> Iterator[tuple[str, str]]:
    """Shard and module of every matrix that engines may fuse with others."""
    for shard, decisions in zip(checkpoint.shards, decided, strict=True):
        for spec, decision in zip(shard.header.tensors, decisions, strict=True):
            if decision.fused_at:
                yield shard.name, split_name(spec.name)[0]


@lru_cache(maxsize=4096)
def _fused_positions(weights: tuple[str, ...], table: FusedTable = TABLE) -> tuple[tuple[int, ...], ...]:
    """Where the members of each fused set stand among the weights below one parent; of a name that repeats, the last.

    >>> _fused_positions(("up_proj.weight", "down_proj.weight", "gate_proj.weight"))
    ((2, 0),)
    """
    at = {split_name(weight)[0]: position for position, weight in enumerate(weights)}
    return tuple(tuple(at[leaf] for leaf in leaves) for leaves in fused_leaves(tuple(sorted(at)), table))


def _check_fused(members: Sequence[_Row], planner: _Planner) -> None:
    if planner.recipe.partial_fused:
        return
    groups = [decision.group for _, _, decision in members]
    shard, spec = next((shard, spec) for shard, spec, decision in members if decision.group != groups[0])
    by_role = all(decision.by_role for _, _, decision in members if decision.group < 0)
    by_role &= len(set(groups) - {-1}) == 1
    names = ", ".join(show(split_name(member.name)[0]) for _, member, _ in members)
    problem = Problem(
        file=shard.name,
        tensor=spec.name,
        kind="fused-set-split",
        message=f"engines fuse {names} into one layer, the recipe treats them differently",
        way_out="treat all of them alike, or set partial_fused",
    )
    (planner.warnings if by_role else planner.problems).append(problem)


def _check_index(checkpoint: Checkpoint) -> list[Problem]:
    """Agreement of index and headers both ways; duplicates over shards."""
    problems: list[Problem] = []
    owner: dict[str, str] = {}
    if _is_agreed(checkpoint):
        return problems
    for shard in checkpoint.shards:
        for spec in shard.header.tensors:
            first = owner.setdefault(spec.name, shard.name)
            if first != shard.name:
                message = f"the same name stands in {show(first)}"
                problems.append(Problem(file=shard.name, tensor=spec.name, kind="duplicate-tensor", message=message))
    if checkpoint.index is None:
        return problems
    read = {shard.name for shard in checkpoint.shards}
    for tensor, shard_name in checkpoint.index.weight_map.items():
        if shard_name in read and owner.get(tensor) != shard_name:
            found = f"it is in {show(owner[tensor])}" if tensor in owner else "no shard that was read has it"
            message = f"the index places it in this shard, {found}"
            problems.append(Problem(file=shard_name, tensor=tensor, kind="index-disagrees", message=message))
    return problems


def _is_agreed(checkpoint: Checkpoint) -> bool:
    """Whether index and headers name the same tensors in the same shards, each once."""
    if checkpoint.index is None:
        return len(checkpoint.shards) < 2
    place_of = checkpoint.index.weight_map
    count = 0
    for shard in checkpoint.shards:
        names = [spec.name for spec in shard.header.tensors]
        if not {shard.name}.issuperset(map(place_of.get, names)):
            return False
        count += len(set(names))
    return count == len(place_of)


def _check_coverage(planner: _Planner, shards: Iterable[ShardPlan], heads: Sequence[str]) -> list[Problem]:
    problems = [
        Problem(
            kind="pattern-unmatched",
            message=f"pattern {show(pattern)} in {where} matches no module",
            way_out="correct or drop it",
        )
        for where, pattern in planner.matcher.unmatched()
        if pattern not in heads
    ]
    if planner.recipe.dequantize:
        if not planner.sources.weights and not planner.sources.problems:
            message = "no weight of this checkpoint is quantized"
            problems.append(Problem(kind="nothing-matched", message=message, way_out="use it as it is"))
        return problems
    asked = range(len(planner.recipe.groups))
    if not any(tensor.scheme in asked for shard in shards for tensor in shard.tensors):
        problems.append(Problem(kind="nothing-matched", message="the recipe quantizes no tensor of this checkpoint"))
    return problems


def _check_config(sources: Sources) -> list[Problem]:
    """What is odd about the quantization of the source, and a claim of one where no weight has any."""
    if sources.problems or sources.weights or not sources.is_claimed:
        return list(sources.problems)
    message = "the source has a quantization_config, and no weight in a format that is read"
    way_out = "start from the unquantized checkpoint, or remove that section if it is one"
    return [Problem(file="config.json", kind="already-quantized", message=message, way_out=way_out)]
