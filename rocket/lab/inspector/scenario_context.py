"""What a scenario has at hand while it plays."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from functools import partial
from typing import TYPE_CHECKING

from rocket.errors import RocketError, unwrapping_group
from rocket.lab.inspector.client import ApiClient, Tally
from rocket.lab.inspector.event_log import Staged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import aiohttp

    from rocket.consistency import Board
    from rocket.lab.comparison import Routing
    from rocket.lab.inspector.controls import Controls
    from rocket.lab.inspector.event_log import EventLog

_PATIENCE_S = 10.0
_LOOK_S = 0.005


class Stuck(RocketError):
    """What a scenario waited for did not come."""


class ScenarioContext:
    """The controls, clients of its own, and what the observer sees."""

    def __init__(
        self, name: str, board: Board, controls: Controls, journal: EventLog, http: aiohttp.ClientSession
    ) -> None:
        self.board = board
        self._name = name
        self._controls = controls
        self._journal = journal
        self._http = http

    def say(self, text: str, phase: str = "step") -> None:
        """Tell viewers what happens."""
        self._journal.add(Staged(time.monotonic(), self._name, phase, text))

    @property
    def replicas(self) -> list[str]:
        """The replicas that the observer sees."""
        return [status.name for status in self.board.replicas]

    async def route(self, routing: Routing) -> None:
        """Route by another rule; raise `Unavailable` if that cannot be done now."""
        await self._controls.route(routing)

    async def do(self, command: str, *nodes: str, delay_ms: int | None = None) -> None:
        """Do something to several nodes at once; raise `RocketError` if one refuses."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for node in nodes:
                    group.create_task(self._controls.disturb(command, node, delay_ms), name=f"{command} {node}")

    @contextlib.asynccontextmanager
    async def applied_late(self, delay_ms: int) -> AsyncIterator[None]:
        """Have every replica apply commits so much later."""
        replicas = self.replicas
        await self.do("delay", *replicas, delay_ms=delay_ms)
        try:
            yield
        finally:
            await self.do("delay", *replicas, delay_ms=0)

    async def rider(self) -> ApiClient:
        """Return a client whose user is known; raise `NotWritten`."""
        rider = ApiClient(self._http, self._name)
        await rider.join()
        return rider

    async def read_again_and_again(self, rider: ApiClient, ride: int, times: int, every_s: float) -> Tally:
        """Read a ride so many times, one after the other; return how those reads went."""
        rider.tally = Tally()
        for _ in range(times):
            await rider.read(ride)
            await asyncio.sleep(every_s)
        return rider.tally

    async def read_until(self, enough: asyncio.Event, rider: ApiClient, ride: int) -> Tally:
        """Read a ride again and again until told to stop."""
        rider.tally = Tally()
        while not enough.is_set():
            await rider.read(ride)
            await asyncio.sleep(_LOOK_S)
        return rider.tally

    async def read_at_once(self, rider: ApiClient, ride: int, times: int) -> Tally:
        """Read a ride so many times, all at the same time."""
        rider.tally = Tally()
        async with asyncio.TaskGroup() as group:
            for number in range(times):
                group.create_task(rider.read(ride), name=f"read {number}")
        return rider.tally

    # --- waiting ---

    async def look_at(self, replica: str) -> None:
        """Wait until the observer has just looked at a replica."""
        before = self._seen_at(replica)
        await self._until(lambda: self._seen_at(replica) > before, f"a look at {replica}")

    def _seen_at(self, replica: str) -> float:
        status = self.board.replica(replica)
        return math.inf if status is None else status.observed_at

    async def beat(self, times: int = 1) -> None:
        """Wait until the observer has looked at the primary, and written down what it knows of replicas."""
        for _ in range(times):
            await self._until(partial(self._seen_after, self._primary_seen_at()), "the observer's next look")
        await asyncio.sleep(10 * _LOOK_S)  # to write it down, and for replicas to get that

    async def caught_up(self) -> None:
        """Wait until every replica has replayed what the primary has flushed by now."""
        await self.beat()
        primary = self.board.primary
        flushed = 0 if primary is None else primary.flush_lsn
        await self._until(
            lambda: all(status.replay_lsn >= flushed for status in self.board.replicas), "replicas to catch up"
        )

    async def everybody(self, count: int) -> None:
        """Wait until the observer sees so many replicas that follow the primary, and the primary."""
        await self._until(
            lambda: (
                not self.board.primary_is_lost
                and sum(status.epoch == self.board.epoch for status in self.board.replicas) >= count
            ),
            f"{count} replicas",
            30.0,
        )

    def _primary_seen_at(self) -> float:
        return 0.0 if self.board.primary is None else self.board.primary.observed_at

    def _seen_after(self, moment: float) -> bool:
        return self._primary_seen_at() > moment

    async def _until(self, so: Callable[[], bool], what: str, patience_s: float | None = None) -> None:
        patience_s = patience_s or _PATIENCE_S
        deadline = time.monotonic() + patience_s
        while not so():
            if time.monotonic() > deadline:
                raise Stuck(f"waited {patience_s:g} s for {what}, in vain")
            await asyncio.sleep(_LOOK_S)
