"""The load: an HTTP client that is strict, and sessions that tell a fresh answer from a stale or a failed one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from rocket.lab.bench.connection import Answer, Garbled, parse
from rocket.lab.bench.load import Load, NotReady
from rocket.lab.bench.orders import Job, Kind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HEAD = b"HTTP/1.1 200 OK\r\nrocket-served-as: replica\r\nContent-Length: 5"
WHOLE = HEAD + b"\r\n\r\nhello"


@given(st.integers(0, len(WHOLE) - 1))
def test_an_answer_is_there_when_all_of_it_is(length: int) -> None:
    """However the network cuts it."""
    assert parse(WHOLE[:length]) is None
    answer = parse(WHOLE)
    assert Answer(200, HEAD, b"hello") == answer
    assert ("replica", "5", None) == tuple(
        answer.header(name) for name in ("Rocket-Served-As", "content-length", "served-as")
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
def test_what_the_api_would_not_say_is_refused(received: bytes) -> None:
    """It is no answer, and would be timed as one."""
    with pytest.raises(Garbled):
        parse(received)


@contextlib.asynccontextmanager
async def api(read: Handler) -> AsyncIterator[str]:
    """Serve something that takes users and rides, and answers reads as it is told to."""

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


async def joined(url: str) -> Load:
    """Return a load of two sessions."""
    load = Load()
    await load.join(Job(Kind.JOIN, url, sessions=2, tokens=True))
    return load


async def test_sessions_bring_back_the_token_that_they_were_given_last() -> None:
    """From answer to request, beginning with that of their write; and not where the contender has none."""
    brought = []

    async def read(request: web.Request) -> web.Response:
        brought.append(request.headers.get("Rocket-Session"))
        return web.json_response({"id": 1}, headers={"Rocket-Session": "read", "Rocket-Served-As": "replica"})

    async with api(read) as url:
        load = await joined(url)
        tally = await load.run(Job(Kind.READS, url, sessions=1, tokens=True, requests=3))
        await load.run(Job(Kind.READS, url, sessions=1, requests=1))

    assert ["written", "read", "read", None] == brought
    assert (3, 3, 0, 0) == (tally.requests, tally.by_replicas, tally.stale, tally.failed)
    assert tally.p50_ms is not None
    assert tally.p99_ms is not None
    assert 0 < tally.p50_ms <= tally.p99_ms <= tally.seconds * 1000


async def test_a_read_that_lacks_the_ride_is_stale_and_one_refused_has_failed() -> None:
    """Neither is timed, and neither is lost."""
    answers = [
        web.json_response({"error": "not found"}, status=404),
        web.json_response({"id": 2}),
        web.json_response({"error": "away"}, status=503),
        web.json_response({"id": 1}),
    ]

    async def read(_request: web.Request) -> web.Response:
        return answers.pop(0)

    async with api(read) as url:
        load = await joined(url)
        tally = await load.run(Job(Kind.READS, url, sessions=1, requests=4))

    assert (1, 2, 1) == (tally.requests, tally.stale, tally.failed)
    assert "503" in tally.failures[0]


async def test_a_lost_connection_is_a_failure_and_the_next_request_opens_another_one() -> None:
    """Also where the server closes it in the middle of an answer."""
    times = 0

    async def read(request: web.Request) -> web.Response:
        nonlocal times
        times += 1
        if times == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"id": 1})

    async with api(read) as url:
        load = await joined(url)
        tally = await load.run(Job(Kind.READS, url, sessions=1, requests=3))

    assert (2, 1) == (tally.requests, tally.failed)


async def test_a_pace_is_kept() -> None:
    """Not more than is due, whatever the answers take; a crowd beside writes at its own."""

    async def read(_request: web.Request) -> web.Response:
        return web.json_response({"id": 1})

    async with api(read) as url:
        load = await joined(url)
        await load.join(Job(Kind.JOIN, url, crowd="writers", sessions=2))
        tally = await load.run(
            Job(Kind.READS, url, sessions=2, seconds=0.5, per_s=20, beside="writers", beside_per_s=40)
        )

    assert 0 < tally.requests <= 10
    assert 0 < tally.beside <= 20


async def test_sessions_that_cannot_be_made_are_said_so() -> None:
    """Instead of being measured."""
    with pytest.raises(NotReady, match="no user could be made"):
        await joined("http://127.0.0.1:1")
