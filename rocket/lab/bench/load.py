"""The load: a child process whose sessions send requests, check every response, and measure latencies.

The process that starts it uses `load_process`, and sends it one `Job` at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import json
import logging
import secrets
import sys
import time
from array import array
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rocket.errors import RocketError, describe, unwrapping_group
from rocket.lab.bench.figures import percentile
from rocket.lab.bench.http import TIMEOUT_S, BadResponse, Connection
from rocket.lab.subprocesses import child_process, run_child

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
    from typing import TypeAlias
    from urllib.parse import SplitResult

    from rocket.lab.bench.http import Response
    from rocket.lab.subprocesses import Parent, Subprocess

    _Act: TypeAlias = Callable[["_Session", "_Count"], Awaitable[None]]

_AFTER_FAILURE_S = 0.01
_FAILURES_SHOWN = 3
_GRACE_S = 30.0
"""How much longer than its seconds a job may take: for requests in flight, and to register users."""
_MS = 1_000_000
_DISTANCE = "123.4"

_log = logging.getLogger("rocket.bench")


class NotReady(RocketError):
    """The users of the sessions could not be registered."""


# --- jobs ---


class Kind(enum.StrEnum):
    """What the sessions do."""

    REGISTER = "register"
    """Each session registers a user and writes the ride that it will read; precedes all other jobs."""
    READS = "reads"
    """Each session reads its ride."""
    WRITES = "writes"
    """Each session writes rides."""
    PAIRS = "pairs"
    """Each session writes a ride and reads it at once; the read is timed."""
    PLAIN_PAIRS = "plain-pairs"
    """A background user writes a ride, and at once a session reads its own, older ride; the read is timed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One load; it ends at the earlier of its two limits, `seconds` and `requests`."""

    kind: Kind
    url: str
    users: str = "cluster"
    """The name of the users whose sessions send the requests; they are kept from job to job."""
    sessions: int = 8
    """Each has a connection of its own, and one request in flight."""
    tokens: bool = False
    """Whether sessions send back their latest session token."""
    freshness: str | None = None
    """What reads ask to be shown, where that is not what their session has written and seen."""
    seconds: float = 3600.0
    requests: int = 2**62
    per_s: float | None = None
    """The rate of all sessions together, however long responses take; None: a closed loop."""
    background: str | None = None
    """Users who write meanwhile, at a rate of their own; in plain pairs, before each read."""
    background_per_s: float = 100.0


@dataclass(frozen=True, slots=True)
class Tally:
    """The result of a job."""

    requests: int
    """Requests answered correctly; only these are timed."""
    seconds: float
    p50_ms: float | None
    """None if no request was answered correctly."""
    p99_ms: float | None
    by_replicas: int
    """Reads that a replica answered."""
    stale: int
    """Reads that did not show an acknowledged ride."""
    failed: int
    failures: tuple[str, ...]
    """The messages of the first few failures."""
    background_writes: int
    """Rides that the background users wrote."""
    cpu_s: float
    """Processor time that the load process itself took."""


# --- the parent's side ---


class LoadProcess:
    """The load process, seen from its parent."""

    def __init__(self, process: Subprocess) -> None:
        self._process = process

    async def register(self, job: Job) -> None:
        """Register the users of a job; raise `SubprocessFailed`."""
        await self._process.ask(asdict(job), _GRACE_S)

    async def run(self, job: Job) -> Tally:
        """Run a job and return its tally; raise `SubprocessFailed`."""
        answer = await self._process.ask(asdict(job), job.seconds + TIMEOUT_S + _GRACE_S)
        tally = Tally(**answer)
        if tally.failed:
            _log.warning("%d requests failed; the first: %s", tally.failed, "; ".join(tally.failures))
        return tally


@contextlib.asynccontextmanager
async def load_process() -> AsyncIterator[LoadProcess]:
    """Run a load process for as long as the context lasts."""
    async with child_process("load process", "rocket.lab.bench.load") as process:
        yield LoadProcess(process)


# --- the child's side ---


class _Session:
    """One user with one connection, who keeps the token of the latest response."""

    def __init__(self) -> None:
        self.email = f"{secrets.token_hex(6)}@bench.example"
        self.token: str | None = None
        self.ride = b""
        """The body of the response that acknowledged the user's first ride, which plain reads request."""
        self._first_token: str | None = None
        """The token that came with it."""
        self.partner: _Session | None = None
        """The background session that writes before each plain read."""
        self._connection: Connection
        self._host = ""
        self._tokens = False
        self._freshness: str | None = None

    def begin(self, address: SplitResult, *, tokens: bool, freshness: str | None = None) -> None:
        """Begin a job in the state of a user who has written the first ride and not read it yet."""
        self._freshness = freshness
        self._connection = Connection(address.hostname or "", address.port or 0)
        self._host = address.netloc
        self._tokens = tokens
        self.token = self._first_token

    def end(self) -> None:
        self._connection.close()

    async def register(self) -> None:
        """Register the user and write the first ride; raise `NotReady`."""
        for path, form in (
            ("/users", f"email={self.email.replace('@', '%40')}"),
            ("/rides", f"distance={_DISTANCE}"),
        ):
            response = await self._send("POST", path, form)
            if response.status != HTTPStatus.CREATED:
                raise NotReady(f"POST {path} was answered {response.status}: {response.body[:200]!r}")
        self.ride, self._first_token = response.body, self.token

    async def read(self, ride: bytes) -> Response:
        """Read the ride that this body acknowledged."""
        return await self._send("GET", f"/rides/{json.loads(ride)['id']}")

    async def write(self) -> Response:
        """Write a ride."""
        return await self._send("POST", "/rides", f"distance={_DISTANCE}")

    async def _send(self, method: str, path: str, form: str = "") -> Response:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}", f"Authorization: {self.email}"]
        if self._tokens and self.token is not None:
            lines.append(f"Rocket-Session: {self.token}")
        if self._freshness is not None and not form:
            lines.append(f"Rocket-Freshness: {self._freshness}")
        if form:
            lines += [f"Content-Length: {len(form)}", "Content-Type: application/x-www-form-urlencoded"]
        response = await self._connection.send("\r\n".join([*lines, "", form]).encode())
        self.token = response.header("Rocket-Session") or self.token
        return response


