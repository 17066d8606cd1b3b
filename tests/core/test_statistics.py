from __future__ import annotations

import json
import math
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.statistics import Extent, Statistics

COUNTS = st.integers(0, 2**40)
SUMS = st.floats(0, 1e30)
EXTENTS = st.builds(Extent, low=st.floats(max_value=0.0), high=st.floats(min_value=0.0))
STATISTICS = st.builds(
    Statistics,
    count=COUNTS,
    squared_error=SUMS,
    squared_weight=SUMS,
    max_error=SUMS,
    amax=SUMS,
    clipped=COUNTS,
    zeroed=COUNTS,
    nonzero=COUNTS,
)


def same(one: Extent, other: Extent) -> bool:
    return repr(one) == repr(other)


@given(st.lists(EXTENTS, max_size=5))
def test_extents_merge_in_any_order(extents: list[Extent]) -> None:
    forward = reduce(Extent.merge, extents, Extent())
    assert same(forward, reduce(Extent.merge, reversed(extents), Extent()))
    assert forward.amax == max([0.0, *(extent.amax for extent in extents)])
    assert same(forward.merge(Extent()), forward)


@pytest.mark.parametrize("bad", [Extent(low=math.nan), Extent(high=math.nan), Extent(low=math.nan, high=math.inf)])
def test_nan_wins_every_merge(bad: Extent) -> None:
    for merged in (bad, bad.merge(Extent(high=9.0)), Extent(low=-9.0, high=9.0).merge(bad), Extent().merge(bad)):
        assert math.isnan(merged.amax)


def test_an_extent_is_stored_exactly() -> None:
    extent = Extent(low=-0.1 - 2**-55, high=3.4028234663852886e38)
    assert Extent.from_json(json.loads(json.dumps(extent.to_json()))) == extent


def test_an_extent_that_is_not_finite_is_read_back_as_such() -> None:
    extent = Extent.from_json(json.loads(json.dumps(Extent(low=-math.inf).to_json(), allow_nan=False)))
    assert math.isnan(extent.amax)


@given(st.lists(STATISTICS, max_size=5))
def test_statistics_merge_in_any_order(parts: list[Statistics]) -> None:
    forward = reduce(Statistics.merge, parts, Statistics())
    backward = reduce(Statistics.merge, reversed(parts), Statistics())
    assert forward.count == sum(part.count for part in parts)
    assert forward.clipped == sum(part.clipped for part in parts)
    assert forward.amax == max([0.0, *(part.amax for part in parts)])
    assert forward.squared_error == pytest.approx(backward.squared_error)
    assert forward.merge(Statistics()) == forward


def test_nan_stays_in_merged_statistics() -> None:
    for merged in (
        Statistics(max_error=math.nan).merge(Statistics(max_error=1.0)),
        Statistics(max_error=1.0).merge(Statistics(max_error=math.nan)),
    ):
        assert math.isnan(merged.max_error)


@given(STATISTICS)
def test_statistics_survive_json_to_six_digits(statistics: Statistics) -> None:
    stored = json.loads(json.dumps(statistics.to_json(), allow_nan=False))
    read = Statistics.from_json(stored | {"module": "other keys are ignored"})
    assert read.to_json() == stored
    assert read.count == statistics.count
    assert read.squared_error == pytest.approx(statistics.squared_error, rel=1e-5)


def test_the_last_digits_of_a_sum_are_not_stored() -> None:
    one, other = Statistics(squared_error=0.1234561), Statistics(squared_error=0.12345612)
    assert one.to_json() == other.to_json() != Statistics(squared_error=0.123457).to_json()


def test_what_is_not_finite_is_stored_as_none() -> None:
    stored = Statistics(squared_error=math.nan, max_error=math.inf).to_json()
    assert (stored["squared_error"], stored["max_error"]) == (None, None)
    assert math.isnan(Statistics.from_json(stored).squared_error)


@pytest.mark.parametrize("value", ["7", True, [], {}])
@pytest.mark.parametrize("name", ["count", "squared_error"])
def test_other_types_are_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match="expected a"):
        Statistics.from_json(Statistics().to_json() | {name: value})


def test_a_count_is_a_whole_number() -> None:
    with pytest.raises(TypeError, match="expected an integer, found float"):
        Statistics.from_json(Statistics().to_json() | {"count": 1.5})
    with pytest.raises(KeyError):
        Statistics.from_json({})


def test_errors_relative_to_the_weight() -> None:
    assert Statistics(squared_error=1.0, squared_weight=4.0).relative_error == 0.5
    assert Statistics(squared_error=1.0, squared_weight=10000.0).sqnr_db == pytest.approx(40)
    assert Statistics(squared_error=1.0, squared_weight=1.0).sqnr_db == 0


def test_a_weight_of_zeros_has_no_error() -> None:
    assert Statistics(count=3).relative_error == 0
    assert Statistics(count=3).sqnr_db == math.inf


def test_an_error_without_weight_is_infinite() -> None:
    assert Statistics(squared_error=1.0).relative_error == math.inf
    assert Statistics(squared_error=1.0).sqnr_db == -math.inf
