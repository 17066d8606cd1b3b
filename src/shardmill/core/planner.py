"""From index, headers, config and recipe to a plan: the decision for every tensor, and checks of the whole.

Names and numbers in, a value out; nothing is opened and nothing is raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from shardmill.core.dtypes import CODES, COMPUTABLE
from shardmill.core.experts import Sizes, Stack, choose_layout, parse_stack, read_sizes
from shardmill.core.fused import fused_sets, is_fusable
from shardmill.core.header import TensorSpec
from shardmill.core.matching import Matcher, split_name
from shardmill.core.plan import COPY, QUANTIZE, SPLIT, Checkpoint, Plan, ShardPlan, TensorPlan, TensorRef
from shardmill.core.recipe import Recipe
from shardmill.core.roles import Role, role_of, runtime_heads
from shardmill.core.scheme import Scheme
from shardmill.errors import Problem, show


@lru_cache(maxsize=65_536)
def _role_of_template(template: str) -> Role | None:
    return role_of(template)


_DIGITS = re.compile(r"\d+")


def _role(module: str) -> Role | None:
    """Roles do not depend on layer numbers: look them up once per name template."""
    return _role_of_template(_DIGITS.sub("0", module))


@dataclass(frozen=True, slots=True)
class _Choice:
    """What the patterns and roles say of one module."""

    group: int
    """-1 for none."""
    reason: str
    pattern: str | None = None
    """The target that names it; None for a catch-all."""


def _is_demanded(shape: tuple[int, ...], choice: _Choice) -> bool:
    """Whether a target insists on a tensor that is no matrix, so that leaving it out would be a surprise.

    An expression that covers a layer also meets its norms and biases; nobody means those.
    """
    if choice.pattern is None or 0 in shape:
        return False
    return len(shape) > 1 or not choice.pattern.startswith("re:")


@dataclass(slots=True)
class _Planner:
    """The state of one planning pass."""

    recipe: Recipe
    sizes: Sizes
    matcher: Matcher
    layouts: dict[str, str | None] = field(default_factory=dict)
    """Layout of the expert stacks below a prefix."""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    linear_modules: list[str] = field(default_factory=list)
    """Modules whose weight is a matrix that stays dense."""
    role_copies: set[str] = field(default_factory=set)
    split: dict[Stack, str] = field(default_factory=dict)
    """Tensor by the stack that its name stands for: with and without `.weight` are the same."""

    def decide(self, spec: TensorSpec, shard: str) -> TensorPlan:
        """Choose what happens to one tensor, and why."""
        stack = parse_stack(spec.name, spec.shape)
        if stack is not None:
            return self._decide_stack(spec, stack, shard)
        module, param = split_name(spec.name)
        choice = self._resolve(module)
        if param != "weight":
            return TensorPlan(spec, COPY, "not a weight")
        return self._decide_weight(spec, module, choice)

    def _decide_weight(self, spec: TensorSpec, module: str, choice: _Choice) -> TensorPlan:
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
        if group < 0:
            if is_matrix:
                self.linear_modules.append(module)
            return TensorPlan(spec, COPY, reason)
        return TensorPlan(spec, QUANTIZE, reason, group)

    def _resolve(self, module: str) -> _Choice:
        """Choose by name alone; notes every pattern that matches."""
        ignored = self.matcher.ignored_by(module)
        target = self.matcher.target_of(module)
        if ignored is not None:
            return _Choice(-1, f"ignored by {show(ignored)}")
        if target is None:
            return _Choice(-1, "no target matches")
        role = _role(module) if self.recipe.default_ignores else None
        if role is not None and not target.explicit:
            self.role_copies.add(module)
            return _Choice(-1, f"default: {role.name} ({role.why})")
        return _Choice(target.group, f"target {show(target.pattern)}", target.pattern if target.explicit else None)

    def _decide_stack(self, spec: TensorSpec, stack: Stack, shard: str) -> TensorPlan:
        """Split a stack when every expert in it is quantized alike; copy it when none is."""
        whole = f"{stack.prefix}.{stack.leaf}"
        ignored = self.matcher.ignored_by(whole)
        found = {self._resolve(module) for expert in range(spec.shape[0]) for module in stack.modules(expert)}
        groups = {choice.group for choice in found}
        reason = min((choice.reason for choice in found), default="no experts")
        if ignored is not None or groups <= {-1}:
            self.linear_modules += [whole, *stack.modules(0)] if stack.param == "weight" else []
            return TensorPlan(spec, COPY, f"ignored by {show(ignored)}" if ignored else reason)
        if len(groups) > 1:
            self._refuse(
                shard,
                spec,
                "experts-differ",
                "its experts are not all treated alike",
                "name all experts of a layer, or none",
            )
            return TensorPlan(spec, COPY, "experts are not treated alike")
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
            return TensorPlan(spec, COPY, "layout of fused experts unknown")
        first = self.split.setdefault(stack, spec.name)
        if first != spec.name:
            self._refuse(
                shard,
                spec,
                "name-collision",
                f"its experts would have the names of those of {show(first)}",
                "ignore both",
            )
        return TensorPlan(spec, SPLIT, reason, groups.pop() if stack.param == "weight" else -1, layout)

    def _refuse(self, shard: str, spec: TensorSpec, kind: str, message: str, way_out: str = "") -> None:
        self.problems.append(Problem(file=shard, tensor=spec.name, kind=kind, message=message, way_out=way_out))


def build_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Decide about every tensor of a checkpoint; problems are collected in the plan, never raised.

    Checks that need the whole checkpoint are made here; those of single tensors by `checks.check_shard`.
    """
    sizes = read_sizes(checkpoint.config)
    planner = _Planner(recipe, sizes, Matcher.build([g.targets for g in recipe.groups], recipe.ignore))
    planner.layouts = _stack_layouts(checkpoint, sizes, recipe)
    schemes = tuple(group.scheme for group in recipe.groups)
    decided = [[planner.decide(spec, shard.name) for spec in shard.header.tensors] for shard in checkpoint.shards]
    refs = _share_global_scales(checkpoint, decided, planner, schemes)
    shards = tuple(
        ShardPlan(
            number=number,
            name=shard.name,
            size=shard.size,
            data_start=shard.header.data_start,
            tensors=tuple(replace(t, fused=refs[t.spec.name]) if t.spec.name in refs else t for t in tensors),
            schemes=schemes,
        )
        for number, (shard, tensors) in enumerate(zip(checkpoint.shards, decided, strict=True))
    )
    heads = runtime_heads(sizes.model_types)
    problems = [
        *checkpoint.problems,
        *planner.problems,
        *_check_index(checkpoint),
        *_check_coverage(planner, shards, heads),
    ]
    problems += _check_config(checkpoint)
    # The names of a split stack's experts never collide with modules that stay dense.
    quantized = {split_name(t.spec.name)[0] for shard in shards for t in shard.tensors if t.action == QUANTIZE}
    return Plan(
        recipe=recipe,
        shards=shards,
        is_indexed=checkpoint.index is not None,
        config_text=checkpoint.config_text,
        model_types=sizes.model_types,
        files=checkpoint.files,
        left_out=checkpoint.left_out,
        ignore=tuple(sorted({*planner.linear_modules, *heads} - quantized)),
        problems=tuple(sorted(set(problems))),
        warnings=tuple(sorted({*checkpoint.warnings, *planner.warnings, *_partial_blocks(shards)})),
    )


