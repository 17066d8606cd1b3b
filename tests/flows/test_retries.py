"""What is worth another try, and what is not."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import requests
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
)
from prefect.states import Failed

from served import Ask
from shardmill.errors import Interrupted, NonFiniteWeight, Problem, ShardFailures, SourceChanged, StorageFailed
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.orchestration.retry import is_transient, is_transient_error
from shardmill.stages import quantize
from shardmill.tasks.quantize import quantize_shard

PROBLEM = Problem(kind="k", message="m")


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def http(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://host")
    return httpx.HTTPStatusError("x", request=request, response=httpx.Response(status, request=request))


def plain_http(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("x", response=response)


def s3(status: int) -> BaseException:
    answer = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": "x"}}
    found: BaseException = ClientError(answer, "GetObject")
    return found


def endless() -> BaseException:
    error = ValueError("its own cause")
    error.__cause__ = error
    return error


TABLE: list[tuple[BaseException, bool]] = [
    (ConnectionResetError(errno.ECONNRESET, "reset"), True),
    (BrokenPipeError(), True),
    (TimeoutError(), True),
    (OSError(errno.ETIMEDOUT, "timed out"), True),
    (OSError(errno.ESTALE, "stale file handle"), True),
    (socket.gaierror(socket.EAI_AGAIN, "try again"), True),
    (StorageFailed(errno.ECONNREFUSED, "read `x` failed"), True),
    (caused(StorageFailed("read `x` failed"), http(503)), True),
    (caused(StorageFailed("read `x` failed"), ConnectionAbortedError()), True),
    (http(500), True),
    (http(429), True),
    (plain_http(502), True),
    (s3(503), True),
    (httpx.ReadTimeout("x"), True),
    (httpx.ConnectError("x"), True),
    (requests.ConnectionError("x"), True),
    (requests.Timeout("x"), True),
    (aiohttp.ServerDisconnectedError(), True),
    (EndpointConnectionError(endpoint_url="http://host"), True),
    (ReadTimeoutError(endpoint_url="http://host"), True),
    (http(403), False),
    (http(404), False),
    (s3(412), False),
    (plain_http(401), False),
    (NoCredentialsError(), False),
    (ValueError("x"), False),
    (MemoryError(), False),
    (OSError(errno.ENOSPC, "no space"), False),
    (OSError(errno.EDQUOT, "quota"), False),
    (OSError(errno.EACCES, "permission"), False),
    (OSError(errno.EIO, "input/output error"), False),
    (FileNotFoundError(errno.ENOENT, "x"), False),
    (socket.gaierror(socket.EAI_NONAME, "no such host"), False),
    (StorageFailed(errno.ENOSPC, "write `x` failed"), False),
    (caused(NonFiniteWeight([PROBLEM]), ConnectionResetError()), False),
    (caused(SourceChanged("x"), TimeoutError()), False),
    (Interrupted("x"), False),
    (ShardFailures([], 0), False),
    (endless(), False),
]


@pytest.mark.parametrize(("error", "transient"), TABLE, ids=lambda value: type(value).__name__)
def test_transient_means_connection_server_or_timeout(error: BaseException, *, transient: bool) -> None:
    assert is_transient_error(error) is transient


def test_the_condition_looks_into_the_state() -> None:
    run: Any = None
    assert is_transient(quantize_shard, run, Failed(data=ConnectionResetError()))
    assert not is_transient(quantize_shard, run, Failed(data=ValueError()))
    assert not is_transient(quantize_shard, run, Failed(message="no error at hand"))


@pytest.mark.parametrize(("error", "tries"), [(ConnectionResetError("reset"), 3), (ValueError("x"), 1)])
def test_only_what_is_transient_is_tried_again(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, tries: int
) -> None:
    begun: list[str] = []

    def fail(shard: Any, *_: object) -> None:
        begun.append(shard.name)
        raise error

    monkeypatch.setattr("shardmill.tasks.quantize.quantize.quantize_shard", fail)
    monkeypatch.setattr(quantize_shard, "retry_delay_seconds", [0])

    state = quantize_checkpoint(ask(), return_state=True)

    assert isinstance(state.result(raise_on_failure=False), ShardFailures)
    assert len(begun) == 4 * tries
    assert not (tmp_path / "result").exists()


def test_a_shard_that_succeeds_at_the_second_try_is_done(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    real = quantize.quantize_shard

    def flaky(shard: Any, *args: Any) -> Any:
        begun.append(shard.name)
        if begun.count(shard.name) == 1:
            raise ConnectionResetError("reset")
        return real(shard, *args)

    monkeypatch.setattr("shardmill.tasks.quantize.quantize.quantize_shard", flaky)
    monkeypatch.setattr(quantize_shard, "retry_delay_seconds", [0])

    summary = quantize_checkpoint(ask())

    assert (summary.shards, summary.hits) == (4, 0)
    assert len(begun) == 8
