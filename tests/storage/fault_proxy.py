"""A proxy on the loopback interface that makes a test S3 server misbehave on request.

It hands every request on unchanged, the Host header included, so that signatures stay valid. Rules say which requests
go wrong and how. It refuses an upstream that is no loopback address, so it can never be pointed at real data.
A request body is held in memory while it is handed on.

    with FaultProxy("http://127.0.0.1:9110") as proxy:
        proxy.set_rules(Rule("lost_reset", method="POST", path="uploadId=", nth=(1,)))
        ...
        assert [entry.path for entry in proxy.log if entry.fired]

What `Rule.do` may say:

    before the server sees the request
      status          answer `status` with an S3 error body of `code` and `message`
      reset           TCP reset instead of an answer
      reset_upload    TCP reset after `at` bytes of the request body, or at its end
      hang            no answer for `seconds`, then a reset
      delay           wait `seconds`, then go on as usual
      corrupt_upload  invert the byte at offset `at` of the request body
    after the server has carried it out
      lost_status     the answer is replaced by `status` and `code`
      lost_reset      the answer is replaced by a TCP reset
    in the body of the answer, whose headers are passed on as they are
      short           close the connection in good order after `at` bytes
      reset_body      TCP reset after `at` bytes
      stall           silence for `seconds` after `at` bytes, then close
      slow            at most `rate` bytes per second
      corrupt         invert the byte at offset `at`
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import random
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from yarl import URL

BEFORE: Final = frozenset({"status", "reset", "reset_upload", "hang", "delay", "corrupt_upload"})
LOST: Final = frozenset({"lost_status", "lost_reset"})
CUTS: Final = frozenset({"short", "reset_body", "stall"})
ACTIONS: Final = BEFORE | LOST | CUTS | {"slow", "corrupt"}
# Hop-by-hop headers belong to one connection, and Expect is answered here; signatures cover none of these.
NOT_FORWARDED: Final = frozenset(
    {"connection", "expect", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)
CHUNK: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Rule:
    """What goes wrong, and with which requests; what is left out means any."""

    do: str
    method: str | None = None
    path: str = ""
    """Regular expression searched in path and query, as they were sent."""
    header: str | None = None
    """Name of a header that must be there."""
    nth: tuple[int, ...] = ()
    """Fires on these matching requests, counted from 1."""
    every: int | None = None
    p: float | None = None
    """Fires on each matching request with this probability, drawn from `seed`."""
    seed: int = 0
    times: int | None = None
    """Fires so often at most."""
    status: int = 503
    code: str = "SlowDown"
    message: str = "injected fault"
    at: int = 0
    seconds: float = 30.0
    rate: int = 1 << 20

    def __post_init__(self) -> None:
        if self.do not in ACTIONS:
            raise ValueError(f"{self.do!r}: expected one of {sorted(ACTIONS)}")
        re.compile(self.path)

    def matches(self, request: web.BaseRequest) -> bool:
        return (
            self.method in (None, request.method)
            and (self.header is None or self.header in request.headers)
            and re.search(self.path, request.raw_path) is not None
        )


@dataclass(slots=True)
class Counter:
    """How often a rule has matched and fired."""

    rule: Rule
    seen: int = 0
    fired: int = 0
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.rule.seed)  # noqa: S311 - it has to repeat

    def draw(self, request: web.BaseRequest) -> bool:
        """Count the request if it matches; True if the rule wants to fire on it."""
        rule = self.rule
        if not rule.matches(request):
            return False
        self.seen += 1
        return (
            (not rule.nth or self.seen in rule.nth)
            and (rule.every is None or self.seen % rule.every == 0)
            and (rule.p is None or self.rng.random() < rule.p)
            and (rule.times is None or self.fired < rule.times)
        )


@dataclass(slots=True)
class Entry:
    """One request that passed."""

    method: str
    path: str
    range: str | None
    do: str | None
    fired: bool = False
    """False where the body ended before the offset of the fault."""
    status: int | None = None
    """Of the server's answer; None where it was never asked or never answered."""
    sent: int = 0
    """Bytes of the body that were passed on to the client."""


