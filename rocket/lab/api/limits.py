"""How many requests and connections the API takes at a time, and for how long it waits for slow clients.

In a flood the event loop is what runs out: every response waits for all the others of its turn. So the loop is
sampled. While it is saturated, and many requests are in flight or turns take long, only as many requests are
admitted as can be answered soon; the others are refused at once. A client that repeats a refused request too soon
waits in a queue, of which each turn answers one: the loop sets the pace of the flood.

A plain limit does not do: clients that repeat refused requests at once then take most of the loop's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import logging
import resource
import socket
import time
from collections import deque
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiohttp import web

from rocket.lab.api.problems import Problem, internal_error
from rocket.web.aiohttp import SESSION

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

RETRY_AFTER_S = 1
BUSY = 48
"""More requests in flight are an overload, unless the loop finds time to wait for events."""
LEAST = 12
"""The fewest that are admitted at a time; eight that ask without a break already keep the loop from waiting."""
LONG_TURN_S = 0.005
"""Turns of the loop that take longer are an overload too, unless it was a single one."""
_SAMPLE_S = 0.01
"""The time between two samples of the loop."""
_QUIET_S = RETRY_AFTER_S + 0.5
"""The overload is over when for this long no request was refused, and few had to wait for their turn."""
_MONITORING = ("/livez", "/readyz", "/replicas", "/metrics")
_RESERVED = 600
"""File descriptors for everything else: mostly Postgres, of up to 31 nodes with 11 connections each."""
_UNSENT_BYTES = 16 * 1024
"""Reading from a connection pauses while more of its responses than this is unsent."""
_SOON_S = 0.001
_TEXT = "There are too many requests. Please try again."
_BODY = json.dumps({"error": _TEXT}).encode()
_HEADERS = {
    "Content-Type": "application/json; charset=utf-8",
    "Cache-Control": "no-store",
    "Retry-After": str(RETRY_AFTER_S),
}

_log = logging.getLogger("rocket.api")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of one application."""

    requests: int = 256
    """Requests in flight: they may all be waiting for a server."""
    bodies: int = 1024
    """Request bodies, of up to 64 KiB, that have yet to arrive in full."""
    connections: int = 10_000
    """Each takes about 5 KB while it is idle."""
    body_s: float = 5.0
    """How long a request's body may take to arrive."""
    request_s: float = 25.0
    """How long a request may take: a last resort, longer than a body and a write with all its attempts take."""
    keepalive_s: float = 30.0
    """How long a connection may go without a whole request: idle, or sending one too slowly."""
    lingering_s: float = 2.0
    """How long the rest of a body that is not needed is read, so that the response gets through."""
    unread_s: float = 10.0
    """How long a client may leave what was sent to it unread."""
    drain_s: float = 2.0
    """How long the requests in flight may take when the server stops."""


BOUNDS = web.AppKey("bounds", Bounds)


class Backoff:
    """How long the client of one connection should pause, during an overload."""

    __slots__ = ("cheap", "until")

    def __init__(self) -> None:
        self.cheap = False
        """Whether its latest request went to no database server: nothing else would slow down its repetition."""
        self.until = 0.0
        """Monotonic seconds: it was asked not to repeat its request before."""


