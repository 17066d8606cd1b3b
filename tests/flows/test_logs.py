"""What the library says within a run stands in the run's log."""

from __future__ import annotations

import logging

import pytest

from served import Ask, library_lines, run_id
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.orchestration.logs import library_logs

LIBRARY = logging.getLogger("shardmill.stages.quantize")


def test_the_librarys_lines_reach_the_runs_log_from_info_on(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardmill.stages import quantize

    find = quantize.find_stored

    def talk(*args: object) -> object:
        LIBRARY.debug("a detail")
        LIBRARY.info("a fact")
        return find(*args)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr("shardmill.tasks.quantize.quantize.find_stored", talk)

    state = quantize_checkpoint(ask(), return_state=True)

    assert library_lines(run_id(state), "a fact", 4) == [(LIBRARY.name, "a fact", True)] * 4


def test_outside_a_run_nothing_is_sent_and_nothing_stays() -> None:
    logger = logging.getLogger("shardmill")
    before = (logger.level, list(logger.handlers))
    with library_logs():
        LIBRARY.info("to nobody")  # Prefect's own handler would warn, and warnings are errors here
        assert logger.isEnabledFor(logging.INFO)
    assert (logger.level, logger.handlers) == before
