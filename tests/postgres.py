"""A PostgreSQL cluster of a test's own: in a temporary folder, on the loopback interface, run by an ordinary user."""

from __future__ import annotations

import asyncio
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest

from workers import Service, free_port, serving

_SERVER_USER: Final = "postgres"
"""Who runs the server where the tests run as root, as which it refuses to run."""


@dataclass(frozen=True)
class Cluster:
    """A running server."""

    port: int
    password: str
    programs: Path

    @property
    def url(self) -> str:
        """For Prefect."""
        return f"postgresql+asyncpg://prefect:{self.password}@127.0.0.1:{self.port}/prefect"

    def ask(self, query: str) -> Any:
        """The single value that a query gives."""

        async def answer() -> Any:
            connection = await asyncpg.connect(self.url.replace("+asyncpg", ""))
            try:
                return await connection.fetchval(query)
            finally:
                await connection.close()

        return asyncio.run(answer())

    def dump(self) -> bytes:
        """Everything in the database, as text."""
        command = [str(self.programs / "pg_dump"), "--dbname", self.url.replace("+asyncpg", "")]
        return subprocess.run(command, check=True, capture_output=True).stdout


def find_programs() -> Path | None:
    """Where `initdb` and `pg_ctl` lie; Debian keeps them out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    program = Path(on_path).resolve() if on_path else found[-1] if found else None
    return program.parent if program and (program.parent / "pg_ctl").exists() else None


@contextmanager
def running_postgres(programs: Path) -> Iterator[Cluster]:
    """Make a cluster with a database `prefect`, and stop it at the end."""
    home, password = Path(tempfile.mkdtemp(prefix="shardmill-postgres-")), secrets.token_hex(16)
    user = _SERVER_USER if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    secret = home / "password"
    secret.write_text(password)
    for path in (home, secret):
        shutil.chown(path, user)
    cluster = Cluster(free_port(), password, programs)

    def control(program: str, *arguments: str) -> None:
        command = [str(programs / program), "--pgdata", str(home / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=user, cwd=home)

    options = f"-c listen_addresses=127.0.0.1 -c port={cluster.port} -c unix_socket_directories={home}"
    try:
        control("initdb", "--username", "prefect", "--auth", "scram-sha-256", "--pwfile", str(secret))
        control("pg_ctl", "start", "--wait", "--log", str(home / "server.log"), "--options", options)
        try:
            make = [
                str(programs / "createdb"),
                "--maintenance-db",
                cluster.url.replace("+asyncpg", "")[:-7] + "postgres",
            ]
            subprocess.run([*make, "prefect"], check=True)
            yield cluster
        finally:
            control("pg_ctl", "stop", "--wait", "--mode", "fast")
    finally:
        shutil.rmtree(home)


@contextmanager
def serving_from_postgres(home: Path) -> Iterator[tuple[Service, Cluster]]:
    """A Prefect server whose database is such a cluster; skips the test where PostgreSQL is not installed."""
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (Debian package `postgresql`)")
    with (
        running_postgres(programs) as cluster,
        serving(home, PREFECT_SERVER_DATABASE_CONNECTION_URL=cluster.url) as service,
    ):
        yield service, cluster
