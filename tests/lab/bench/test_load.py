"""The load: a strict HTTP client, and sessions that distinguish fresh, stale and failed responses."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from rocket.lab.bench.http import BadResponse, Response, parse
from rocket.lab.bench.load import Job, Kind, Load, NotReady

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HEAD = b"HTTP/1.1 200 OK\r\nrocket-served-as: replica\r\nContent-Length: 5"
WHOLE = HEAD + b"\r\n\r\nhello"


@given(st.integers(0, len(WHOLE) - 1))
def test_a_response_is_parsed_once_it_is_complete(length: int) -> None:
    """However the network splits it."""
    assert parse(WHOLE[:length]) is None
    response = parse(WHOLE)
    assert Response(200, HEAD, b"hello") == response
    assert ("replica", "5", None) == tuple(
        response.header(name) for name in ("Rocket-Served-As", "content-length", "served-as")
    )


@pytest.mark.parametrize(
    "received",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        WHOLE + b"HTTP/1.1 200",
        b"x" * (2**20 + 1),
    ],
)
def test_what_the_api_would_not_send_is_rejected(received: bytes) -> None:
    """It is not a response, and must not be timed as one."""
    with pytest.raises(BadResponse):
        parse(received)


@contextlib.asynccontextmanager
async def api(read: Handler) -> AsyncIterator[str]:
    """Serve a stub that accepts users and rides, and answers reads by `read`."""

    async def write(_request: web.Request) -> web.Response:
        return web.json_response({"id": 1}, status=201, headers={"Rocket-Session": "written"})

    app = web.Application()
    app.add_routes([web.post("/users", write), web.post("/rides", write), web.get("/rides/1", read)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def registered(url: str) -> Load:
    """Return a load with two registered sessions."""
    load = Load()
    await load.register(Job(Kind.REGISTER, url, sessions=2, tokens=True))
    return load


async def test_sessions_send_back_their_latest_token() -> None:
    """Beginning with the token of their write; a job without tokens sends none."""
    sent = []

    async def read(request: web.Request) -> web.Response:
        sent.append(request.headers.get("Rocket-Session"))
        return web.json_response({"id": 1}, headers={"Rocket-Session": "read", "Rocket-Served-As": "replica"})

    async with api(read) as url:
        load = await registered(url)
        tally = await load.run(Job(Kind.READS, url, sessions=1, tokens=True, requests=3))
        await load.run(Job(Kind.READS, url, sessions=1, requests=1))

    assert ["written", "read", "read", None] == sent
    assert (3, 3, 0, 0) == (tally.requests, tally.by_replicas, tally.stale, tally.failed)
    assert tally.p50_ms is not None
    assert tally.p99_ms is not None
    assert 0 < tally.p50_ms <= tally.p99_ms <= tally.seconds * 1000


async def test_reads_say_what_they_ask_for() -> None:
    """By their header, and only where it is not what their session has written and seen."""
    asked = []

    async def read(request: web.Request) -> web.Response:
        asked.append(request.headers.get("Rocket-Freshness"))
        return web.json_response({"id": 1})

    async with api(read) as url:
        load = await registered(url)
        for freshness in ("global", None):
            await load.run(Job(Kind.READS, url, sessions=1, freshness=freshness, requests=1))

    assert ["global", None] == asked


async def test_a_read_without_the_ride_is_stale_and_a_refused_read_has_failed() -> None:
    """Neither is timed, and both are counted."""
    answers = [
        web.json_response({"error": "not found"}, status=404),
        web.json_response({"id": 2}),
        web.json_response({"error": "away"}, status=503),
        web.json_response({"id": 1}),
    ]

    async def read(_request: web.Request) -> web.Response:
        return answers.pop(0)

    async with api(read) as url:
        load = await registered(url)
        tally = await load.run(Job(Kind.READS, url, sessions=1, requests=4))

    assert (1, 2, 1) == (tally.requests, tally.stale, tally.failed)
    assert "503" in tally.failures[0]


async def test_a_lost_connection_is_a_failure_and_the_next_request_opens_another() -> None:
    """Here the server closes it instead of answering."""
    times = 0

    async def read(request: web.Request) -> web.Response:
        nonlocal times
        times += 1
        if times == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"id": 1})

    async with api(read) as url:
        load = await registered(url)
        tally = await load.run(Job(Kind.READS, url, sessions=1, requests=3))

    assert (2, 1) == (tally.requests, tally.failed)


async def test_rates_are_kept() -> None:
    """No more requests than are due, however long responses take; background users have a rate of their own."""

    async def read(_request: web.Request) -> web.Response:
        return web.json_response({"id": 1})

    async with api(read) as url:
        load = await registered(url)
        await load.register(Job(Kind.REGISTER, url, users="writers", sessions=2))
        tally = await load.run(
            Job(Kind.READS, url, sessions=2, seconds=0.5, per_s=20, background="writers", background_per_s=40)
        )

    assert 0 < tally.requests <= 10
    assert 0 < tally.background_writes <= 20


async def test_sessions_without_a_server_are_an_error() -> None:
    """Instead of being measured."""
    with pytest.raises(NotReady, match="no user could be registered"):
        await registered("http://127.0.0.1:1")
