"""Clients that are slow, too many or never satisfied: they are tolerated for a while, at no cost to others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from rocket.lab.api.limits import Bounds
from tests.support.raw_http import FORM, UNKNOWN, answer_from, ask, connection, new_ride, refusal, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.raw_http import Address

pytestmark = pytest.mark.usefixtures("nothing_is_logged_as_an_error")

DEADLINE_S = 10.0
LIVEZ = request(b"GET /livez")
RIDE = request(b"GET /rides/1")
"""Of an unknown user: it is a 401, which takes a query."""
MANY = 10_000
CONNECTIONS = 400
"""How many there may be."""
MIB = 2**20


SLOW_BODIES = Bounds(
    body_s=60.0, keepalive_s=1.0, lingering_s=0.2, unread_s=1.0, connections=CONNECTIONS
)  # fmt: skip


@pytest.fixture
def bounds() -> Bounds:
    """Have the server give up soon, and take few connections."""
    return Bounds(body_s=0.2, keepalive_s=1.0, lingering_s=0.2, unread_s=1.0, connections=CONNECTIONS)


@pytest.fixture(autouse=True)
async def others_are_served(
    address: Address,
) -> AsyncIterator[None]:
    """Hold that others are answered, also on a connection that they have had for longer."""
    async with asyncio.timeout(2 * DEADLINE_S), connection(address) as (reader, writer):
        writer.write(LIVEZ)
        assert (await answer_from(reader)).status == 200
        yield
        for sent, status in ((LIVEZ, 200), (request(b"GET /readyz"), 200), (RIDE, 401)):
            assert (await ask(address, sent)).status == status


async def dripping(writer: asyncio.StreamWriter, sent: bytes) -> None:
    """Write a byte at a time, until the server closes the connection."""
    with contextlib.suppress(ConnectionError):
        for byte in sent:
            if writer.is_closing():  # uvloop has another error for that
                return
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("before", [b"", LIVEZ], ids=["at first", "later"])
async def test_headers_that_come_a_byte_at_a_time_are_not_waited_for(address: Address, before: bytes) -> None:
    """A request has to be there in time, whatever of it has come."""
    reader, writer = await asyncio.open_connection(*address)
    if before:
        writer.write(before)
        await answer_from(reader)
    slow = asyncio.ensure_future(dripping(writer, LIVEZ.replace(b"Host", b"X-" + b"y" * 500 + b": z\r\nHost")))
    async with asyncio.timeout(DEADLINE_S):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await slow
    writer.close()


async def test_a_body_that_comes_a_byte_at_a_time_is_not_waited_for(address: Address) -> None:
    """The answer says so, and then the connection is closed."""
    async with connection(address) as (reader, writer):
        writer.write(new_ride(FORM, b"Content-Length: 10000"))
        slow = asyncio.ensure_future(dripping(writer, b"x" * 10_000))
        assert refusal(await answer_from(reader)) == (408, "The request body did not arrive in time.")
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await slow


async def test_a_body_that_nobody_asked_for_is_not_read_for_ever(address: Address) -> None:
    """Where it does not matter it is read for a moment, so that the answer gets through, and no longer."""
    sent = request(b"GET /livez", b"Transfer-Encoding: chunked") + b"10000\r\n" + b"x" * 65536 + b"\r\n"
    async with connection(address) as (reader, writer):
        writer.write(sent)
        assert (await answer_from(reader)).status == 200
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()


@pytest.mark.parametrize("bounds", [SLOW_BODIES])
async def test_slow_bodies_take_nobodys_place(address: Address) -> None:
    """However many wait for theirs, others are let in."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(300):  # more than are let in at a time
            _, writer = await stack.enter_async_context(connection(address))
            writer.write(new_ride(FORM, b"Content-Length: 1000", b"Authorization: " + UNKNOWN, body=b"distance"))
        assert (await ask(address, RIDE)).status == 401


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="left to the system's own patience")
async def test_a_client_that_reads_no_answers_is_given_up(address: Address) -> None:
    """What was sent to it is not kept for ever, nor is its connection."""
    asking = socket.socket()
    asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    asking.setblocking(False)
    loop = asyncio.get_running_loop()
    with asking:
        await loop.sock_connect(asking, address)
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionError):
                while True:
                    await loop.sock_sendall(asking, request(b"GET /metrics") * 10)


async def test_thousands_of_requests_on_one_connection_are_answered_in_turn(address: Address) -> None:
    """All of them, in order, and without keeping others waiting or memory in the meantime."""
    rss = psutil.Process().memory_info().rss
    reader, writer = await asyncio.open_connection(*address)
    sending = asyncio.ensure_future(_send_all(writer, [request(b"GET /nowhere/%d" % n) for n in range(MANY)]))
    began = time.monotonic()
    assert (await ask(address, RIDE)).status == 401
    alone_s = time.monotonic() - began
    for number in range(MANY):
        assert b"/nowhere/%d'" % number in (await answer_from(reader)).body
    assert alone_s < time.monotonic() - began
    await sending
    writer.close()
    assert psutil.Process().memory_info().rss - rss < 50 * MIB


async def _send_all(writer: asyncio.StreamWriter, requests: list[bytes]) -> None:
    for each in requests:
        writer.write(each)
        await writer.drain()


async def test_idle_connections_make_room_for_new_ones(address: Address) -> None:
    """A new one is served, and those that did nothing for longest are gone."""
    idle = [await asyncio.open_connection(*address) for _ in range(2 * CONNECTIONS)]
    assert (await ask(address, RIDE)).status == 401
    closed = await asyncio.gather(*(_is_closed(reader) for reader, _ in idle))
    assert closed[:CONNECTIONS] == [True] * CONNECTIONS
    assert CONNECTIONS // 2 < closed.count(False) <= CONNECTIONS
    for _, writer in idle:
        writer.close()


@pytest.mark.parametrize("bounds", [SLOW_BODIES])
async def test_who_is_being_served_keeps_its_connection(address: Address) -> None:
    """However many others connect."""
    async with connection(address) as (reader, writer):
        writer.write(new_ride(FORM, b"Content-Length: 12"))
        idle = [await asyncio.open_connection(*address) for _ in range(2 * CONNECTIONS)]
        writer.write(b"distance=abc")
        assert refusal(await answer_from(reader))[0] == 422
    for _, writer in idle:
        writer.close()


@pytest.mark.parametrize("bounds", [SLOW_BODIES])
async def test_without_an_idle_one_new_connections_are_closed(address: Address) -> None:
    """At once, and not by keeping them waiting."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(CONNECTIONS + 20):
            _, writer = await stack.enter_async_context(connection(address))
            writer.write(new_ride(FORM, b"Content-Length: 12"))
        reader, _ = await stack.enter_async_context(connection(address))
        assert await _is_closed(reader)
    async with asyncio.timeout(DEADLINE_S):
        while await _is_refused(address):
            await asyncio.sleep(0.01)


async def _is_closed(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(0.1):
            return await reader.read(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


async def _is_refused(address: Address) -> bool:
    try:
        await ask(address, LIVEZ)
    except (ConnectionError, asyncio.IncompleteReadError):
        return True
    return False
