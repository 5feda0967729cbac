"""An API with its inspector, and a viewer of its events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rocket.cluster import control
from rocket.lab.api.app import build_app
from rocket.lab.inspector.controls import Targets
from rocket.lab.inspector.inspector import Inspector, Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import ClientResponse, ClientSession, web
    from aiohttp.test_utils import TestClient
    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.comparison import ComparisonRouter
    from rocket.lab.inspector.event_log import EventLog

    Client = TestClient[web.Request, web.Application]

DEADLINE_S = 20.0
"""For everything that a test waits for: much longer than it takes."""
QUICK = Limits(tick_s=0.1)
"""Totals ten times a second."""
HEADERS = {"Rocket-Inspector": "1"}


@dataclass
class Viewer:
    """A client of the stream, and what it has received."""

    response: ClientResponse
    hellos: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    last_id: str = ""

    @property
    def fresh(self) -> list[dict[str, Any]]:
        """What happened since it connected; a new viewer receives earlier events as well."""
        return [event for event in self.events if event["t"] >= self.hellos[0]["now"]]

    async def until(self, kind: str, **values: Any) -> dict[str, Any]:
        """Read until there is an event of this kind with these values; return it."""
        seen = 0
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for event in self.events[seen:]:
                    if event["kind"] == kind and values.items() <= event.items():
                        return event
                seen = len(self.events)
                await self.read()

    async def read(self) -> None:
        """Read one message."""
        name = ""
        while line := (await self.response.content.readline(max_line_length=2**26)).decode().removesuffix("\n"):
            key, _, value = line.partition(": ")
            if key == "id":
                self.last_id = value
            elif key == "event":
                name = value
            elif key == "data" and name == "hello":
                self.hellos.append(json.loads(value))
            elif key == "data":
                self.events += json.loads(value)
        if not name:
            raise EOFError


@contextlib.asynccontextmanager
async def viewing(client: Client | ClientSession, last_id: str = "") -> AsyncIterator[Viewer]:
    """View the events for as long as the context lasts, from the greeting on."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    async with client.get("/inspector/events", headers=headers) as response:
        assert 200 == response.status
        viewer = Viewer(response)
        await viewer.read()
        yield viewer


@dataclass
class Inspected:
    """An API with its inspector, and the log of that."""

    client: Client
    event_log: EventLog

    async def command(self, **command: object) -> tuple[int, dict[str, Any]]:
        """Send a command; return status and answer."""
        async with self.client.post("/inspector/control", json=command, headers=HEADERS) as response:
            return response.status, await response.json()


@contextlib.asynccontextmanager
async def inspecting(
    router: ComparisonRouter,
    cluster: LocalCluster,
    aiohttp_client: AiohttpClient,
    **options: Any,
) -> AsyncIterator[Inspected]:
    """Serve an API that commands a cluster; the options are those of its inspector."""
    options = {"limits": QUICK} | options
    inspector = Inspector(router, Targets("", cluster), list(cluster.nodes), 0.5, **options)
    app = build_app(router, recorder=inspector.event_log.recorder)
    async with control.listening(cluster, lambda: None), inspector.serving(app):
        yield Inspected(await aiohttp_client(app), inspector.event_log)
