"""Cancelled and killed runs: nothing half-written stays, nothing finished is done again."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH

from served import Ask, left_behind
from shardmill.errors import Interrupted
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.storage.local import FileWriter


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background ignores interrupts, and `interrupt_main` does nothing then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_the_shards_in_work_and_leaves_no_temporary_file(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[str]
) -> None:
    """A cancelled run gets its signal in the main thread only, like this one."""
    both = threading.Barrier(2)
    stopped: list[str] = []

    def hang(
        shard: Any, _read: object, write: Callable[[memoryview], None], *, should_stop: Callable[[], bool], **_: Any
    ) -> Any:
        write(memoryview(b"some bytes"))
        if both.wait(60) == 0:
            assert left_behind(tmp_path), "the files that must go are there"
            _thread.interrupt_main()
        deadline = time.monotonic() + 60
        while not should_stop():
            assert time.monotonic() < deadline, "nobody asked this shard to stop"
            time.sleep(0.01)
        stopped.append(shard.name)
        raise Interrupted("stopped on request")

    with monkeypatch.context() as patch:
        patch.setattr("shardmill.kernels.shard.encode_shard", hang)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(ask(workers=2))

    assert len(stopped) == 2
    assert left_behind(tmp_path) == []
    assert not (tmp_path / "result").exists()

    computed.clear()
    assert quantize_checkpoint(ask()).hits == 0
    assert len(computed) == 4


KILLED_RUN = """
import os, signal, sys
from shardmill.flows.parameters import QuantizeRequest
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.storage import local, store

store._FRESH_NS = 0
commit, count = local.FileWriter.commit, 0

def commit_or_die(self, name="", **options):
    global count
    if name.endswith(".safetensors"):
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return commit(self, name, **options)

local.FileWriter.commit = commit_or_die
quantize_checkpoint(QuantizeRequest.model_validate_json(sys.argv[1]))
"""


def test_a_killed_run_goes_on_where_it_was(ask: Ask, tmp_path: Path, computed: list[str]) -> None:
    environment = os.environ | {
        "PREFECT_API_URL": PREFECT_API_URL.value() or "",
        "PREFECT_LOCAL_STORAGE_PATH": str(PREFECT_LOCAL_STORAGE_PATH.value()),
    }
    request = ask(workers=1)
    command = [sys.executable, "-P", "-c", KILLED_RUN, request.model_dump_json()]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ends = sorted(name.rpartition(".")[2] for name in left_behind(tmp_path))
    assert ends == ["shardmill-claim", "tmp"]
    assert len(list((tmp_path / ".shardmill" / "receipts").iterdir())) == 2

    summary = quantize_checkpoint(request)

    assert (summary.hits, len(computed)) == (2, 2)
    assert left_behind(tmp_path) == []


def test_a_full_disk_leaves_no_temporary_file(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: FileWriter, data: memoryview) -> None:
        raise OSError(28, "No space left on device", str(self), None, str(len(data)))

    monkeypatch.setattr(FileWriter, "write", full)

    state = quantize_checkpoint(ask(), return_state=True)

    assert state.is_failed()
    assert left_behind(tmp_path) == []
