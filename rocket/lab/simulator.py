"""The simulator: clients that write a ride, read it back, and tell if it is not what they wrote."""

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

import aiohttp

_LONGEST_PAUSE_S = 2.0
_SHORTEST_RIDE, _LONGEST_RIDE = 5.0, 1000.0
_RIDES_PER_CLIENT_S = 2.0
"""How many rides a second one client makes at most before another one joins."""
_MOST_IN_FLIGHT = 2000
"""Rides under way; when the API is slower than the rate, further ones are left out, and counted."""
_REQUEST_TIMEOUT_S = 10.0
_SESSION_HEADER = "Rocket-Session"
"""What the API hands out with an answer, and wants to see again."""
_RETRY_S = 0.5
_LOOK_S = 0.1
"""How soon one client notices that there shall be more."""

_log = logging.getLogger("rocket.simulator")
_ALIKE = {"alike": "not answered"}
"""Of lines of which one every while is enough."""


class Outcome(enum.StrEnum):
    """How a read went, seen from outside."""

    FRESH = "fresh"
    STALE = "stale"
    """The ride that had been acknowledged was not there, or not as it had been written."""
    REFUSED = "refused"
    """The API said that it cannot answer now."""
    FAILED = "failed"
    """No answer at all."""


@dataclass
class Tally:
    """What a simulation has seen."""

    rides: int = 0
    unwritten: int = 0
    """Rides that the API did not acknowledge."""
    left_out: int = 0
    """Rides that were not begun, because too many were under way."""
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
            ("read", "refused"): self.reads[Outcome.REFUSED],
            ("read", "without an answer"): self.reads[Outcome.FAILED],
        }
        if any(trouble.values()):
            told = (f"{_counted(count, what)} {how}" for (what, how), count in trouble.items() if count)
            lines.append(", ".join(told))
        lines.append(_counted(self.stale, "stale read"))
        return lines


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


