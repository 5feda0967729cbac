"""What a scenario works with: the controls, users of the API, and the state that the observer sees."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from rocket.errors import RocketError, unwrapping_group
from rocket.lab.inspector.event_log import ScenarioStep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from rocket.consistency import Board
    from rocket.lab.client import Answer, Api
    from rocket.lab.comparison import Routing
    from rocket.lab.inspector.controls import Controls
    from rocket.lab.inspector.event_log import EventLog

_NOT_SHOWN = {HTTPStatus.NOT_FOUND, HTTPStatus.UNAUTHORIZED}
"""Statuses of a node that does not show a ride, or does not know its user."""
_REPLICAS_TIMEOUT_S = 30.0
_POLL_S = 0.005


class WaitTimeout(RocketError):
    """A scenario waited too long for something."""


@dataclass(slots=True)
class ReadTally:
    """The results of a scenario's reads."""

    reads: int = 0
    stale: int = 0
    refused: int = 0
    """Answered by a 503."""
    by_primary: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    longest_ms: float = 0.0

    @classmethod
    def sum(cls, tallies: Iterable[ReadTally]) -> ReadTally:
        """Return the sum of tallies."""
        total = cls()
        for one in tallies:
            total.reads += one.reads
            total.stale += one.stale
            total.refused += one.refused
            total.by_primary += one.by_primary
            total.reasons += one.reasons
            total.longest_ms = max(total.longest_ms, one.longest_ms)
        return total

    @property
    def by_replicas(self) -> int:
        """The number of reads that a replica answered."""
        return self.reads - self.refused - self.by_primary

    def __str__(self) -> str:
        refused = f", {self.refused} told to try again (503)" if self.refused else ""
        return f"{self.stale} of {self.reads} reads stale{refused}"


class ScenarioUser:
    """A user of the API with one session, who writes rides and reads them. Every method raises `NoAnswer`."""

    def __init__(self, api: Api, scenario: str) -> None:
        self.tally = ReadTally()
        self.lost: list[str] = []
        """Notices of a possible loss in a promotion."""
        self._api = api
        self._email = f"{scenario}-{secrets.token_hex(3)}@scenario.example"
        self._tokens: tuple[str, ...] = ()

    async def join(self) -> None:
        """Create the user; raise `UnexpectedAnswer` if the API does not."""
        self._take(await self._api.post("/users", json={"email": self._email})).expect(HTTPStatus.CREATED)

    async def write(self) -> int:
        """Write a ride and return its id; raise `UnexpectedAnswer` unless it is acknowledged."""
        distance = secrets.randbelow(9000) / 10 + 10
        answer = await self._api.post("/rides", user=self._email, tokens=self._tokens, json={"distance": distance})
        return int(self._take(answer).expect(HTTPStatus.CREATED).json()["id"])

    async def read(self, ride: int) -> None:
        """Read a ride that was written, and count the result."""
        began = time.monotonic()
        answer = self._take(await self._api.get(f"/rides/{ride}", user=self._email, tokens=self._tokens))
        self.tally.reads += 1
        if answer.status not in {*_NOT_SHOWN, HTTPStatus.OK}:
            self.tally.refused += 1
            return
        self.tally.stale += answer.status in _NOT_SHOWN
        self.tally.by_primary += answer.role == "primary"
        self.tally.reasons[answer.reason or "unknown"] += 1
        self.tally.longest_ms = max(self.tally.longest_ms, (time.monotonic() - began) * 1000)

    async def read_repeatedly(self, ride: int, times: int, every_s: float) -> ReadTally:
        """Read a ride a number of times, one after the other; return the results."""
        self.tally = ReadTally()
        for _ in range(times):
            await self.read(ride)
            await asyncio.sleep(every_s)
        return self.tally

    async def read_until(self, stop: asyncio.Event, ride: int) -> ReadTally:
        """Read a ride, one read after the other, until `stop` is set; return the results."""
        self.tally = ReadTally()
        while not stop.is_set():
            await self.read(ride)
            await asyncio.sleep(_POLL_S)
        return self.tally

    async def read_at_once(self, ride: int, times: int) -> ReadTally:
        """Read a ride a number of times, all at the same time; return the results."""
        self.tally = ReadTally()
        async with asyncio.TaskGroup() as group:
            for number in range(times):
                group.create_task(self.read(ride), name=f"read {number}")
        return self.tally

    def _take(self, answer: Answer) -> Answer:
        """Take the session token of an answer, and the notice of a possible loss; return the answer."""
        if answer.token is not None:
            self._tokens = (answer.token,)
        if answer.possible_loss is not None:
            self.lost.append(answer.possible_loss)
        return answer


