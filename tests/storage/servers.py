"""S3 servers for tests: moto in this process, and a Ceph radosgw that somebody else started."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shlex
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import boto3
import pytest
from botocore.config import Config

SMALLEST_PART: Final = 65536
"""Length in bytes of the shortest part, but the last, that moto takes; real servers want 5 MiB."""
RADOSGW_VARIABLE: Final = "SHARDMILL_RADOSGW_ENV"
"""Names the file with `export` lines that `ceph.sh start` writes."""
_MOTO_BEGAN: Final = b"2010-11-10T20:48:33.000Z"
"""When every upload began, as moto has it."""
ABSENT: Final = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_SESSION_TOKEN",
    "FSSPEC_S3",
    "FSSPEC_S3_ENDPOINT_URL",
)
"""What a developer's own environment must not add."""


@dataclass(frozen=True)
class S3Server:
    """A server and the keys for it."""

    endpoint: str
    access_key: str
    secret_key: str
    smallest_part: int
    """Length in bytes of the shortest part, but the last, of an upload."""
    backend: Any = None
    """What holds the objects, where that is in this process."""

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """Variables that lead every S3 client to the server, or to a proxy before it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def lead(self, patch: pytest.MonkeyPatch, endpoint: str = "") -> None:
        """Set that environment for one test."""
        for name in ABSENT:
            patch.delenv(name, raising=False)
        for name, value in self.environment(endpoint).items():
            patch.setenv(name, value)

    @cached_property
    def client(self) -> Any:
        """A client that knows nothing of the code under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 2}),
        )

    def new_bucket(self) -> str:
        """Make an empty bucket."""
        name = f"test-{secrets.token_hex(6)}"
        self.client.create_bucket(Bucket=name)
        return name

    def put_empty(self, bucket: str, keys: Iterable[str]) -> None:
        """Write many objects that hold nothing, past the network where the server is within reach."""
        if self.backend is not None:
            for key in keys:
                self.backend.put_object(bucket, key, b"")
            return
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: self.client.put_object(Bucket=bucket, Key=key), keys))

    def keys(self, bucket: str) -> list[str]:
        """Every key of a bucket, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))

    def open_uploads(self, bucket: str) -> list[str]:
        """Keys of the uploads of a bucket that nobody finished or gave up."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket)
        return sorted(entry["Key"] for page in pages for entry in page.get("Uploads", []))


@contextlib.contextmanager
def run_moto() -> Iterator[S3Server]:
    """Start moto at a free port of this process."""
    os.environ["S3_UPLOAD_PART_MIN_SIZE"] = str(SMALLEST_PART)  # moto reads it when it is imported
    from moto import backends
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication
    from moto.s3.models import s3_backends
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel("ERROR")  # it would print every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    list_uploads = S3Response.list_multipart_uploads
    # at every request it would list the folders of its package, and match the host with the patterns of all services
    modules, backend_of = backends.list_of_moto_modules, DomainDispatcherApplication.get_backend_for_host
    backends.list_of_moto_modules = functools.cache(lambda: frozenset(modules()))
    DomainDispatcherApplication.get_backend_for_host = functools.cache(backend_of)  # type: ignore[method-assign]

    def list_uploads_of_today(response: S3Response) -> Any:
        status, headers, body = list_uploads(response)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z").encode()
        data = body.encode() if isinstance(body, str) else body
        return status, headers, data.replace(_MOTO_BEGAN, now)

    S3Response.list_multipart_uploads = list_uploads_of_today  # type: ignore[assignment,method-assign]
    try:
        host, port = server.get_host_and_port()
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        yield S3Server(f"http://{host}:{port}", "moto-access", "moto-secret-of-the-tests", SMALLEST_PART, backend)
    finally:
        S3Response.list_multipart_uploads = list_uploads  # type: ignore[method-assign]
        backends.list_of_moto_modules = modules
        DomainDispatcherApplication.get_backend_for_host = backend_of  # type: ignore[method-assign]
        server.stop()


def find_radosgw() -> S3Server | None:
    """The running radosgw that the environment names."""
    file = os.environ.get(RADOSGW_VARIABLE)
    if not file:
        return None
    found = read_exports(Path(file).read_text())
    return S3Server(
        found["AWS_ENDPOINT_URL"], found["AWS_ACCESS_KEY_ID"], found["AWS_SECRET_ACCESS_KEY"], smallest_part=5 << 20
    )


def read_exports(text: str) -> Mapping[str, str]:
    """The variables that lines such as `export A=b C=d` set."""
    words = [word for line in text.splitlines() for word in shlex.split(line) if word != "export"]
    return dict(word.split("=", 1) for word in words)
