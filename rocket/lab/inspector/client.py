"""A client of a scenario: over HTTP, as any other, with a user and a session of its own."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

from rocket.errors import RocketError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import aiohttp

_TOKEN = "Rocket-Session"  # noqa: S105 - the header's name
_UNKNOWN = {HTTPStatus.NOT_FOUND, HTTPStatus.UNAUTHORIZED}
"""What a node says that does not show a ride, or not even its user."""


class NotWritten(RocketError):
    """The API did not take what a scenario needs."""


@dataclass(slots=True)
class Tally:
    """How a scenario's reads went."""

    reads: int = 0
    stale: int = 0
    refused: int = 0
    """Not answered, but told to come again."""
    by_primary: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    longest_ms: float = 0.0

    @classmethod
    def of(cls, tallies: Iterable[Tally]) -> Tally:
        """Add up."""
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
        """How many a replica answered."""
        return self.reads - self.refused - self.by_primary

    def __str__(self) -> str:
        refused = f", {self.refused} told to try again (503)" if self.refused else ""
        return f"{self.stale} of {self.reads} reads stale{refused}"


class ApiClient:
    """One user with one session, who writes rides and reads them."""

    def __init__(self, http: aiohttp.ClientSession, scenario: str) -> None:
        self.tally = Tally()
        self.lost: list[str] = []
        """Notices that a promotion may have lost something."""
        self._http = http
        self._email = f"{scenario}-{secrets.token_hex(3)}@scenario.example"
        self._token: str | None = None

    async def join(self) -> None:
        """Make the user; raise `NotWritten`."""
        async with self._http.post("/users", json={"email": self._email}) as response:
            if not response.ok:
                raise NotWritten(f"no user was made: {response.status} {await response.text()}")
            self._token = response.headers.get(_TOKEN)

    async def write(self) -> int | None:
        """Write a ride and return its id; None if that was refused, or nobody knows."""
        distance = secrets.randbelow(9000) / 10 + 10
        async with self._http.post("/rides", json={"distance": distance}, headers=self._headers()) as response:
            self._take(response)
            body = await response.json(content_type=None)
            return int(body["id"]) if response.status == HTTPStatus.CREATED else None

    async def write_for_certain(self) -> int:
        """Write a ride and return its id; raise `NotWritten`."""
        ride = await self.write()
        if ride is None:
            raise NotWritten("the ride was not written")
        return ride

    async def read(self, ride: int) -> None:
        """Read a ride that was written, and take account of the answer."""
        began = time.monotonic()
        async with self._http.get(f"/rides/{ride}", headers=self._headers()) as response:
            await response.read()
            self._take(response)
        self.tally.reads += 1
        if response.status not in {*_UNKNOWN, HTTPStatus.OK}:
            self.tally.refused += 1
            return
        self.tally.stale += response.status in _UNKNOWN
        self.tally.by_primary += response.headers.get("Rocket-Served-As") == "primary"
        self.tally.reasons[response.headers.get("Rocket-Route-Reason", "unknown")] += 1
        self.tally.longest_ms = max(self.tally.longest_ms, (time.monotonic() - began) * 1000)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._email} | ({_TOKEN: self._token} if self._token else {})

    def _take(self, response: aiohttp.ClientResponse) -> None:
        self._token = response.headers.get(_TOKEN, self._token)
        if "Rocket-Lost" in response.headers:
            self.lost.append(response.headers["Rocket-Lost"])
