"""Sessions in web services: in and out by header and by cookies, whatever becomes of the request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from aiohttp import web

from rocket import OutcomeUnknown, Router, Unavailable
from rocket.web import Cookie, Header
from rocket.web import aiohttp as for_aiohttp
from rocket.web.asgi import RocketMiddleware
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from pytest_aiohttp.plugin import AiohttpClient

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster
    from rocket.web.asgi import Message, Receive, Scope, Send

HEADER = "Rocket-Session"
FOREIGN = "1~1-aaaaaaaaaa~0/1~0/0"
WRITE = "SELECT pg_logical_emit_message(true, 'test', 'something')"


@pytest_asyncio.fixture
async def plain(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router as it comes."""
    async with await Router.open(dsns(cluster)) as router:
        yield router


def answers(error: type[web.HTTPException]) -> Callable[[Connection], Awaitable[None]]:
    """Return work that answers by an error, as handlers do."""

    async def work(db: Connection) -> None:
        await db.fetchval("SELECT 1")
        raise error

    return work


async def handle(request: web.Request) -> web.StreamResponse:
    """Write, and end as the path says."""
    session = request[for_aiohttp.SESSION]
    match request.path:
        case "/quiet":
            return web.Response()
        case "/unavailable":
            raise Unavailable("no node")
        case "/unknown":
            raise OutcomeUnknown("who knows")
        case "/absent":
            await session.read(answers(web.HTTPNotFound))
        case "/sold-out":
            await session.write(answers(web.HTTPConflict))
    await session.write(lambda db: db.fetchval("SELECT 1"))
    match request.path:
        case "/missing":
            raise web.HTTPNotFound
        case "/bug":
            raise RuntimeError("a bug")
        case "/stream":
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"text")
            return response
    return web.Response()


@pytest.mark.parametrize(
    ("path", "status", "carried"),
    [
        ("/", 200, True),
        ("/missing", 404, True),
        ("/absent", 404, True),
        ("/sold-out", 409, True),
        ("/bug", 500, True),
        ("/stream", 200, True),
        ("/quiet", 200, False),
        ("/unavailable", 503, False),
        ("/unknown", 504, False),
    ],
)
async def test_aiohttp_hands_the_token_out_with_every_answer(
    plain: Router, aiohttp_client: AiohttpClient, path: str, status: int, *, carried: bool
) -> None:
    """If the session was used; what could not be carried out is answered by its status."""
    app = web.Application()
    app.router.add_get("/{rest:.*}", handle)
    for_aiohttp.setup(app, lambda: plain, carrier=Header())
    client = await aiohttp_client(app)
    response = await client.get(path)
    assert (status, carried) == (response.status, HEADER in response.headers)
    assert carried == (response.headers.get("Cache-Control") == "no-store") or status > 500
    assert (status == 503) == ("Retry-After" in response.headers)
    assert 400 == (await client.get(path, headers={HEADER: "garbage"})).status


async def test_aiohttp_puts_no_second_answer_into_a_stream(plain: Router, aiohttp_client: AiohttpClient) -> None:
    """Its client finds it cut off, and gets nothing that the handler never wrote."""

    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"text")
        raise Unavailable("no node")

    app = web.Application()
    app.router.add_get("/", broken)
    for_aiohttp.setup(app, lambda: plain)
    client = await aiohttp_client(app)
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    async with asyncio.timeout(10):
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"text" == body


async def by_asgi(router: Router, scheme: str, *cookies: str) -> list[str]:
    """Write in a request that brings these cookies; return what is to be set."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        await scope["state"]["rocket"].write(lambda db: db.execute(WRITE))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "scheme": scheme}
    scope["headers"] = [(b"cookie", "; ".join(cookies).encode())]
    await RocketMiddleware(app, lambda: router, carrier=Cookie("notes"))(scope, receive, send)
    assert 200 == sent[0]["status"]
    return [value.decode() for name, value in sent[0]["headers"] if name == b"set-cookie"]


async def test_a_browsers_concurrent_requests_are_covered_by_cookies(plain: Router) -> None:
    """Each response sets one of its own, and clears those that it covers; a foreign one is dropped as well."""
    (first,), (second,) = await by_asgi(plain, "http"), await by_asgi(plain, "https")
    assert first.endswith("; Path=/; HttpOnly; SameSite=Lax")
    assert second.endswith("; Path=/; HttpOnly; SameSite=Lax; Secure")
    brought = [cookie.partition(";")[0] for cookie in (first, second)]
    assert brought[0].partition("=")[0] != brought[1].partition("=")[0]
    *cleared, fresh = await by_asgi(plain, "http", *brought, "another=1")
    assert [f"{cookie.partition('=')[0]}=" for cookie in brought] == [line.partition(";")[0] for line in cleared]
    assert all("Max-Age=0" in line for line in cleared)
    assert fresh.partition("=")[0] not in {cookie.partition("=")[0] for cookie in brought}
    for wrong in ("garbage", FOREIGN):
        gone, anew = await by_asgi(plain, "http", f"notes.00000000={wrong}")
        assert gone.startswith("notes.00000000=; ")
        assert wrong not in anew


async def test_asgi_carries_what_work_has_read_with_an_error(plain: Router) -> None:
    """A framework makes an answer of it inside the middleware."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        session = scope["state"]["rocket"]
        do = session.read if scope["path"] == "/absent" else session.write
        try:
            await do(answers(web.HTTPNotFound))
        except web.HTTPNotFound:
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body"})

    async def receive() -> Message:
        return {"type": "http.request"}

    for path in ("/absent", "/sold-out"):
        sent: list[Message] = []

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path, "headers": []}
        await RocketMiddleware(app, lambda: plain)(scope, receive, send)
        assert 404 == sent[0]["status"]
        assert {b"rocket-session", b"cache-control"} == {name for name, _ in sent[0]["headers"]}
