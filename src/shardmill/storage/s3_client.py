"""Requests to an S3-compatible storage: settings, one retry policy, errors in our words, the way into the event loop.

Endpoint and credentials come from the environment, the profile or the machine, as botocore and fsspec find them. No
text made here holds a part of them: messages are built from operation, place, HTTP status and error code alone, and
errors of the libraries below are never chained.
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import random
import re
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any, Final, TypeVar

import aiohttp
import aiohttp.payload
import fsspec
from aiohttp.abc import AbstractStreamWriter
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp

from shardmill.errors import (
    ObjectMissing,
    ShardmillError,
    SourceChanged,
    StorageFailed,
    StorageUnavailable,
    TransferDamaged,
    show,
)
from shardmill.storage.operations import operation
from shardmill.storage.prompt import prompt_socket
from shardmill.storage.s3_body import CHUNK_BYTES, read_into

CONNECT_SECONDS: Final[float] = 5.0
READ_SECONDS: Final[float] = 30.0
"""Silence after which a connection counts as lost."""
REQUEST_SECONDS: Final[float] = 60.0
"""A request, all its tries together, may take so long, and longer by what its bytes take at `SLOWEST`."""
FIRST_SECONDS: Final[float] = 10.0
"""The same until the endpoint has answered anything: most likely its name is wrong, or it is not there."""
CLEANUP_SECONDS: Final[float] = 15.0
"""The same for requests that tidy up after another one failed."""
SLOWEST: Final[int] = 256 << 10
"""Bytes per second; a transfer that is slower is given up."""
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 4.0
_CONNECTIONS: Final = 32
_chance: Final = random.Random()  # noqa: S311 - pauses, not secrets; the common one belongs to the program
_ENVIRONMENT: Final = ("AWS_", "FSSPEC_", "BOTO")

_NO_BUCKET: Final = "NoSuchBucket"
_TRANSIENT_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
_TRANSIENT_CODES: Final = frozenset(
    {
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)
_DAMAGED_CODES: Final = frozenset(
    {"BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
)
_DENIED_CODES: Final = frozenset(
    {
        "AccessDenied",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_FULL_CODES: Final = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})
_LOST: Final = (
    aiohttp.ClientError,
    TimeoutError,
    ConnectionError,
    BotoConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,
)
_NO_CREDENTIALS: Final = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Place:
    """A key of a bucket; also a prefix of keys."""

    bucket: str
    key: str

    @property
    def url(self) -> str:
        """As people write it; holds no secret."""
        return f"s3://{self.bucket}/{self.key}"


class RequestRefused(StorageFailed):
    """The server refused a request for good; `status` and `code` tell how."""

    status: int = 0
    code: str = ""

    @property
    def is_bucket_missing(self) -> bool:
        """Whether there is no such bucket."""
        return self.code == _NO_BUCKET


@dataclass(frozen=True, slots=True)
class _Trouble:
    """What went wrong with one try, without anything that could be secret."""

    what: str
    code: int = errno.EIO
    """An errno."""
    status: int = 0
    reply: str = ""
    """Error code of the server."""
    is_transient: bool = False
    is_damage: bool = False

    def as_error(self, name: str, url: str, tries: int) -> StorageFailed:
        often = f" {tries} times" if tries > 1 else ""
        message = f"{name} {show(url, 200)} failed{often}: {self.what}"
        if self.is_damage:
            return TransferDamaged(self.code, message)
        if self.is_transient:
            return StorageUnavailable(self.code, message)
        if self.status == 404 and self.reply != _NO_BUCKET:
            return ObjectMissing(errno.ENOENT, message)
        refused = RequestRefused(self.code, message)
        refused.status, refused.code = self.status, self.reply
        return refused


class _NoEndpoint(Exception):
    """The endpoint of the settings is no URL."""


_MEANINGS: Final[Sequence[tuple[tuple[type[Exception], ...], _Trouble]]] = (
    (
        (FlexibleChecksumError,),
        _Trouble("the bytes do not have their checksum", is_transient=True, is_damage=True),
    ),
    ((TimeoutError,), _Trouble("no answer in time", errno.ETIMEDOUT, is_transient=True)),
    (_LOST, _Trouble("the connection failed", is_transient=True)),
    (_NO_CREDENTIALS, _Trouble("no usable credentials", errno.EACCES)),
    ((_NoEndpoint,), _Trouble("the endpoint is no URL", errno.EINVAL)),
    ((BotoCoreError,), _Trouble("it cannot be sent", errno.EINVAL)),
)
"""What errors that are no reply mean; the first that fits counts."""


def _trouble(error: Exception) -> _Trouble:
    """Tell what an error of the libraries means; one that is a defect of the program is raised again."""
    if isinstance(error, ClientError):
        return _refusal(error.response)
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return _Trouble("the certificate of the server is not trusted")
    for kinds, trouble in _MEANINGS:
        if isinstance(error, kinds):
            return replace(trouble, what=f"{trouble.what} ({type(error).__name__})")
    raise error


def _refusal(response: Mapping[str, Any]) -> _Trouble:
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", ""))
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9.]{0,63}", code):
        code = ""  # a reply to HEAD has no body that could tell one
    trouble = _Trouble(f"HTTP {status} {code}".rstrip(), status=status, reply=code)
    if code in _FULL_CODES or status == 507:
        return replace(trouble, what=f"{trouble.what}: no space left", code=errno.ENOSPC)
    if code == _NO_BUCKET:
        return replace(trouble, what=f"{trouble.what}: there is no such bucket")
    if code in _DENIED_CODES or status in {401, 403}:
        return replace(trouble, what=f"{trouble.what}: access denied", code=errno.EACCES)
    if status == 400 and not code:
        return replace(trouble, what=f"{trouble.what}: access denied, perhaps by an expired token", code=errno.EACCES)
    is_damage = code in _DAMAGED_CODES
    is_transient = is_damage or code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS
    return replace(trouble, is_transient=is_transient, is_damage=is_damage)


class Body(io.RawIOBase):
    """Bytes of a request, read out of memory without a copy of the whole; botocore may sum and rewind it."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view
        self._at = 0

    def __len__(self) -> int:
        return len(self._view)

    @property
    def rest(self) -> memoryview:
        """The bytes from here on."""
        return self._view[self._at :]

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere."""
        self._at = offset + (0, self._at, len(self._view))[whence]
        return self._at

    def read(self, size: int = -1, /) -> memoryview:
        """Give the next bytes without copying them; hashes and sockets take views."""
        rest = len(self._view) - self._at
        count = rest if size < 0 else min(size, rest)
        self._at += count
        return self._view[self._at - count : self._at]

    def readinto(self, out: Any) -> int:
        """Copy the next bytes."""
        count = min(len(out), len(self._view) - self._at)
        out[:count] = self._view[self._at : self._at + count]
        self._at += count
        return count


class _BodyPayload(aiohttp.payload.Payload):
    """Sends a `Body` as it is; any other file would be read by a thread of its own, in small bits."""

    def __init__(self, value: Body, **options: Any) -> None:
        super().__init__(value, **options)
        self._size = len(value.rest)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Give the bytes as text."""
        return bytes(self._value.rest).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send everything that follows; the body stays where it is, so that it can be sent again."""
        view: memoryview = self._value.rest
        for begin in range(0, len(view), CHUNK_BYTES):
            await writer.write(view[begin : begin + CHUNK_BYTES])


aiohttp.payload.register_payload(_BodyPayload, Body, order=aiohttp.payload.Order.try_first)


def transfer_seconds(size: int) -> float:
    """How long a request that carries `size` bytes may take."""
    return REQUEST_SECONDS + size / SLOWEST


def wait_for(future: Future[_T]) -> _T:
    """Wait for a request; it is given up when the wait is broken off."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _never() -> bool:
    return False


