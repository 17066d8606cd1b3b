"""What the library says within a run stands in the run's log."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

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


TALKS_TO_NOBODY = """
import logging, os, sys
from prefect.logging import get_logger
from prefect.logging.configuration import setup_logging
from shardmill.orchestration.logs import library_logs

setup_logging()  # as the engine does before it runs a flow
with library_logs():
    pass
os.read(0, 1)
for number in range(3):
    get_logger("talk").info("line %s", number)
    print("plain", flush=True)
os.write(int(sys.argv[1]), b"lives")
"""


def test_a_process_goes_on_when_whoever_read_its_output_is_gone() -> None:
    """A flow's output goes to its worker, which may be killed."""
    answer, answering = os.pipe()
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-c", TALKS_TO_NOBODY, str(answering)]
    environment = os.environ | {"PREFECT_LOGGING_LEVEL": "INFO"}
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=[answering], env=environment
    ) as process:
        os.close(answering)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
        assert process.stdin is not None
        process.stdin.write(b".")
        process.stdin.flush()
        with os.fdopen(answer, "rb") as lines:
            assert lines.read() == b"lives"
        assert process.wait(60) == 0
