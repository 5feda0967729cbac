"""The inspector, put together: it records the API's requests and serves the page, its events and its commands."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket.lab.api.limits import ADMISSION
from rocket.lab.api.problems import Problem
from rocket.lab.api.status import METRICS
from rocket.lab.comparison import ComparisonRouter, Routing
from rocket.lab.inspector import access
from rocket.lab.inspector.controls import Controls
from rocket.lab.inspector.event_log import CommandDone, EventLog
from rocket.lab.inspector.export import history_lines
from rocket.lab.inspector.feed import Feed
from rocket.lab.inspector.runner import Runner
from rocket.lab.inspector.scenarios import SCENARIOS
from rocket.lab.inspector.stream import Stream
from rocket.lab.shutdown import background

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import CarriedOut, LocalCluster
    from rocket.lab.inspector.controls import Targets
    from rocket.lab.inspector.events import Event

_NOT_OURS = "This program does not run the cluster, so it causes no faults."
_MOST_REQUESTS = 10**6
"""Requests that a history may be asked for."""

HistoryExport = Callable[[EventLog, int, Routing, Sequence[str]], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Limits:
    """The inspector's times and limits."""

    tick_s: float = 1.0
    """Between two events with totals."""
    idle_s: float = 60.0
    """Requests are recorded this long after the last viewer has left, for a viewer who reconnects."""
    max_viewers: int = 8
    write_timeout_s: float = 2.0
    """A viewer that does not read for this long is dropped."""
    heartbeat_s: float = 5.0
    """Between two signs of life to a viewer while there is nothing new."""
    stop_timeout_s: float = 12.0
    """`heal` waits this long for a scenario to stop; healing takes its time in addition."""
    step_timeout_s: float = 10.0
    """A scenario waits this long for what it needs."""
    clock: Callable[[], float] = time.monotonic
    """The clock by which `tick_s` and `idle_s` pass."""


