"""Routers on a cluster of the tests, which nothing observes unless a test does, and the API on them."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from rocket import Policy
from rocket.consistency import Board
from rocket.lab.api.app import build_app, serve
from rocket.lab.comparison import ComparisonRouter
from rocket.routing.observer import Observer
from rocket.web.carriers import HEADER
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import web
    from aiohttp.test_utils import TestClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.api.limits import Bounds
    from tests.support.raw_http import Address


async def board_of_primary(cluster: LocalCluster) -> Board:
    """Return a board that knows the primary, and no replica."""
    board = Board()
    finder = Observer(dsns(cluster, cluster.primary.name), board, interval_s=1, roles_only=True)
    await finder.run_once()
    finder.close()
    assert board.primary is not None
    return board


@contextlib.asynccontextmanager
async def opened(cluster: LocalCluster, board: Board, lease_s: float = 60.0) -> AsyncIterator[ComparisonRouter]:
    """Open a router on a board whose primary may be used for `lease_s` after it was last observed."""
    policy = Policy(primary_lease_s=lease_s)
    async with await ComparisonRouter.open(dsns(cluster), board=board, policy=policy) as router:
        yield router


async def as_session(client: TestClient[web.Request, web.Application], email: str) -> dict[str, str]:
    """Return the headers of a session whose token covers all that was written so far, by a user who is there."""
    response = await client.post("/users", json={"email": email})
    return {"Authorization": email, HEADER: response.headers[HEADER]}


@contextlib.asynccontextmanager
async def serving(router: ComparisonRouter, bounds: Bounds) -> AsyncIterator[Address]:
    """Serve the API, which also answers to the name Rides.Example; give its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = build_app(router, allowed_hosts=["", "Rides.Example"], bounds=bounds)
        async with serve(app, listening):
            yield listening.getsockname()