class Simulator:
    """Makes traffic against an API, over HTTP and nothing else.

    Without a rate: one client that writes a ride, waits up to two seconds, and reads it back. With one: that
    many rides a second in all, each read back at once or after such a pause, from as many clients as it takes,
    which keep their sessions from ride to ride.
    The rate may be changed at any time. Where several processes share the API's port, `reconnect` lets each
    request reach another one.
    """

    def __init__(
        self,
        url: str,
        *,
        rate: float | None = None,
        reconnect: bool = False,
        chance: random.Random | None = None,
    ) -> None:
        self.tally = Tally()
        self._url = url
        self._rate = rate
        self._rate_changed = asyncio.Event()
        self._reconnect = reconnect
        self._chance = chance or random.Random()  # noqa: S311 - no secrets here
        self._emails: list[str] = []
        self._tokens: dict[str, str] = {}
        """The session token of each client, while none of its rides has it."""
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def rate(self) -> float | None:
        """Rides a second; 0: none for now, None: as many as one client makes."""
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        self._rate = rate
        self._rate_changed.set()

    async def run(self) -> None:
        """Make traffic until cancelled; an API that is away for a while is waited for."""
        connector = aiohttp.TCPConnector(limit=0, force_close=self._reconnect)
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
        async with (
            aiohttp.ClientSession(self._url, connector=connector, timeout=timeout) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                self._rate_changed.clear()
                rate = self._rate
                clients = 1 if rate is None else math.ceil(rate / _RIDES_PER_CLIENT_S)
                while len(self._emails) < clients:
                    self._emails.append(await self._new_user(session))
                if rate is None:
                    await self._rides_of_one(session, group)
                elif rate:
                    await self._rides_at(rate, session, group)
                await self._rate_changed.wait()

    async def _new_user(self, session: aiohttp.ClientSession) -> str:
        email = f"{secrets.token_hex(6)}@example.com"
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                async with session.post("/users", json={"email": email}) as response:
                    if response.ok:
                        return email
                    _log.warning("no user yet: %d %s", response.status, await response.text(), extra=_ALIKE)
            await asyncio.sleep(_RETRY_S)

    async def _rides_of_one(self, session: aiohttp.ClientSession, group: asyncio.TaskGroup) -> None:
        """Make one ride after the other until the rate is changed."""
        while not self._rate_changed.is_set():
            pause_s = self._chance.uniform(0, _LONGEST_PAUSE_S)
            ride = group.create_task(self._ride(session, pause_s), name="ride")
            while not (ride.done() or self._rate_changed.is_set()):
                await asyncio.wait((ride,), timeout=_LOOK_S)

    async def _rides_at(self, rate: float, session: aiohttp.ClientSession, group: asyncio.TaskGroup) -> None:
        """Make so many rides a second until the rate is changed."""
        began = time.monotonic()
        for number in itertools.count(1):
            if len(self._under_way) < _MOST_IN_FLIGHT:
                pause_s = self._chance.choice((0.0, self._chance.uniform(0, _LONGEST_PAUSE_S)))
                ride = group.create_task(self._ride(session, pause_s), name=f"ride {number}")
                self._under_way.add(ride)
                ride.add_done_callback(self._under_way.discard)
            else:
                self.tally.left_out += 1
            if await self._changed_within(began + number / rate - time.monotonic()):
                return

    async def _changed_within(self, timeout_s: float) -> bool:
        """Wait until the rate is changed; False when the time is over."""
        if timeout_s <= 0:
            await asyncio.sleep(0)
            return self._rate_changed.is_set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._rate_changed.wait()
        return self._rate_changed.is_set()

    async def _ride(self, session: aiohttp.ClientSession, pause_s: float) -> None:
        email = self._chance.choice(self._emails)
        distance = round(self._chance.uniform(_SHORTEST_RIDE, _LONGEST_RIDE), 1)
        headers = {"Authorization": email}
        # The tokens of rides that overlap are of two sessions: the later one begins with nothing.
        if (token := self._tokens.pop(email, None)) is not None:
            headers[_SESSION_HEADER] = token
        try:
            async with session.post("/rides", data={"distance": str(distance)}, headers=headers) as response:
                if response.status != HTTPStatus.CREATED:
                    _log.warning("ride not written: %d %s", response.status, await response.text(), extra=_ALIKE)
                    self.tally.unwritten += 1
                    await asyncio.sleep(_RETRY_S)
                    return
                written = await response.json()
                _take_token(response, headers)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            _log.warning("ride not written: %r", error, extra=_ALIKE)
            self.tally.unwritten += 1
            await asyncio.sleep(_RETRY_S)
            return
        self.tally.rides += 1
        await asyncio.sleep(pause_s)
        self.tally.reads[await self._read_back(session, headers, written)] += 1
        token = headers.get(_SESSION_HEADER)
        if token is not None and self._rate is not None:  # one client alone would stay on its replica for good
            self._tokens[email] = token

    async def _read_back(
        self, session: aiohttp.ClientSession, headers: dict[str, str], written: dict[str, object]
    ) -> Outcome:
        try:
            async with session.get(f"/rides/{written['id']}", headers=headers) as response:
                body = await response.json(content_type=None)
                _take_token(response, headers)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            _log.warning("no answer for ride %s: %r", written["id"], error, extra=_ALIKE)
            return Outcome.FAILED
        if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.warning("ride %s not read: %d %s", written["id"], response.status, body, extra=_ALIKE)
            return Outcome.REFUSED
        node = response.headers.get("Rocket-Served-By", "unknown")
        reason = response.headers.get("Rocket-Route-Reason", "unknown")
        self.tally.by_node[node] += 1
        if response.headers.get("Rocket-Served-As") == "primary":
            self.tally.fallbacks[reason] += 1
        if response.status == HTTPStatus.OK and body == written:
            return Outcome.FRESH
        _log.error(
            "STALE READ: wrote ride %s, and %s (%s) answered %d %s",
            written, node, reason, response.status, body,
        )  # fmt: skip
        return Outcome.STALE


def _take_token(response: aiohttp.ClientResponse, headers: dict[str, str]) -> None:
    """Let the next request bring the token that an answer gave; none, where it gave none."""
    headers.pop(_SESSION_HEADER, None)
    if (token := response.headers.get(_SESSION_HEADER)) is not None:
        headers[_SESSION_HEADER] = token
