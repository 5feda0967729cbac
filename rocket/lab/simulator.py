"""The simulator: clients that write a ride, read it back, and report whether it is what they wrote."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import math
import random
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from rocket.consistency import Freshness
from rocket.lab.client import Api, NoAnswer, UnexpectedAnswer

_LONGEST_PAUSE_S = 2.0
_SHORTEST_RIDE, _LONGEST_RIDE = 5.0, 1000.0
_RIDES_PER_CLIENT_S = 2.0
"""How many rides a second one client makes at most before another one joins."""
_POLL_S = 0.1
"""How soon one client notices that there are to be more."""

_log = logging.getLogger("rocket.simulator")
_ALIKE = {"alike": "not answered"}
"""Marks log lines of which one now and then is enough."""


class Outcome(enum.StrEnum):
    """How a read went, as its client sees it."""

    FRESH = "fresh"
    STALE = "stale"
    """The ride that had been acknowledged was not there, or not as it had been written."""
    LATE = "late"
    """The ride was not there yet, and need not be, by what the read asked for."""
    REFUSED = "refused"
    """The API answered that it could not carry it out now."""
    FAILED = "failed"
    """No answer at all."""


@dataclass
class Tally:
    """The figures of a simulation."""

    rides: int = 0
    unwritten: int = 0
    """Rides that the API did not acknowledge."""
    left_out: int = 0
    """Rides that were not begun, because too many were in flight."""
    reads: Counter[Outcome] = field(default_factory=Counter)
    by_node: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Reads that went to the primary, by reason."""

    @property
    def stale(self) -> int:
        """Reads that broke the guarantee."""
        return self.reads[Outcome.STALE]

    def lines(self) -> list[str]:
        """Return a summary for people."""
        total = sum(self.reads.values())
        nodes = ", ".join(f"{name} {count}" for name, count in sorted(self.by_node.items()))
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.fallbacks.most_common())
        lines = [
            f"{_counted(self.rides, 'ride')} written, {_counted(total, 'read')}: {nodes or 'none answered'}",
            f"{_counted(sum(self.fallbacks.values()), 'read')} by the primary"
            + (f" ({reasons})" if reasons else ""),
        ]
        trouble = {
            ("ride", "not acknowledged"): self.unwritten,
            ("ride", "left out"): self.left_out,
            ("read", "without a ride that it need not show yet"): self.reads[Outcome.LATE],
            ("read", "refused"): self.reads[Outcome.REFUSED],
            ("read", "without an answer"): self.reads[Outcome.FAILED],
        }
        if any(trouble.values()):
            parts = (f"{_counted(count, what)} {how}" for (what, how), count in trouble.items() if count)
            lines.append(", ".join(parts))
        lines.append(_counted(self.stale, "stale read"))
        return lines


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


