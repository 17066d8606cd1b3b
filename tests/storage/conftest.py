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


@pytest.fixture
def moto_proxy(moto: S3Server) -> Iterator[FaultProxy]:
    """A proxy before moto that does what its rules say."""
    with FaultProxy(moto.endpoint) as proxy:
        yield proxy
