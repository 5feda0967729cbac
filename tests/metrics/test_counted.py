"""What a service does with a router is counted once, by whichever way it comes there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from aiohttp import web
from prometheus_client import CollectorRegistry

from rocket import Limits, Router, Session
from rocket.metrics import RouterMetrics
from rocket.web import aiohttp as for_aiohttp
from rocket.web.asgi import RocketMiddleware
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from pytest_aiohttp.plugin import AiohttpClient

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster
    from rocket.web.asgi import Message, Receive, Scope, Send

    Ask = Callable[[str, str | None], Awaitable[int]]
    """Asks a service for a path, with a token; returns the status."""

FOREIGN = "1~1-aaaaaaaaaa~0/1~0/0"


class Counted:
    """A router whose metrics are registered, and that is all."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._registry = CollectorRegistry()
        RouterMetrics(router, registry=self._registry)

    def counts(self) -> dict[str, int]:
        """Return how many reads and writes there were, and what became of them."""
        counts: dict[str, int] = {}
        for family in self._registry.collect():
            if family.name.startswith(("rocket_reads", "rocket_writes", "rocket_session_tokens")):
                for sample in family.samples:
                    name = sample.name.removeprefix("rocket_").removesuffix("_total")
                    kind = f"{name} {sample.labels['outcome']}" if name == "writes" else name
                    counts[kind] = counts.get(kind, 0) + int(sample.value)
        return {kind: count for kind, count in counts.items() if count}


@pytest_asyncio.fixture
async def counted(cluster: LocalCluster) -> AsyncIterator[Counted]:
    """A router as it comes, with its metrics."""
    async with await Router.open(dsns(cluster), limits=Limits(read_s=1.0, write_s=1.0)) as router:
        yield Counted(router)


async def do(session: Session, path: str) -> None:
    """Do what a path says."""

    async def one(db: Connection) -> None:
        await db.fetchval("SELECT 1")

    await (session.write(one) if path == "/write" else session.read(one))


async def by_asgi(router: Router, path: str, token: str | None) -> int:
    """Have an ASGI application do what a path says."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        await do(scope["state"]["rocket"], scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    headers = [] if token is None else [(b"rocket-session", token.encode())]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    await RocketMiddleware(app, lambda: router)(scope, receive, send)
    return int(sent[0]["status"])


@pytest.fixture(params=["asgi", "aiohttp"])
async def ask(request: pytest.FixtureRequest, counted: Counted, aiohttp_client: AiohttpClient) -> Ask:
    """A service on the router, behind one of the middlewares."""
    router = counted.router
    if request.param == "asgi":
        return lambda path, token: by_asgi(router, path, token)

    async def handle(asked: web.Request) -> web.Response:
        await do(asked[for_aiohttp.SESSION], asked.path)
        return web.Response()

    app = web.Application()
    app.router.add_get("/{rest:.*}", handle)
    for_aiohttp.setup(app, lambda: router)
    client = await aiohttp_client(app)

    async def ask(path: str, token: str | None) -> int:
        response = await client.get(path, headers={} if token is None else {"Rocket-Session": token})
        return response.status

    return ask


async def test_what_a_service_does_is_counted_once(counted: Counted, ask: Ask) -> None:
    """Reads, writes, and tokens that are refused: when they are parsed, and by the primary."""
    assert 200 == await ask("/read", None)
    assert {"reads": 1} == counted.counts()
    assert 200 == await ask("/write", None)
    assert {"reads": 1, "writes committed": 1} == counted.counts()
    for token in ("garbage", FOREIGN):
        assert 400 == await ask("/read", token)
    assert 400 == await ask("/write", FOREIGN)
    assert {"reads": 1, "writes committed": 1, "session_tokens_refused": 3} == counted.counts()


async def test_what_no_node_can_do_is_counted_once(counted: Counted, ask: Ask) -> None:
    """A 503 is one read, or one write, however often it was tried."""
    for pool in counted.router.pools:
        await counted.router.remove(pool.name)
    for path in ("/read", "/write"):
        assert 503 == await ask(path, None)
    assert {"reads_unavailable": 1, "writes unavailable": 1} == counted.counts()


async def test_calls_without_a_session_are_counted(counted: Counted) -> None:
    """As are those of callers that keep the token themselves."""

    async def one(db: Connection) -> Any:
        return await db.fetchval("SELECT 1")

    written = await counted.router.write(one, subject="you")
    await counted.router.read(one, subject="you", token=written.token)
    await counted.router.session("you").read(one)
    assert {"reads": 2, "writes committed": 1} == counted.counts()
