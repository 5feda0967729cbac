"""The traffic: sessions that write, read and list rides one after the other, and record each operation."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import aiohttp

from rocket.lab.checker.history import Op, Outcome, Request, Role

if TYPE_CHECKING:
    from aiohttp.typedefs import LooseHeaders

    from rocket.lab.checker.history import HistoryWriter

MOST_RIDES = 90
"""How many writes a user begins at most: a list of 100 then shows every ride there is."""
_LIVES_WRITES = (10, 40)
"""How many writes a session begins before another one takes its place, with a user of its own."""
_WITHOUT_TOKEN = 0.2
_SHARING = 0.3
"""Which part of the sessions share a user with others."""
_WRITES = (0.04, 0.15, 0.3)
"""Which part of its operations a session writes: one of these. Each write is read back at once."""
_LISTS = 0.12
"""Which part of the other operations they are; the rest are reads of any ride."""
_SECOND_TOKEN = 0.1
_HANG_UP, _HANG_UP_IN_BURST = 0.005, 0.4
_HANG_UP_AFTER_S = (0.0005, 0.012)
_PAUSED = 0.5
_LONGEST_PAUSE_S = 0.03
_AFTER_FAILURE_S = 0.05
_RECONNECT = 0.1
"""Which part of the requests of a reconnecting client go over a connection of their own."""
_LOST = (
    aiohttp.ServerDisconnectedError,
    aiohttp.ClientOSError,
    aiohttp.ClientConnectionResetError,
    aiohttp.ClientPayloadError,
)
"""What a client sees of a connection that is lost while it waits for an answer."""
_PATIENCE_S = 15.0
"""Longer than the API lets anything take: who is not answered in that time never is."""
_TOKEN = "Rocket-Session"  # noqa: S105 - the name of a header
_ROLE = "Rocket-Served-As"
_HEADERS = {"node": "Rocket-Served-By", "reason": "Rocket-Route-Reason", "got": _TOKEN, "lost": "Rocket-Lost"}
_INVALID = {HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED}


@dataclass(frozen=True, slots=True)
class Job:
    """What one client process is told at its start."""

    url: str
    history: str
    """The file to which its operations are appended."""
    zero: float
    """The moment from which times are counted, by the monotonic clock that all processes share."""
    seed: int
    process: int
    processes: int
    sessions: int
    reconnecting: bool = False
    """Whether some requests go over a connection of their own, so that each process of the API gets some."""


@dataclass(slots=True)
class Account:
    """A user, as the sessions know it that act for it."""

    email: str
    rides: list[int] = field(default_factory=list)
    """Those whose IDs are known."""
    writes: int = 0
    """Begun, whatever became of them."""
    token: str | None = None
    """The last one that any of its sessions was given."""

    @property
    def full(self) -> bool:
        """Whether no more may be written for it."""
        return self.writes >= MOST_RIDES


class Workload:
    """The sessions of one client process, and the file that they record in."""

    def __init__(
        self,
        orders: Job,
        http: aiohttp.ClientSession,
        anew: aiohttp.ClientSession,
        history: HistoryWriter,
    ) -> None:
        self.counts: dict[str, int] = {}
        """Operations so far, by request and outcome: `read ok`."""
        self.hang_up_until = 0.0
        """Clients hang up all the time until then, in seconds since zero."""
        self._http = http
        http._retry_connection = False  # noqa: SLF001 - what is sent again is counted here
        self.anew = anew
        """Opens a connection for each request."""
        self._orders = orders
        self._history = history
        # Each process draws from its own seed; what is drawn when depends on the traffic all the same.
        self.chance = random.Random(f"{orders.seed} {orders.process}")  # noqa: S311 - no secrets here
        self._names = iter(range(2**62))
        self._writes = iter(range(2**62))
        self._shared = self._new_account()
        self._accounts = [self._shared]

    def now(self) -> float:
        """Return the seconds since zero."""
        return time.monotonic() - self._orders.zero

    async def run(self) -> None:
        """Make traffic until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._orders.sessions):
                sharing = number < self._orders.sessions * _SHARING
                group.create_task(self._place(sharing=sharing), name=f"place {number}")

    async def _place(self, *, sharing: bool) -> None:
        """Let one session after another act."""
        while True:
            session = Session(self, self._account(sharing=sharing), tokens=self.chance.random() >= _WITHOUT_TOKEN)
            await session.live()

    async def flood(self, sessions: int, until: float) -> None:
        """Let so many more sessions read as fast as they can."""
        async with asyncio.TaskGroup() as group:
            for number in range(sessions):
                account = self.chance.choice(self._accounts[-self._orders.sessions :])
                session = Session(self, account, tokens=self.chance.random() >= _WITHOUT_TOKEN)
                session.take_over(account.token)
                group.create_task(session.read_until(until), name=f"flood {number}")

    @property
    def http(self) -> aiohttp.ClientSession:
        """What the next request goes by."""
        if self._orders.reconnecting and self.chance.random() < _RECONNECT:
            return self.anew
        return self._http

    def session_name(self) -> str:
        """Return a name that no session of this run has had."""
        return f"s{self._orders.process}.{next(self._names)}"

    def distance(self) -> float:
        """Return a distance that no other write of this run has."""
        return (next(self._writes) * self._orders.processes + self._orders.process + 1) / 10

    def record(self, operation: Op) -> None:
        """Add a line to the history."""
        counted = f"{operation.request} {operation.outcome}"
        self.counts[counted] = self.counts.get(counted, 0) + 1
        self._history.add(operation)

    def _account(self, *, sharing: bool) -> Account:
        if not sharing:
            account = self._new_account()
        else:
            if self._shared.full:
                self._shared = self._new_account()
            account = self._shared
        self._accounts.append(account)
        return account

    def _new_account(self) -> Account:
        return Account(f"u{self._orders.process}.{next(self._names)}@torture.example")