class ScenarioContext:
    """The interface of a scenario to the program."""

    def __init__(  # noqa: PLR0917 - what it is made of
        self,
        name: str,
        board: Board,
        controls: Controls,
        event_log: EventLog,
        api: Api,
        step_timeout_s: float,
    ) -> None:
        self.board = board
        self._name = name
        self._controls = controls
        self._event_log = event_log
        self._api = api
        self._step_timeout_s = step_timeout_s

    def report(self, text: str, phase: str = "step") -> None:
        """Inform viewers of a step."""
        self._event_log.add(ScenarioStep(time.monotonic(), self._name, phase, text))

    @property
    def replicas(self) -> list[str]:
        """The replicas that the observer sees."""
        return [status.name for status in self.board.replicas]

    async def user(self) -> ScenarioUser:
        """Create a user; raise `NoAnswer` or `UnexpectedAnswer`."""
        user = ScenarioUser(self._api, self._name)
        await user.join()
        return user

    async def set_routing(self, routing: Routing) -> None:
        """Route by another rule; raise `Unavailable` if that is impossible now."""
        await self._controls.set_routing(routing)

    async def command(self, command: str, *nodes: str, delay_ms: int | None = None) -> None:
        """Send a command for several nodes at the same time; raise `RocketError` if one is refused."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for node in nodes:
                    group.create_task(
                        self._controls.command_cluster(command, node, delay_ms), name=f"{command} {node}"
                    )

    @contextlib.asynccontextmanager
    async def apply_delay(self, delay_ms: int) -> AsyncIterator[None]:
        """Delay the replay of commits on every replica for as long as the context lasts."""
        replicas = self.replicas
        await self.command("delay", *replicas, delay_ms=delay_ms)
        try:
            yield
        finally:
            await self.command("delay", *replicas, delay_ms=0)

    # --- waiting; each raises `WaitTimeout` ---

    async def wait_for_status(self, replica: str) -> None:
        """Wait for the next status of a replica."""
        before = self._observed_at(replica)
        await self._wait(lambda: self._observed_at(replica) > before, f"a status of {replica}")

    async def wait_for_heartbeat(self, times: int = 1) -> None:
        """Wait until the observer has asked the primary, and has written the statuses of replicas there."""
        for _ in range(times):
            await self._wait(partial(self._primary_observed_after, self._primary_observed_at()), "the observer")
        await asyncio.sleep(10 * _POLL_S)  # for the heartbeat to be written, and to reach replicas

    async def wait_for_catchup(self) -> None:
        """Wait until every replica has replayed what the primary has flushed by now."""
        await self.wait_for_heartbeat()
        primary = self.board.primary
        flushed = 0 if primary is None else primary.flush_lsn
        await self._wait(
            lambda: all(status.replay_lsn >= flushed for status in self.board.replicas), "replicas to catch up"
        )

    async def wait_for_replicas(self, count: int) -> None:
        """Wait until the observer sees the primary, and a number of replicas that follow it."""
        await self._wait(
            lambda: (
                not self.board.primary_is_lost
                and sum(status.epoch == self.board.epoch for status in self.board.replicas) >= count
            ),
            f"{count} replicas",
            _REPLICAS_TIMEOUT_S,
        )

    def _observed_at(self, replica: str) -> float:
        status = self.board.replica(replica)
        return math.inf if status is None else status.observed_at

    def _primary_observed_at(self) -> float:
        return 0.0 if self.board.primary is None else self.board.primary.observed_at

    def _primary_observed_after(self, moment: float) -> bool:
        return self._primary_observed_at() > moment

    async def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float | None = None) -> None:
        timeout_s = timeout_s or self._step_timeout_s
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise WaitTimeout(f"waited {timeout_s:g} s for {what}")
            await asyncio.sleep(_POLL_S)
