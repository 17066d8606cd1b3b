"""The place that every storage operation passes: it counts, names, fails and kills as it is told."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shardmill.errors import ObjectMissing, StorageFailed
from shardmill.storage import operations
from shardmill.storage.local import LocalFolder
from shardmill.storage.operations import FAULT_VARIABLE, Faults, operation, watched


@pytest.mark.parametrize(
    ("text", "what", "at", "is_lasting"),
    [("kill@17", "kill", 17, False), ("ENOSPC@1", "ENOSPC", 1, False), ("EIO@20+", "EIO", 20, True)],
)
def test_a_fault_is_read(text: str, what: str, at: int, is_lasting: bool) -> None:  # noqa: FBT001 - a row of a table
    faults = Faults.parse(text)
    assert (faults.what, faults.at, faults.is_lasting, faults.log) == (what, at, is_lasting, [])


MALFORMED = ["", "kill", "kill@", "@3", "kill@x", "kill@0", "kill@-1", "kill@3++", "kill@3 ", "NOPE@3", "errorcode@3"]


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"{FAULT_VARIABLE}: expected kill@N or an errno name"):
        Faults.parse(text)


def reach(count: int) -> list[int]:
    """Do some operations; the numbers of those that failed."""
    failed: list[int] = []
    for number in range(1, count + 1):
        try:
            with operation("write", f"place-{number}"):
                pass
        except StorageFailed:
            failed.append(number)
    return failed


@pytest.mark.parametrize(("text", "expected"), [("EIO@3", [3]), ("EIO@3+", [3, 4, 5, 6]), ("EIO@7", []), ("", [])])
def test_the_operation_fails_that_was_asked_for_and_all_are_counted(text: str, expected: list[int]) -> None:
    with watched(Faults.parse(text) if text else Faults()) as seen:
        assert reach(6) == expected
    assert seen.log == [("write", f"place-{number}") for number in range(1, 7)]


def test_a_failed_operation_is_not_done_and_names_itself() -> None:
    done: list[str] = []
    with watched(Faults("ENOSPC", 1)), pytest.raises(StorageFailed) as caught, operation("write", Path("/a/b")):
        done.append("written")
    assert done == []
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.strerror == f"write `/a/b` failed: {os.strerror(errno.ENOSPC)}"


def test_nothing_is_counted_or_disturbed_outside() -> None:
    with watched(Faults("EIO", 1, is_lasting=True)) as outer:
        with watched(Faults()) as inner:
            assert reach(2) == []
        assert reach(1) == [1]
    assert reach(3) == []
    assert (len(inner.log), len(outer.log)) == (2, 1)


def test_operations_of_all_threads_count_and_one_of_them_fails() -> None:
    failed: list[int] = []
    with watched(Faults("EIO", 150)) as seen:
        threads = [threading.Thread(target=lambda: failed.extend(reach(50))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(seen.log), len(failed)) == (400, 1)


def test_what_fails_inside_is_named_once_by_the_inner_operation() -> None:
    with pytest.raises(StorageFailed) as caught, operation("publish", "outer"), operation("write", "inner"):
        raise OSError(errno.EIO, "it is broken")
    assert str(caught.value) == "write `inner` failed: it is broken"
    with pytest.raises(ObjectMissing), operation("publish", "outer"):
        raise ObjectMissing(errno.ENOENT, "read `x` failed")
    with pytest.raises(ZeroDivisionError), operation("publish", "outer"):
        raise ZeroDivisionError


def test_a_message_shows_no_control_characters_and_has_an_end() -> None:
    with pytest.raises(StorageFailed) as caught, operation("write", "a\n\x1b[31m" + "b" * 5000):
        raise OSError(errno.EIO, "it is broken")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


PUT = """
import sys
from pathlib import Path
from shardmill.storage.local import LocalFolder
LocalFolder(Path(sys.argv[1])).put("name", b"content")
print("done", flush=True)
"""


def put_in_a_process(folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", PUT, str(folder)]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {FAULT_VARIABLE: fault}
    )


def test_a_process_is_killed_at_the_operation_that_its_environment_names(tmp_path: Path) -> None:
    with watched(Faults()) as seen:
        LocalFolder(tmp_path / "counted").put("name", b"content")
    names = [name for name, _ in seen.log]
    renamed = names.index("rename") + 1
    for number in (1, renamed, renamed + 1):
        folder = tmp_path / str(number)
        killed = put_in_a_process(folder, f"kill@{number}")
        assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, ""), killed.stderr
        assert (folder / "name").exists() is (number > renamed)
    whole = put_in_a_process(tmp_path / "whole", f"kill@{len(names) + 1}")
    assert (whole.returncode, whole.stdout) == (0, "done\n")


def test_a_process_can_be_given_a_full_disk(tmp_path: Path) -> None:
    failed = put_in_a_process(tmp_path / "new", "ENOSPC@3+")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "StorageFailed" in failed.stderr
    assert list((tmp_path / "new").iterdir()) == []


def test_without_a_fault_in_the_environment_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAULT_VARIABLE, raising=False)
    assert operations._from_environment() is None
    monkeypatch.setenv(FAULT_VARIABLE, "EIO@2")
    faults = operations._from_environment()
    assert faults is not None
    assert (faults.what, faults.at) == ("EIO", 2)