def read_time(text: Any) -> datetime:
    """Read a time of a header or of a listing; botocore, which guesses among all spellings, takes 20 times as long.

    >>> read_time("Mon, 30 Nov 2026 15:10:41 GMT") == read_time("2026-11-30T15:10:41.000Z")
    True
    """
    if isinstance(text, str):
        for reader in (parsedate_to_datetime, datetime.fromisoformat):
            try:
                time = reader(text)
            except ValueError:
                continue
            if time.tzinfo is not None:
                return time
    guessed: datetime = parse_timestamp(text)
    return guessed


def _connector_args() -> dict[str, Any]:
    from aiobotocore.config import AioConfig  # takes long to import

    wanted = {"socket_factory": prompt_socket}
    try:
        AioConfig(connector_args=wanted)
    except BotoCoreError:  # an older one does not know it
        return {}
    return wanted


class Client:
    """The way to one endpoint for one process; all its threads share it."""

    def __init__(self) -> None:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        self._signs_bodies = endpoint.startswith("http://")
        """What it most likely has to be; `_connect` finds out."""
        self._fs = fsspec.filesystem(
            "s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=self._settings()
        )
        self._fs.retries = 1
        self._is_connected = False
        self._has_answered = False
        self._connecting = asyncio.Lock()

    def _settings(self) -> dict[str, Any]:
        # Over plain http nothing but a signed body tells the server of damage. Over https that would only cost time.
        return {
            "connect_timeout": CONNECT_SECONDS,
            "connector_args": _connector_args(),
            "max_pool_connections": _CONNECTIONS,
            "read_timeout": READ_SECONDS,
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "s3": {"payload_signing_enabled": self._signs_bodies},
            "user_agent": f"shardmill/{version('shardmill')}",  # that of botocore is put together for every request
        }

    async def _connect(self) -> None:
        async with self._connecting:
            if self._is_connected:
                return
            try:
                session = await self._fs.set_session()
            except ValueError:
                session = None
            if session is None:
                raise _NoEndpoint
            signs_bodies = str(session.meta.endpoint_url).startswith("http://")
            if signs_bodies != self._signs_bodies:
                self._signs_bodies = signs_bodies
                self._fs.config_kwargs = self._settings()
                await self._fs.set_session(refresh=True)
            self._fs.session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=read_time)
            self._is_connected = True

    async def send(self, method: str, **arguments: Any) -> Any:
        """Do one try of one request; errors are those of the libraries."""
        if not self._is_connected:
            await self._connect()
        await self._fs.set_session()
        session = await self._fs.get_s3(arguments["Bucket"])
        try:
            reply = await getattr(session, method)(**arguments, **self._fs.req_kw)
        except ClientError:
            self._has_answered = True
            raise
        self._has_answered = True
        return reply

    def start(
        self,
        name: str,
        url: str,
        attempt: Callable[[], Awaitable[_T]],
        *,
        seconds: float | None = None,
        give_up: Callable[[], bool] = _never,
    ) -> Future[_T]:
        """Begin a request that is tried until it succeeds, is refused, or its time is over.

        Args:
            name: the operation, for messages.
            attempt: one try.
            seconds: for all tries together; `REQUEST_SECONDS` unless given.
            give_up: whether another try is of no use any more.
        """
        limit = REQUEST_SECONDS if seconds is None else seconds
        if not self._has_answered:
            limit = min(limit, FIRST_SECONDS)
        return asyncio.run_coroutine_threadsafe(_insist(name, url, attempt, limit, give_up), self._fs.loop)

    def call(self, name: str, place: Place, method: str, *, seconds: float | None = None, **arguments: Any) -> Any:
        """Do one request that carries few bytes, and wait for its reply.

        Args:
            name: the operation, as it is counted and told.
            method: of the S3 API.
            arguments: of the method, `Bucket` and `Key` excepted; `Key` may be overridden by None to leave it out.
        """
        key = {"Key": place.key} if arguments.pop("Key", place.key) is not None else {}
        with operation(name, place.url):
            return wait_for(
                self.start(
                    name,
                    place.url,
                    lambda: self.send(method, Bucket=place.bucket, **key, **arguments),
                    seconds=seconds,
                )
            )

    def put(self, place: Place, data: bytes, **arguments: Any) -> None:
        """Write an object in one request."""
        self.put_view(place, memoryview(data), **arguments)

    def put_view(self, place: Place, view: memoryview, **arguments: Any) -> None:
        """Write an object in one request."""

        def attempt() -> Awaitable[Any]:
            return self.send("put_object", Bucket=place.bucket, Key=place.key, Body=Body(view), **arguments)

        with operation("put", place.url):
            wait_for(self.start("put", place.url, attempt, seconds=transfer_seconds(len(view))))

    def remove(self, place: Place, *, seconds: float | None = None) -> None:
        """Delete an object; one that is not there is no error."""
        try:
            self.call("delete", place, "delete_object", seconds=seconds)
        except ObjectMissing:
            return

    def get(self, place: Place, limit: int, **arguments: Any) -> tuple[Mapping[str, Any], bytes]:
        """Read the first bytes of what a request answers with, `limit` of them or all; also its head."""

        async def attempt() -> tuple[Mapping[str, Any], bytes]:
            reply = await self.send("get_object", Bucket=place.bucket, Key=place.key, **arguments)
            async with reply["Body"] as body:
                length = int(reply["ContentLength"])
                data = bytearray()
                while len(data) < min(length, limit):
                    chunk = await body.read(min(CHUNK_BYTES, limit - len(data)))
                    if not chunk:
                        raise aiohttp.ClientPayloadError
                    data += chunk
                if length <= limit:
                    await body.read()  # the end: checksums are compared there
            return reply, bytes(data)

        with operation("get", place.url):
            return wait_for(self.start("get", place.url, attempt, seconds=transfer_seconds(limit)))

    def read_range(self, place: Place, etag: str, start: int, view: memoryview) -> Future[None]:
        """Begin to fill `view` with bytes of the object that had this ETag; a broken transfer goes on where it broke.

        The future raises `SourceChanged` where the object is another one or gone, else `StorageFailed`.
        """
        try:
            with operation("get", place.url):
                return asyncio.run_coroutine_threadsafe(self._fill(place, etag, start, view), self._fs.loop)
        except StorageFailed as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

    async def _fill(self, place: Place, etag: str, start: int, view: memoryview) -> None:
        done = 0

        def took(nbytes: int) -> None:
            nonlocal done
            done += nbytes

        async def attempt() -> None:
            span = f"bytes={start + done}-{start + len(view) - 1}"
            reply = await self.send("get_object", Bucket=place.bucket, Key=place.key, IfMatch=f'"{etag}"', Range=span)
            async with reply["Body"] as body:
                _check_range(reply, place, etag, start + done)
                await read_into(body, view[done:], took, silence=READ_SECONDS)

        if not len(view):
            return
        try:
            await _insist("get", place.url, attempt, transfer_seconds(len(view)), _never)
        except ObjectMissing:
            pass
        except RequestRefused as error:
            if error.status not in {412, 416}:
                raise
        else:
            return
        raise changed(place)