def _partial_blocks(shards: Iterable[ShardPlan]) -> list[Problem]:
    """One warning for all weights that blocks do not tile; they are padded, and engines may refuse them."""
    found = [
        (shard.name, tensor.spec, block)
        for shard in shards
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


def _stack_layouts(checkpoint: Checkpoint, sizes: Sizes, recipe: Recipe) -> dict[str, str | None]:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for shard in checkpoint.shards:
        for spec in shard.header.tensors:
            stack = parse_stack(spec.name, spec.shape)
            if stack is not None and stack.param == "weight":
                shapes.setdefault(stack.prefix, {})[stack.leaf] = spec.shape
    return {prefix: recipe.expert_layout or choose_layout(found, sizes) for prefix, found in shapes.items()}


def _share_global_scales(
    checkpoint: Checkpoint, decided: Sequence[Sequence[TensorPlan]], planner: _Planner, schemes: Sequence[Scheme]
) -> dict[str, tuple[TensorRef, ...]]:
    """Members of each fused set that share a global scale, by tensor name; reports sets whose members disagree."""
    located: dict[str, tuple[TensorRef, TensorPlan]] = {}
    for shard, tensors in zip(checkpoint.shards, decided, strict=True):
        for tensor in tensors:
            module, param = split_name(tensor.spec.name)
            if param == "weight" and len(tensor.spec.shape) == 2 and is_fusable(module):
                located[module] = (TensorRef(shard.name, shard.header.data_start, tensor.spec), tensor)
    shared: dict[str, tuple[TensorRef, ...]] = {}
    for members in fused_sets(located):
        _check_fused(members, located, planner)
        for group in {located[m][1].scheme for m in members} - {-1}:
            if schemes[group].weights.has_global_scale:
                refs = tuple(located[m][0] for m in members if located[m][1].scheme == group)
                shared.update({ref.spec.name: refs for ref in refs if len(refs) > 1})
    return shared


def _check_fused(
    members: Sequence[str], located: Mapping[str, tuple[TensorRef, TensorPlan]], planner: _Planner
) -> None:
    groups = {member: located[member][1].scheme for member in members}
    if len(set(groups.values())) == 1 or planner.recipe.partial_fused:
        return
    odd = sorted(member for member in members if groups[member] != groups[members[0]])
    by_role = all(member in planner.role_copies for member in members if groups[member] < 0)
    by_role &= len(set(groups.values()) - {-1}) == 1
    ref = located[odd[0]][0]
    problem = Problem(
        file=ref.shard,
        tensor=ref.spec.name,
        kind="fused-set-split",
        message=f"engines fuse {', '.join(map(show, members))} into one layer, the recipe treats them differently",
        way_out="treat all of them alike, or set partial_fused",
    )
    (planner.warnings if by_role else planner.problems).append(problem)


def _check_index(checkpoint: Checkpoint) -> list[Problem]:
    """Agreement of index and headers both ways; duplicates over shards."""
    problems: list[Problem] = []
    owner: dict[str, str] = {}
    for shard in checkpoint.shards:
        for spec in shard.header.tensors:
            first = owner.setdefault(spec.name, shard.name)
            if first != shard.name:
                message = f"the same name stands in {show(first)}"
                problems.append(Problem(file=shard.name, tensor=spec.name, kind="duplicate-tensor", message=message))
    if checkpoint.index is None:
        return problems
    read = {shard.name for shard in checkpoint.shards}
    for tensor, shard_name in checkpoint.index.weight_map:
        if shard_name in read and owner.get(tensor) != shard_name:
            found = f"it is in {show(owner[tensor])}" if tensor in owner else "no shard that was read has it"
            message = f"the index places it in this shard, {found}"
            problems.append(Problem(file=shard_name, tensor=tensor, kind="index-disagrees", message=message))
    return problems


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
    if not any(tensor.scheme >= 0 for shard in shards for tensor in shard.tensors):
        problems.append(Problem(kind="nothing-matched", message="the recipe quantizes no tensor of this checkpoint"))
    return problems


def _check_config(checkpoint: Checkpoint) -> list[Problem]:
    config = checkpoint.config
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    if any(level.get("quantization_config") or level.get("compression_config") for level in nested):
        message = "the source has a quantization_config: it is quantized already"
        return [
            Problem(
                file="config.json",
                kind="already-quantized",
                message=message,
                way_out="start from the unquantized checkpoint",
            )
        ]
    return []
