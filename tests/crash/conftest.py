"""A server for runs that are disturbed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.servers import S3Server, run_moto


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """An S3 server in this process."""
    with run_moto() as server:
        yield server