class FaultProxy:
    """The proxy, with an event loop in a thread of its own; a context manager."""

    def __init__(self, upstream: str) -> None:
        self._upstream = checked_loopback(upstream)
        self._counters: list[Counter] = []
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self.port = 0
        self.log: list[Entry] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def fired(self) -> int:
        """Requests that went wrong."""
        return sum(entry.fired for entry in self.log)

    def set_rules(self, *rules: Rule) -> None:
        """Replace the rules and forget all counts and log entries; the first rule that fires decides."""
        self._counters = [Counter(rule) for rule in rules]
        self.log = []

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        app = web.Application(client_max_size=1 << 40)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # handler_cancellation: a fault that sleeps ends when its client gives up
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.port = runner.addresses[0][1]
            async with _new_session() as self._session:
                self._ready.set()
                await self._stopped.wait()
        finally:
            await runner.cleanup()

    def _select(self, request: web.Request) -> Rule | None:
        """Let every rule count the request; the first that fires is chosen."""
        firing = [counter for counter in self._counters if counter.draw(request)]
        if not firing:
            return None
        firing[0].fired += 1
        return firing[0].rule

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        rule = self._select(request)
        do = rule.do if rule else ""
        entry = Entry(request.method, request.raw_path, request.headers.get("Range"), do or None)
        self.log.append(entry)
        if rule and do in BEFORE:
            entry.fired = True
            if (answer := await _go_wrong_before(request, rule)) is not None:
                return answer
        body = await request.read()
        if rule and do == "corrupt_upload":
            entry.fired, body = rule.at < len(body), inverted(body, rule.at)
        try:
            return await self._forward(request, body, rule, entry)
        except aiohttp.ClientConnectorError as error:
            entry.fired = False
            return error_reply(502, "UpstreamUnreachable", str(error))

    async def _forward(self, request: web.Request, body: bytes, rule: Rule | None, entry: Entry) -> web.StreamResponse:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in NOT_FORWARDED]
        url = URL(self._upstream + request.raw_path, encoded=True)
        # The reply is lost however the exchange ends, be it that the client gives up while the server still works.
        entry.fired |= rule is not None and rule.do in LOST
        async with self._session.request(
            request.method, url, headers=headers, data=io.BytesIO(body) if body else None, allow_redirects=False
        ) as reply:
            entry.status = reply.status
            if rule and rule.do in LOST:
                await reply.read()
                return reset(request) if rule.do == "lost_reset" else error_reply(rule.status, rule.code)
            return await _relay(request, reply, rule, entry)


def _new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None),
        skip_auto_headers=["User-Agent", "Accept", "Accept-Encoding", "Content-Type"],
        # a pooled connection that the server has dropped would be a fault nobody asked for
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
    )


async def _go_wrong_before(request: web.Request, rule: Rule) -> web.Response | None:
    """Faults that come before the server sees the request; None if it still has to."""
    if rule.do == "status":
        await request.read()
        return error_reply(rule.status, rule.code, rule.message)
    if rule.do == "reset_upload":
        received = 0
        async for chunk in request.content.iter_chunked(CHUNK):
            received += len(chunk)
            if received >= rule.at:
                break
    if rule.do in ("hang", "delay"):
        await asyncio.sleep(rule.seconds)
    return reset(request) if rule.do in ("reset", "reset_upload", "hang") else None


async def _relay(
    request: web.Request, reply: aiohttp.ClientResponse, rule: Rule | None, entry: Entry
) -> web.StreamResponse:
    answer = web.StreamResponse(status=reply.status, reason=reply.reason)
    for name, value in reply.headers.items():
        if name.lower() not in NOT_FORWARDED:
            answer.headers.add(name, value)
    await answer.prepare(request)
    do, at = (rule.do, rule.at) if rule else ("", 0)
    async for chunk in reply.content.iter_chunked(CHUNK):
        here = at - entry.sent  # the fault's offset within this chunk
        if rule and do in CUTS and here < len(chunk):
            await answer.write(chunk[:here])
            entry.sent, entry.fired = at, True
            return await _cut(request, answer, rule)
        if rule and do == "slow":
            entry.fired = True
            await asyncio.sleep(len(chunk) / rule.rate)
        hit = do == "corrupt" and 0 <= here < len(chunk)
        entry.fired |= hit
        await answer.write(inverted(chunk, here) if hit else chunk)
        entry.sent += len(chunk)
    await answer.write_eof()
    return answer


async def _cut(request: web.Request, answer: web.StreamResponse, rule: Rule) -> web.StreamResponse:
    """End an answer whose body is not complete."""
    if rule.do == "stall":
        await asyncio.sleep(rule.seconds)
    if rule.do == "reset_body":
        await asyncio.sleep(0.05)  # a reset discards what the client has not yet read
        reset(request)
    elif request.transport is not None:
        request.transport.close()
    return answer


def checked_loopback(upstream: str) -> str:
    """The upstream URL without a trailing slash.

    Raises:
        ValueError: it is not plain HTTP on a loopback address.
    """
    parts = urlsplit(upstream)
    if parts.scheme != "http" or parts.path.strip("/") or not is_loopback(parts.hostname or ""):
        raise ValueError(f"upstream {upstream!r}: expected http://127.0.0.1:PORT")
    return f"{parts.scheme}://{parts.netloc}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def inverted(data: bytes, at: int) -> bytes:
    """The same bytes with all bits of the one at offset `at` inverted, if there is one."""
    changed = bytearray(data)
    if 0 <= at < len(changed):
        changed[at] ^= 0xFF
    return bytes(changed)


def error_reply(status: int, code: str, message: str = "injected fault") -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return web.Response(status=status, content_type="application/xml", text=text)


def reset(request: web.Request) -> web.Response:
    """Drop the connection with a TCP RST; what is returned reaches nobody."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()