class Admission:
    """Admits requests or refuses them, before anything else is done for them.

    `handling` wraps a handler; requests are admitted unseen while fewer are `inside` than `unchecked`.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.refused = 0
        """The requests refused since the start."""
        self.inside = 0
        """The requests in flight."""
        self.never_refused = set(_MONITORING)
        """Paths for monitoring; in an overload they too wait for their turn if they are repeated at once."""
        self.most = self.bounds.requests
        """How many may be inside."""
        self.unchecked = self.bounds.requests
        """`most`, and 0 during an overload."""
        self._bodies = 0
        self._logged = False
        """Whether the overload was logged, as it is once a request is refused."""
        self._was_behind = False
        self._refused_before = 0
        self._quiet_since = 0.0
        self._waits = 0
        self._early: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def handling(self, handler: Handler) -> Handler:
        """Return a handler that passes on only the requests that are admitted."""
        expecting = _checking_expectations(handler)

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            if self.inside >= self.unchecked or "Expect" in request.headers:
                connection = request.protocol
                assert isinstance(connection, Connection)  # noqa: S101 - `Connections` makes no other
                return await self.rationed(request, expecting, connection.backoff)
            self.inside += 1
            try:
                return await handler(request)
            finally:
                self.inside -= 1

        return handle

    async def rationed(self, request: web.BaseRequest, handler: Handler, backoff: Backoff) -> web.StreamResponse:
        """Admit a request of a client with this backoff, or refuse it."""
        overload = self.most < self.bounds.requests
        too_soon = overload and time.monotonic() < backoff.until
        if too_soon or backoff.cheap:
            await self._turn()
        if request.path not in self.never_refused and (too_soon or self.inside >= self.most):
            backoff.until = time.monotonic() + RETRY_AFTER_S
            self.refused += 1
            return web.Response(body=_BODY, status=HTTPStatus.SERVICE_UNAVAILABLE, headers=_HEADERS)
        self.inside += 1
        try:
            response = await handler(request)
        finally:
            self.inside -= 1
        session = request.get(SESSION)
        backoff.cheap = session is None or session.last is None
        return response

    async def _turn(self) -> None:
        """Wait in the queue of which each turn of the loop takes one."""
        loop = asyncio.get_running_loop()
        if not self._early:
            loop.call_soon(self._next)
        place = loop.create_future()
        self._early.append(place)
        await place

    def _next(self) -> None:
        place = self._early.popleft()
        if not place.done():
            place.set_result(None)
        if self._early:
            asyncio.get_running_loop().call_soon(self._next)

    @contextlib.contextmanager
    def waiting_for_a_body(self) -> Iterator[None]:
        """Make room for another request while this one's body arrives; raise a 503 if too many are arriving."""
        if self._bodies >= self.bounds.bodies:
            self.refused += 1
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, {"Retry-After": str(RETRY_AFTER_S)})
        self._bodies += 1
        self.inside -= 1
        try:
            yield
        finally:
            self._bodies -= 1
            self.inside += 1

    # --- the loop ---

    @contextlib.contextmanager
    def watching_the_loop(self) -> Iterator[None]:
        """Admit fewer requests while the running loop is saturated, for as long as the context lasts."""
        self._timer = asyncio.get_running_loop().call_later(_SAMPLE_S, self._sample)
        try:
            yield
        finally:
            self._timer.cancel()
            self._timer = None

    def _sample(self) -> None:
        # A timer's callback comes before the others of its turn; the turn that follows is a whole one.
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: loop.call_soon(self._turned, time.monotonic()))

    def _turned(self, began: float) -> None:
        if self._timer is None:
            return
        now = time.monotonic()
        # A loop that waits for events gives up the processor voluntarily, which the system counts.
        waits = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        self.follow(now, now - began, waited=waits > self._waits)
        self._waits = waits
        self._timer = asyncio.get_running_loop().call_later(_SAMPLE_S, self._sample)

    def follow(self, now: float, turn_s: float, *, waited: bool) -> None:
        """Adapt to a sample: whether the loop has `waited` since the last one, and how long a turn took."""
        refusing = self.refused != self._refused_before
        self._refused_before = self.refused
        if refusing or len(self._early) > LEAST:
            self._quiet_since = now
        if self.unchecked:
            behind = not waited and (turn_s > LONG_TURN_S or self.inside > BUSY)
            if behind and self._was_behind:
                self.most, self.unchecked, self._quiet_since = BUSY, 0, now
            self._was_behind = behind
            return
        if refusing and not self._logged:
            self._logged = True
            _log.warning("overload: more than %d requests at a time are refused", self.most)
        if now - self._quiet_since > _QUIET_S:
            self.most = self.unchecked = self.bounds.requests
            if self._logged:
                self._logged = False
                _log.warning("the overload is over; %d requests were refused since the start", self.refused)
        elif waited:
            self.most = min(self.bounds.requests, self.most + self.most // 16 + 1)
        elif refusing:
            self.most = max(LEAST, self.most * 3 // 4)


ADMISSION = web.AppKey("admission", Admission)


def _checking_expectations(handler: Handler) -> Handler:
    """Return a handler that refuses expectations other than 100-continue: aiohttp does so in plain text."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Expect", "100-continue").lower() == "100-continue":
            return await handler(request)
        response = Problem(HTTPStatus.EXPECTATION_FAILED, "Expectation Failed.").response()
        response.headers["Cache-Control"] = "no-store"
        return response

    return handle


# --- connections ---


class Connections:
    """The connections of clients: makes one for each that is accepted, and room for it."""

    def __init__(self, server: web.Server, bounds: Bounds, listening: socket.socket) -> None:
        self.open: set[Connection] = set()
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._settings = {
            "access_log": None,
            "keepalive_timeout": bounds.keepalive_s,
            "lingering_time": bounds.lingering_s,
            # Compressed bodies are refused: decompressed, they have no bound.
            "auto_decompress": False,
        }
        self._most = _most_connections(bounds.connections)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted connections inherit it, and closed ones keep it
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(bounds.unread_s * 1000))

    def __call__(self) -> Connection:
        """Make the protocol of a new connection."""
        return Connection(self, self._server, loop=self._loop, **self._settings)

    def make_room(self, newcomer: Connection) -> None:
        """End connections if there are too many: those that were idle for longest, or else the newcomer."""
        if len(self.open) <= self._most:
            return
        idle = (each for each in self.open if each is not newcomer and each.is_idle)
        # Many at a time, since finding them takes a look at all.
        ended = heapq.nsmallest(self._most // 16 + 1, idle, key=lambda each: each.used_at)
        for each in ended or [newcomer]:
            # Not now: the task of a new connection, which is about to begin, does not expect to have lost it yet.
            self._loop.call_later(_SOON_S, each.abort)


def _most_connections(wanted: int) -> int:
    """Return how many connections there may be, after raising the process's limit on descriptors if possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = wanted + _RESERVED
    if soft != resource.RLIM_INFINITY and soft < descriptors:
        raised = descriptors if hard == resource.RLIM_INFINITY else min(descriptors, hard)
        with contextlib.suppress(OSError, ValueError):  # a system may have further limits
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return wanted
    return min(wanted, max(soft - _RESERVED, soft // 2))


class Connection(web.RequestHandler):
    """One connection of a client."""

    __slots__ = ("_connections", "backoff")

    def __init__(self, connections: Connections, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._connections = connections
        self.backoff = Backoff()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to serve it."""
        transport.set_write_buffer_limits(high=_UNSENT_BYTES)  # type: ignore[attr-defined]
        super().connection_made(transport)
        self._connections.open.add(self)
        self._connections.make_room(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget it."""
        self._connections.open.discard(self)
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request, or for its client to read a response."""
        return self._waiter is not None or self.writing_paused

    @property
    def used_at(self) -> float:
        """When it was made, or had its latest response: seconds of the loop's clock, plus the keep-alive time."""
        return self._next_keepalive_close_time

    def abort(self) -> None:
        """End it at once."""
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - it may quote the request
    ) -> web.StreamResponse:
        """Answer in JSON what aiohttp would answer in plain text: requests that are not HTTP."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun already")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.error("a request failed outside of its handler", exc_info=exc)
            response = internal_error().response()
        else:
            response = Problem(HTTPStatus(status), "The request is not valid HTTP.").response()
        response.headers["Cache-Control"] = "no-store"
        response.force_close()
        return response
