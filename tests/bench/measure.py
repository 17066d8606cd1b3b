"""Processes and what they cost, the page cache, and the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

SHARDMILL: Final = (sys.executable, "-P", "-m", "shardmill.cli")
BLOCK_BYTES: Final = 8 << 20
_LAUNCHER: Final = Path(__file__).with_name("launch.py")
_STDERR_SHOWN: Final = 4000
_NOT_INHERITED: Final = frozenset(
    [
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONPATH",
        "PREFECT_API_KEY",
        "PREFECT_API_URL",
        "PREFECT_PROFILE",
        "SHARDMILL_KERNELS",
        "SHARDMILL_STORE",
    ]
)
_FILE_SYSTEMS: Final = {"tmpfs": "RAM disk (tmpfs)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one process cost."""

    seconds: float
    """Wall time from before its start until its end."""
    cpu_seconds: float
    """User and system time."""
    peak_bytes: int
    """Largest resident size."""
    read_bytes: int
    """Bytes asked for with read calls; Python's own modules count, mapped files do not."""
    load: float
    """Load average of the last minute before it started."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that succeeded."""

    run: Run
    stdout: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on its last line of stdout."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found


class CommandFailed(Exception):
    """A measured process ended with another code than 0; the end of its stderr is in the message."""


def execute(command: Sequence[str | Path], **environment: str) -> Finished:
    """Run a command to its end, in a clean folder and without variables that would change what it does.

    Raises:
        CommandFailed: it did not succeed.
    """
    words = [str(word) for word in command]
    variables = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED} | environment
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        launched = subprocess.run(
            [sys.executable, "-I", "-S", _LAUNCHER, stdout, stderr, *words],
            check=True,
            stdout=subprocess.PIPE,
            env=variables,
            cwd=folder,
        )
        found = json.loads(launched.stdout)
        if found["status"]:
            said = stderr.read_text(errors="replace")[-_STDERR_SHOWN:]
            raise CommandFailed(f"{' '.join(words)} ended with {found['status']}: {said}")
        return Finished(Run(**found["run"]), stdout.read_text(errors="replace"))


def shardmill(*arguments: str | Path, **environment: str) -> Finished:
    """Run the command line of this project.

    Raises:
        CommandFailed: it did not succeed.
    """
    return execute([*SHARDMILL, *arguments], **environment)


def quantize(source: Path, destination: Path, preset: str, **environment: str) -> Finished:
    """`shardmill run` on the CPU, with a store beside the destination and all other choices as they are.

    Raises:
        CommandFailed: it did not succeed.
    """
    words = ("run", source, destination, "--scheme", preset, "--device", "cpu", "--json", "--quiet")
    return shardmill(*words, **environment)


def shards_of(folder: Path) -> list[Path]:
    """The shards of a checkpoint, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def warm(paths: Iterable[Path]) -> None:
    """Read files once, so that they are in the page cache."""
    buffer = bytearray(BLOCK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(paths: Iterable[Path]) -> None:
    """Ask the kernel to forget the pages of files; what lies on a RAM disk stays."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def middle(runs: Iterable[Run], what: str = "seconds") -> float:
    """Median of one figure of some runs."""
    return float(median(getattr(run, what) for run in runs))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, str]:
    """What the figures depend on, in words."""
    models = {line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")}
    memory = next(line for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "CPU": f"{', '.join(sorted(models)) or platform.machine()}, {cores()} cores",
        "memory": f"{int(memory.split()[1]) / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def file_system(folder: Path) -> str:
    """What kind of file system a folder lies on, for people."""
    mounts = [line.split()[1:3] for line in _lines("/proc/self/mounts")]
    fitting = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    kind = max(fitting)[1]
    return _FILE_SYSTEMS.get(kind, f"disk ({kind})")


def versions(python: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Versions of distributions that an interpreter finds."""
    program = "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in %r}))"
    return execute([python, "-P", "-c", program % (tuple(names),)]).document


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
