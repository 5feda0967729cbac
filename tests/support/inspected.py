"""An API with its inspector, and a viewer of its events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import ClientResponse, web
    from aiohttp.test_utils import TestClient

    from rocket.lab.inspector.event_log import EventLog

    Client = TestClient[web.Request, web.Application]

DEADLINE_S = 20.0
"""For whatever a test waits for: much longer than it takes."""


HEADERS = {"Rocket-Inspector": "1"}


@dataclass
class Viewer:
    """A client of the stream, and what it has been told."""

    response: ClientResponse
    hellos: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    last_id: str = ""

    @property
    def fresh(self) -> list[dict[str, Any]]:
        """What happened since it looks; who comes is told of the time before, too."""
        return [event for event in self.events if event["t"] >= self.hellos[0]["now"]]

    async def until(self, kind: str, **values: Any) -> dict[str, Any]:
        """Read on until there is such an event; return it."""
        looked_at = 0
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for event in self.events[looked_at:]:
                    if event["kind"] == kind and values.items() <= event.items():
                        return event
                looked_at = len(self.events)
                await self.read()

    async def read(self) -> None:
        """Read one message."""
        name = ""
        while line := (await self.response.content.readline(max_line_length=2**26)).decode().removesuffix("\n"):
            what, _, value = line.partition(": ")
            if what == "id":
                self.last_id = value
            elif what == "event":
                name = value
            elif what == "data" and name == "hello":
                self.hellos.append(json.loads(value))
            elif what == "data":
                self.events += json.loads(value)
        if not name:
            raise EOFError


@contextlib.asynccontextmanager
async def looking(client: Client, last_id: str = "") -> AsyncIterator[Viewer]:
    """Look at the events for a while, from the greeting on."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    async with client.get("/inspector/events", headers=headers) as response:
        assert 200 == response.status
        viewer = Viewer(response)
        await viewer.read()
        yield viewer


@dataclass
class Inspected:
    """An API, and what its inspector has noted."""

    client: Client
    journal: EventLog

    async def order(self, **order: object) -> tuple[int, dict[str, Any]]:
        """Order something; return status and answer."""
        async with self.client.post("/inspector/control", json=order, headers=HEADERS) as response:
            return response.status, await response.json()
