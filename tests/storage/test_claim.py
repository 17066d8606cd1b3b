"""One destination, one plan: claims on disk and in an object storage, of living, dead and silent owners."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardmill.errors import DestinationInvalid, StorageFailed
from shardmill.storage import claim as claims
from shardmill.storage.claim import (
    CLAIM_NAME,
    STALE_SECONDS,
    Claim,
    check_claim,
    claimed_folder,
    claimed_path,
    new_claim,
    parse_claim,
    read_claim,
    release,
)
from shardmill.storage.memory import MemoryFolder
from shardmill.storage.process import Process

OURS, THEIRS = new_claim("plan-a", "ours"), new_claim("plan-b", "theirs")
DEAD = replace(OURS.process, start="1")
UNREADABLE = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"run": "r"}', b"\0" * 4000]


def refused(run: AbstractContextManager[None], owner: Claim) -> None:
    """Make sure that a run is kept away, and told by whom."""
    with pytest.raises(DestinationInvalid) as caught, run:
        pytest.fail("the claim of a living run was ignored")
    assert [problem.kind for problem in caught.value.problems] == ["destination-claimed"]
    assert f"run `{owner.run}` on `{owner.process.host}`" in str(caught.value)


def start_process(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a program that prints a line when it is ready, and wait for the line."""
    command = [sys.executable, "-P", "-c", program, *arguments]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wait_until(what: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, f"not so: {what}"
        time.sleep(0.005)


# ---- what a claim says ------------------------------------------------------------------------------------------


def test_a_claim_is_read_as_it_was_written() -> None:
    assert parse_claim(OURS.to_bytes()) == OURS


@pytest.mark.parametrize("data", UNREADABLE)
def test_what_is_no_claim_is_none(data: bytes) -> None:
    assert parse_claim(data) is None


def test_an_owner_is_dead_when_its_process_is_gone_and_not_before() -> None:
    program = "from shardmill.storage.claim import new_claim; import time; print('ready', flush=True); time.sleep(600)"
    process = start_process(program)
    claim = replace(OURS, process=Process.numbered(process.pid))
    assert not claim.is_dead()
    process.send_signal(signal.SIGKILL)
    wait_until("the process is a zombie, or gone", claim.is_dead)
    process.communicate()
    assert claim.is_dead()


def test_a_process_that_got_the_number_of_another_is_not_its_owner() -> None:
    assert replace(OURS, process=DEAD).is_dead()


LONG_AGO = time.time() - STALE_SECONDS - 60
SILENT = [
    ("on this machine, alive", {}, False),
    ("on another machine", {"host": "elsewhere"}, True),
    ("before a restart", {"boot": "another"}, True),
    ("where no system tells of processes", {"start": ""}, True),
]


@pytest.mark.parametrize(("changes", "is_stale"), [row[1:] for row in SILENT], ids=[row[0] for row in SILENT])
def test_an_owner_that_cannot_be_looked_at_is_dead_when_it_is_silent_for_long(
    changes: dict[str, Any],
    is_stale: bool,  # noqa: FBT001 - a column of a table
) -> None:
    process = replace(OURS.process, **changes)
    assert not replace(OURS, process=process, time=time.time()).is_dead()
    assert replace(OURS, process=process, time=LONG_AGO).is_dead() is is_stale


# ---- on disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "new" / "result"


def file_of(destination: Path) -> Path:
    return destination.parent / f".{destination.name}{CLAIM_NAME}"


def test_a_claim_lies_beside_the_destination_while_its_run_lives(destination: Path) -> None:
    with claimed_path(destination, OURS):
        assert parse_claim(file_of(destination).read_bytes()) == OURS
    assert list(destination.parent.iterdir()) == []


def test_a_claim_is_given_up_when_the_run_fails(destination: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claimed_path(destination, OURS):
        raise KeyboardInterrupt
    assert list(destination.parent.iterdir()) == []


def test_runs_of_one_plan_share_a_destination_on_disk(destination: Path) -> None:
    second = replace(OURS, run="second")
    with claimed_path(destination, OURS):
        with claimed_path(destination, second):
            assert parse_claim(file_of(destination).read_bytes()) == OURS
        assert parse_claim(file_of(destination).read_bytes()) == OURS
    assert not file_of(destination).exists()


def test_a_run_of_another_plan_is_kept_away_on_disk(destination: Path) -> None:
    with claimed_path(destination, OURS):
        before = file_of(destination).read_bytes()
        refused(claimed_path(destination, THEIRS), OURS)
        assert file_of(destination).read_bytes() == before
    with claimed_path(destination, THEIRS):
        refused(claimed_path(destination, OURS), THEIRS)


HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from shardmill.storage.claim import claimed_path, new_claim
with claimed_path(Path(sys.argv[1]), new_claim("plan-b", "theirs" + "x" * 500)):
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_claim_of_a_killed_run_is_taken_over_on_disk(destination: Path) -> None:
    process = start_process(HOLD, str(destination))
    owner = parse_claim(file_of(destination).read_bytes())
    assert owner is not None
    try:
        with pytest.raises(DestinationInvalid, match="is making another result"), claimed_path(destination, OURS):
            pass
    finally:
        kill(process)
    assert parse_claim(file_of(destination).read_bytes()) == owner, "a killed run leaves its file"
    with claimed_path(destination, OURS):
        assert parse_claim(file_of(destination).read_bytes()) == OURS
    assert list(destination.parent.iterdir()) == []


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_file_that_nobody_holds_is_taken_over_whatever_it_says(destination: Path, content: bytes) -> None:
    destination.parent.mkdir()
    file_of(destination).write_bytes(content)
    with claimed_path(destination, OURS):
        assert parse_claim(file_of(destination).read_bytes()) == OURS
    assert list(destination.parent.iterdir()) == []


@contextlib.contextmanager
def held(path: Path, content: bytes) -> Iterator[int]:
    """A locked file, as between an owner's lock and its first word."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield fd
    finally:
        os.close(fd)


def test_an_owner_that_has_not_said_its_plan_yet_is_waited_for(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(file_of(destination), b"") as fd:
        monkeypatch.setattr(time, "sleep", lambda _seconds: os.pwrite(fd, THEIRS.to_bytes(), 0))
        refused(claimed_path(destination, OURS), THEIRS)


def test_an_owner_that_never_says_its_plan_is_not_waited_for_for_ever(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with (
        held(file_of(destination), b"{"),
        pytest.raises(StorageFailed, match=r"claim .* failed"),
        claimed_path(destination, OURS),
    ):
        pytest.fail("the claim of a living run was ignored")
    assert 0 < sum(waits) < 10


def test_a_claim_follows_no_link(destination: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    destination.parent.mkdir()
    file_of(destination).symlink_to(tmp_path / "precious")
    with pytest.raises(StorageFailed, match="claim"), claimed_path(destination, OURS):
        pytest.fail("a link was taken for a claim")
    assert (tmp_path / "precious").read_text() == "x"


def race(run: Callable[[Claim], AbstractContextManager[None]], runs: int = 8) -> list[str]:
    """Let runs of as many plans claim one place at once; what became of each."""
    together, inside, found = threading.Barrier(runs), threading.Lock(), list[str]()
    decided = threading.Semaphore(0)

    def start(number: int) -> None:
        together.wait()
        try:
            with run(new_claim(f"plan-{number}", f"run-{number}")):
                assert inside.acquire(blocking=False), "two plans are inside"
                for _ in range(runs - 1):
                    assert decided.acquire(timeout=60)
                inside.release()
                found.append("made")
        except DestinationInvalid:
            found.append("refused")
        except AssertionError as error:
            found.append(str(error))
        finally:
            decided.release()

    threads = [threading.Thread(target=start, args=(number,)) for number in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found)


@pytest.mark.parametrize("_round", range(5))
def test_of_many_plans_at_once_one_is_made_on_disk(destination: Path, _round: int) -> None:
    assert race(lambda claim: claimed_path(destination, claim)) == ["made", *["refused"] * 7]
    assert list(destination.parent.iterdir()) == []


# ---- in an object storage ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> MemoryFolder:
    return MemoryFolder(str(tmp_path))


def test_a_claim_lies_in_the_folder_while_its_run_lives(folder: MemoryFolder) -> None:
    with claimed_folder(folder, OURS):
        assert read_claim(folder) == OURS
        check_claim(folder, OURS)
    assert folder.listing() == {}


def test_runs_of_one_plan_share_a_folder(folder: MemoryFolder) -> None:
    second = replace(OURS, run="second")
    with claimed_folder(folder, OURS):
        with claimed_folder(folder, second):
            check_claim(folder, second)
        assert read_claim(folder) == OURS
    assert folder.listing() == {}


def test_a_run_of_another_plan_is_kept_away(folder: MemoryFolder) -> None:
    with claimed_folder(folder, OURS):
        refused(claimed_folder(folder, THEIRS), OURS)
        assert read_claim(folder) == OURS
        with pytest.raises(DestinationInvalid, match="run `ours`"):
            check_claim(folder, THEIRS)
    check_claim(folder, THEIRS)


@pytest.mark.parametrize("_round", range(5))
def test_of_many_plans_at_once_one_is_made(folder: MemoryFolder, _round: int) -> None:
    assert race(lambda claim: claimed_folder(folder, claim)) == ["made", *["refused"] * 7]
    assert folder.listing() == {}


def test_the_claim_of_a_dead_run_of_this_machine_is_taken_over_at_once(folder: MemoryFolder) -> None:
    program = "from shardmill.storage.claim import *; import time; print('ready', flush=True); time.sleep(600)"
    process = start_process(program)
    owner = replace(THEIRS, process=Process.numbered(process.pid))
    folder.put(CLAIM_NAME, owner.to_bytes())
    try:
        refused(claimed_folder(folder, OURS), owner)
    finally:
        kill(process)
    with claimed_folder(folder, OURS):
        assert read_claim(folder) == OURS
    assert folder.listing() == {}


def test_a_silent_owner_elsewhere_keeps_others_away_for_a_while(folder: MemoryFolder) -> None:
    silent = replace(THEIRS, process=replace(THEIRS.process, host="elsewhere"), time=time.time() - STALE_SECONDS + 120)
    folder.put(CLAIM_NAME, silent.to_bytes())
    refused(claimed_folder(folder, OURS), silent)
    assert read_claim(folder) == silent
    folder.put(CLAIM_NAME, replace(silent, time=silent.time - 180).to_bytes())
    with claimed_folder(folder, OURS):
        assert read_claim(folder) == OURS


@pytest.mark.parametrize("content", UNREADABLE)
def test_content_that_is_no_claim_is_replaced(folder: MemoryFolder, content: bytes) -> None:
    folder.put(CLAIM_NAME, content)
    with claimed_folder(folder, OURS):
        assert read_claim(folder) == OURS
    assert folder.listing() == {}


def renewals() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "claim"]


def test_a_living_owner_renews_its_claim(folder: MemoryFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 0.001)
    old = replace(OURS, time=1.0)

    def is_renewed() -> bool:
        found = read_claim(folder)
        return found is not None and found.time > LONG_AGO and replace(found, time=1.0) == old

    with claimed_folder(folder, old):
        wait_until("the claim has a new time", is_renewed)
        folder.remove(CLAIM_NAME)
        wait_until("a claim that went lost is there again", is_renewed)
    assert renewals() == []
    assert folder.listing() == {}


def test_renewing_goes_on_when_the_storage_does_not_answer_for_once(
    folder: MemoryFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 0.001)
    failures: list[str] = []
    put = folder.put

    def fail_twice(name: str, data: bytes, *, durable: bool = True) -> None:
        if len(failures) < 2:
            failures.append(name)
            raise StorageFailed("put failed")
        put(name, data, durable=durable)

    monkeypatch.setattr(folder, "put", fail_twice)
    with claimed_folder(folder, replace(OURS, time=1.0)):
        wait_until("the claim has a new time", lambda: (read_claim(folder) or OURS).time != 1.0)
    assert len(failures) == 2


def test_a_run_that_lost_its_claim_neither_renews_nor_removes_the_new_one(
    folder: MemoryFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 0.001)
    with claimed_folder(folder, OURS):
        while read_claim(folder) != THEIRS:  # a renewal may be between its look and its word
            folder.put(CLAIM_NAME, THEIRS.to_bytes())
            time.sleep(0.01)
        wait_until("nobody renews", lambda: renewals() == [])
        with pytest.raises(DestinationInvalid, match="run `theirs`"):
            check_claim(folder, OURS)
    assert read_claim(folder) == THEIRS


def test_release_removes_ones_own_claim_and_a_dead_one_of_the_same_plan_only(folder: MemoryFolder) -> None:
    rows = [
        (OURS, True),
        (replace(OURS, run="second"), False),
        (replace(OURS, run="second", process=DEAD), True),
        (THEIRS, False),
        (replace(THEIRS, process=DEAD), False),
    ]
    for owner, is_removed in rows:
        folder.put(CLAIM_NAME, owner.to_bytes())
        release(folder, OURS)
        assert (read_claim(folder) is None) is is_removed, json.dumps(owner.run)
    folder.put(CLAIM_NAME, b"{")
    release(folder, OURS)
    assert folder.read(CLAIM_NAME, 100) == b"{"


def test_when_two_take_over_the_claim_of_a_dead_run_one_finds_out_before_it_publishes(
    folder: MemoryFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both see the dead owner; the second removes what the first has just written."""
    folder.put(CLAIM_NAME, replace(OURS, run="dead", process=DEAD).to_bytes())
    first, remove = contextlib.ExitStack(), folder.remove
    other = MemoryFolder(folder.url.partition("//")[2])

    def remove_late(name: str) -> None:
        if read_claim(other) != THEIRS:
            first.enter_context(claimed_folder(other, THEIRS))
        remove(name)

    monkeypatch.setattr(folder, "remove", remove_late)
    with first, claimed_folder(folder, OURS):
        monkeypatch.undo()
        check_claim(folder, OURS)
        with pytest.raises(DestinationInvalid, match="run `ours`"):
            check_claim(folder, THEIRS)