class Simulator:
    """Traffic against an API, over HTTP and nothing else.

    Without a rate: one client that writes a ride, waits up to two seconds, and reads it back. With a rate: that
    number of rides a second in all, each read back at once or after a pause like that, from as many clients as it
    takes, which keep their sessions from ride to ride. Reads ask for what `freshness` says.
    The rate may be changed at any time. Where several processes share the API's port, `reconnect` lets each
    request reach another one. When the API is slower than the rate, no more than `most_in_flight` rides are begun;
    the others are left out, and counted. After a failure a client waits for `retry_s`.
    """

    def __init__(
        self,
        url: str,
        *,
        rate: float | None = None,
        reconnect: bool = False,
        chance: random.Random | None = None,
        most_in_flight: int = 2000,
        retry_s: float = 0.5,
        freshness: Freshness = Freshness.SESSION,
    ) -> None:
        self.tally = Tally()
        self._url = url
        self._rate = rate
        self._rate_changed = asyncio.Event()
        self._reconnect = reconnect
        self._chance = chance or random.Random()  # noqa: S311 - no secrets here
        self._most_in_flight = most_in_flight
        self._retry_s = retry_s
        self._freshness = freshness
        self._emails: list[str] = []
        self._tokens: dict[str, str] = {}
        """The session token of each client, while none of its rides has it."""
        self._in_flight: set[asyncio.Task[None]] = set()

    @property
    def rate(self) -> float | None:
        """Rides a second; 0: none for now; None: those of one client."""
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        self._rate = rate
        self._rate_changed.set()

    async def run(self) -> None:
        """Make traffic until cancelled; while the API does not answer, try again."""
        async with Api(self._url, reconnect=self._reconnect) as api, asyncio.TaskGroup() as group:
            while True:
                self._rate_changed.clear()
                rate = self._rate
                clients = 1 if rate is None else math.ceil(rate / _RIDES_PER_CLIENT_S)
                while len(self._emails) < clients:
                    self._emails.append(await self._new_user(api))
                if rate is None:
                    await self._rides_of_one(api, group)
                elif rate:
                    await self._rides_at(rate, api, group)
                await self._rate_changed.wait()

    async def _new_user(self, api: Api) -> str:
        email = f"{secrets.token_hex(6)}@example.com"
        while True:
            with contextlib.suppress(NoAnswer):
                answer = await api.post("/users", json={"email": email})
                if answer.ok:
                    return email
                _log.warning("no user yet: %d %s", answer.status, answer.text, extra=_ALIKE)
            await asyncio.sleep(self._retry_s)

    async def _rides_of_one(self, api: Api, group: asyncio.TaskGroup) -> None:
        """Make one ride after another until the rate is changed."""
        while not self._rate_changed.is_set():
            pause_s = self._chance.uniform(0, _LONGEST_PAUSE_S)
            ride = group.create_task(self._ride(api, pause_s), name="ride")
            while not (ride.done() or self._rate_changed.is_set()):
                await asyncio.wait((ride,), timeout=_POLL_S)

    async def _rides_at(self, rate: float, api: Api, group: asyncio.TaskGroup) -> None:
        """Make this many rides a second until the rate is changed."""
        began = time.monotonic()
        for number in itertools.count(1):
            if len(self._in_flight) < self._most_in_flight:
                pause_s = self._chance.choice((0.0, self._chance.uniform(0, _LONGEST_PAUSE_S)))
                ride = group.create_task(self._ride(api, pause_s), name=f"ride {number}")
                self._in_flight.add(ride)
                ride.add_done_callback(self._in_flight.discard)
            else:
                self.tally.left_out += 1
            if await self._changed_within(began + number / rate - time.monotonic()):
                return

    async def _changed_within(self, timeout_s: float) -> bool:
        """Wait until the rate is changed; return False when the time is over."""
        if timeout_s <= 0:
            await asyncio.sleep(0)
            return self._rate_changed.is_set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._rate_changed.wait()
        return self._rate_changed.is_set()

    async def _ride(self, api: Api, pause_s: float) -> None:
        email = self._chance.choice(self._emails)
        distance = round(self._chance.uniform(_SHORTEST_RIDE, _LONGEST_RIDE), 1)
        # The tokens of rides that overlap belong to two sessions: the later one starts without.
        token = self._tokens.pop(email, None)
        try:
            answer = await api.post("/rides", user=email, tokens=_sent(token), form={"distance": str(distance)})
            ride = answer.expect(HTTPStatus.CREATED).json()
        except (NoAnswer, UnexpectedAnswer, ValueError) as error:
            _log.warning("ride not written: %s", error, extra=_ALIKE)
            self.tally.unwritten += 1
            await asyncio.sleep(self._retry_s)
            return
        self.tally.rides += 1
        written_at = time.monotonic()
        await asyncio.sleep(pause_s)
        outcome, token = await self._read_back(api, email, answer.token, ride, written_at)
        self.tally.reads[outcome] += 1
        if token is not None and self._rate is not None:  # one client alone would stay on its replica for good
            self._tokens[email] = token

    async def _read_back(
        self, api: Api, email: str, token: str | None, ride: dict[str, Any], written_at: float
    ) -> tuple[Outcome, str | None]:
        """Read a ride that was acknowledged; return how that went, and the session's next token."""
        asked = None if self._freshness is Freshness.SESSION else str(self._freshness)
        age_s = time.monotonic() - written_at
        try:
            answer = await api.get(f"/rides/{ride['id']}", user=email, tokens=_sent(token), freshness=asked)
            body = answer.json()
        except (NoAnswer, ValueError) as error:
            _log.warning("no answer for ride %s: %s", ride["id"], error, extra=_ALIKE)
            return Outcome.FAILED, token
        if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.warning("ride %s not read: %d %s", ride["id"], answer.status, body, extra=_ALIKE)
            return Outcome.REFUSED, answer.token
        node, reason = answer.node or "unknown", answer.reason or "unknown"
        self.tally.by_node[node] += 1
        if answer.role == "primary":
            self.tally.fallbacks[reason] += 1
        if answer.status == HTTPStatus.OK and body == ride:
            return Outcome.FRESH, answer.token
        if answer.status == HTTPStatus.NOT_FOUND and self._may_be_late(age_s):
            return Outcome.LATE, answer.token
        _log.error(
            "STALE READ: wrote ride %s, and %s (%s) answered %d %s", ride, node, reason, answer.status, body
        )
        return Outcome.STALE, answer.token

    def _may_be_late(self, age_s: float) -> bool:
        """Return whether reads need not show what was written that many seconds before."""
        max_age_s = self._freshness.max_age_s
        return self._freshness is Freshness.ANY if max_age_s is None else age_s < max_age_s


def _sent(token: str | None) -> tuple[str, ...]:
    return () if token is None else (token,)
