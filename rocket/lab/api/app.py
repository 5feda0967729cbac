"""The API as an aiohttp application, and as a server that drains before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiohttp import web

from rocket.lab.api import connections, health, openapi, rides, users
from rocket.lab.api.hosts import known_hosts_only
from rocket.lab.api.keys import DRAINING, METRICS, ROUTER
from rocket.lab.api.limits import ADMISSION, Admission
from rocket.lab.api.metrics import Metrics
from rocket.lab.api.problems import MAX_BODY_BYTES, Problem, internal_error, problems
from rocket.lab.api.recorder import RECORDER, RequestRecorder
from rocket.lab.api.requests import told_apart

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Collection

    from rocket.lab.api.limits import Handler
    from rocket.lab.comparison import ComparisonRouter

_DRAIN_S = 2.0
"""How long requests in flight may take to end when the server stops."""
_KEEPALIVE_S = 30.0
"""How long a connection may go without a whole request: an idle one, and one whose request comes too slowly."""
_LINGERING_S = 2.0
"""How long the rest of a body is waited for that is of no interest any more."""
_AT_ONCE_S = 0.001
_BACKLOG = 1024
"""How many connections may wait to be accepted: one is in each turn of the loop."""

_log = logging.getLogger("rocket.api")


def build_app(
    router: ComparisonRouter,
    *,
    allowed_hosts: Collection[str] = (),
    audience: RequestRecorder | None = None,
    request_ids: bool = False,
) -> web.Application:
    """Make the application; `allowed_hosts` are the names, beside localhost, that it answers to.

    `audience` is told of each request that reached the router. With `request_ids` each request has an id, which
    its answer and its log lines carry, and a log line of its own.
    """
    app = web.Application(
        middlewares=[*([told_apart] if request_ids else []), problems, known_hosts_only(allowed_hosts)],
        client_max_size=MAX_BODY_BYTES,
    )
    app[ROUTER] = router
    app[ADMISSION] = Admission()
    app[METRICS] = Metrics(router, app[ADMISSION])
    app[DRAINING] = asyncio.Event()
    app[RECORDER] = audience or RequestRecorder()
    for method, path, handler in (
        ("POST", "/rides", rides.create),
        ("GET", "/rides", rides.page),
        ("GET", "/rides/{id}", rides.show),
        ("POST", "/users", users.create),
        ("GET", "/livez", health.alive),
        ("GET", "/readyz", health.ready),
        ("GET", "/replicas", health.replicas),
        ("GET", "/metrics", health.metrics),
        ("GET", "/openapi.json", openapi.describe),
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
    """Serve on a bound socket for as long as the context lasts; then let what is in flight end.

    Until that has ended whoever comes is still answered, and `GET /readyz` says that this is the end.
    """
    runner = _Runner(app)
    await runner.setup()
    connections.end_unread(listening)
    try:
        await web.SockSite(runner, listening, backlog=_BACKLOG).start()
        with app[ADMISSION].watching_the_loop():
            yield
    finally:
        app[DRAINING].set()
        await runner.drain()
        await runner.cleanup()


class _Protocol(connections.Protocol):
    """Says in JSON what aiohttp would say in plain text of requests that are not HTTP."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - it may quote the request
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.error("a request failed outside of its handler", exc_info=exc)
            response = internal_error().response()
        else:
            response = Problem(HTTPStatus(status), "The request is not valid HTTP.").response()
        response.headers["Cache-Control"] = "no-store"
        response.force_close()
        return response


class _Server(web.Server):
    """Makes a `_Protocol` for each connection, and room for it."""

    def __init__(self, handler: Handler, *, most: int, **settings: Any) -> None:
        super().__init__(handler, **settings)
        self._most = most

    def __call__(self) -> _Protocol:
        return _Protocol(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        # Many at a time, since to find them takes a look at all.
        if len(self._connections) > self._most and not connections.make_room(
            self._connections, self._most // 16 + 1
        ):
            # Its task, which is about to begin, does not expect to have lost it by then.
            self._loop.call_later(_AT_ONCE_S, transport.abort)


def _handling(handler: Handler, admission: Admission) -> Handler:
    """Return what handles a request from its very beginning: only what is let in gets to `handler`."""

    async def expected(request: web.BaseRequest) -> web.StreamResponse:
        # aiohttp looks at expectations before any middleware, and answers them in plain text.
        if request.headers.get("Expect", "100-continue").lower() == "100-continue":
            return await handler(request)
        response = Problem(HTTPStatus.EXPECTATION_FAILED, "Expectation Failed.").response()
        response.headers["Cache-Control"] = "no-store"
        return response

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if admission.inside >= admission.unasked or "Expect" in request.headers:
            protocol = request.protocol
            assert isinstance(protocol, _Protocol)  # noqa: S101 - no other is made
            return await admission.rationed(request, expected, protocol.manners)
        admission.inside += 1
        try:
            return await handler(request)
        finally:
            admission.inside -= 1

    return handle


class _Runner(web.AppRunner):
    """Runs an application with our protocol."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(
            app,
            handle_signals=False,
            access_log=None,
            shutdown_timeout=_DRAIN_S,
            keepalive_timeout=_KEEPALIVE_S,
            lingering_time=_LINGERING_S,
            # Compressed bodies are refused: unpacked, they have no bound.
            auto_decompress=False,
        )

    async def drain(self) -> None:
        """Let the requests in flight end, for `_DRAIN_S` at the most, before anybody is turned away."""
        assert self.server is not None  # noqa: S101 - it is set up
        deadline = time.monotonic() + _DRAIN_S
        await self.shutdown()  # what streams would not end by itself
        self.server.pre_shutdown()  # those who ask nothing now
        await asyncio.gather(*(connection.shutdown(_DRAIN_S) for connection in self.server.connections))
        self._shutdown_timeout = max(0.1, deadline - time.monotonic())

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            _handling(made.request_handler, self.app[ADMISSION]),
            most=connections.room(),
            request_factory=made.request_factory,
            loop=made._loop,  # noqa: SLF001
            **made._kwargs,  # noqa: SLF001
        )
