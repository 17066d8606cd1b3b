"""Several conversions of one checkpoint, side by side: each is a run of its own, and source bytes are read once.

Every run has its plan, its receipts and blobs, its claim and its destination; only reads of the source are shared, see
`storage.shared`. One that fails is told at the end and stops no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from shardmill.core.recipe import Recipe
from shardmill.errors import DestinationInvalid, Problem, Refused, show
from shardmill.stages.pipeline import Prepared, RunOptions, RunResult, Watcher, execute, prepare
from shardmill.stages.plan import Locations
from shardmill.storage.location import parse_location
from shardmill.storage.shared import Companion, Companions


class _Stop(threading.Event):
    """Set when the common one is, or when this run alone is to stop."""

    def __init__(self, common: threading.Event) -> None:
        super().__init__()
        self._common = common

    def is_set(self) -> bool:
        return super().is_set() or self._common.is_set()


def prepare_several(requests: Sequence[tuple[Locations, Recipe]], options: RunOptions) -> tuple[Prepared, ...]:
    """Plan and validate every conversion; nothing is written before all of them may begin.

    Raises:
        Refused: the input or a request; the problems of all of them are in it.
        DestinationInvalid: two of them would be written to one place.
    """
    _check_places([locations for locations, _ in requests])
    found: list[Prepared] = []
    problems: list[Problem] = []
    for locations, recipe in requests:
        try:
            found.append(prepare(locations, recipe, options))
        except Refused as error:
            problems += error.problems
    if problems:
        raise Refused(problems)
    return tuple(found)


def _check_places(requests: Sequence[Locations]) -> None:
    """No destination is another one, or lies in it."""
    places = [parse_location(locations.destination) for locations in requests]
    message = "two results would be written there"
    problems = [
        Problem(file=str(inner), kind="destination-shared", message=f"{message}: it is, or lies in, {show(str(outer))}")
        for number, inner in enumerate(places)
        for other, outer in enumerate(places)
        if number != other and outer.contains(inner)
    ]
    if problems:
        raise DestinationInvalid(problems)


def run_several(
    prepared: Sequence[Prepared],
    options: RunOptions,
    new_watcher: Callable[[int], Watcher] = lambda _number: Watcher(),
    stop: threading.Event | None = None,
) -> list[RunResult | Exception]:
    """Do what was prepared, all of it at a time; returns a result or an error for each, in order.

    Args:
        new_watcher: makes the watcher of the run of that number; its callbacks come from several threads.
        stop: asks all of them to stop.
    """
    common = stop or threading.Event()
    companions = Companions(prepared[0].source, len(prepared))

    def work(number: int) -> RunResult | Exception:
        companion = companions.companion(number)
        return _guarded(prepared[number], options, new_watcher(number), _Stop(common), companion)

    with ThreadPoolExecutor(len(prepared), thread_name_prefix="run") as pool:
        return list(pool.map(work, range(len(prepared))))


def _guarded(
    prepared: Prepared, options: RunOptions, watch: Watcher, stop: threading.Event, companion: Companion
) -> RunResult | Exception:
    try:
        return execute(prepared, options, watch, stop, companion)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the other runs go on
        return error
    finally:
        companion.leave()
