"""Bodies of replies: from the socket straight into memory that is there.

aiohttp makes a new object of every 256 KiB that arrive, and each is copied once more: that is most of what a client
pays for reading. So when it has parsed the head of a reply of known length, its protocol steps aside for one that lets
the socket write where the bytes belong, and comes back when the body is there. asyncio provides for that, with TLS and
without (`BufferedProtocol`, `Transport.set_protocol`). A connection that is not as expected is read in chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import aiohttp

CHUNK_BYTES: Final = 256 << 10


async def read_into(body: Any, view: memoryview, took: Callable[[int], None], *, silence: float) -> None:
    """Fill `view` with the first bytes of a body.

    Args:
        body: of a reply of aiobotocore.
        took: called with the number of bytes whenever some arrived, so that a broken body can go on where it broke.
        silence: seconds without a byte after which the connection counts as lost.

    Raises:
        aiohttp.ClientError: the connection broke, or the body is too short.
        TimeoutError: nothing arrived for so long.
    """
    response = getattr(body, "raw_stream", None)
    if not isinstance(response, aiohttp.ClientResponse) or not _is_exactly(response, len(view)):
        await _read_chunks(body, view, took)
        return
    at = _take_buffered(response.content, view, took)
    if at == len(view):
        return
    connection = response.connection
    if connection is None or not isinstance(connection.transport, asyncio.Transport):
        await _read_chunks(body, view[at:], took)
        return
    rest = _Rest(connection.transport, connection.protocol, view[at:], took, silence)
    try:
        await rest.arrived
    except BaseException:
        rest.stop()
        response.close()
        raise
    response.content.feed_eof()


def _is_exactly(response: aiohttp.ClientResponse, nbytes: int) -> bool:
    """Whether the body has that length, as it is."""
    headers = response.headers
    return headers.get("Content-Length") == str(nbytes) and not {"Transfer-Encoding", "Content-Encoding"} & set(headers)


def _take_buffered(content: aiohttp.StreamReader, view: memoryview, took: Callable[[int], None]) -> int:
    """Take what arrived with the head of the reply."""
    at = 0
    while at < len(view) and (chunk := content.read_nowait(len(view) - at)):
        view[at : at + len(chunk)] = chunk
        at += len(chunk)
        took(len(chunk))
    return at


async def _read_chunks(body: Any, view: memoryview, took: Callable[[int], None]) -> None:
    at = 0
    while at < len(view):
        chunk = await body.read(min(CHUNK_BYTES, len(view) - at))
        if not chunk:
            raise aiohttp.ClientPayloadError
        view[at : at + len(chunk)] = chunk
        at += len(chunk)
        took(len(chunk))


class _Rest(asyncio.BufferedProtocol):
    """Stands in for the protocol of a connection until the rest of one body is in memory, and not a byte longer."""

    def __init__(
        self,
        transport: asyncio.Transport,
        usual: Any,
        view: memoryview,
        took: Callable[[int], None],
        silence: float,
    ) -> None:
        self._transport, self._usual = transport, usual
        self._view, self._took, self._silence = view, took, silence
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self.arrived: asyncio.Future[None] = self._loop.create_future()
        usual.pause_reading()  # its watch over silence ends with that
        transport.set_protocol(self)
        transport.resume_reading()
        self._watch = self._loop.call_later(silence, self._listen)

    def stop(self) -> None:
        """Write no more, and let the usual protocol hear what comes."""
        self._watch.cancel()
        self._view = memoryview(b"")
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._usual)

    def _end(self, error: BaseException | None = None) -> None:
        self.stop()
        if self.arrived.done():
            return
        if error is None:
            self.arrived.set_result(None)
        else:
            self.arrived.set_exception(error)

    def _listen(self) -> None:
        left = self._heard + self._silence - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._listen)
        else:
            self._end(TimeoutError())

    # ---- what the transport calls

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - what is left is what may come
        """Give the memory that is not filled yet."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Take note of what was written there."""
        self._heard = self._loop.time()
        self._view = self._view[nbytes:]
        self._took(nbytes)
        if not len(self._view):
            self._end()

    def eof_received(self) -> Any:
        """Let the connection close."""
        return self._usual.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell both the usual protocol and who waits for the body."""
        self._usual.connection_lost(exc)
        self._end(aiohttp.ClientPayloadError() if exc is None else aiohttp.ClientOSError(*exc.args))

    def pause_writing(self) -> None:
        """Leave it to the usual protocol."""
        self._usual.pause_writing()

    def resume_writing(self) -> None:
        """Leave it to the usual protocol."""
        self._usual.resume_writing()