class _Count:
    """The counters of a running job."""

    def __init__(self, limit: int = 2**62) -> None:
        self.times_ns = array("q")
        self.by_replicas = self.stale = self.failed = 0
        self.failures: list[str] = []
        self._left = itertools.repeat(None, limit)

    def take_one(self) -> bool:
        """Take one of the requests left; return False if none is left."""
        return next(self._left, self) is None

    def failure(self, message: str) -> None:
        self.failed += 1
        if len(self.failures) < _FAILURES_SHOWN:
            self.failures.append(message)

    def is_acknowledged(self, response: Response) -> bool:
        """Return whether a write was acknowledged; count it as failed if not."""
        if response.status != HTTPStatus.CREATED:
            self.failure(f"POST: {response.status} {response.body[:80]!r}")
        return response.status == HTTPStatus.CREATED

    def shows(self, response: Response, ride: bytes) -> bool:
        """Return whether a read shows the ride; count it as stale or failed if not."""
        if response.status == HTTPStatus.OK and _same(response.body, ride):
            self.by_replicas += response.header("Rocket-Served-As") == "replica"
            return True
        if response.status in {HTTPStatus.OK, HTTPStatus.NOT_FOUND, HTTPStatus.UNAUTHORIZED}:
            self.stale += 1
        else:
            self.failure(f"GET: {response.status} {response.body[:80]!r}")
        return False


def _same(body: bytes, ride: bytes) -> bool:
    return body == ride or json.loads(body) == json.loads(ride)


class Load:
    """Runs jobs, one after the other, with users that are kept from job to job."""

    def __init__(self) -> None:
        self._sessions: dict[str, list[_Session]] = {}

    async def register(self, job: Job) -> None:
        """Register a session for each user of a job, with a ride each; raise `NotReady`."""
        sessions = self._sessions[job.users] = [_Session() for _ in range(job.sessions)]
        for session in sessions:
            session.begin(urlsplit(job.url), tokens=job.tokens)
            try:
                await session.register()
            except (OSError, TimeoutError, BadResponse) as error:
                raise NotReady(f"no user could be registered: {describe(error)}") from None
            finally:
                session.end()

    async def run(self, job: Job) -> Tally:
        """Run a job and return its tally."""
        foreground = self._sessions[job.users][: job.sessions]
        background = self._sessions[job.background] if job.background else []
        if job.kind is Kind.PLAIN_PAIRS:
            for session, partner in zip(foreground, background, strict=False):
                session.partner = partner
        count, background_count = _Count(job.requests), _Count()
        address = urlsplit(job.url)
        for session in [*foreground, *background]:
            session.begin(address, tokens=job.tokens, freshness=job.freshness)
        cpu_s, began = time.process_time(), time.monotonic()
        until = began + job.seconds
        try:
            with unwrapping_group():
                async with asyncio.TaskGroup() as group:
                    _start(group, foreground, _Task(_ACTS[job.kind], count, until, job.per_s))
                    if job.kind is not Kind.PLAIN_PAIRS:
                        _start(group, background, _Task(_write, background_count, until, job.background_per_s))
        finally:
            for session in [*foreground, *background]:
                session.end()
        return _tally(count, background_count, time.monotonic() - began, time.process_time() - cpu_s)


