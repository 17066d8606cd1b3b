"""A Prefect server of the session's own, and what the tests of the flow share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import (
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_LOGGING_LEVEL,
    temporary_settings,
)
from prefect.testing.utilities import prefect_test_harness

import checkpoints
from served import Ask
from shardmill.core.receipt import Receipt
from shardmill.flows.parameters import QuantizeRequest
from shardmill.stages import quantize
from shardmill.storage import store


@pytest.fixture(scope="session", autouse=True)
def server() -> Iterator[None]:
    """A server for all tests of this folder; a heartbeat would add a second to every flow."""
    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_LEVEL: "ERROR"}),
    ):
        yield


@pytest.fixture(autouse=True)
def records(tmp_path: Path) -> Iterator[Path]:
    """Where Prefect keeps result records: a folder for each test."""
    folder = tmp_path / "records"
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: folder}):
        yield folder


@pytest.fixture(autouse=True)
def _remember_young_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of files younger than two seconds are not remembered, and tests have no others."""
    monkeypatch.setattr(store, "_FRESH_NS", 0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were computed, in the order in which they were begun."""
    names: list[str] = []
    compute = quantize._compute

    def note(sources: quantize.Sources, *args: Any) -> Receipt:
        names.append(sources.shard.name)
        return compute(sources, *args)

    monkeypatch.setattr(quantize, "_compute", note)
    return names


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of four shards."""
    return checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 4))


@pytest.fixture
def ask(source: Path, tmp_path: Path) -> Ask:
    """Make a request for `source`; keywords override."""

    def make(**choices: object) -> QuantizeRequest:
        fixed = {"source": str(source), "destination": str(tmp_path / "result"), "device": "cpu", "workers": 2}
        return QuantizeRequest.model_validate(fixed | choices)

    return make
