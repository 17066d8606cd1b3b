"""What the library says within a run stands in the run's log."""

from __future__ import annotations

import logging
import time
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

from served import Ask, run_id
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.orchestration.logs import library_logs

LIBRARY = logging.getLogger("shardmill.stages.quantize")


def lines(flow_run_id: UUID, wanted: str, count: int) -> list[tuple[str, str, bool]]:
    """`(logger, message, is of a task run)` of the library's lines, once `wanted` is there `count` times."""
    deadline = time.monotonic() + 60
    while True:
        with get_client(sync_client=True) as client:
            logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
        found = [
            (log.name, log.message, log.task_run_id is not None) for log in logs if log.name.startswith("shardmill")
        ]
        if sum(message == wanted for _, message, _ in found) >= count:
            return found
        assert time.monotonic() < deadline, f"expected {wanted!r} in the log, found {found}"
        time.sleep(0.2)


def test_the_librarys_lines_reach_the_runs_log_from_info_on(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardmill.stages import quantize

    find = quantize.find_stored

    def talk(*args: object) -> object:
        LIBRARY.debug("a detail")
        LIBRARY.info("a fact")
        return find(*args)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr("shardmill.tasks.quantize.quantize.find_stored", talk)

    state = quantize_checkpoint(ask(), return_state=True)

    assert lines(run_id(state), "a fact", 4) == [(LIBRARY.name, "a fact", True)] * 4


def test_outside_a_run_nothing_is_sent_and_nothing_stays() -> None:
    logger = logging.getLogger("shardmill")
    before = (logger.level, list(logger.handlers))
    with library_logs():
        LIBRARY.info("to nobody")  # Prefect's own handler would warn, and warnings are errors here
        assert logger.isEnabledFor(logging.INFO)
    assert (logger.level, logger.handlers) == before
