"""Runs that are stopped at their storage operations; `kill_points.py` says what must hold, and tries all of them.

By default some operations are tried, from another one on every day; the slow tests try the others. By hand:

    python tests/crash/kill_points.py --site local --fault kill --every 1 --load --folder DIR
"""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from storage.servers import ABSENT, S3Server

SCRIPT = Path(__file__).with_name("kill_points.py")
DAY = dt.datetime.now(dt.UTC).date().toordinal()


def try_points(
    folder: Path, *arguments: str, every: int, first: int = 1, server: S3Server | None = None
) -> dict[str, Any]:
    """Run the battery in a process without threads, and return its report; fails where a promise is broken."""
    environment = {name: value for name, value in os.environ.items() if name not in ABSENT}
    if server is not None:
        environment |= server.environment()
    command = [sys.executable, str(SCRIPT), "--site", "s3" if server else "local", "--folder", str(folder)]
    command += [*arguments, "--first", str(first), "--every", str(every)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["failures"] == [], command
    assert done.returncode == 0
    assert report["attempts"] == len(range(first, report["operations"] + 1, every)) > 0
    print(f"{report['operations']} operations, {report['attempts']} attempts: {report['outcomes']}")
    return report


def offset(every: int) -> int:
    """Where to begin today; with a failure the command tells it."""
    return 1 + DAY * 7 % every


def assert_stopped(outcomes: Mapping[str, int], attempts: int) -> None:
    """Nearly all attempts were stopped; threads interleave, so a run may end before a late operation."""
    assert outcomes.get("killed", 0) + outcomes.get("failed", 0) > 0
    assert outcomes.get("ended before", 0) <= max(1, attempts // 10)


def test_a_run_on_disk_survives_being_killed(tmp_path: Path) -> None:
    report = try_points(tmp_path, every=60, first=offset(60))
    assert_stopped(report["outcomes"], report["attempts"])


@pytest.mark.s3
def test_a_run_in_a_bucket_survives_being_killed(tmp_path: Path, moto: S3Server) -> None:
    report = try_points(tmp_path, every=150, first=offset(150), server=moto)
    assert_stopped(report["outcomes"], report["attempts"])


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_a_run_on_disk_survives_being_killed_anywhere(tmp_path: Path) -> None:
    report = try_points(tmp_path, "--load", every=1)
    assert_stopped(report["outcomes"], report["attempts"])
    assert report["outcomes"]["not loadable"] > report["outcomes"]["loadable"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EACCES"])
@pytest.mark.parametrize("lasting", [(), ("--lasting",)], ids=["once", "lasting"])
def test_a_run_on_disk_survives_a_disk_that_fails_anywhere(
    tmp_path: Path, fault: str, lasting: tuple[str, ...]
) -> None:
    report = try_points(tmp_path, "--fault", fault, *lasting, every=5, first=offset(5))
    assert_stopped(report["outcomes"], report["attempts"])


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", ["kill", "ENOSPC", "EIO", "EACCES"])
def test_a_run_in_a_bucket_survives_what_goes_wrong_anywhere(tmp_path: Path, moto: S3Server, fault: str) -> None:
    report = try_points(tmp_path, "--fault", fault, every=7, first=offset(7), server=moto)
    assert_stopped(report["outcomes"], report["attempts"])
