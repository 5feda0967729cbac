"""The client processes, which make the traffic: their side, and that of the program that runs them.

A client receives its `Job`, then messages like `{"do": "flood", "sessions": 50, "until": 12.5}` or
`{"do": "hang-up", "until": 12.5}`, and at last `{"do": "end"}`. It sends its counts of requests twice a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import Counter, defaultdict
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from rocket import Freshness, Limits, Router
from rocket.errors import TaskDied, describe, unwrapping_group
from rocket.lab.api.rides import INSERT_RIDE
from rocket.lab.api.users import INSERT_USER
from rocket.lab.checker.history import TENANT, HistoryWriter, Op, Outcome, Request
from rocket.lab.client import Api
from rocket.lab.shutdown import background
from rocket.lab.subprocesses import Subprocess, SubprocessFailed, run_child
from rocket.lab.torture.workload import (
    API_TIMEOUT_S,
    Job,
    Workload,
    library_failed,
    library_shown,
    loss_of,
    route_of,
)
from rocket.topology.patroni import Topology
from rocket.topology.patroni_rest import RestClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from asyncpg import Record

    from rocket import Connection, Work
    from rocket.lab.subprocesses import Parent
    from rocket.lab.torture.workload import Account

COMMAND = ("rocket.lab.torture.clients",)
"""The module that is a client process, with its arguments."""

_COUNTS_S = 0.5
_FIRST_READ_S = 30.0
_POLL_S = 0.05
_END_S = 5.0
"""How long a client may take to write down what it has."""
_OF_LIBRARY = 0.34
"""Sessions that use the library itself, beside the others, as a share of them."""
_LIMITS = Limits(connections=6, primary_reads=4, commit_s=2.0)
"""Less time than a synchronous standby is away: COMMITs are given up."""
_WRITES, _WRITES_WHERE_READS_RAISE = 0.15, 0.04
"""The share of writes: where all reads raise, a write is the only answer without an error, and has to be rare."""
_WRITES_PER_SESSION, _WRITES_PER_SESSION_WHERE_READS_RAISE = (5, 20), (2, 5)
_READS_OF_ONE = 0.4
_RAISING = 0.5
_IN_WRITE = 0.4
"""The share of lists that are read in a write, and so on the primary."""
_RAISING_KINDS = ("raises", "cancelled")
_KINDS = (*_RAISING_KINDS, "returns", "nests", "swallows", "sets state", TENANT)
_SESSION = Freshness.SESSION
_LONGEST_PAUSE_S = 0.03
_AFTER_FAILURE_S = 0.05
_CANCELLED_AFTER_S = (0.0005, 0.03)
_LONGEST_S = 20.0
"""More than a write may take with its COMMIT and its floor; to take longer is an error of the library."""
_ALL = """
    SELECT rides.* FROM users JOIN rides ON rides.user_id = users.id
     WHERE users.email = $1 ORDER BY rides.id DESC
"""
_ONE = """
    SELECT rides.* FROM users JOIN rides ON rides.user_id = users.id
     WHERE users.email = $1 AND rides.id = $2
"""
TENANTS = """
    CREATE ROLE torture_tenant;
    GRANT SELECT ON users TO torture_tenant;
    GRANT SELECT, INSERT ON rides TO torture_tenant;
    CREATE POLICY of_tenant ON rides
     USING (user_id = (SELECT id FROM users WHERE email = current_setting('torture.tenant', true)));
    ALTER TABLE rides ENABLE ROW LEVEL SECURITY;
"""
"""Makes the role of tenants, to which row-level security shows the rides of the user that a setting names."""
_LEFT = """
    SELECT nullif(concat_ws(', ',
        'the role ' || nullif(current_user, session_user)::text,
        'the session user ' || nullif(session_user, 'postgres')::text,
        'the tenant ' || nullif(current_setting('torture.tenant', true), ''),
        'the search path ' || nullif(current_setting('search_path'), '"$user", public'),
        'a table ' || to_regclass('pg_temp.rides')::text,
        (SELECT 'a prepared statement ' || name FROM pg_prepared_statements WHERE name = 'torture')
    ), '')
