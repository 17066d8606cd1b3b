"""A worker's keys stay with the worker: whatever becomes of its runs, nothing that is kept or shown holds one."""

from __future__ import annotations

import base64
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import checkpoints
from postgres import serving_from_postgres
from storage.fault_proxy import FaultProxy, Rule
from storage.servers import ABSENT, S3Server, run_moto
from workers import DEPLOYMENT, Service, end_of, free_port, serving, start

pytestmark = pytest.mark.slow

Dump = Callable[[], bytes]
"""Everything in the server's database, as text."""


def new_canary(name: str) -> str:
    """A key that occurs nowhere else; letters and digits only, so that no encoding of text changes it."""
    return f"CANARY{name}{secrets.token_hex(12)}"


def forms(canary: str) -> list[bytes]:
    """How a canary may stand in a file: as it is, or within a text in base64."""
    shifted = [base64.b64encode(b"x" * shift + canary.encode())[4:-4] for shift in range(3)]
    return [canary.encode(), *shifted]


@dataclass(frozen=True)
class Keys:
    """Canaries by the place in which a worker finds them."""

    environment: dict[str, str]
    profile: dict[str, str]
    """For the worker that has them in a file only."""
    all: tuple[str, ...]

    @classmethod
    def make(cls, home: Path) -> Keys:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
        environment = {name: new_canary(name.replace("_", "")) for name in names}
        kept = {name.lower(): new_canary(f"PROFILE{number}") for number, name in enumerate(names[:3])}
        file = home / "credentials"
        file.write_text("[canary]\n" + "".join(f"{name} = {value}\n" for name, value in kept.items()))
        profile = {"AWS_SHARED_CREDENTIALS_FILE": str(file), "AWS_PROFILE": "canary"}
        return cls(environment, profile, (*environment.values(), *kept.values()))


@contextmanager
def on_sqlite(home: Path) -> Iterator[tuple[Service, Dump]]:
    def dump() -> bytes:
        with closing(sqlite3.connect(home / "prefect.db")) as database:
            return "\n".join(database.iterdump()).encode()

    with serving(home) as service:
        yield service, dump


@contextmanager
def on_postgres(home: Path) -> Iterator[tuple[Service, Dump]]:
    with serving_from_postgres(home) as (service, cluster):
        yield service, cluster.dump


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name in ABSENT:
        monkeypatch.delenv(name, raising=False)
    with run_moto() as server:
        yield server


def kept_on_disk(home: Path) -> dict[str, bytes]:
    """Every file of the server and its workers: logs, database, result records, temporary files."""
    return {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def kept_in_bucket(s3: S3Server, bucket: str) -> dict[str, bytes]:
    """Every object with its name and metadata."""
    found: dict[str, bytes] = {}
    for key in s3.keys(bucket):
        answer = s3.client.get_object(Bucket=bucket, Key=key)
        found[f"s3://{bucket}/{key}"] = answer["Body"].read() + repr(answer["Metadata"]).encode()
    return found


def offer_in_url(service: Service, request: Mapping[str, Any], canary: str) -> str:
    """Ask for a run whose source names a user and a password; what the server says."""
    with service.client as client:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
    parameters = {"request": dict(request) | {"source": f"s3://user:{canary}@bucket/model"}}
    answer = httpx.post(f"{service.url}/deployments/{deployment.id}/create_flow_run", json={"parameters": parameters})
    assert answer.status_code == 409
    return answer.text


@pytest.mark.parametrize("database", [on_sqlite, on_postgres])
def test_no_key_is_kept_or_shown(
    database: Callable[[Path], AbstractContextManager[tuple[Service, Dump]]], s3: S3Server, tmp_path: Path
) -> None:
    keys, in_url, home = Keys.make(tmp_path), new_canary("URL"), tmp_path / "served"
    bucket = s3.new_bucket()
    for path in checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 3)).iterdir():
        s3.client.put_object(Bucket=bucket, Key=f"source/{path.name}", Body=path.read_bytes())

    def request(name: str) -> dict[str, Any]:
        places = {"source": f"s3://{bucket}/source", "destination": f"s3://{bucket}/{name}/result"}
        return places | {"scheme": "FP8_DYNAMIC", "device": "cpu", "workers": 1}

    echo = f"The key {keys.environment['AWS_ACCESS_KEY_ID']} with token {keys.environment['AWS_SESSION_TOKEN']}"
    refusals = [
        Rule("status", method=method, path="/blobs/", status=403, code="InvalidAccessKeyId", message=echo)
        for method in ("PUT", "POST")
    ]
    plain = {name: value for name, value in s3.environment().items() if "KEY" not in name}
    by_environment = plain | keys.environment
    by_profile = plain | {"HF_TOKEN": keys.environment["HF_TOKEN"]} | keys.profile
    nowhere = f"http://127.0.0.1:{free_port()}"
    with database(home) as (service, dump), FaultProxy(s3.endpoint) as proxy, service.client as client:
        proxy.set_rules(*refusals)
        cases = [
            ("environment", by_environment, request("environment"), "Completed"),
            ("profile", by_profile, request("profile"), "Completed"),
            ("refused", by_environment | {"AWS_ENDPOINT_URL": proxy.url}, request("refused"), "Failed"),
            ("silent", by_environment | {"AWS_ENDPOINT_URL": nowhere}, request("silent"), "Failed"),
            (
                "hub",
                by_environment | {"HF_ENDPOINT": nowhere, "HF_HUB_OFFLINE": "0"},
                request("hub") | {"source": "hf://org/model"},
                "Failed",
            ),
        ]
        ends = {}
        for name, environment, asked, _ in cases:
            with service.worker(name, **environment):
                ends[name] = end_of(client, start(client, asked))
        offer_in_url(service, request("url"), in_url)
        database_text = dump()
    kept = kept_on_disk(home) | kept_in_bucket(s3, bucket) | {"database": database_text}

    assert ends == {name: expected for name, _, _, expected in cases}
    assert proxy.fired
    assert bucket.encode() in database_text, "what is no secret is found"
    places = " ".join(kept)
    for wanted in ("server.log", "hub.log", "/receipts/", "/digests", "shardmill.json", "refused/.shardmill"):
        assert wanted in places
    found = [
        (place, canary)
        for canary in (*keys.all, in_url)
        for place, content in kept.items()
        if any(form in content for form in forms(canary))
    ]
    assert found == []
