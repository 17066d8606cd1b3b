"""Before a plan, where a size is asked for instead of a scheme: measure what candidates would leave, and choose.

Every candidate is worked out by the kernels that quantize, and nothing of it is written. All of them read the source
together, each byte once, see `storage.shared`. What was found is kept in the store under the key of the job that would
have been done, and receipts of jobs that were done tell the same: so another budget reads nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from shardmill.core.budget import BYTES, Measured, Solution, Wish, frame_of, items_of, measured, solve
from shardmill.core.budget_recipe import differences, recipe_of
from shardmill.core.checks import check_shard
from shardmill.core.experts import parse_stack
from shardmill.core.matching import split_name
from shardmill.core.nonfinite import Kept
from shardmill.core.plan import Checkpoint, Plan, ShardPlan, TensorPlan
from shardmill.core.planner import build_plan
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import Group, Recipe
from shardmill.core.scheme import Scheme
from shardmill.errors import Interrupted, Problem, Refused
from shardmill.stages.devices import DevicePool, limit_threads, resolve_devices
from shardmill.stages.importance import check_importance, importance_of, resolve_importance
from shardmill.stages.nonfinite import find_kept
from shardmill.stages.pipeline import RunOptions
from shardmill.stages.plan import collection_paused
from shardmill.stages.quantize import Controls, Sources, interrupted, open_unchanged
from shardmill.storage.shared import Companions
from shardmill.storage.source import SourceFolder, read_checkpoint
from shardmill.storage.store import Store

_UNFIT = "group-indivisible"
_ABOUT_WHOLE = frozenset({"nothing-matched", "fused-set-split", "config-unresolved"})
"""Findings about a plan that is made to measure a candidate wherever it fits, not to be executed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A recipe that keeps to a budget, and how it was found."""

    recipe: Recipe
    solution: Solution


@dataclass(slots=True)
class MeasureWatch:
    """Callbacks for whoever shows progress."""

    on_total: Callable[[int], None] = field(default=lambda _size: None)
    """Called with the bytes that all candidates together work through."""
    on_bytes: Callable[[int], None] = field(default=lambda _count: None)


def solve_budget(
    source: SourceFolder,
    store: Store,
    wish: Wish,
    options: RunOptions,
    watch: MeasureWatch | None = None,
    stop: threading.Event | None = None,
) -> Solved:
    """Find the recipe whose result is within a budget and has the least error.

    Raises:
        Refused: the source or the request, with every problem; or no choice is within the budget.
        NonFiniteWeight: NaN or Inf in a weight that is to be quantized.
        StorageFailed: reading the source or writing the store failed.
        Interrupted: stopped on request; what was measured is kept.
    """
    stopping = stop or threading.Event()
    with collection_paused():
        checkpoint = read_checkpoint(source)
        plans = _plans(checkpoint, wish, None)
    kept = None
    if wish.base.allow_nonfinite:
        most = max(plans, key=lambda plan: sum(tensor.scheme == 0 for shard in plan.shards for tensor in shard.tensors))
        kept = find_kept(most, source, store, stopping.is_set)
        plans = _plans(checkpoint, wish, kept)
    records = _measure(plans, source, store, options, watch or MeasureWatch(), stopping)
    found = [measured(*row) for row in zip(plans, wish.candidates, records, strict=True)]
    return _solve(checkpoint, wish, kept, plans, found)


def _plans(checkpoint: Checkpoint, wish: Wish, kept: Kept | None) -> list[Plan]:
    """A plan for each candidate, of all weights that it fits.

    Raises:
        Refused: whatever stands against any of them; no candidate fits some weight.
    """
    plans, unfit = [], list[dict[str, Problem]]()
    problems: list[Problem] = []
    for scheme in wish.candidates:
        recipe = replace(wish.base, groups=(Group(scheme=scheme),), partial_fused=True)
        plan, left = _fitting_plan(checkpoint, resolve_importance(recipe), kept)
        found = [*plan.problems, *(problem for shard in plan.shards for problem in check_shard(shard))]
        problems += [problem for problem in found if problem.kind not in _ABOUT_WHOLE]
        problems += [] if found else check_importance(plan)
        plans.append(plan)
        unfit.append(left)
    nowhere = [problem for name, problem in unfit[0].items() if all(name in left for left in unfit)]
    if wish.base.indivisible == "refuse":
        problems += nowhere
    if problems:
        raise Refused({*problems, *checkpoint.problems})
    return plans


def _fitting_plan(checkpoint: Checkpoint, recipe: Recipe, kept: Kept | None) -> tuple[Plan, dict[str, Problem]]:
    """The plan of a candidate without the weights that it does not fit, and those."""
    plan = build_plan(checkpoint, recipe, kept)
    unfit = {
        problem.tensor: problem for shard in plan.shards for problem in check_shard(shard) if problem.kind == _UNFIT
    }
    if not unfit:
        return plan, {}
    names = [_module(t) for shard in plan.shards for t in shard.tensors if t.spec.name in unfit]
    ignore = tuple(dict.fromkeys((*recipe.ignore, *names)))
    return build_plan(checkpoint, replace(recipe, ignore=ignore), kept), unfit


def _module(tensor: TensorPlan) -> str:
    """The name by which a weight, or a stack of them, is ignored."""
    stack = tensor.decode.stack if tensor.decode else parse_stack(tensor.spec.name, tensor.spec.shape)
    return stack.whole if stack is not None else split_name(tensor.spec.name)[0]


def _measure(
    plans: Sequence[Plan], source: SourceFolder, store: Store, options: RunOptions, watch: MeasureWatch,
    stop: threading.Event,
) -> list[list[WeightRecord]]:  # fmt: skip
    """What each candidate leaves of every weight, from the store or from one read of the source."""
    found = [
        {shard.name: known for shard in plan.shards if (known := _known(shard, source, store)) is not None}
        for plan in plans
    ]
    missing = [
        [shard for shard in plan.shards if shard.name not in known] for plan, known in zip(plans, found, strict=True)
    ]
    if any(missing):
        store.prepare()
        watch.on_total(sum(shard.size for row in missing for shard in row))
        measuring = _Measuring(Companions(source, len(plans)), store, options, watch, stop)
        with ThreadPoolExecutor(len(plans), thread_name_prefix="measure") as pool:
            futures = [
                pool.submit(measuring.candidate, number, row, known)
                for number, (row, known) in enumerate(zip(missing, found, strict=True))
            ]
        failures = [error for future in futures if (error := future.exception()) is not None]
        if failures:
            raise next((error for error in failures if not isinstance(error, Interrupted)), failures[0])
    return [
        [record for shard in plan.shards for record in known[shard.name]]
        for plan, known in zip(plans, found, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Measuring:
    """A pass over the source by several candidates."""

    companions: Companions
    store: Store
    options: RunOptions
    watch: MeasureWatch
    stop: threading.Event

    def candidate(self, number: int, missing: Sequence[ShardPlan], found: dict[str, tuple[WeightRecord, ...]]) -> None:
        """Measure the shards that are missing of a candidate, in order; the first failure stops all of them."""
        companion = self.companions.companion(number)
        devices = resolve_devices(self.options.device, self.options.workers)
        controls = Controls(DevicePool(devices), self.stop.is_set, self.watch.on_bytes)

        def work(shard: ShardPlan) -> tuple[WeightRecord, ...]:
            with companion.taking(shard.name) as shared:
                return measure_shard(shard, shared, self.store, controls)

        try:
            for name in found:
                companion.pass_over(name)
            with ThreadPoolExecutor(len(devices), thread_name_prefix="shard") as pool:
                names = [shard.name for shard in missing]
                found |= zip(names, pool.map(work, missing), strict=True)
        except BaseException:
            self.stop.set()
            raise
        finally:
            companion.leave()


def _known(shard: ShardPlan, source: SourceFolder, store: Store) -> tuple[WeightRecord, ...] | None:
    """What is known of a shard without reading the source's tensors."""
    job = store.known_job(shard, source)
    return store.errors(job.key) if job is not None else None


