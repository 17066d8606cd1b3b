"""How large a result may be, and the scheme of every weight that makes the most of it.

What is chosen for together: modules that engines merge, and all experts of a layer. The cost of a scheme is the error
that it was measured to leave; the sizes are those of the plan. `knapsack` chooses, `budget_recipe` writes it down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardmill.core.fused import TABLE, FusedTable, fused_sets
from shardmill.core.knapsack import Option, choose, largest, smallest
from shardmill.core.plan import PART, Plan
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import Recipe
from shardmill.core.resolve import runtime_layers
from shardmill.core.scheme import Scheme, parse_scheme, with_group_size
from shardmill.core.statistics import Statistics
from shardmill.core.summary import human_bytes
from shardmill.errors import Problem, RecipeInvalid, Refused, show

OVERALL: Final = "bpw"
QUANTIZED: Final = "bpw-quantized"
BYTES: Final = "bytes"
DEFAULT_CANDIDATES: Final = ("NVFP4A16", "W4A16", "FP8_DYNAMIC", "W8A16")
"""Schemes that one engine serves beside each other on one device: see docs/budget.md."""
_UNITS: Final = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BUDGET: Final = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?(bpw-quantized|bpw|B|kB|MB|GB|TB)")
_SHOWN: Final = 3


def _invalid(kind: str, message: str, way_out: str = "") -> RecipeInvalid:
    return RecipeInvalid([Problem(kind=kind, message=message, way_out=way_out)])


@dataclass(frozen=True, slots=True)
class Budget:
    """The largest size that a result may have."""

    amount: float
    unit: str = OVERALL
    """`bpw`: bits per element of all tensors; `bpw-quantized`: of quantized weights alone; `bytes`: of all shards."""

    def __str__(self) -> str:
        if self.unit == BYTES:
            return f"{int(self.amount):,} bytes ({human_bytes(self.amount)})"
        return f"{self.amount:g} {_SAID[self.unit]}"


_SAID: Final = {OVERALL: "bits per weight overall", QUANTIZED: "bits per quantized weight"}


def parse_budget(text: str) -> Budget:
    """Read a budget: `4.5bpw`, `4.5bpw-quantized`, or bytes such as `12GB`, in decimal units.

    Raises:
        RecipeInvalid: anything else, or nothing at all.

    >>> parse_budget("4.5bpw"), parse_budget("1.5kB")
    (Budget(amount=4.5, unit='bpw'), Budget(amount=1500.0, unit='bytes'))
    """
    found = _BUDGET.fullmatch(text.strip()) if text.isascii() else None
    if found is None or float(found[1]) <= 0:
        way_out = "such as 4.5bpw, 4.5bpw-quantized or 12GB"
        raise _invalid("budget", f"expected a number and a unit as budget, found {show(text)}", way_out)
    if found[2] in (OVERALL, QUANTIZED):
        return Budget(float(found[1]), found[2])
    return Budget(float(math.floor(float(found[1]) * _UNITS[found[2]])), BYTES)


def parse_candidates(names: Iterable[str], group_size: int | None = None) -> tuple[Scheme, ...]:
    """Read candidates: names of presets, each with a group size behind a colon if it is not the preset's own.

    Args:
        group_size: for candidates whose group size can be chosen and that name none.

    Raises:
        RecipeInvalid: an unknown scheme, a group size that does not fit, fewer than two, one that stands twice.

    >>> [scheme.label for scheme in parse_candidates(["w4a16:64", "NVFP4A16"])]
    ['int4 group 64', 'NVFP4A16']
    """
    found: list[Scheme] = []
    problems: list[Problem] = []
    for entry in names:
        name, colon, size = entry.strip().partition(":")
        try:
            if colon and not (size.isascii() and size.isdigit() and int(size[:9]) > 0):
                raise _invalid("candidate", f"expected a group size behind the colon of {show(entry)}")
            scheme = parse_scheme(name)
            if scheme.needs_input_scale:
                message = f"candidate {show(name)} quantizes activations, and only errors of weights are measured"
                raise _invalid("candidate", message, "take NVFP4A16, whose weights are the same")
            wanted = int(size) if colon else group_size if takes_group_size(scheme) else None
            found.append(with_group_size(scheme, wanted) if wanted else scheme)
        except RecipeInvalid as error:
            problems += error.problems
    labels = [scheme.label for scheme in found]
    message = "candidate {} stands twice"
    problems += [
        Problem(kind="candidate", message=message.format(show(label)))
        for label in dict.fromkeys(labels)
        if labels.count(label) > 1
    ]
    if not problems and len(found) < 2:
        problems.append(
            Problem(kind="candidate", message=f"a budget chooses among two candidates or more, found {len(found)}")
        )
    if problems:
        raise RecipeInvalid(problems)
    return tuple(found)


def takes_group_size(scheme: Scheme) -> bool:
    """Whether the group size of a scheme is the user's to choose."""
    return scheme.weights.strategy == "group" and not scheme.weights.is_mx


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A size instead of a scheme."""

    budget: Budget
    candidates: tuple[Scheme, ...]
    """With the search that is in force."""
    base: Recipe
    """All else of the recipe; its groups do not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One candidate on one checkpoint: sizes from its plan, errors from a measuring pass."""

    scheme: Scheme
    sizes: Mapping[str, int]
    """Bytes of what replaces a weight, by module."""
    tensors: Mapping[str, str]
    """Source tensor by module."""
    statistics: Mapping[str, Statistics]
    """By module."""


def measured(plan: Plan, scheme: Scheme, records: Iterable[WeightRecord]) -> Measured:
    """Put sizes and errors of a candidate together.

    Args:
        plan: of the candidate on the whole checkpoint, as its first group.
    """
    sizes: dict[str, int] = {}
    tensors: dict[str, str] = {}
    for shard in plan.shards:
        for tensor in shard.tensors:
            if tensor.scheme == 0:
                for unit in shard.units_of(tensor):
                    sizes[unit.module] = sum(spec.nbytes for spec in unit.outputs)
                    tensors[unit.module] = tensor.spec.name
    statistics = {record.module: record.statistics for record in records if record.module in sizes}
    return Measured(scheme=scheme, sizes=sizes, tensors=tensors, statistics=statistics)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What every choice has in common."""

    fixed_bytes: int
    """Of the data of all tensors that no candidate quantizes."""
    elements: int
    """Of all tensors of the result."""
    header_bytes: int = 0
    """Of the heads of all shards, where the budget counts them."""