class Inspector:
    """Records what happens to one API, its observer and its cluster, for those who view it."""

    def __init__(
        self,
        router: ComparisonRouter,
        targets: Targets,
        nodes: Sequence[str],
        interval_s: float,
        *,
        limits: Limits | None = None,
        history: HistoryExport = history_lines,
    ) -> None:
        """Prepare to inspect a router with these nodes, which is observed every `interval_s`."""
        self.event_log = EventLog()
        self.event_log.follow(router.board)
        self._router = router
        self._targets = targets
        self._nodes = nodes
        self._interval_s = interval_s
        self._limits = limits = Limits() if limits is None else limits
        self._history_lines = history
        self._one_history = asyncio.Lock()
        self._files = access.page_files()
        self._controls = Controls(targets, router, self.event_log)
        self._runner = Runner(
            targets,
            router,
            self._controls,
            self.event_log,
            stop_timeout_s=limits.stop_timeout_s,
            step_timeout_s=limits.step_timeout_s,
        )

    @property
    def _names(self) -> list[str]:
        """The names of the original nodes, and of those added since."""
        return list(dict.fromkeys((*self._nodes, *(pool.name for pool in self._router.pools))))

    @contextlib.asynccontextmanager
    async def serving(self, app: web.Application) -> AsyncIterator[None]:
        """Add the inspector's routes to an application and run its tasks for as long as the context lasts."""
        limits = self._limits
        feed = self._feed = Feed(
            self.event_log,
            self._router,
            app[METRICS],
            lambda: self._controls.node_states,
            tick_s=limits.tick_s,
            idle_s=limits.idle_s,
            clock=limits.clock,
        )
        self._stream = Stream(
            feed,
            max_viewers=limits.max_viewers,
            write_timeout_s=limits.write_timeout_s,
            heartbeat_s=limits.heartbeat_s,
        )
        app.on_shutdown.append(self._stream.close)
        for method, path, handler in (
            ("GET", "/inspector", self._index),
            ("GET", "/inspector/", self._redirect),
            ("GET", "/inspector/events", self._events),
            ("GET", "/inspector/history", self._history),
            ("POST", "/inspector/control", self._control),
            ("GET", "/inspector/{name}", self._file),
        ):
            app.router.add_route(method, path, handler)
        page = {"", "/", "/events", "/control", *(f"/{name}" for name in self._files)}
        app[ADMISSION].never_refused |= {f"/inspector{path}" for path in page}
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(background(feed.run(), "inspector"))
            if (cluster := self._targets.cluster) is not None:
                stack.enter_context(self._logging_commands(cluster))
                await stack.enter_async_context(background(self._follow_nodes(feed), "inspector's nodes"))
                await stack.enter_async_context(background(self._runner.run(), "inspector's scenarios"))
            yield

    @contextlib.contextmanager
    def _logging_commands(self, cluster: LocalCluster) -> Iterator[None]:
        """Log the commands that a cluster carries out."""

        def log(done: CarriedOut) -> None:
            self.event_log.add(CommandDone(time.monotonic(), done))

        cluster.on_command.append(log)
        try:
            yield
        finally:
            cluster.on_command.remove(log)

    async def _follow_nodes(self, feed: Feed) -> None:
        while True:
            await feed.wait_for_viewer()
            await self._controls.update_node_states()

    # --- the routes ---

    async def _index(self, request: web.Request) -> web.Response:
        access.check_may_view(request, self._targets.token)
        if self._targets.token is not None and "token" in request.query:
            # The token moves to a cookie, which other sites cannot send and scripts cannot read.
            response = web.Response(status=HTTPStatus.SEE_OTHER, headers={"Location": "/inspector"})
            response.set_cookie(
                access.COOKIE, request.query["token"], path="/inspector", httponly=True, samesite="Strict"
            )
            response.headers.update(access.SECURITY_HEADERS)
            return response
        return self._served(access.INDEX)

    async def _redirect(self, request: web.Request) -> web.Response:
        """Redirect from the address with a slash at the end to the page."""
        location = f"/inspector?{request.query_string}".removesuffix("?")
        return web.Response(
            status=HTTPStatus.PERMANENT_REDIRECT, headers={**access.SECURITY_HEADERS, "Location": location}
        )

    async def _file(self, request: web.Request) -> web.Response:
        access.check_may_view(request, self._targets.token)
        return self._served(request.match_info["name"])

    def _served(self, name: str) -> web.Response:
        if name not in self._files:
            raise Problem(HTTPStatus.NOT_FOUND, f"The inspector has no file '{name}'.", access.SECURITY_HEADERS)
        body, content_type = self._files[name]
        return web.Response(body=body, headers={**access.SECURITY_HEADERS, "Content-Type": content_type})

    async def _events(self, request: web.Request) -> web.Response:
        access.check_may_fetch(request, self._targets.token)
        return self._stream.open(request, lambda: self._hello(request))

    async def _history(self, request: web.Request) -> web.Response:
        access.check_may_fetch(request, self._targets.token)
        last = request.query.get("last", str(_MOST_REQUESTS))
        if not (last.isascii() and last.isdigit() and 0 < int(last[:9]) <= _MOST_REQUESTS):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "'last' is a number of requests.")
        self._feed.add_viewer()  # a client that asks for a history is likely to ask again
        self._feed.remove_viewer()
        async with self._one_history:  # each takes up to a second, and reads continue meanwhile
            lines = self._history_lines(self.event_log, int(last[:9]), self._router.routing, self._names)
            text = await asyncio.to_thread(lambda: "".join(f"{line}\n" for line in lines))
        return web.Response(
            text=text,
            headers={**access.SECURITY_HEADERS, "Content-Type": "application/x-ndjson"},
        )

    async def _control(self, request: web.Request) -> web.Response:
        access.check_may_command(request, self._targets.token)
        if self._targets.cluster is None:
            raise Problem(HTTPStatus.FORBIDDEN, _NOT_OURS)
        command = await access.read_command(request)
        match command.get("command"):
            case "scenario":
                result = self._runner.start(command.get("name"))
            case name:
                if name == "heal":
                    await self._runner.stop()
                elif name in ("routing", "simulator"):
                    self._runner.check_idle()
                result = await self._controls.execute(command)
        return web.json_response({"said": result}, headers=access.SECURITY_HEADERS)

    def _hello(self, request: web.Request) -> Event:
        policy, simulator = self._router.policy, self._targets.simulator
        no_controls = _NOT_OURS if self._targets.cluster is None else None
        if no_controls is None and self._targets.token is None and not access.is_local(request):
            no_controls = access.NOT_LOCAL
        max_lag = [] if policy.max_lag_bytes is None else [f"{policy.max_lag_bytes} bytes"]
        max_lag += [] if policy.max_lag_s is None else [f"{policy.max_lag_s:g} s"]
        return {
            "now": self.event_log.ms(time.monotonic()),
            "zero": datetime.fromtimestamp(self.event_log.zero_wall, UTC).isoformat().replace("+00:00", "Z"),
            "routing": self._router.routing,
            "routings": list(Routing),
            "nodes": self._names,
            "max_wait_ms": policy.max_wait_s * 1000,
            "lease_ms": policy.lease_s * 1000,
            "interval_ms": self._interval_s * 1000,
            "max_lag": " or ".join(max_lag) or None,
            "controls": no_controls is None,
            "no_controls": no_controls,
            "token_required": self._targets.token is not None,
            "simulator": simulator is not None,
            "simulator_rate": None if simulator is None else simulator.rate,
            "scenarios": [{"name": one.name, "title": one.title, "text": one.text} for one in SCENARIOS.values()],
        }