class Session:
    """One client: it does one thing after the other, and sends back the token that it was given, or has none."""

    def __init__(self, workload: Workload, account: Account, *, tokens: bool) -> None:
        self.name = workload.session_name()
        self._workload = workload
        self._chance = workload.chance
        self._account = account
        self._tokens = tokens
        self._newest: str | None = None
        self._earlier: list[str] = []
        self._over = False
        """Whether token or user were called invalid: there is no going on with them."""

    async def live(self) -> None:
        """Act until it is time for somebody else."""
        while not await self._join():
            await self._pause(good=False)
        writes_left = self._chance.randint(*_LIVES_WRITES)
        writes = self._chance.choice(_WRITES)
        while writes_left and not (self._account.full or self._over):
            if self._chance.random() < writes:
                writes_left -= 1
                good = await self._write()
            elif self._chance.random() < _LISTS:
                good = await self._list()
            else:
                good = await self._read_one()
            await self._pause(good=good)

    def take_over(self, token: str | None) -> None:
        """Go on with a token that another session of the same user was given."""
        self._newest = token

    async def read_until(self, until: float) -> None:
        """Read without a pause; only what is no use at all is not repeated at once."""
        while self._workload.now() < until and not self._over:
            good = await (self._list() if self._chance.random() < _LISTS else self._read_one())
            if not good:
                await asyncio.sleep(_AFTER_FAILURE_S)

    async def _pause(self, *, good: bool) -> None:
        if not good:
            await asyncio.sleep(_AFTER_FAILURE_S)
        elif self._chance.random() < _PAUSED:
            await asyncio.sleep(self._chance.uniform(0, _LONGEST_PAUSE_S))

    async def _join(self) -> bool:
        joined = await self._request(Request.JOIN, "/users", {"email": self._account.email})
        return joined.outcome is Outcome.OK

    async def _write(self) -> bool:
        self._account.writes += 1
        distance = self._workload.distance()
        written = await self._request(Request.WRITE, "/rides", {"distance": str(distance)}, distance=distance)
        if written.outcome is not Outcome.OK or written.ride is None:
            return False
        self._account.rides.append(written.ride)
        return await self._read(written.ride)

    async def _read_one(self) -> bool:
        if not self._account.rides:
            return await self._list()
        return await self._read(self._chance.choice(self._account.rides))

    async def _read(self, ride: int) -> bool:
        return (await self._request(Request.READ, f"/rides/{ride}", ride=ride)).outcome is Outcome.OK

    async def _list(self) -> bool:
        return (await self._request(Request.LIST, "/rides?limit=100")).outcome is Outcome.OK

    async def _request(
        self,
        request: Request,
        path: str,
        form: dict[str, str] | None = None,
        *,
        ride: int | None = None,
        distance: float | None = None,
    ) -> Op:
        """Ask for something, record how it went, and return the record."""
        tokens = self._to_send()
        headers: LooseHeaders = [("Authorization", self._account.email), *((_TOKEN, token) for token in tokens)]
        came: dict[str, Any] = {"outcome": None, "ride": ride, "distance": distance}
        at, patience_s = self._workload.now(), self._patience_s()
        try:
            async with asyncio.timeout(patience_s):
                try:
                    came |= await _ask(self._workload.http, request, path, form, headers)
                except _LOST as error:
                    if form is not None or isinstance(error, aiohttp.ClientConnectorError):
                        raise
                    came["again"] = True
                    came |= await _ask(self._workload.anew, request, path, form, headers)
        except aiohttp.ClientConnectorError as error:
            came |= {"outcome": Outcome.FAIL, "error": f"refused: {error}"}
        except TimeoutError:  # our own
            outcome = Outcome.FAIL if form is None and patience_s == _PATIENCE_S else Outcome.UNKNOWN
            came |= {"outcome": outcome, "error": f"hung up after {patience_s:.4f} s"}
        except (aiohttp.ClientError, ValueError) as error:
            outcome = Outcome.FAIL if form is None else Outcome.UNKNOWN
            came |= {"outcome": outcome, "error": f"{type(error).__name__}: {error}"}
        finally:  # cancelled: it is recorded all the same
            if came["outcome"] is None:
                came |= {"outcome": Outcome.UNKNOWN, "error": "cut off"}
            op = Op(
                session=self.name,
                user=self._account.email,
                tokens=self._tokens,
                request=request,
                at=round(at, 6),
                done=round(self._workload.now(), 6),
                sent=", ".join(tokens) or None,
                **came,
            )
            self._workload.record(op)
        if op.outcome is Outcome.OK:
            self._keep(op.got)
        self._over = op.status in _INVALID
        return op

    def _patience_s(self) -> float:
        burst = self._workload.now() < self._workload.hang_up_until
        if self._chance.random() < (_HANG_UP_IN_BURST if burst else _HANG_UP):
            return self._chance.uniform(*_HANG_UP_AFTER_S)
        return _PATIENCE_S

    def _to_send(self) -> list[str]:
        """Return the tokens of the next request: the newest, at times with an earlier one beside it."""
        if not self._tokens or self._newest is None:
            return []
        if self._earlier and self._chance.random() < _SECOND_TOKEN:
            both = [self._newest, self._chance.choice(self._earlier)]
            self._chance.shuffle(both)
            return both
        return [self._newest]

    def _keep(self, token: str | None) -> None:
        if token is not None and token != self._newest:
            if self._newest is not None:
                self._earlier = [*self._earlier[-9:], self._newest]
            self._newest = self._account.token = token