def frame_of(plan: Plan, changing: Collection[str], header_bytes: int = 0) -> Frame:
    """Add up what stays as it is.

    Args:
        plan: of some candidate.
        changing: source tensors for which a scheme is chosen.
    """
    fixed = elements = 0
    for shard in plan.shards:
        for tensor in shard.tensors:
            if tensor.action == PART:
                continue
            for unit in shard.units_of(tensor):
                if unit.scheme is not None:
                    elements += unit.rows * unit.cols
                else:
                    elements += math.prod(unit.outputs[0].shape)
                    fixed += sum(spec.nbytes for spec in unit.outputs) if tensor.spec.name not in changing else 0
    return Frame(fixed_bytes=fixed, elements=elements, header_bytes=header_bytes)


@dataclass(frozen=True, slots=True)
class Item:
    """Modules that are to have one scheme."""

    modules: tuple[str, ...]
    options: tuple[Option, ...]
    candidates: tuple[int, ...]
    """Number of the candidate by option: one that does not fit a module is none."""
    elements: int


def items_of(
    candidates: Sequence[Measured], table: FusedTable = TABLE, importance: Mapping[str, float] | None = None
) -> tuple[Item, ...]:
    """Group modules that share a scheme, with size and cost of every candidate that fits all of them.

    Modules of which no candidate fits all partners are left out.

    Args:
        importance: how much errors of a module count, such as the mean square of what enters it; None for all alike.
    """
    modules = dict.fromkeys(module for candidate in candidates for module in candidate.sizes)
    found = []
    for members in together(modules, table):
        fitting = [n for n, candidate in enumerate(candidates) if all(m in candidate.statistics for m in members)]
        if fitting:
            options = tuple(
                Option(
                    sum(candidates[n].sizes[m] for m in members),
                    math.fsum(cost_of(candidates[n].statistics[m], importance, m) for m in members),
                )
                for n in fitting
            )
            elements = sum(candidates[fitting[0]].statistics[m].count for m in members)
            found.append(Item(members, options, tuple(fitting), elements))
    return tuple(found)


def cost_of(statistics: Statistics, importance: Mapping[str, float] | None, module: str) -> float:
    """What the error of a weight of n elements counts: √n ‖ΔW‖² / ‖W‖², by the importance of its inputs if known.

    Between all weights alike and all elements alike; what else was tried is told in docs/budget.md.

    >>> cost_of(Statistics(count=4, squared_error=0.25, squared_weight=4.0), {"a": 2.0}, "a")
    0.25
    """
    relative = math.sqrt(statistics.count) * statistics.relative_error**2
    return relative * (1.0 if importance is None else importance[module])


