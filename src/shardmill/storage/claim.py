"""Claims: one destination, one plan. A small file says which run is making a destination, and of what.

On disk it lies beside the destination and is locked as long as its owner lives. Elsewhere it lies inside, is created
only where none is, and its owner renews its time; one that is no longer renewed is taken over. Runs of the same plan
share a destination: they write the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from shardmill.errors import DestinationInvalid, Problem, StorageFailed, show
from shardmill.storage.folder import Folder
from shardmill.storage.local import remove_dead_temporaries
from shardmill.storage.operations import operation
from shardmill.storage.process import Process

log = logging.getLogger(__name__)
CLAIM_NAME: Final = ".shardmill-claim"
STALE_SECONDS: Final = 30 * 60
"""Age after which a claim that was not renewed belongs to nobody."""
RENEWAL_SECONDS: Final = 5 * 60
_LIMIT: Final = 64_000
_ATTEMPTS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Who makes a destination, and of what."""

    run: str
    plan: str
    """Names what is made: same plan, same bytes."""
    process: Process
    time: float
    """Of the last renewal, seconds since the epoch."""

    def to_bytes(self) -> bytes:
        """Encode as JSON."""
        return json.dumps(asdict(self)).encode()

    def is_dead(self) -> bool:
        """Whether the owner is known to be gone, or has not renewed the claim for long."""
        is_running = self.process.is_running()
        return time.time() - self.time > STALE_SECONDS if is_running is None else not is_running


def parse_claim(data: bytes) -> Claim | None:
    """Read a claim; None when it is not one."""
    try:
        raw: Any = json.loads(data)
        process = Process.parse(raw["process"])
        run, plan, renewed = str(raw["run"]), str(raw["plan"]), float(raw["time"])
    except (ValueError, KeyError, TypeError):
        return None
    return None if process is None else Claim(run=run, plan=plan, process=process, time=renewed)


def new_claim(plan: str, run: str = "") -> Claim:
    """A claim of this process."""
    return Claim(run=run or secrets.token_hex(4), plan=plan, process=Process.current(), time=time.time())


def refuse_claimed(destination: str, owner: Claim) -> DestinationInvalid:
    """Build the refusal of a destination that another run is making."""
    since = max(0, int(time.time() - owner.time)) // 60
    who = f"run {show(owner.run, 40)} on {show(owner.process.host, 60)}"
    message = f"{who} is making another result there, seen {since} minutes ago"
    way_out = "wait for it, or choose another destination"
    return DestinationInvalid([Problem(file=destination, kind="destination-claimed", message=message, way_out=way_out)])


@contextlib.contextmanager
def claimed_path(destination: Path, claim: Claim) -> Iterator[None]:
    """Hold the claim of a destination on disk; removes temporary files that dead runs left beside it.

    Raises:
        DestinationInvalid: a living run makes another result there.
    """
    path = destination.parent / f".{destination.name}{CLAIM_NAME}"
    with operation("claim", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_dead_temporaries(path.parent)
        fd = _lock(path, destination, claim)
    try:
        yield
    finally:
        if fd is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(fd)


def _lock(path: Path, destination: Path, claim: Claim) -> int | None:
    """Lock the file of a claim; None where a run of the same plan has it."""
    for _ in range(_ATTEMPTS):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = parse_claim(os.pread(fd, _LIMIT, 0))
            os.close(fd)
            if owner is not None and owner.plan != claim.plan:
                raise refuse_claimed(str(destination), owner) from None
            if owner is not None:
                log.info("run %s makes the same result in %s", owner.run, show(str(destination), 200))
                return None
            time.sleep(0.05)  # its owner has not written it yet
            continue
        if _is_named(fd, path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, claim.to_bytes(), 0)
            return fd
        os.close(fd)  # its owner removed it in between
    raise StorageFailed(f"claim {show(str(path), 200)} failed: it is taken and given up all the time")


def _is_named(fd: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def claimed_folder(folder: Folder, claim: Claim) -> Iterator[None]:
    """Hold the claim of a destination in an object storage, and renew it meanwhile; sweeps what dead runs left.

    Raises:
        DestinationInvalid: a living run makes another result there.
    """
    is_owner = _take(folder, claim)
    folder.sweep()
    done = threading.Event()
    renewal = threading.Thread(target=_renew, args=(folder, claim, done), name="claim", daemon=True)
    if is_owner:
        renewal.start()
    try:
        yield
    finally:
        done.set()
        if is_owner:
            renewal.join()
            with contextlib.suppress(StorageFailed):
                release(folder, claim)


def _take(folder: Folder, claim: Claim) -> bool:
    for _ in range(_ATTEMPTS):
        if folder.create(CLAIM_NAME, claim.to_bytes()):
            return True
        owner = read_claim(folder)
        if owner is None or owner.is_dead():
            if owner is not None:
                log.info("run %s is gone; its claim of %s is taken over", owner.run, folder.url)
            folder.remove(CLAIM_NAME)
        elif owner.plan == claim.plan:
            log.info("run %s makes the same result in %s", owner.run, folder.url)
            return False
        else:
            raise refuse_claimed(folder.url, owner)
    raise StorageFailed(f"claim {show(folder.url, 200)} failed: it is taken and given up all the time")


def read_claim(folder: Folder) -> Claim | None:
    """The claim of a destination in an object storage; None where there is none, or nothing that can be read."""
    try:
        return parse_claim(folder.read(CLAIM_NAME, _LIMIT))
    except FileNotFoundError:
        return None


def check_claim(folder: Folder, claim: Claim) -> None:
    """Make sure that no run of another plan has taken a destination over meanwhile.

    Raises:
        DestinationInvalid: one has.
    """
    owner = read_claim(folder)
    if owner is not None and owner.plan != claim.plan:
        raise refuse_claimed(folder.url, owner)


def release(folder: Folder, claim: Claim) -> None:
    """Remove the claim of a run, and that of a dead one of the same plan; another's stays."""
    owner = read_claim(folder)
    if owner is not None and (owner.run == claim.run or (owner.plan == claim.plan and owner.is_dead())):
        folder.remove(CLAIM_NAME)


def _renew(folder: Folder, claim: Claim, done: threading.Event) -> None:
    while not done.wait(RENEWAL_SECONDS):
        with contextlib.suppress(StorageFailed):
            owner = read_claim(folder)
            if owner is not None and owner.run != claim.run:
                return
            folder.put(CLAIM_NAME, new_claim(claim.plan, claim.run).to_bytes())
