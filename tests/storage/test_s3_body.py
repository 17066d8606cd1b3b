"""Bodies that go from the socket straight into memory, beside a server that says when which bytes come."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from shardmill.storage import s3_body
from shardmill.storage.prompt import PromptSocket, prompt_socket
from shardmill.storage.s3_body import read_into

DATA = bytes(range(256)) * 4096
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Site:
    """An HTTP server of one answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.writers: list[asyncio.StreamWriter] = []
        self.url = ""

    @property
    def connections(self) -> int:
        return len(self.writers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await self.answer(writer)
                await writer.drain()


def head(length: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length


@contextlib.asynccontextmanager
async def running(answer: Answer, certificate: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    site = Site(answer)
    server = await asyncio.start_server(site.serve, "127.0.0.1", 0, ssl=certificate)
    port = server.sockets[0].getsockname()[1]
    site.url = f"{'https' if certificate else 'http'}://127.0.0.1:{port}/"
    try:
        yield site
    finally:
        server.close()
        for writer in site.writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)


async def fetch(session: aiohttp.ClientSession, url: str, view: memoryview, **options: Any) -> list[int]:
    """Read one body; how many bytes came at a time."""
    came: list[int] = []
    async with session.get(url, ssl=False) as response:
        body = SimpleNamespace(raw_stream=response, read=response.content.read)
        await read_into(body, view, came.append, **{"silence": 5.0, **options})
    return came


@pytest.fixture
def certificate(tmp_path: Path) -> ssl.SSLContext:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "pem").write_bytes(made + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    return context


@pytest.mark.parametrize("is_secret", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("first", [0, 1, 70_000, 900_000, len(DATA)])
def test_bodies_arrive_and_the_connection_is_used_again(
    certificate: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, first: int, *, is_secret: bool
) -> None:
    async def in_chunks(*_: object) -> None:
        raise AssertionError("the body was read in chunks")

    monkeypatch.setattr(s3_body, "_read_chunks", in_chunks)

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(len(DATA)) + DATA[:first])
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(DATA[first:])

    async def main() -> int:
        async with running(answer, certificate if is_secret else None) as site, aiohttp.ClientSession() as session:
            for _ in range(3):
                found = bytearray(len(DATA))
                assert sum(await fetch(session, site.url, memoryview(found))) == len(DATA)
                assert found == DATA
            async with session.get(site.url, ssl=False) as response:
                assert await response.read() == DATA
            return site.connections

    assert asyncio.run(main()) == 1


@pytest.mark.parametrize("sent", [1, 70_000, len(DATA) - 1])
def test_a_broken_body_tells_how_far_it_came(sent: int) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(len(DATA)))
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(DATA[:sent])
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with running(answer) as site, aiohttp.ClientSession() as session:
            found = bytearray(len(DATA))
            came: list[int] = []
            async with session.get(site.url) as response:
                with pytest.raises(aiohttp.ClientError):
                    await read_into(SimpleNamespace(raw_stream=response), memoryview(found), came.append, silence=5.0)
            assert sum(came) == sent
            assert found == DATA[:sent] + bytes(len(DATA) - sent)

    asyncio.run(main())


def test_silence_ends_the_read_and_the_connection() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(len(DATA)) + DATA[:100])

    async def main() -> int:
        async with running(answer) as site, aiohttp.ClientSession() as session:
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await fetch(session, site.url, memoryview(bytearray(len(DATA))), silence=0.05)
            return site.connections

    assert asyncio.run(main()) == 2


def test_a_read_that_is_given_up_writes_no_more() -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(head(len(DATA)) + DATA[:100])
            await writer.drain()
            await go_on.wait()
            writer.write(DATA[100:])

        async with running(answer) as site, aiohttp.ClientSession() as session:
            found = bytearray(len(DATA))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await fetch(session, site.url, memoryview(found))
            go_on.set()
            await asyncio.sleep(0.05)
            assert found == DATA[:100] + bytes(len(DATA) - 100)

    asyncio.run(main())


@pytest.mark.parametrize("wanted", [1, 70_000, len(DATA) - 1])
def test_of_a_longer_body_only_the_first_bytes_are_taken(wanted: int) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(len(DATA)) + DATA)

    async def main() -> None:
        async with running(answer) as site, aiohttp.ClientSession() as session:
            found = bytearray(wanted)
            assert sum(await fetch(session, site.url, memoryview(found))) == wanted
            assert found == DATA[:wanted]

    asyncio.run(main())


def test_a_shorter_body_is_an_error() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(10) + DATA[:10])

    async def main() -> None:
        async with running(answer) as site, aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientPayloadError):
                await fetch(session, site.url, memoryview(bytearray(11)))

    asyncio.run(main())


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="only Linux has the option")
def test_prompt_sockets_ask_for_acknowledgement_after_every_reply() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        [address, *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with prompt_socket(address) as client:
            assert isinstance(client, PromptSocket)
            client.connect((host, port))
            other, _ = server.accept()
            with other:
                for _ in range(3):
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
                    other.sendall(b"head")
                    assert client.recv(100) == b"head"
                    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) == 1
