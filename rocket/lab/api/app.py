"""The API as an aiohttp application, and as a server that drains before it stops."""

from __future__ import annotations

import asyncio
import contextlib
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket.lab.api import parameters, rides, status, users
from rocket.lab.api.limits import ADMISSION, BOUNDS, Admission, Bounds, Connections
from rocket.lab.api.problems import MAX_BODY_BYTES, Problem, answer_problems, known_hosts_only
from rocket.lab.api.recorder import RECORDER, RequestRecorder, log_requests
from rocket.lab.api.status import DRAINING, METRICS, ROUTER, Metrics
from rocket.web.aiohttp import setup

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Collection

    from rocket.lab.comparison import ComparisonRouter

_BACKLOG = 1024
"""Connections that may wait to be accepted: each turn of the loop accepts one."""
_AT_LEAST_S = 0.1

_OF_RIDES = {rides.create, rides.page, rides.show}
_OF_SESSIONS = {*_OF_RIDES, users.create}


def build_app(
    router: ComparisonRouter,
    *,
    allowed_hosts: Collection[str] = (),
    recorder: RequestRecorder | None = None,
    request_ids: bool = False,
    bounds: Bounds | None = None,
) -> web.Application:
    """Make the application; `allowed_hosts` are the names, beside localhost, that it answers to.

    `recorder` is given a record of each request that reached the router. With `request_ids` each request has an
    id, which its response and its log lines carry, and a log line of its own.
    """
    admission = Admission(bounds)
    metrics = Metrics(router, admission)
    app = web.Application(
        middlewares=[
            *([log_requests] if request_ids else []),
            answer_problems(admission.bounds.request_s, known_hosts_only(allowed_hosts)),
        ],
        client_max_size=MAX_BODY_BYTES,
    )
    app[BOUNDS] = admission.bounds
    app[ROUTER] = router
    app[ADMISSION] = admission
    app[METRICS] = metrics
    app[DRAINING] = asyncio.Event()
    app[RECORDER] = recorder or RequestRecorder()
    setup(
        app,
        lambda: router,
        subject=lambda request: users.who_asks(request) if request.match_info.handler in _OF_RIDES else None,
        freshness=parameters.freshness,
        only=lambda request: request.match_info.handler in _OF_SESSIONS,
        route_headers=True,
        answer_errors=False,
    )
    for method, path, handler in (
        ("POST", "/rides", rides.create),
        ("GET", "/rides", rides.page),
        ("GET", "/rides/{id}", rides.show),
        ("POST", "/users", users.create),
        ("GET", "/livez", status.alive),
        ("GET", "/readyz", status.ready),
        ("GET", "/replicas", status.replicas),
        ("GET", "/metrics", status.metrics),
        ("GET", "/openapi.json", status.describe),
    ):
        app.router.add_route(method, path, handler)
    return app


def leave_out(app: web.Application, path: str, why: str) -> None:
    """Answer requests for something that is not served with a 404 that says why."""

    async def refuse(_request: web.Request) -> web.Response:
        raise Problem(HTTPStatus.NOT_FOUND, why)

    for each in (path, path + "/{rest:.*}"):
        app.router.add_route("*", each, refuse)


@contextlib.asynccontextmanager
async def serve(app: web.Application, listening: socket.socket) -> AsyncIterator[None]:
    """Serve on a bound socket for as long as the context lasts; then let the requests in flight end.

    While they do, further requests are answered, and `GET /readyz` says that the server is shutting down.
    """
    admission, bounds = app[ADMISSION], app[BOUNDS]
    runner = web.AppRunner(app, shutdown_timeout=_AT_LEAST_S)
    await runner.setup()
    try:
        server = runner.server
        assert server is not None  # noqa: S101 - it is set up
        server.request_handler = admission.handling(server.request_handler)
        listener = await asyncio.get_running_loop().create_server(
            Connections(server, bounds, listening), sock=listening, backlog=_BACKLOG
        )
        try:
            with admission.watching_the_loop():
                yield
        finally:
            app[DRAINING].set()
            deadline = time.monotonic() + bounds.drain_s
            await runner.shutdown()  # streams, which would not end by themselves
            server.pre_shutdown()  # idle connections
            await asyncio.gather(*(connection.shutdown(bounds.drain_s) for connection in server.connections))
            listener.close()
            await server.shutdown(max(_AT_LEAST_S, deadline - time.monotonic()))
    finally:
        await runner.cleanup()