def changed(place: Place) -> SourceChanged:
    """Build the error for an object that is not what it was."""
    return SourceChanged(f"{show(place.url, 200)} changed while it was read; run again")


def etag_of(reply: Mapping[str, Any]) -> str:
    """ETag without its quotes."""
    return str(reply.get("ETag", "")).strip('"')


def _check_range(reply: Mapping[str, Any], place: Place, etag: str, first: int) -> None:
    """Do not trust that a server heeds `Range` and `If-Match`."""
    if etag_of(reply) != etag:
        raise changed(place)
    if not str(reply.get("ContentRange", "" if first else "bytes 0-")).startswith(f"bytes {first}-"):
        raise StorageFailed(errno.EIO, f"get {show(place.url, 200)} failed: the server does not read ranges")


async def _insist(
    name: str, url: str, attempt: Callable[[], Awaitable[_T]], seconds: float, give_up: Callable[[], bool]
) -> _T:
    """Try until it works, with growing and random pauses; give up when time is over or more tries are of no use."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    trouble: _Trouble | None = None
    tries = 0
    while True:
        tries += 1
        try:
            async with asyncio.timeout_at(end):
                return await attempt()
        except ShardmillError:
            raise
        except Exception as error:  # noqa: BLE001 - sorted out there, and raised again where it is a defect
            is_out_of_time = isinstance(error, TimeoutError) and loop.time() >= end
            if trouble is None or not is_out_of_time:  # else what went wrong before tells more
                trouble = _trouble(error)
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(tries, 10)) * _chance.uniform(0.5, 1.0)
        if not trouble.is_transient or give_up() or loop.time() + pause >= end:
            break
        _log.debug("%s %s: %s; try %d follows", name, url, trouble.what, tries + 1)
        await asyncio.sleep(pause)
    raise trouble.as_error(name, url, tries)


# ---- one client per process

_lock = threading.Lock()
_clients: dict[object, Client] = {}


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - another thread may have held it when this process split off
    _lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)


def connect() -> Client:
    """Give the client of this process for the environment as it is now; made at the first call, connected later."""
    settings = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    key = (os.getpid(), hash(frozenset(settings.items())))
    with _lock:
        if key not in _clients:
            _clients.clear()
            _clients[key] = Client()
        return _clients[key]
