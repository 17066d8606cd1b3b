"""Run a command and print what it cost; small, because the peak memory of a child begins with that of its parent.

    python -I -S launch.py STDOUT_FILE STDERR_FILE COMMAND [ARGUMENT ...]

Uses nothing but the standard library's core, so that its own size stays far below that of anything measured.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    stdout, stderr, *command = sys.argv[1:]
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [(os.POSIX_SPAWN_OPEN, fd, path, flags, 0o600) for fd, path in ((1, stdout), (2, stderr))]
    load = os.getloadavg()[0]
    started = time.perf_counter()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - started
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())  # gone once reaped
    _, status, usage = os.wait4(pid, 0)
    found = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "read_bytes": int(counts["rchar"]),
        "load": load,
    }
    json.dump({"status": os.waitstatus_to_exitcode(status), "run": found}, sys.stdout)


if __name__ == "__main__":
    main()
