"""The traffic: sessions that write, read and list rides, one request after the other, and record each."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import asyncpg

import rocket
from rocket import Freshness, InvalidToken, OutcomeUnknown, Unavailable
from rocket.lab.checker.history import READS, Op, Outcome, Request, Role, asked_by
from rocket.lab.client import Api, ConnectionLost, NoAnswer, NotConnected

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rocket.lab.checker.history import HistoryWriter
    from rocket.lab.client import Answer

MOST_RIDES = 90
"""How many writes a user begins at most: a list of 100 then shows every ride there is."""
_WRITES_PER_SESSION = (10, 40)
"""How many writes a session begins before another one replaces it, with a user of its own."""
_WITHOUT_TOKEN = 0.2
_SHARING = 0.3
"""The share of the sessions that have a user in common."""
_WITH_ALL_PROCESSES = 0.5
"""The share of those whose user sessions of all client processes have."""
_USER_OF_ALL_S = 3.0
"""For so long all processes take the same user: none knows how much others have written for it."""
_WRITES = (0.04, 0.15, 0.3)
"""The share of writes among a session's requests: one of these. Each write is read back at once."""
_LISTS = 0.12
"""The share of lists among the other requests; the rest are reads of any ride."""
_SECOND_TOKEN = 0.1
_HANG_UP, _HANG_UP_IN_BURST = 0.005, 0.4
_HANG_UP_AFTER_S = (0.0005, 0.012)
_PAUSED = 0.5
_LONGEST_PAUSE_S = 0.03
_AFTER_FAILURE_S = 0.05
_RECONNECT = 0.1
"""The share of the requests of a reconnecting client that go over a connection of their own."""
_PATIENCE_S = 15.0
"""Longer than the API takes for anything: a request without an answer by then never gets one."""
API_TIMEOUT_S = 2 * _PATIENCE_S
"""Of the HTTP client: sessions give up by themselves, and record that."""
_ANY = str(Freshness.ANY)
_INVALID = {HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED}


@dataclass(frozen=True, slots=True)
class Job:
    """What a client process does."""

    url: str
    history: str
    """The file to which its operations are appended."""
    zero: float
    """The moment from which times are counted, by the monotonic clock that all processes share."""
    seed: int
    process: int
    processes: int
    sessions: int
    freshness: str = str(Freshness.SESSION)
    """What reads ask for, as `Run.freshness` has it."""
    reconnecting: bool = False
    """Whether some requests go over a connection of their own, so that each process of the API gets some."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """The DSNs of the nodes, for sessions that use the library itself; with `patroni` none are needed. Without
    either there are no such sessions."""
    patroni: Sequence[str] = ()
    """The addresses of Patroni's REST APIs, where it runs the cluster."""
    patroni_dsn: str = ""
    """The DSN of a member, with `{host}` and `{port}` in it."""


@dataclass(slots=True)
class Account:
    """A user, and what its sessions know of it."""

    email: str
    rides: list[int] = field(default_factory=list)
    """Those whose ids are known."""
    writes: int = 0
    """Begun, whether they succeeded or not."""
    token: str | None = None
    """The last one that any of its sessions was given."""
    most: int = MOST_RIDES
    """How many writes are begun for it here."""

    @property
    def full(self) -> bool:
        """Whether no more may be written for it."""
        return self.writes >= self.most

    def learn(self, rides: Iterable[int]) -> None:
        """Take note of rides that others may have written."""
        self.rides.extend(sorted(set(rides).difference(self.rides)))