"""
"""What is left in the session of earlier work; NULL for nothing."""
_BE_TENANT = "SET ROLE torture_tenant"
_NAME_TENANT = "SELECT set_config('torture.tenant', $1, false)"
_COUNT_VISIBLE = "SELECT count(*) FROM rides"
_ALL_VISIBLE = "SELECT * FROM rides ORDER BY id DESC"
_WRONG = "SELECT 1 / 0"
_STATE = ("SET ROLE pg_monitor", "SET search_path = pg_catalog", "PREPARE torture AS SELECT 1", "DEALLOCATE ALL")
"""What the next work on the connection must not meet."""
_STATE_OF_WRITES = (
    *_STATE,
    "CREATE TEMP TABLE rides (LIKE public.rides INCLUDING ALL)",
    "SET SESSION AUTHORIZATION pg_monitor",
)
"""With the table, the next write would be acknowledged and go there."""
_FLOOD_SESSIONS = 240
"""More, all clients together, than a pool admits and lets wait; not enough to overload the machine."""


class Clients:
    """The client processes, seen from the program that runs them."""

    def __init__(self, processes: Sequence[Subprocess]) -> None:
        self._processes = processes
        self._counts: defaultdict[Subprocess, dict[str, int]] = defaultdict(dict)
        self._shutdown = False

    @property
    def pids(self) -> list[int]:
        """The ids of the processes."""
        return [process.pid for process in self._processes]

    @property
    def counts(self) -> Counter[str]:
        """Requests so far by kind and outcome (`read ok`), not older than a second or so."""
        total: Counter[str] = Counter()
        for counts in self._counts.values():
            total.update(counts)
        return total

    async def have_read(self) -> None:
        """Wait until each process has read something; raise `TaskDied` if one does not in time."""
        try:
            async with asyncio.timeout(_FIRST_READ_S):
                while any("read ok" not in self._counts[process] for process in self._processes):  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise TaskDied(f"the clients read nothing within {_FIRST_READ_S:g} s") from None

    def flood(self, until: float) -> int:
        """Start many more sessions, which read until then, in seconds since zero; return their number."""
        self._send({"do": "flood", "sessions": _FLOOD_SESSIONS // len(self._processes), "until": until})
        return _FLOOD_SESSIONS

    def hang_up(self, until: float) -> None:
        """Have all sessions hang up again and again until then, in seconds since zero."""
        self._send({"do": "hang-up", "until": until})

    async def watch(self) -> None:
        """Receive their counts; raise `TaskDied` if a process ends before `end`."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for process in self._processes:
                    group.create_task(self._watch(process), name=process.name)

    async def _watch(self, process: Subprocess) -> None:
        while True:
            try:
                self._counts[process] = await process.receive()
            except SubprocessFailed as error:
                if self._shutdown:
                    return
                raise TaskDied(str(error)) from None

    def _send(self, message: dict[str, object]) -> None:
        for process in self._processes:
            process.send(message)

    async def end(self) -> None:
        """Have them write down what they have, and reap them; one that takes too long is killed."""
        self._shutdown = True
        self._send({"do": "end"})
        await asyncio.gather(*(process.ended(_END_S) for process in self._processes))


@contextlib.asynccontextmanager
async def running(jobs: Sequence[Job]) -> AsyncIterator[Clients]:
    """Run a client process for each job for as long as the context lasts."""
    async with contextlib.AsyncExitStack() as stack:
        processes: list[Subprocess] = []
        clients = Clients(processes)
        stack.push_async_callback(clients.end)
        for job in jobs:
            process = await Subprocess.start(f"client process {job.process}", *COMMAND)
            processes.append(process)
            process.send(asdict(job))
        yield clients


# --- in a client process ---


async def work(parent: Parent) -> None:
    """Make traffic until the parent asks for the end."""
    job = Job(**await parent.receive())
    logging.getLogger("rocket").addHandler(logging.NullHandler())  # the program itself says what it observes
    with HistoryWriter(Path(job.history)) as history:
        async with (
            Api(job.url, timeout_s=API_TIMEOUT_S, retries=False) as api,
            Api(job.url, timeout_s=API_TIMEOUT_S, retries=False, reconnect=True) as fresh,
        ):
            workload = Workload(job, api, fresh, history)
            async with contextlib.AsyncExitStack() as stack:
                if job.nodes or job.patroni:
                    router = await _open_router(job, stack)
                    sessions = LibrarySessions(workload, router, max(1, int(job.sessions * _OF_LIBRARY)))
                    await stack.enter_async_context(background(sessions.run(), "sessions of the library"))
                await stack.enter_async_context(background(workload.run(), "sessions"))
                await stack.enter_async_context(background(_count(workload, parent), "counts"))
                await _follow(parent, workload)
        parent.send(workload.counts)


async def _open_router(job: Job, stack: contextlib.AsyncExitStack) -> Router:
    """Open a router as a service would that has these nodes, or Patroni's, for `stack` to close."""
    if not job.patroni:
        return await stack.enter_async_context(await Router.open(job.nodes, limits=_LIMITS))
    client = await stack.enter_async_context(RestClient(job.patroni))
    topology = Topology(client, job.patroni_dsn)
    nodes, veto = await topology.find(), topology.may_be_primary
    router = await stack.enter_async_context(await Router.open(nodes, limits=_LIMITS, may_be_primary=veto))
    await stack.enter_async_context(background(topology.follow(router), "topology"))
    return router


