"""Processes are told apart, and the living from the dead, as far as this machine can tell."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from shardmill.storage.process import Process

HERE = Process.current()


def test_this_process_runs() -> None:
    assert HERE.is_running()


def test_a_process_that_got_the_number_of_another_is_not_that_one() -> None:
    assert replace(HERE, start="1").is_running() is False


@pytest.mark.parametrize("field", ["host", "boot", "space"])
def test_of_a_process_elsewhere_nothing_is_known(field: str) -> None:
    changes: dict[str, Any] = {field: "x"}
    assert replace(HERE, **changes).is_running() is None


@pytest.mark.parametrize("field", ["boot", "start"])
def test_where_no_system_tells_of_processes_nothing_is_known(field: str) -> None:
    changes: dict[str, Any] = {field: ""}
    assert replace(HERE, **changes).is_running() is None


def test_two_machines_that_tell_nothing_are_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "readlink", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    silent = Process.current()
    assert (silent.boot, silent.space, silent.start) == ("", "", "")
    assert silent.is_running() is None


def test_a_killed_process_is_dead_though_nobody_asked_for_its_exit_status() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        child = Process.numbered(started.pid)
        assert child.is_running()
        started.kill()
        deadline = time.monotonic() + 60
        while child.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert child.is_running() is False
    assert child.is_running() is False


def test_a_process_is_read_as_it_was_written() -> None:
    assert Process.parse(json.loads(json.dumps(asdict(HERE)))) == HERE


@pytest.mark.parametrize(
    "raw", [None, 3, [], {}, {**asdict(HERE), "pid": "1"}, {**asdict(HERE), "host": 1}, {**asdict(HERE), "more": ""}]
)
def test_what_names_no_process_is_none(raw: object) -> None:
    assert Process.parse(raw) is None
