"""The inspector, put together: a witness of the API, and the routes where it is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket import Routing
from rocket.lab.api.keys import METRICS
from rocket.lab.api.limits import ADMISSION
from rocket.lab.api.problems import Problem
from rocket.lab.inspector import access
from rocket.lab.inspector.controls import Controls
from rocket.lab.inspector.event_log import EventLog, Faulted
from rocket.lab.inspector.export import history_lines
from rocket.lab.inspector.feed import Feed
from rocket.lab.inspector.runner import Runner
from rocket.lab.inspector.scenarios import SCENARIOS
from rocket.lab.inspector.stream import Stream
from rocket.lab.shutdown import background

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rocket import Router
    from rocket.cluster.cluster import CarriedOut, LocalCluster
    from rocket.lab.inspector.events import Event
    from rocket.lab.inspector.targets import Targets

_NOT_OURS = "No faults on a cluster that rocket only attached to."
_FAR = "Orders are taken from clients on this machine only; --inspector-token lets others in."
_LAST = 10**6
"""Requests that a history holds at most, if so many are still there."""


class Inspector:
    """Watches one API, its observer, and what is done to the cluster."""

    def __init__(self, router: Router[str], reach: Targets, nodes: Sequence[str], interval_s: float) -> None:
        self.journal = EventLog()
        self.journal.watch(router.board)
        self._router = router
        self._reach = reach
        self._nodes = nodes
        self._interval_s = interval_s
        self._one_history = asyncio.Lock()
        self._files = access.page_files()
        self._controls = Controls(reach, router, self.journal)
        self._stage = Runner(reach, router, self._controls, self.journal)

    @property
    def _names(self) -> list[str]:
        """Of the nodes that there were, and of those that have come since."""
        return list(dict.fromkeys((*self._nodes, *(pool.name for pool in self._router.pools))))

    @contextlib.asynccontextmanager
    async def serving(self, app: web.Application) -> AsyncIterator[None]:
        """Add the inspector's routes to an application and do its work for as long as the context lasts."""
        feed = self._feed = Feed(self.journal, self._router, app[METRICS])
        feed.states = lambda: self._controls.states
        self._stream = Stream(feed)
        app.on_shutdown.append(self._stream.close)
        for method, path, handler in (
            ("GET", "/inspector", self._index),
            ("GET", "/inspector/", self._moved),
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
            if (cluster := self._reach.cluster) is not None:
                cluster.on_command.append(self._note)
                stack.callback(cluster.on_command.remove, self._note)
                watching = self._watch_nodes(cluster, feed)
                await stack.enter_async_context(background(watching, "inspector's nodes"))
                await stack.enter_async_context(background(self._stage.run(), "inspector's stage"))
            yield

    def _note(self, done: CarriedOut) -> None:
        self.journal.add(Faulted(time.monotonic(), done))

    async def _watch_nodes(self, cluster: LocalCluster, feed: Feed) -> None:
        while True:
            await feed.wanted()
            await self._controls.watch_nodes(cluster.run_dir)

    # --- the routes ---

    async def _index(self, request: web.Request) -> web.Response:
        access.may_look(request, self._reach.token)
        if self._reach.token is not None and "token" in request.query:
            # Out of the address, into a cookie that no page of another site can send, and no script read.
            response = web.Response(status=HTTPStatus.SEE_OTHER, headers={"Location": "/inspector"})
            response.set_cookie(
                access.COOKIE, request.query["token"], path="/inspector", httponly=True, samesite="Strict"
            )
            response.headers.update(access.SECURITY_HEADERS)
            return response
        return self._served(access.INDEX)

    async def _moved(self, request: web.Request) -> web.Response:
        """Lead to the page whoever wrote its address with a slash at the end."""
        location = f"/inspector?{request.query_string}".removesuffix("?")
        return web.Response(
            status=HTTPStatus.PERMANENT_REDIRECT, headers={**access.SECURITY_HEADERS, "Location": location}
        )

    async def _file(self, request: web.Request) -> web.Response:
        access.may_look(request, self._reach.token)
        return self._served(request.match_info["name"])

    def _served(self, name: str) -> web.Response:
        if name not in self._files:
            raise Problem(HTTPStatus.NOT_FOUND, f"The inspector has no file '{name}'.", access.SECURITY_HEADERS)
        body, content_type = self._files[name]
        return web.Response(body=body, headers={**access.SECURITY_HEADERS, "Content-Type": content_type})

    async def _events(self, request: web.Request) -> web.Response:
        access.may_be_told(request, self._reach.token)
        return self._stream.open(request, lambda: self._hello(request))

    async def _history(self, request: web.Request) -> web.Response:
        access.may_be_told(request, self._reach.token)
        last = request.query.get("last", str(_LAST))
        if not (last.isascii() and last.isdigit() and 0 < int(last[:9]) <= _LAST):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "'last' is a number of requests.")
        self._feed.look()  # whoever asks for one wants another one later
        self._feed.look_away()
        async with self._one_history:  # each is work for a second, and reads go on meanwhile
            lines = history_lines(self.journal, int(last[:9]), self._router.routing, self._names)
            text = await asyncio.to_thread(lambda: "".join(f"{line}\n" for line in lines))
        return web.Response(
            text=text,
            headers={**access.SECURITY_HEADERS, "Content-Type": "application/x-ndjson"},
        )

    async def _control(self, request: web.Request) -> web.Response:
        access.may_act(request, self._reach.token)
        if self._reach.cluster is None:
            raise Problem(HTTPStatus.FORBIDDEN, _NOT_OURS)
        order = await access.order_of(request)
        match order.get("command"):
            case "scenario":
                said = self._stage.begin(order.get("name"))
            case command:
                if command == "heal":
                    await self._stage.end()
                elif command in ("routing", "simulator"):
                    self._stage.refuse_while_playing()
                said = await self._controls.carry_out(order)
        return web.json_response({"said": said}, headers=access.SECURITY_HEADERS)

    def _hello(self, request: web.Request) -> Event:
        policy, simulator = self._router.policy, self._reach.simulator
        why_not = _NOT_OURS if self._reach.cluster is None else None
        if why_not is None and self._reach.token is None and not access.is_near(request):
            why_not = _FAR
        max_lag: str | None = None
        if policy.max_lag_bytes is not None:
            max_lag = f"{policy.max_lag_bytes} bytes"
        elif policy.max_lag_s is not None:
            max_lag = f"{policy.max_lag_s:g} s"
        return {
            "now": self.journal.ms(time.monotonic()),
            "zero": datetime.fromtimestamp(self.journal.zero_wall, UTC).isoformat().replace("+00:00", "Z"),
            "routing": self._router.routing,
            "routings": list(Routing),
            "nodes": self._names,
            "max_wait_ms": policy.max_wait_s * 1000,
            "lease_ms": policy.lease_s * 1000,
            "interval_ms": self._interval_s * 1000,
            "max_lag": max_lag,
            "controls": why_not is None,
            "no_controls": why_not,
            "token_required": self._reach.token is not None,
            "simulator": simulator is not None,
            "simulator_rate": None if simulator is None else simulator.rate,
            "scenarios": [{"name": one.name, "title": one.title, "text": one.text} for one in SCENARIOS.values()],
        }
