"""Servers and storages for the tests of this layer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.fault_proxy import FaultProxy
from storage.servers import RADOSGW_VARIABLE, S3Server, find_radosgw, run_moto


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """An S3 server in this process."""
    with run_moto() as server:
        yield server


@pytest.fixture(scope="session")
def radosgw() -> S3Server:
    """A real S3 server, for tests marked `ceph`."""
    server = find_radosgw()
    if server is None:
        pytest.skip(f"no radosgw: start one with tests/storage/ceph.sh and set {RADOSGW_VARIABLE} to its env file")
    return server


@pytest.fixture(params=["moto", pytest.param("radosgw", marks=pytest.mark.ceph)])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Each S3 server in turn; clients of this process are led to it."""
    found: S3Server = request.getfixturevalue(request.param)
    found.lead(monkeypatch)
    return found


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server, which does what its rules say; clients of this process are led to it."""
    with FaultProxy(server.endpoint) as running:
        server.lead(monkeypatch, running.url)
        yield running
