"""The multiple-choice knapsack beside brute force."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.knapsack import Choice, Option, choose, hull, largest, smallest

OPTIONS = st.builds(Option, st.integers(1, 40), st.integers(0, 60).map(float))
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=6)


def brute_force(items: Sequence[Sequence[Option]], capacity: int) -> float | None:
    costs = [
        sum(option.cost for option in chosen)
        for chosen in product(*items)
        if sum(option.size for option in chosen) <= capacity
    ]
    return min(costs, default=None)


@given(ITEMS, st.integers(0, 250))
def test_no_choice_costs_less(items: list[list[Option]], capacity: int) -> None:
    found, best = choose(items, capacity), brute_force(items, capacity)
    assert (found is None) == (best is None) == (smallest(items) > capacity)
    if found is not None:
        assert found.cost == pytest.approx(best, abs=1e-6)
        assert found.bound <= found.cost
        assert found.size == sum(options[pick].size for options, pick in zip(items, found.picks, strict=True))
        assert found.size <= capacity


@given(ITEMS)
def test_the_largest_useful_capacity_gives_the_least_cost(items: list[list[Option]]) -> None:
    most = largest(items)
    found = choose(items, most)
    assert found is not None
    assert found.cost == sum(min(option.cost for option in options) for options in items)
    assert found.size == most


@given(st.lists(OPTIONS, min_size=1, max_size=8))
def test_each_step_of_the_hull_saves_less(options: list[Option]) -> None:
    on_hull = [options[n] for n in hull(options)]
    rates = [(a.cost - b.cost) / (b.size - a.size) for a, b in pairwise(on_hull)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates)
    assert on_hull[-1].cost == min(option.cost for option in options)


def layers(count: int, seed: int = 0) -> list[list[Option]]:
    """Layers of three widths, whose errors fall by four with every bit."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    items = []
    for number in range(count):
        weights = (1000, 3000, 4500)[number % 3]
        error = weights * rng.uniform(0.2, 3.0)
        items.append([Option(weights * bits + rng.randrange(3), error * 4.0**-bits) for bits in (3, 4, 5, 6, 8)])
    return items


def choose_layers(*, states: int) -> tuple[Choice, int]:
    items = layers(400)
    capacity = (smallest(items) + largest(items)) // 2
    found = choose(items, capacity, states=states)
    assert found is not None
    return found, capacity


def test_hundreds_of_items_are_chosen_close_to_the_bound() -> None:
    found, capacity = choose_layers(states=1000)
    assert 0 <= capacity - found.size < capacity / 1000
    assert found.cost <= found.bound * 1.001
    assert choose_layers(states=1000) == (found, capacity)


def test_few_states_are_still_within_the_capacity_and_no_worse_than_none() -> None:
    [(few, capacity), (none, _)] = [choose_layers(states=states) for states in (3, 0)]
    assert few.size <= capacity
    assert few.cost <= none.cost