def measure_shard(shard: ShardPlan, source: SourceFolder, store: Store, controls: Controls) -> tuple[WeightRecord, ...]:
    """Find out what quantizing a shard would leave of its weights, and keep it in the store.

    Raises:
        As `quantize.quantize_shard`.
    """
    from shardmill.kernels.lanes import needs_torch  # kernels take long to import, and a hit needs none
    from shardmill.kernels.shard import encode_shard

    with ExitStack() as stack, controls.devices.lend() as device:
        if controls.should_stop():
            raise interrupted()
        sources = Sources(shard, source, stack, controls.on_bytes)
        for name in shard.sources:
            if name != shard.name or store.known_digest(sources.meet(name)) is not None:
                sources.learn(name, store, controls.should_stop)
        if needs_torch(shard, device):
            limit_threads(controls.devices.devices)
        with collection_paused():
            layout = shard.layout()
        open_unchanged(sources, layout)
        weights = encode_shard(
            shard,
            sources.read,
            _drop,
            device=device,
            announce=sources.announce,
            should_stop=controls.should_stop,
            new_scratch=store.new_scratch,
            layout=layout,
            importance_of=importance_of,
            peek=sources.peek,
            lend=sources.lend,
            seams=sources.seams,
        )
        sources.close()
        store.remember(sources.identities[shard.name], sources.digests[shard.name])
        return store.put_errors(sources.key, weights)


