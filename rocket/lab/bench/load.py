"""The load: sessions that ask, check every answer, and take the time."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from array import array
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rocket.errors import RocketError, describe, unwrapping_group
from rocket.lab.bench.connection import Connection, Garbled
from rocket.lab.bench.figures import percentile
from rocket.lab.bench.orders import Kind, Tally

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from typing import TypeAlias
    from urllib.parse import SplitResult

    from rocket.lab.bench.connection import Answer
    from rocket.lab.bench.orders import Job

    _Act: TypeAlias = Callable[["_Session", "_Count"], Awaitable[None]]

_AFTER_FAILURE_S = 0.01
_FAILURES_TOLD = 3
_MS = 1_000_000
_DISTANCE = "123.4"


class NotReady(RocketError):
    """The sessions could not be made."""


class _Session:
    """One user with one connection, who keeps the token of the latest answer."""

    def __init__(self) -> None:
        self.email = f"{secrets.token_hex(6)}@bench.example"
        self.token: str | None = None
        self.ride = b""
        """The body of the answer that acknowledged the ride which plain reads ask for."""
        self._home: str | None = None
        """The token that came with it."""
        self.partner: _Session | None = None
        """Who writes before each plain read."""
        self._connection: Connection
        self._host = ""
        self._tokens = False

    def begin(self, address: SplitResult, *, tokens: bool) -> None:
        """Begin a load: as somebody who has written the ride, and not read it yet."""
        self._connection = Connection(address.hostname or "", address.port or 0)
        self._host = address.netloc
        self._tokens = tokens
        self.token = self._home

    def end(self) -> None:
        self._connection.close()

    async def join(self) -> None:
        """Become a user with a ride; raise `NotReady`."""
        for path, form, expected in (
            ("/users", f"email={self.email.replace('@', '%40')}", HTTPStatus.CREATED),
            ("/rides", f"distance={_DISTANCE}", HTTPStatus.CREATED),
        ):
            answer = await self._ask("POST", path, form)
            if answer.status != expected:
                raise NotReady(f"POST {path} was answered {answer.status}: {answer.body[:200]!r}")
        self.ride, self._home = answer.body, self.token

    async def read(self, ride: bytes) -> Answer:
        """Read the ride of which this is the acknowledgement."""
        return await self._ask("GET", f"/rides/{json.loads(ride)['id']}")

    async def write(self) -> Answer:
        """Write a ride."""
        return await self._ask("POST", "/rides", f"distance={_DISTANCE}")

    async def _ask(self, method: str, path: str, form: str = "") -> Answer:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}", f"Authorization: {self.email}"]
        if self._tokens and self.token is not None:
            lines.append(f"Rocket-Session: {self.token}")
        if form:
            lines += [f"Content-Length: {len(form)}", "Content-Type: application/x-www-form-urlencoded"]
        answer = await self._connection.ask("\r\n".join([*lines, "", form]).encode())
        self.token = answer.header("Rocket-Session") or self.token
        return answer


class _Count:
    """What is counted while a load runs."""

    def __init__(self, most: int = 2**62) -> None:
        self.times_ns = array("q")
        self.by_replicas = self.stale = self.failed = 0
        self.failures: list[str] = []
        self._left = itertools.repeat(None, most)

    def may_go_on(self) -> bool:
        """Take one of the requests that may be made."""
        return next(self._left, self) is None

    def failure(self, what: str) -> None:
        self.failed += 1
        if len(self.failures) < _FAILURES_TOLD:
            self.failures.append(what)

    def is_acknowledged(self, answer: Answer) -> bool:
        """Tell whether a write was; count it if it was not."""
        if answer.status != HTTPStatus.CREATED:
            self.failure(f"POST: {answer.status} {answer.body[:80]!r}")
        return answer.status == HTTPStatus.CREATED

    def shows(self, answer: Answer, ride: bytes) -> bool:
        """Tell whether a read shows the ride; count it if it does not."""
        if answer.status == HTTPStatus.OK and _same(answer.body, ride):
            self.by_replicas += answer.header("Rocket-Served-As") == "replica"
            return True
        if answer.status in {HTTPStatus.OK, HTTPStatus.NOT_FOUND, HTTPStatus.UNAUTHORIZED}:
            self.stale += 1
        else:
            self.failure(f"GET: {answer.status} {answer.body[:80]!r}")
        return False


def _same(body: bytes, ride: bytes) -> bool:
    return body == ride or json.loads(body) == json.loads(ride)


class Load:
    """Carries out orders, one after the other, with crowds of sessions that stay the same."""

    def __init__(self) -> None:
        self._crowds: dict[str, list[_Session]] = {}

    async def join(self, orders: Job) -> None:
        """Make a crowd, whose sessions each have a ride; raise `NotReady`."""
        crowd = self._crowds[orders.crowd] = [_Session() for _ in range(orders.sessions)]
        for session in crowd:
            session.begin(urlsplit(orders.url), tokens=orders.tokens)
            try:
                await session.join()
            except (OSError, TimeoutError, Garbled) as error:
                raise NotReady(f"no user could be made: {describe(error)}") from None
            finally:
                session.end()

    async def run(self, orders: Job) -> Tally:
        """Make a load and return how it went."""
        crowd = self._crowds[orders.crowd][: orders.sessions]
        beside = self._crowds[orders.beside] if orders.beside else []
        if orders.kind is Kind.PLAIN_PAIRS:
            for session, partner in zip(crowd, beside, strict=False):
                session.partner = partner
        count, aside = _Count(orders.requests), _Count()
        address = urlsplit(orders.url)
        for session in [*crowd, *beside]:
            session.begin(address, tokens=orders.tokens)
        cpu_s, began = time.process_time(), time.monotonic()
        until = began + orders.seconds
        try:
            with unwrapping_group():
                async with asyncio.TaskGroup() as group:
                    _set_out(group, crowd, _Course(_ACTS[orders.kind], count, until, orders.per_s))
                    if orders.kind is not Kind.PLAIN_PAIRS:
                        _set_out(group, beside, _Course(_write, aside, until, orders.beside_per_s))
        finally:
            for session in [*crowd, *beside]:
                session.end()
        return _tally(count, aside, time.monotonic() - began, time.process_time() - cpu_s)


@dataclass(frozen=True, slots=True)
class _Course:
    """What each session of a crowd does."""

    act: _Act
    count: _Count
    until: float
    """Monotonic seconds."""
    per_s: float | None
    """The crowd's pace; None: each as soon as it has its answer."""


