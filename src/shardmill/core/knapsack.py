"""One option for each item, within a capacity, with the least cost: the multiple-choice knapsack.

The convex hull of each item's options gives, in order of cost saved per byte, a good choice and the multiplier of
Lagrange's bound. What that bound rules out is left out of an exact search, by dynamic programming over the items that
are still open. Nothing depends on chance or on the order of a set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

STATES: Final = 10_000
"""Partial choices that the exact search keeps of each item; beyond them it keeps those with the best bounds."""
_ROUNDING: Final = 1e-9
"""Share of a sum of costs that may be due to rounding."""


class Option(NamedTuple):
    """What an item may be."""

    size: int
    """In bytes."""
    cost: float


@dataclass(frozen=True, slots=True)
class Choice:
    """One option for each item."""

    picks: tuple[int, ...]
    """Number of the option by item."""
    size: int
    cost: float
    bound: float
    """No choice within the capacity costs less."""


class _Step(NamedTuple):
    """From one option on an item's hull to the next larger one."""

    rate: float
    """Cost saved per byte."""
    item: int
    before: int
    after: int


def smallest(items: Sequence[Sequence[Option]]) -> int:
    """Size of the smallest choice."""
    return sum(min(option.size for option in options) for options in items)


def largest(items: Sequence[Sequence[Option]]) -> int:
    """Size of the choice that costs least: more capacity is of no use.

    >>> largest([[Option(1, 5.0), Option(2, 1.0), Option(9, 1.0)]])
    2
    """
    return sum(min(options, key=lambda option: (option.cost, option.size)).size for options in items)


def hull(options: Sequence[Option]) -> list[int]:
    """Numbers of the options on the lower convex hull, by size: each saves less per byte than the one before.

    >>> hull([Option(4, 9.0), Option(8, 1.0), Option(6, 8.0), Option(9, 2.0)])
    [0, 1]
    """
    found: list[int] = []
    for number in sorted(range(len(options)), key=lambda n: (*options[n], n)):
        if found and options[number].cost >= options[found[-1]].cost:
            continue
        while len(found) > 1 and _rate(options, found[-2], found[-1]) <= _rate(options, found[-1], number):
            found.pop()
        found.append(number)
    return found


def _rate(options: Sequence[Option], before: int, after: int) -> float:
    return (options[before].cost - options[after].cost) / (options[after].size - options[before].size)


def choose(items: Sequence[Sequence[Option]], capacity: int, *, states: int = STATES) -> Choice | None:
    """Choose an option for each item; None where even the smallest ones do not fit.

    The choice is the best one, or within `choice.cost - choice.bound` of it where more than `states` partial choices
    would have to be kept.

    Args:
        capacity: bytes that all chosen options may take together.

    >>> choose([[Option(1, 9.0), Option(3, 1.0)], [Option(1, 4.0), Option(2, 1.0)]], 4).picks
    (1, 0)
    """
    if smallest(items) > capacity:
        return None
    picks, multiplier = _greedy(items, capacity)
    found = _search(items, capacity, picks, multiplier, states)
    reduced = [min(option.cost + multiplier * option.size for option in options) for options in items]
    cost = _cost(items, found)
    bound = max(0.0, min(math.fsum([*reduced, -multiplier * capacity]), cost))
    return Choice(tuple(found), _size(items, found), cost, bound)


def _cost(items: Sequence[Sequence[Option]], picks: Sequence[int]) -> float:
    return math.fsum(options[pick].cost for options, pick in zip(items, picks, strict=True))


def _size(items: Sequence[Sequence[Option]], picks: Sequence[int]) -> int:
    return sum(options[pick].size for options, pick in zip(items, picks, strict=True))


def _steps(items: Sequence[Sequence[Option]]) -> Iterator[_Step]:
    for item, options in enumerate(items):
        on_hull = hull(options)
        for before, after in pairwise(on_hull):
            yield _Step(_rate(options, before, after), item, before, after)


def _greedy(items: Sequence[Sequence[Option]], capacity: int) -> tuple[list[int], float]:
    """Take the steps that save most per byte while there is room, and later ones that still fit.

    Returns:
        Picks, and the rate of the first step that found no room: the multiplier of the best bound; 0 if all did.
    """
    picks = [hull(options)[0] for options in items]
    room, multiplier = capacity - _size(items, picks), 0.0
    for step in sorted(_steps(items), key=lambda step: (-step.rate, step.item, step.after)):
        more = items[step.item][step.after].size - items[step.item][picks[step.item]].size
        if more <= room:
            room -= more
            picks[step.item] = step.after
        elif not multiplier:
            multiplier = step.rate
    return picks, multiplier


class _State(NamedTuple):
    """Options for some of the items."""

    size: int
    cost: float
    regret: float
    """What they cost more than the best ones, at the price of the multiplier."""
    item: int
    pick: int
    before: _State | None


def _search(
    items: Sequence[Sequence[Option]], capacity: int, incumbent: list[int], multiplier: float, states: int
) -> list[int]:
    """The best choice, item by item, without what the bound rules out; the incumbent if nothing is better.

    At the price of the multiplier every option has a regret. Those of a choice that is better than the incumbent add up
    to less than the gap between the incumbent and the bound (Pisinger 1995, without his order of items).
    """
    priced = [[option.cost + multiplier * option.size for option in options] for options in items]
    regrets = [[price - min(prices) for price in prices] for prices in priced]
    known = _cost(items, incumbent)
    gap = known - math.fsum([*(min(prices) for prices in priced), -multiplier * capacity]) + _ROUNDING * known
    picks = [row.index(0.0) for row in regrets]
    undecided = [n for n, row in enumerate(regrets) if sum(regret <= gap for regret in row) > 1]
    for n in undecided:
        picks[n] = -1
    settled = [options[pick] for options, pick in zip(items, picks, strict=True) if pick >= 0]
    front = [_State(sum(o.size for o in settled), math.fsum(o.cost for o in settled), 0.0, -1, -1, None)]
    rest = sum(min(option.size for option in items[n]) for n in undecided)
    for n in sorted(undecided, key=lambda n: (sorted(regrets[n])[1], n)):
        rest -= min(option.size for option in items[n])
        grown = [
            _State(state.size + option.size, state.cost + option.cost, state.regret + regret, n, pick, state)
            for state in front
            for pick, (option, regret) in enumerate(zip(items[n], regrets[n], strict=True))
            if state.regret + regret <= gap and state.size + option.size + rest <= capacity
        ]
        front = _undominated(grown, states)
    if not front or front[-1].cost >= known:
        return incumbent
    state: _State | None = front[-1]
    while state is not None and state.item >= 0:
        picks[state.item] = state.pick
        state = state.before
    return picks


def _undominated(grown: list[_State], states: int) -> list[_State]:
    """Those to which no other one is preferable, by size; the one that costs least is the last."""
    grown.sort(key=lambda state: state[:2])
    found: list[_State] = []
    for state in grown:
        if not found or state.cost < found[-1].cost:
            found.append(state)
    if len(found) > states:
        found = sorted(sorted(found, key=lambda state: state.regret)[:states], key=lambda state: state.size)
    return found
