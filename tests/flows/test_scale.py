"""A checkpoint of many shards as a flow: what a shard costs in time and database, and that no state is lost.

`pytest -s` shows the table that `docs/executors.md` holds.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient

import checkpoints
from postgres import serving_from_postgres
from shardmill.flows.parameters import QuantizeRequest
from workers import Service, serving, shard_runs, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SHARDS: Final = 500
SCHEME: Final = "FP8_DYNAMIC"
WORKERS: Final = 2
Size = Callable[[], int]
"""Bytes of a database."""
CONVERT: Final = """
import json, sys, time
from dataclasses import asdict
from shardmill.core.recipe import uniform
from shardmill.flows.parameters import QuantizeRequest
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations

request = QuantizeRequest.model_validate_json(sys.argv[1])
found = {"plain": 0.0}
for folder in sys.argv[2:]:
    began = time.perf_counter()
    locations = Locations(source=request.source, destination=folder)
    run(locations, uniform(request.scheme), RunOptions(device=request.device, workers=request.workers))
    found["plain"] = time.perf_counter() - began
began = time.perf_counter()
state = quantize_checkpoint(request, return_state=True)
found["flow"] = time.perf_counter() - began
summary = state.result()
print(json.dumps(found | {"shards": summary.shards, "hits": summary.hits, "run": str(state.state_details.flow_run_id)}))
"""
"""Converts with the plain loop into each of the given folders, then with the flow."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a process that converted tells."""

    plain: float
    """Seconds of the last plain loop; the ones before load and compile."""
    flow: float
    """Seconds of the flow."""
    shards: int
    hits: int
    run: str


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 500 shards of 8 kB."""
    weights = {f"model.layers.{n}.mlp.down_proj.weight": checkpoints.gaussian(n, 64, 64) for n in range(SHARDS)}
    return checkpoints.write(tmp_path_factory.mktemp("many") / "source", checkpoints.deal(weights, SHARDS))


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows to print when all databases are through."""
    rows: list[str] = []
    yield rows
    print(f"\n{SHARDS} shards of 8 kB, {WORKERS} workers")
    print(
        "| database | plain loop s | flow s | overhead per shard | again, all hits, s | states complete after s | ",
        end="",
    )
    print("database per shard |\n| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


@contextmanager
def on_sqlite(home: Path) -> Iterator[tuple[Service, Size]]:
    with serving(home) as service:

        def size() -> int:
            with closing(sqlite3.connect(home / "prefect.db")) as database:
                pages, page = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
            return int(pages * page)

        yield service, size


@contextmanager
def on_postgres(home: Path) -> Iterator[tuple[Service, Size]]:
    with serving_from_postgres(home) as (service, cluster):
        yield service, lambda: int(cluster.ask("SELECT pg_database_size('prefect')"))


def convert(service: Service, request: QuantizeRequest, *plain: Path) -> Conversion:
    """Convert in a process of its own, since one speaks to one server."""
    command = [sys.executable, "-P", "-c", CONVERT, request.model_dump_json(), *map(str, plain)]
    environment = dict(service.environment) | {"PREFECT_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return Conversion(**json.loads(done.stdout))


def settled(client: SyncPrefectClient, conversion: Conversion, name: str) -> float:
    """Wait until the server shows every shard in the state `name`, once; the seconds it took."""
    began, flow_run = time.perf_counter(), UUID(conversion.run)

    def states() -> Counter[str]:
        return Counter(found.state.name or "" for found in shard_runs(client, flow_run) if found.state)

    wait_until(f"{SHARDS} shards are {name}", lambda: states() == {name: SHARDS}, 300)
    state = client.read_flow_run(flow_run).state
    assert state is not None
    assert state.name == "Completed"
    return time.perf_counter() - began


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("database", [on_sqlite, on_postgres])
def test_five_hundred_shards_lose_no_state_and_are_found_again(
    database: Callable[[Path], AbstractContextManager[tuple[Service, Size]]],
    many: Path,
    table: list[str],
    tmp_path: Path,
) -> None:
    def request(destination: str) -> QuantizeRequest:
        fixed = {"source": str(many), "scheme": SCHEME, "device": "cpu", "workers": WORKERS}
        return QuantizeRequest.model_validate(fixed | {"destination": str(tmp_path / "flow" / destination)})

    with database(tmp_path / "served") as (service, size), service.client as client:
        before = size()
        first = convert(service, request("a"), tmp_path / "warm" / "result", tmp_path / "plain" / "result")
        lag = settled(client, first, "Completed")
        growth = size() - before
        again = convert(service, request("b"))
        settled(client, again, "Cached")

    overhead = 1e3 * (first.flow - first.plain) / SHARDS
    cells = (database.__name__.removeprefix("on_"), f"{first.plain:.1f}", f"{first.flow:.1f}", f"{overhead:.1f} ms")
    more = (f"{again.flow:.1f}", f"{lag:.1f}", f"{growth / SHARDS / 1e3:.1f} kB")
    table.append(f"| {' | '.join(cells + more)} |")
    assert (first.shards, first.hits) == (SHARDS, 0)
    assert (again.shards, again.hits) == (SHARDS, SHARDS)
    expected = files(tmp_path / "plain" / "result")
    assert files(tmp_path / "flow" / "a") == expected
    assert files(tmp_path / "flow" / "b") == expected