async def _ask(
    http: aiohttp.ClientSession, request: Request, path: str, form: dict[str, str] | None, headers: LooseHeaders
) -> dict[str, Any]:
    """Send a request and return what the answer says, as fields of an `Op`."""
    method = "GET" if form is None else "POST"
    async with http.request(method, path, data=form, headers=headers) as response:
        return _answer(request, response, await response.text())


def _answer(request: Request, response: aiohttp.ClientResponse, body: str) -> dict[str, Any]:
    """Return what an answer says, as fields of an `Op`; raise `ValueError` for one that makes no sense."""
    came: dict[str, Any] = {name: response.headers.get(header) for name, header in _HEADERS.items()}
    came["status"] = response.status
    role = response.headers.get(_ROLE)
    if role is not None:
        came["role"] = Role(role)
    elif came["node"] is not None:
        came["role"] = Role.PRIMARY if came["node"] == Role.PRIMARY else Role.REPLICA
    missing = request is Request.READ and response.status == HTTPStatus.NOT_FOUND
    if not (response.ok or missing):
        return came | {"outcome": _not_ok(request, response.status), "error": body[:200]}
    said = json.loads(body)
    match request:
        case Request.WRITE:
            came["ride"] = said["id"]
        case Request.READ if not missing:
            came["distance"] = said["distance"]
        case Request.LIST:
            came["rides"] = tuple((ride["id"], ride["distance"]) for ride in said["rides"])
            came["complete"] = said["next"] is None
    return came | {"outcome": Outcome.OK}


def _not_ok(request: Request, status: int) -> Outcome:
    """Return what a client knows after such an answer: a write may have been done for all that a 5xx says."""
    definite = request in {Request.READ, Request.LIST} or status < HTTPStatus.INTERNAL_SERVER_ERROR
    return Outcome.FAIL if definite or status == HTTPStatus.SERVICE_UNAVAILABLE else Outcome.UNKNOWN