def _drop(_data: memoryview) -> None:
    """Nothing is written."""


def _solve(
    checkpoint: Checkpoint, wish: Wish, kept: Kept | None, plans: Sequence[Plan], found: Sequence[Measured]
) -> Solved:
    """Choose, write the choice down, and make sure that a plan of it does what was chosen and is as small.

    Raises:
        Refused: no choice is within the budget.
    """
    table = wish.base.fused_table
    items = items_of(found, table, _importance(wish.candidates, found))
    tensors = {module: tensor for candidate in found for module, tensor in candidate.tensors.items()}
    changing = {tensors[module] for item in items for module in item.modules}
    frame = frame_of(plans[0], changing, max(_header_bytes(plan) for plan in plans))
    while True:
        solution = solve(wish.candidates, items, wish.budget, frame)
        recipe = recipe_of(solution, plans[0], wish.base)
        plan = build_plan(checkpoint, resolve_importance(recipe), kept)
        if wrong := differences(solution, plan):
            raise AssertionError(f"{len(wrong)} modules are not as chosen by {recipe}: {wrong[:3]}")
        over = sum(shard.sizes().output_bytes for shard in plan.shards) - wish.budget.amount
        if wish.budget.unit != BYTES or over <= 0:
            return Solved(recipe=recipe, solution=solution)
        frame = replace(frame, header_bytes=frame.header_bytes + int(over))


def _header_bytes(plan: Plan) -> int:
    """Of the heads of all output shards together."""
    sizes = [shard.sizes() for shard in plan.shards]
    return sum(size.output_bytes - size.quantized_bytes - size.copied_bytes for size in sizes)


def _importance(schemes: Sequence[Scheme], found: Sequence[Measured]) -> dict[str, float] | None:
    """Mean importance of the input features of each module, where a file tells it."""
    means: dict[str, float] = {}
    for scheme, candidate in zip(schemes, found, strict=True):
        if scheme.search is None or not scheme.search.importance_file:
            return None
        resolved = resolve_importance(Recipe(groups=(Group(scheme=scheme),))).groups[0].scheme
        for module in candidate.sizes:
            values = importance_of(resolved, module) if module not in means else None
            if values is not None:
                numbers = values.cast("f")
                means[module] = math.fsum(numbers) / len(numbers)
    return means
