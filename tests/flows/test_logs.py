"""What the library says within a run stands in the run's log."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from served import Ask, library_lines, run_id
from shardmill.core.outcome import ShardOutcome
from shardmill.core.receipt import WeightRecord
from shardmill.core.statistics import Statistics
from shardmill.errors import StorageFailed
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.orchestration.logs import library_logs, log_shard

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


def test_each_shard_has_one_line_and_its_weights_only_at_debug(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    quantize_checkpoint(ask())
    first = shard_lines(caplog)
    assert len(first) == 4
    assert all(
        re.fullmatch(r"shard model-0000\d-of-00004\.safetensors: .* kB in .* s, .*B/s, miss", line) for line in first
    )
    assert not [r for r in caplog.records if r.getMessage().startswith("tensor ")]
    caplog.clear()

    quantize_checkpoint(ask())
    assert shard_lines(caplog) == []  # the destination holds it all
    assert "4 of 4 shards were done before" in caplog.text


def shard_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("shard ")]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """Lines that an outcome of a shard with a nasty name gets."""

    def write(result: ShardOutcome | BaseException, level: int = logging.INFO) -> list[str]:
        shard: Any = SimpleNamespace(name="model\n-1", size=1_200_000_000)
        with caplog.at_level(level):
            log_shard(logging.getLogger(), shard, result)
        return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]

    return write


def outcome(seconds: float, *, is_hit: bool) -> ShardOutcome:
    weights = (WeightRecord("layers\r.0", "W4A16", Statistics(count=1, squared_error=1, squared_weight=4)),)
    receipt: Any = SimpleNamespace(weights=weights)
    return ShardOutcome(shard="", receipt=receipt, is_hit=is_hit, sources=(), bytes_read=0, seconds=seconds)


def test_a_line_tells_size_time_rate_and_whether_it_was_done_before(lines: Callable[..., list[str]]) -> None:
    assert lines(outcome(3.4, is_hit=False)) == [r"INFO shard model\n-1: 1.2 GB in 3.4 s, 0.35 GB/s, miss"]


def test_a_hit_that_took_no_time_has_no_rate(lines: Callable[..., list[str]]) -> None:
    assert lines(outcome(0.0, is_hit=True), logging.DEBUG) == [r"INFO shard model\n-1: 1.2 GB, hit"]


def test_weights_have_lines_at_debug(lines: Callable[..., list[str]]) -> None:
    assert lines(outcome(1.0, is_hit=False), logging.DEBUG)[1:] == [
        r"DEBUG tensor layers\r.0: W4A16, relative error 0.5000"
    ]


def test_a_failure_is_one_line_without_control_characters(lines: Callable[..., list[str]]) -> None:
    assert lines(StorageFailed("no\x1b space\nand more")) == [
        r"ERROR shard model\n-1: failed, StorageFailed: no\x1b space"
    ]
