"""A proxy between unix sockets that fails on demand."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket.lab.torture.proxy import Mode, Proxy, TcpProxy, socket_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SOON_S = 0.1
LAST = b"!"


class Server:
    """A primary that echoes what it receives, and ends after `LAST`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        with contextlib.suppress(OSError):
            while piece := await reader.read(1000):
                self.heard += piece
                writer.write(piece)
                if piece == LAST:
                    break
        writer.close()


@pytest_asyncio.fixture
async def server(kept_dir: Path) -> AsyncIterator[Server]:
    """A server at the other end of the link."""
    echo = Server(socket_path(kept_dir, 1))
    listening = await asyncio.start_unix_server(echo.serve, echo.path)
    yield echo
    listening.close()


@pytest_asyncio.fixture
async def proxy(server: Server, kept_dir: Path) -> AsyncIterator[Proxy]:
    """A link that passes everything."""
    proxy = Proxy(socket_path(kept_dir, 2), lambda: server.path)
    async with proxy.listening():
        yield proxy


@contextlib.asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect as a replica would."""
    reader, writer = await asyncio.open_unix_connection(proxy.path)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_what_is_sent_goes_through_both_ways(proxy: Proxy) -> None:
    """In order and whole, also when it is much."""
    async with connected(proxy) as (reader, writer):
        sent = bytes(range(256)) * 4000
        writer.write(sent)
        async with asyncio.timeout(5):
            assert sent == await reader.readexactly(len(sent))


async def test_a_cut_link_drops_connections_and_lets_none_in(proxy: Proxy) -> None:
    """And passes again when it is whole."""
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        assert b"x" == await reader.readexactly(1)
        proxy.turn(Mode.CUT)
        with contextlib.suppress(ConnectionError):
            assert b"" == await reader.read(1)
    async with connected(proxy) as (reader, _):
        with contextlib.suppress(ConnectionError):
            assert b"" == await reader.read(1)
    proxy.turn(Mode.PASS)
    async with connected(proxy) as (reader, writer):
        writer.write(b"y")
        assert b"y" == await reader.readexactly(1)


async def test_a_delayed_link_is_late_by_as_much_each_way(proxy: Proxy) -> None:
    """However many pieces are under way."""
    proxy.turn(Mode.DELAYED, delay_s=0.05)
    async with connected(proxy) as (reader, writer):
        began = time.monotonic()
        for _ in range(20):
            writer.write(b"x")
            await asyncio.sleep(0.001)
        assert b"x" * 20 == await reader.readexactly(20)
        assert 0.1 <= time.monotonic() - began < 0.5


async def test_a_refusing_link_lets_none_in(proxy: Proxy) -> None:
    """Connections made before go on."""
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        assert b"x" == await reader.readexactly(1)
        proxy.turn(Mode.REFUSING)
        async with connected(proxy) as (other, _):
            with contextlib.suppress(ConnectionError):
                assert b"" == await other.read(1)
        writer.write(b"y")
        assert b"y" == await reader.readexactly(1)


async def test_a_forgotten_connection_stands_and_says_nothing(proxy: Proxy, server: Server) -> None:
    """A new one is as good as ever; the server notices that a client has given up."""
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        assert b"x" == await reader.readexactly(1)
        proxy.forget()
        writer.write(b"y")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON_S):
                await reader.read(1)
        assert b"x" == server.heard
        async with connected(proxy) as (other, to_other):
            to_other.write(b"z")
            assert b"z" == await other.readexactly(1)
    async with asyncio.timeout(5):
        while any(proxy.path.name in task.get_name() for task in asyncio.all_tasks()):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("mode", "heard"), [(Mode.SILENT_PRIMARY, b"xy"), (Mode.SILENT_REPLICA, b"x")])
async def test_a_half_open_link_holds_one_direction_back(
    proxy: Proxy, server: Server, mode: Mode, heard: bytes
) -> None:
    """The connection stands, the other direction works, and what was held back comes in the end."""
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        assert b"x" == await reader.readexactly(1)
        proxy.turn(mode)
        writer.write(b"y")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON_S):
                await reader.read(1)
        assert heard == server.heard
        proxy.turn(Mode.PASS)
        assert b"y" == await reader.readexactly(1)


async def test_without_a_primary_new_connections_are_closed(proxy: Proxy, server: Server) -> None:
    """Connections made before stay."""
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        assert b"x" == await reader.readexactly(1)
        server.path.unlink()
        async with connected(proxy) as (other, _):
            with contextlib.suppress(ConnectionError):
                assert b"" == await other.read(1)
        writer.write(b"y")
        assert b"y" == await reader.readexactly(1)


async def test_the_end_of_the_primary_is_seen_through_the_link(proxy: Proxy) -> None:
    """What it sent last arrives before that."""
    async with connected(proxy) as (reader, writer):
        writer.write(LAST)
        assert LAST == await reader.readexactly(1)
        with contextlib.suppress(ConnectionError):
            assert b"" == await reader.read(1)


async def test_nothing_is_left_of_a_closed_link(server: Server, kept_dir: Path) -> None:
    """Neither socket nor task."""
    proxy = Proxy(socket_path(kept_dir, 2), lambda: server.path)
    async with proxy.listening(), connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
    assert not proxy.path.exists()
    assert not [task for task in asyncio.all_tasks() if proxy.path.name in task.get_name()]


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.9 is an address of its own on Linux only")
async def test_a_silent_link_by_tcp_holds_everything_back(server: Server) -> None:
    """New connections are accepted, and receive nothing either; in the end all of it arrives."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    proxy = TcpProxy("127.0.0.9", port, "127.0.0.1")
    async with proxy.listening(), asyncio.timeout(5):
        proxy.turn(Mode.SILENT)
        reader, writer = await asyncio.open_connection("127.0.0.9", port)
        writer.write(b"x")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON_S):
                await reader.read(1)
        assert b"" == server.heard

        proxy.turn(Mode.PASS)
        assert b"x" == await reader.read(1)
        writer.close()
    listening.close()
