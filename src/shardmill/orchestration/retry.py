"""What is worth another try."""

from __future__ import annotations

import errno
import socket
from typing import Any, Final

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from shardmill.errors import Interrupted, Refused, SourceChanged, StorageUnavailable

_TRANSIENT_ERRNO: Final = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
        socket.EAI_AGAIN,
    }
)
_TRANSIENT_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
_TRANSIENT_TYPES: Final = frozenset(
    {
        "aiohttp.ClientConnectionError",
        "aiohttp.ClientPayloadError",
        "botocore.ConnectionClosedError",
        "botocore.EndpointConnectionError",
        "botocore.HTTPClientError",
        "httpx.TransportError",
        "requests.ConnectionError",
        "requests.Timeout",
    }
)
"""Errors of storage libraries that are no `ConnectionError` or `TimeoutError`; importing them would cost time."""
_CAUSES: Final = 8


def is_transient_error(error: BaseException | None) -> bool:
    """Whether the same work may succeed a little later: connection, server error or timeout.

    >>> is_transient_error(ConnectionResetError()), is_transient_error(OSError(errno.ENOSPC, "no space"))
    (True, False)
    """
    for _ in range(_CAUSES):
        if error is None or isinstance(error, Refused | SourceChanged | Interrupted):
            return False
        names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError | StorageUnavailable) or names & _TRANSIENT_TYPES:
            return True
        if (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO) or _status(error) in _TRANSIENT_STATUS:
            return True
        error = error.__cause__
    return False


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries, as httpx, requests, botocore and aiohttp do."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        found = response.get("HTTPStatusCode") if isinstance(response, dict) else None
    else:
        found = getattr(response, "status_code", getattr(error, "status", None))
    return found if isinstance(found, int) else None


def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry condition of tasks that move bytes."""
    return is_transient_error(state.data if isinstance(state.data, BaseException) else None)