class Workload:
    """The sessions of one client process, and the history that they are recorded in."""

    def __init__(self, job: Job, api: Api, fresh: Api, history: HistoryWriter) -> None:
        self.counts: dict[str, int] = {}
        """Operations so far, by request and outcome: `read ok`."""
        self.hang_up_until = 0.0
        """Clients hang up all the time until then, in seconds since zero."""
        self.fresh = fresh
        """Opens a connection for each request."""
        self._api = api
        self._job = job
        self._history = history
        self._sessions = asyncio.TaskGroup()
        # Each process has its own seed; the order of the draws still depends on the traffic.
        self.chance = random.Random(f"{job.seed} {job.process}")  # noqa: S311 - no secrets here
        self._names = iter(range(2**62))
        self._writes = iter(range(2**62))
        self._asked = asked_by(job.freshness)
        self._of_all = self._account_of_all(-1)
        self._shared = self.new_account()
        self._accounts = [self._shared]

    def now(self) -> float:
        """Return the seconds since zero."""
        return time.monotonic() - self._job.zero

    async def run(self) -> None:
        """Make traffic until cancelled."""
        async with self._sessions as group:
            for number in range(self._job.sessions):
                sharing = number < self._job.sessions * _SHARING
                group.create_task(self._run_sessions(sharing=sharing), name=f"sessions {number}")

    async def _run_sessions(self, *, sharing: bool) -> None:
        """Run one session after the other."""
        while True:
            account = self._account(sharing=sharing)
            await Session(self, account, tokens=self._sends_tokens()).run()

    def flood(self, sessions: int, until: float) -> None:
        """Start this many more sessions, which read as fast as they can; `run` owns their tasks."""
        for number in range(sessions):
            account = self.chance.choice(self._accounts[-self._job.sessions :])
            session = Session(self, account, tokens=self._sends_tokens())
            session.take_over(account.token)
            self._sessions.create_task(session.read_until(until), name=f"flood {number}")

    def _sends_tokens(self) -> bool:
        return self.chance.random() >= _WITHOUT_TOKEN

    @property
    def api(self) -> Api:
        """The client of the API for the next request."""
        if self._job.reconnecting and self.chance.random() < _RECONNECT:
            return self.fresh
        return self._api

    def session_name(self) -> str:
        """Return a name that no session of this run has had."""
        return f"s{self._job.process}.{next(self._names)}"

    def freshness(self) -> Freshness:
        """Return what the next read asks for."""
        return self._asked[0] if len(self._asked) == 1 else self.chance.choice(self._asked)

    def distance(self) -> float:
        """Return a distance that no other write of this run has."""
        return (next(self._writes) * self._job.processes + self._job.process + 1) / 10

    def record(self, operation: Op) -> None:
        """Add a line to the history."""
        counted = f"{operation.request} {operation.outcome}"
        self.counts[counted] = self.counts.get(counted, 0) + 1
        self._history.add(operation)

    def _account(self, *, sharing: bool) -> Account:
        if not sharing:
            account = self.new_account()
        elif self.chance.random() < _WITH_ALL_PROCESSES:
            account = self.account_of_all()
        else:
            if self._shared.full:
                self._shared = self.new_account()
            account = self._shared
        self._accounts.append(account)
        return account

    def account_of_all(self) -> Account:
        """Return the account that sessions of all client processes have now; one of its own if that is full."""
        of_now = self._account_of_all(int(self.now() / _USER_OF_ALL_S))
        if of_now.email != self._of_all.email:
            self._of_all = of_now
        return self.new_account() if self._of_all.full else self._of_all

    def _account_of_all(self, number: int) -> Account:
        name = f"all.{self._job.zero:.6f}.{number}"  # of this run
        return Account(f"{name}@torture.example", most=MOST_RIDES // self._job.processes)

    def new_account(self) -> Account:
        """Return an account that no session of this run has had."""
        return Account(f"u{self._job.process}.{next(self._names)}@torture.example")


class Session:
    """One client: it sends one request after the other, with the token that it was given, or without any."""

    def __init__(self, workload: Workload, account: Account, *, tokens: bool) -> None:
        self.name = workload.session_name()
        self._workload = workload
        self._chance = workload.chance
        self._account = account
        self._tokens = tokens
        self._newest: str | None = None
        self._earlier: list[str] = []
        self._over = False
        """Whether the API rejected its token or user: the session cannot go on."""

    async def run(self) -> None:
        """Send requests until the session has begun all its writes."""
        while not await self._join():
            await self._pause(good=False)
        writes_left = self._chance.randint(*_WRITES_PER_SESSION)
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
        """Read without a pause, except after a failure."""
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
        freshness = self._workload.freshness() if request in READS else Freshness.SESSION
        asked = None if freshness is Freshness.SESSION else str(freshness)
        fields: dict[str, Any] = {"outcome": None, "ride": ride, "distance": distance, "freshness": asked}
        at, patience_s = self._workload.now(), self._patience_s()
        try:
            async with asyncio.timeout(patience_s):
                try:
                    fields |= await self._ask(self._workload.api, request, path, form, tokens, freshness=asked)
                except ConnectionLost:
                    if form is not None:
                        raise
                    fields["again"] = True
                    fields |= await self._ask(self._workload.fresh, request, path, form, tokens, freshness=asked)
        except NotConnected as error:
            fields |= {"outcome": Outcome.FAIL, "error": f"refused: {error}"}
        except TimeoutError:  # our own
            outcome = Outcome.FAIL if form is None and patience_s == _PATIENCE_S else Outcome.UNKNOWN
            fields |= {"outcome": outcome, "error": f"hung up after {patience_s:.4f} s"}
        except (NoAnswer, ValueError) as error:
            outcome = Outcome.FAIL if form is None else Outcome.UNKNOWN
            fields |= {"outcome": outcome, "error": str(error)}
        finally:  # cancelled: it is recorded all the same
            if fields["outcome"] is None:
                fields |= {"outcome": Outcome.UNKNOWN, "error": "cut off"}
            op = Op(
                session=self.name,
                user=self._account.email,
                tokens=self._tokens,
                request=request,
                at=round(at, 6),
                done=round(self._workload.now(), 6),
                sent=", ".join(tokens) or None,
                **fields,
            )
            self._workload.record(op)
        if op.outcome is Outcome.OK:
            self._keep(op.got)
            self._account.learn(ride for ride, _ in op.rides or ())
        self._over = op.status in _INVALID
        return op

    async def _ask(
        self,
        api: Api,
        request: Request,
        path: str,
        form: Mapping[str, str] | None,
        tokens: Sequence[str],
        *,
        freshness: str | None,
    ) -> dict[str, Any]:
        """Send a request and return the fields of an `Op` that its answer fills; raise `NoAnswer`."""
        user, method = self._account.email, "GET" if form is None else "POST"
        answer = await api.request(method, path, user=user, tokens=tokens, form=form, freshness=freshness)
        fields = _fields(request, answer)
        if freshness == _ANY and len(tokens) > 1 and fields["got"] == ",".join(tokens):
            fields["got"] = None  # it has left them as they are
        return fields

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


def _fields(request: Request, answer: Answer) -> dict[str, Any]:
    """Return the fields of an `Op` that an answer fills; raise `ValueError` for one that makes no sense."""
    fields: dict[str, Any] = {
        "status": answer.status,
        "node": answer.node,
        "role": None if answer.role is None else Role(answer.role),
        "reason": answer.reason,
        "got": answer.token,
        "lost": answer.possible_loss,
    }
    missing = request is Request.READ and answer.status == HTTPStatus.NOT_FOUND
    if not (answer.ok or missing):
        return fields | {"outcome": _not_ok(request, answer.status), "error": answer.text[:200]}
    body = answer.json()
    match request:
        case Request.WRITE:
            fields["ride"] = body["id"]
        case Request.READ if not missing:
            fields["distance"] = body["distance"]
        case Request.LIST:
            fields["rides"] = tuple((ride["id"], ride["distance"]) for ride in body["rides"])
            fields["complete"] = body["next"] is None
    return fields | {"outcome": Outcome.OK}


def _not_ok(request: Request, status: int) -> Outcome:
    """Return what a client knows after an answer that is not a success: a write may be done in spite of a 5xx."""
    definite = request in READS or status < HTTPStatus.INTERNAL_SERVER_ERROR
    return Outcome.FAIL if definite or status == HTTPStatus.SERVICE_UNAVAILABLE else Outcome.UNKNOWN


# --- what sessions of the library record ---


def library_shown(request: Request, value: Any) -> dict[str, Any]:
    """Return the fields of an `Op` that are filled by what work returned, or raised."""
    ok: dict[str, Any] = {"outcome": Outcome.OK, "status": HTTPStatus.OK}
    match request:
        case Request.JOIN:
            return ok
        case Request.WRITE if value is None:
            return {"outcome": Outcome.FAIL, "status": HTTPStatus.UNAUTHORIZED}
        case Request.WRITE:
            return ok | {"status": HTTPStatus.CREATED, "ride": value["id"]}
        case Request.READ if value:
            return ok | {"distance": value[0]["distance"]}
        case Request.READ:
            return ok | {"status": HTTPStatus.NOT_FOUND}
        case Request.LIST:
            return ok | {"complete": True, "rides": tuple((ride["id"], ride["distance"]) for ride in value)}


def library_failed(request: Request, kind: str, error: Exception) -> dict[str, Any]:
    """Return the fields of an `Op` that are filled by an error of the library."""
    fields: dict[str, Any] = {"outcome": Outcome.FAIL, "error": f"{type(error).__name__}: {error}"[:200]}
    match error:
        case OutcomeUnknown() if request not in READS:
            return fields | {"outcome": Outcome.UNKNOWN, "status": HTTPStatus.GATEWAY_TIMEOUT}
        case Unavailable() | OutcomeUnknown():
            return fields | {"status": HTTPStatus.SERVICE_UNAVAILABLE}
        case InvalidToken():
            return fields | {"status": HTTPStatus.BAD_REQUEST}
        case asyncpg.InFailedSQLTransactionError() if kind == "swallows" and request is Request.WRITE:
            return fields
    return fields | {"status": HTTPStatus.INTERNAL_SERVER_ERROR}


def loss_of(session: rocket.Session) -> str | None:
    """Return the notice of a loss that a session was given."""
    return None if session.lost is None else str(session.lost)


def route_of(last: rocket.Answer[Any] | None) -> dict[str, Any]:
    """Return the fields of an `Op` that say where an answer of the library came from."""
    if last is None:
        return {}
    return {"node": last.node, "role": Role(last.role), "reason": str(last.reason)}