@dataclass(frozen=True, slots=True)
class _Task:
    """What each of several sessions does until a point in time."""

    act: _Act
    count: _Count
    until: float
    """Monotonic seconds."""
    per_s: float | None
    """The rate of all the sessions together; None: each sends its next request as soon as it has a response."""


def _start(group: asyncio.TaskGroup, sessions: list[_Session], task: _Task) -> None:
    """Start the task of each session; at a given rate, the sessions take turns."""
    now = time.monotonic()
    for number, session in enumerate(sessions):
        if task.per_s is None:
            due_times: Iterator[float] = itertools.repeat(now)
        else:
            due_times = itertools.count(now + number / task.per_s, len(sessions) / task.per_s)
        group.create_task(_repeat(session, task, due_times), name=f"session {number}")


async def _repeat(session: _Session, task: _Task, due_times: Iterator[float]) -> None:
    """Act at each due time, or as soon as the action before has ended."""
    for due in itertools.takewhile(lambda due: due < task.until, due_times):
        if (early_s := due - time.monotonic()) > 0:
            await asyncio.sleep(early_s)
        if time.monotonic() >= task.until or not task.count.take_one():
            return
        try:
            await task.act(session, task.count)
        except (OSError, TimeoutError, BadResponse) as error:
            task.count.failure(describe(error))
            await asyncio.sleep(_AFTER_FAILURE_S)


async def _read(session: _Session, count: _Count, written: bytes = b"") -> None:
    ride = written or session.ride
    began_ns = time.perf_counter_ns()
    response = await session.read(ride)
    took_ns = time.perf_counter_ns() - began_ns
    if count.shows(response, ride):
        count.times_ns.append(took_ns)


async def _write(session: _Session, count: _Count) -> None:
    began_ns = time.perf_counter_ns()
    response = await session.write()
    took_ns = time.perf_counter_ns() - began_ns
    if count.is_acknowledged(response):
        count.times_ns.append(took_ns)


async def _write_and_read(session: _Session, count: _Count) -> None:
    written = await session.write()
    if count.is_acknowledged(written):
        await _read(session, count, written.body)


async def _read_after_partners_write(session: _Session, count: _Count) -> None:
    assert session.partner is not None  # noqa: S101 - `Load.run` sets it
    if count.is_acknowledged(await session.partner.write()):
        await _read(session, count)


_ACTS: Mapping[Kind, _Act] = {
    Kind.READS: _read,
    Kind.WRITES: _write,
    Kind.PAIRS: _write_and_read,
    Kind.PLAIN_PAIRS: _read_after_partners_write,
}


def _tally(count: _Count, background_count: _Count, seconds: float, cpu_s: float) -> Tally:
    ordered = sorted(count.times_ns)
    return Tally(
        requests=len(ordered),
        seconds=seconds,
        p50_ms=percentile(ordered, 50) / _MS if ordered else None,
        p99_ms=percentile(ordered, 99) / _MS if ordered else None,
        by_replicas=count.by_replicas,
        stale=count.stale,
        failed=count.failed + background_count.failed,
        failures=(*count.failures, *background_count.failures),
        background_writes=len(background_count.times_ns),
        cpu_s=cpu_s,
    )


async def _work(parent: Parent) -> None:
    """Run one job after the other; the process ends with its parent."""
    load = Load()
    while True:
        message = await parent.receive()
        job = Job(**{**message, "kind": Kind(message["kind"])})
        if job.kind is Kind.REGISTER:
            await load.register(job)
            parent.send({})
        else:
            parent.send(asdict(await load.run(job)))


if __name__ == "__main__":
    sys.exit(run_child(_work))