def _set_out(group: asyncio.TaskGroup, crowd: list[_Session], course: _Course) -> None:
    """Have each session of a crowd act, one after the other where they keep a pace."""
    now = time.monotonic()
    for number, session in enumerate(crowd):
        if course.per_s is None:
            due_times: Iterator[float] = itertools.repeat(now)
        else:
            due_times = itertools.count(now + number / course.per_s, len(crowd) / course.per_s)
        group.create_task(_keep_acting(session, course, due_times), name=f"session {number}")


async def _keep_acting(session: _Session, course: _Course, due_times: Iterator[float]) -> None:
    """Act when it is due, or at once if that is over, and never twice at a time."""
    for due in itertools.takewhile(lambda due: due < course.until, due_times):
        if (early_s := due - time.monotonic()) > 0:
            await asyncio.sleep(early_s)
        if time.monotonic() >= course.until or not course.count.may_go_on():
            return
        try:
            await course.act(session, course.count)
        except (OSError, TimeoutError, Garbled) as error:
            course.count.failure(describe(error))
            await asyncio.sleep(_AFTER_FAILURE_S)


async def _read(session: _Session, count: _Count, written: bytes = b"") -> None:
    ride = written or session.ride
    began_ns = time.perf_counter_ns()
    answer = await session.read(ride)
    took_ns = time.perf_counter_ns() - began_ns
    if count.shows(answer, ride):
        count.times_ns.append(took_ns)


async def _write(session: _Session, count: _Count) -> None:
    began_ns = time.perf_counter_ns()
    answer = await session.write()
    took_ns = time.perf_counter_ns() - began_ns
    if count.is_acknowledged(answer):
        count.times_ns.append(took_ns)


async def _write_and_read(session: _Session, count: _Count) -> None:
    written = await session.write()
    if count.is_acknowledged(written):
        await _read(session, count, written.body)


async def _read_after_anothers_write(session: _Session, count: _Count) -> None:
    assert session.partner is not None  # noqa: S101 - it was given one
    if count.is_acknowledged(await session.partner.write()):
        await _read(session, count)


_ACTS: Mapping[Kind, _Act] = {
    Kind.READS: _read,
    Kind.WRITES: _write,
    Kind.PAIRS: _write_and_read,
    Kind.PLAIN_PAIRS: _read_after_anothers_write,
}


def _tally(count: _Count, aside: _Count, seconds: float, cpu_s: float) -> Tally:
    ordered = sorted(count.times_ns)
    return Tally(
        requests=len(ordered),
        seconds=seconds,
        p50_ms=percentile(ordered, 50) / _MS if ordered else None,
        p99_ms=percentile(ordered, 99) / _MS if ordered else None,
        by_replicas=count.by_replicas,
        stale=count.stale,
        failed=count.failed + aside.failed,
        failures=(*count.failures, *aside.failures),
        beside=len(aside.times_ns),
        cpu_s=cpu_s,
    )