async def _follow(parent: Parent, workload: Workload) -> None:
    """Do what the parent asks for, until it asks for the end."""
    while True:
        match await parent.receive():
            case {"do": "flood", "sessions": int(sessions), "until": until}:
                workload.flood(sessions, until)
            case {"do": "hang-up", "until": until}:
                workload.hang_up_until = until
            case _:
                return


async def _count(workload: Workload, parent: Parent) -> None:
    while True:
        parent.send(workload.counts)
        await asyncio.sleep(_COUNTS_S)


# --- sessions that use the library itself ---


class Refused(Exception):
    """What work raises by itself, as a service's "not found" or "sold out": it shows what work has seen."""

    def __init__(self, seen: Sequence[Record]) -> None:
        super().__init__("work refuses")
        self.seen = seen


class LibrarySessions:
    """Sessions that use a `Router` in this process: their work raises, is cancelled, nests, sets state.

    They all bring their tokens. What an error of work shows is recorded as an answer.
    """

    def __init__(self, workload: Workload, router: Router, sessions: int) -> None:
        self._workload = workload
        self._router = router
        self._sessions = sessions
        self._account = workload.account_of_all()

    async def run(self) -> None:
        """Make traffic until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._sessions):
                group.create_task(
                    self._run_sessions(raising=number % 2 == 1), name=f"sessions of the library {number}"
                )

    async def _run_sessions(self, *, raising: bool) -> None:
        """Run one session after the other; they share a user, so that each sees what others write."""
        while True:
            if self._account.full:
                self._account = self._workload.account_of_all()
            await LibrarySession(self._workload, self._router, self._account, raising=raising).run()


class LibrarySession:
    """One client of the library: one read or write after the other, each with work of some kind.

    If it is `raising`, its reads show what they have seen by errors alone.
    """

    def __init__(self, workload: Workload, router: Router, account: Account, *, raising: bool) -> None:
        self._workload = workload
        self._chance = workload.chance
        self._account = account
        self._name = workload.session_name()
        self._session = router.session(account.email)
        self._raising = raising
        self._over = False
        self._left: str | None = None

    async def run(self) -> None:
        """Read and write until the session has begun all its writes."""
        while not await self._record(Request.JOIN, "returns", self._session.write, self._join):  # noqa: ASYNC110
            await asyncio.sleep(_AFTER_FAILURE_S)
        writes_left = self._chance.randint(
            *(_WRITES_PER_SESSION_WHERE_READS_RAISE if self._raising else _WRITES_PER_SESSION)
        )
        writes = _WRITES_WHERE_READS_RAISE if self._raising else _WRITES
        while writes_left and not (self._account.full or self._over):
            if self._chance.random() < writes:
                writes_left -= 1
                good = await self._write()
            elif self._account.rides and self._chance.random() < _READS_OF_ONE:
                good = await self._read_one()
            else:
                good = await self._list()
            await asyncio.sleep(self._chance.uniform(0, _LONGEST_PAUSE_S) if good else _AFTER_FAILURE_S)

    # --- reads and writes ---

    async def _join(self, primary: Connection) -> None:
        await primary.execute(INSERT_USER, self._account.email)

    async def _write(self) -> bool:
        self._account.writes += 1
        distance = self._workload.distance()
        kind = self._chance.choice(("returns", "returns", "raises", "nests", "swallows", TENANT))

        async def work(primary: Connection) -> Record | None:
            if kind == TENANT:
                await self._become_tenant(primary)
            if kind == "nests":
                with contextlib.suppress(Refused):
                    async with primary.transaction():
                        await primary.fetchrow(INSERT_RIDE, self._account.email, distance, None)
                        raise Refused(())
            ride = await primary.fetchrow(INSERT_RIDE, self._account.email, distance, None)
            if kind == "raises":
                raise Refused(())
            if kind == "swallows":
                with contextlib.suppress(asyncpg.DivisionByZeroError):
                    await primary.execute(_WRONG)
            return ride

        return await self._record(Request.WRITE, kind, self._session.write, work, distance=distance)

    async def _read_one(self) -> bool:
        ride = self._chance.choice(self._account.rides)
        raises = self._raising or self._chance.random() < _RAISING

        async def work(node: Connection) -> list[Record]:
            found = await node.fetch(_ONE, self._account.email, ride)
            if raises:
                raise Refused(found)
            return found

        freshness = self._workload.freshness()
        return await self._record(
            Request.READ,
            "raises" if raises else "returns",
            functools.partial(self._session.read, freshness=freshness),
            work,
            freshness=freshness,
            ride=ride,
        )

    async def _list(self) -> bool:
        kind = self._chance.choice(_RAISING_KINDS if self._raising else _KINDS)
        writes = self._chance.random() < _IN_WRITE
        seen: list[Sequence[Record]] = []

        async def work(node: Connection) -> list[Record]:
            seen.clear()
            if kind == "swallows":
                with contextlib.suppress(asyncpg.DivisionByZeroError):
                    async with node.transaction():
                        await node.execute(_WRONG)
            if kind == TENANT:
                await self._become_tenant(node)
                return await node.fetch(_ALL_VISIBLE)
            if kind == "nests":
                async with node.transaction(), node.transaction():
                    return await node.fetch(_ALL, self._account.email)
            found = await node.fetch(_ALL, self._account.email)
            if kind == "raises":
                raise Refused(found)
            if kind == "cancelled":
                seen.append(found)
                await asyncio.Event().wait()
            if kind == "sets state":
                await node.execute(self._chance.choice(_STATE_OF_WRITES if writes else _STATE))
            return found

        freshness = _SESSION if writes else self._workload.freshness()
        read = functools.partial(self._session.read, freshness=freshness)
        run = self._session.write if writes else read
        within_s = self._chance.uniform(*_CANCELLED_AFTER_S) if kind == "cancelled" else _LONGEST_S
        what = f"{kind} in a write" if writes else kind
        return await self._record(Request.LIST, what, run, work, freshness=freshness, seen=seen, within_s=within_s)

    async def _become_tenant(self, node: Connection) -> None:
        """Become a tenant for good, as some services do; note what earlier work has left, and would show."""
        left = await node.fetchval(_LEFT)
        await node.execute(_BE_TENANT)
        if visible := await node.fetchval(_COUNT_VISIBLE):
            left = f"{left}: {visible} rides of others are visible"
        self._left = self._left or left
        await node.fetchval(_NAME_TENANT, self._account.email)

    # --- the record ---

    async def _record(
        self,
        request: Request,
        kind: str,
        run: Callable[[Work[Any]], Awaitable[Any]],
        work: Work[Any],
        *,
        freshness: Freshness = _SESSION,
        ride: int | None = None,
        distance: float | None = None,
        seen: Sequence[Sequence[Record]] = (),
        within_s: float = _LONGEST_S,
    ) -> bool:
        """Run work, record what it showed, by a value or an error, and return whether that was an answer."""
        session, before = self._session, self._session.last
        session.lost = self._left = None  # they are of one answer here
        sent, at = session.token, self._workload.now()
        fields: dict[str, Any] = {"outcome": Outcome.UNKNOWN, "error": "cut off"}
        try:
            async with asyncio.timeout(within_s):
                fields = library_shown(request, await run(work))
        except TimeoutError:  # our own
            fields = {"outcome": Outcome.UNKNOWN, "error": f"hung up after {within_s:.4f} s"}
            if seen:
                fields = library_shown(request, seen[0]) | {"raised": "cancelled"}
            elif within_s == _LONGEST_S:
                fields |= {"status": HTTPStatus.INTERNAL_SERVER_ERROR}
        except Refused as refused:
            if request is Request.WRITE:
                fields = {"outcome": Outcome.FAIL, "error": describe(refused)}
            else:
                fields = library_shown(request, refused.seen) | {"raised": "error"}
        except Exception as error:  # noqa: BLE001 - which ones are allowed is for the checker
            fields = library_failed(request, kind, error)
        finally:  # cancelled: it is recorded all the same
            last = None if session.last is before else session.last
            got = session.token
            op = Op(
                session=self._name,
                user=self._account.email,
                tokens=True,
                request=request,
                at=round(at, 6),
                done=round(self._workload.now(), 6),
                sent=None if sent is None else sent.replace(",", ", "),
                got=None if got is None or "," in got else got,  # several: until a primary resolves them
                lost=loss_of(session),
                freshness=None if freshness is _SESSION else str(freshness),
                work=kind,
                left=self._left,
                **{"ride": ride, "distance": distance} | route_of(last) | fields,
            )
            self._workload.record(op)
        if op.acknowledged_write and op.ride is not None:
            self._account.rides.append(op.ride)
        self._account.learn(ride for ride, _ in op.rides or ())
        self._over = op.status in {HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED}
        return op.outcome is Outcome.OK


def main() -> int:
    """Run until asked to end; return the exit code."""
    return run_child(work)


if __name__ == "__main__":
    raise SystemExit(main())