def together(modules: Iterable[str], table: FusedTable = TABLE) -> tuple[tuple[str, ...], ...]:
    """Group modules that engines merge or run as one layer, in the order in which their first members stand.

    >>> together(["a.q_proj", "a.o_proj", "a.k_proj", "m.experts.0.w1", "m.experts.1.w2"])
    (('a.q_proj', 'a.k_proj'), ('a.o_proj',), ('m.experts.0.w1', 'm.experts.1.w2'))
    """
    order = {module: number for number, module in enumerate(modules)}
    leader = {module: module for module in order}

    def find(module: str) -> str:
        while leader[module] != module:
            leader[module] = leader[leader[module]]
            module = leader[module]
        return module

    for members in [*(layer.members for layer in runtime_layers(order, table)), *fused_sets(order, table)]:
        for member in members[1:]:
            leader[find(member)] = find(members[0])
    groups: dict[str, list[str]] = {}
    for module in order:
        groups.setdefault(find(module), []).append(module)
    return tuple(tuple(members) for members in groups.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A scheme for every item, within a budget."""

    schemes: tuple[Scheme, ...]
    """The candidates."""
    items: tuple[Item, ...]
    picks: tuple[int, ...]
    """Number of the candidate by item."""
    budget: Budget
    frame: Frame
    cost: float
    bound: float
    """No choice within the budget costs less."""

    @property
    def scheme_of(self) -> dict[str, int]:
        """Number of the candidate by module."""
        return {m: pick for item, pick in zip(self.items, self.picks, strict=True) for m in item.modules}

    def option(self, number: int) -> Option:
        """What was chosen for the item of that number."""
        item = self.items[number]
        return item.options[item.candidates.index(self.picks[number])]

    @property
    def quantized_bytes(self) -> int:
        """Of the quantized weights, scales included."""
        return sum(self.option(n).size for n in range(len(self.items)))

    @property
    def quantized_elements(self) -> int:
        """Of the quantized weights."""
        return sum(item.elements for item in self.items)

    @property
    def bits_per_weight(self) -> float:
        """As the summary of a result has it."""
        return 8 * (self.quantized_bytes + self.frame.fixed_bytes) / self.frame.elements

    @property
    def quantized_bits_per_weight(self) -> float:
        """As the summary of a result has it."""
        return 8 * self.quantized_bytes / self.quantized_elements


def solve(schemes: Sequence[Scheme], items: Sequence[Item], budget: Budget, frame: Frame) -> Solution:
    """Choose a scheme for every item, such that the budget holds and the costs add up to the least.

    Raises:
        Refused: there is nothing to choose for, or no choice is so small; the message tells what can be reached.
    """
    if not items:
        message = "no candidate fits any weight: there is nothing to quantize"
        raise Refused([Problem(kind="budget-empty", message=message, way_out="name other candidates")])
    options = [item.options for item in items]
    elements = sum(item.elements for item in items)
    capacity = math.floor(_capacity(budget, frame, elements) + 1e-6)
    found = choose(options, capacity)
    if found is None:
        reach = [_said(budget.unit, size, frame, elements) for size in (smallest(options), largest(options))]
        raise Refused(
            [
                Problem(
                    kind="budget-unreachable",
                    message=f"budget {budget} cannot be met: the candidates reach {reach[0]} to {reach[1]}",
                    way_out="raise the budget, or name smaller --candidates",
                )
            ]
        )
    picks = tuple(item.candidates[pick] for item, pick in zip(items, found.picks, strict=True))
    return Solution(
        schemes=tuple(schemes),
        items=tuple(items),
        picks=picks,
        budget=budget,
        frame=frame,
        cost=found.cost,
        bound=found.bound,
    )


def _capacity(budget: Budget, frame: Frame, elements: int) -> float:
    """Bytes that the quantized weights may take."""
    if budget.unit == QUANTIZED:
        return budget.amount * elements / 8
    if budget.unit == OVERALL:
        return budget.amount * frame.elements / 8 - frame.fixed_bytes
    return budget.amount - frame.fixed_bytes - frame.header_bytes


def _said(unit: str, size: int, frame: Frame, elements: int) -> str:
    """A size of the quantized weights in the unit of a budget, rounded up."""
    if unit == BYTES:
        return f"{size + frame.fixed_bytes + frame.header_bytes:,} bytes"
    bits = 8 * size / elements if unit == QUANTIZED else 8 * (size + frame.fixed_bytes) / frame.elements
    return f"{math.ceil(bits * 1000) / 1000:.3f} {unit}"
