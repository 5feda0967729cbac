"""A REST API like Patroni's that lists what a test wants."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.test_utils import TestServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from rocket.cluster.cluster import LocalCluster


class FakePatroni:
    """The REST API of one member."""

    def __init__(self) -> None:
        self.members: list[dict[str, object]] | None = []
        """What it lists; None: its store is down."""
        self.paused = False
        self.text: str | None = None
        """What it answers instead."""

    async def cluster(self, _request: web.Request) -> web.Response:
        """Answer `GET /cluster`."""
        if self.members is None:
            return web.Response(status=503, text="no store")
        if self.text is not None:
            return web.Response(text=self.text, content_type="application/json")
        return web.json_response({"members": self.members} | ({"pause": True} if self.paused else {}))

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve it, and give its address."""
        app = web.Application()
        app.router.add_get("/cluster", self.cluster)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")


def listed(cluster: LocalCluster, *names: str, timeline: int = 1, **tags: object) -> list[dict[str, object]]:
    """Return nodes of a cluster as members."""
    same: dict[str, object] = {"host": "127.0.0.1", "role": "replica", "timeline": timeline, "tags": tags}
    return [same | {"name": name, "port": cluster.node(name).port} for name in names]


@contextlib.contextmanager
def hanging(number: int) -> Iterator[list[str]]:
    """Give addresses at which connections are accepted, and no request is ever answered."""
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        yield [f"http://127.0.0.1:{one.getsockname()[1]}" for one in listening]
