"""What one process of the API does: observe, route and serve."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket import Board, Observer, Policy, Router, Routing
from rocket.ending import background

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Mapping


@dataclass(frozen=True, slots=True)
class Service:
    """What a process of the API has to know."""

    nodes: Mapping[str, str]
    """DSNs by name, whatever the nodes' roles are."""
    routing: Routing
    policy: Policy
    observer_interval_s: float
    observe: bool
    """Whether replicas are observed, or nothing but roles."""
    allowed_hosts: tuple[str, ...]


@contextlib.asynccontextmanager
async def serving(service: Service, listener: socket.socket | None) -> AsyncIterator[None]:
    """Serve for as long as the context lasts, once everything is ready; without a listener only observe.

    The end comes in reverse: server, observer, pools.
    """
    # To import aiohttp takes as long as to make a cluster: who has one to make need not wait for that first.
    from rocket.api.app import build_app, serve  # noqa: PLC0415
    from rocket.api.users import UserFloors  # noqa: PLC0415

    board = Board()
    observer = Observer(
        service.nodes, board, interval_s=service.observer_interval_s, roles_only=not service.observe
    )
    async with contextlib.AsyncExitStack() as stack:
        router = await stack.enter_async_context(
            await Router.open(
                service.nodes,
                UserFloors(),
                board,
                policy=service.policy,
                waiting=observer.waiting,
                routing=service.routing,
            )
        )
        stack.callback(observer.close)
        await observer.run_once()  # so that the first reads find a board
        await stack.enter_async_context(background(observer.run(), "observer"))
        if listener is not None:
            app = build_app(router, allowed_hosts=service.allowed_hosts)
            await stack.enter_async_context(serve(app, listener))
        yield
