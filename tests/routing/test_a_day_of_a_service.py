"""A service whose replicas fail one after the other, each in its own way, but for one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from rocket import Reason, Role, Router, Unavailable
from rocket.consistency import obstacle
from rocket.lab.app import DATABASE
from rocket.lab.torture.proxy import Mode, Proxy, socket_path
from tests.support.servers import dsns, fresh_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster
    from rocket.routing.answer import Route

WELL = "well"
BEHIND = {"slow": 0, "refusing": 0, "silent": 1, "repointed": 0, "full": 1, WELL: 1}
"""The replicas of the service, and the server that each leads to: as its number, of the two that there are."""
SLOW_S = 0.3
SESSIONS = 8
WRITES_EVERY = 50
SETTLED_S = 3.0
"""So long after a fault has begun a request may take longer than `LONGEST_S`."""
LONGEST_S = 1.0

_END_POOLED = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1 AND application_name = 'rocket'
"""
"""An observer's connection goes on: to it, all is well."""


_log = logging.getLogger("rocket.tests")


class Request(NamedTuple):
    """One request of the service."""

    at: float
    took_s: float
    node: str | None
    """None where it was not answered."""
    role: Role | None
    reason: Reason | None
    in_vain: bool
    """Whether the primary had to answer, and the replica that is well was known to be fit, and was not tried."""


class Service:
    """Sessions that read without a pause, and write now and then."""

    def __init__(self, router: Router) -> None:
        self.requests: list[Request] = []
        self.began = time.monotonic()
        self._router = router
        self._ends = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve for as long as the context lasts."""
        async with asyncio.TaskGroup() as group:
            for number in range(SESSIONS):
                group.create_task(self._serve(f"day-{number}@example.com"), name=f"session {number}")
            yield
            self._ends.set()

    def now(self) -> float:
        """Return the seconds since it began."""
        return time.monotonic() - self.began

    async def _serve(self, email: str) -> None:
        session = self._router.session(email)
        written = 0
        for turn in itertools.count():
            if self._ends.is_set():
                break
            if turn % WRITES_EVERY:
                seen = await self._ask(session, session.read, functools.partial(count, email))
                assert seen in {None, written}
            else:
                done = await self._ask(session, session.write, functools.partial(write, email))
                written += done is not None
            await asyncio.sleep(0)

    async def _ask(
        self,
        session: Session,
        how: Callable[[Callable[[Connection], Awaitable[int]]], Awaitable[int]],
        work: Callable[[Connection], Awaitable[int]],
    ) -> int | None:
        at = self.now()
        try:
            value = await how(work)
        except Unavailable:
            self.requests.append(Request(at, self.now() - at, None, None, None, in_vain=False))
            return None
        last = session.last
        assert last is not None
        in_vain = last.role is Role.PRIMARY and last.route is not None and self._could_be_read(last.route)
        self.requests.append(Request(at, self.now() - at, last.node, last.role, last.reason, in_vain))
        return value

    def _could_be_read(self, route: Route) -> bool:
        status = next((status for status in route.statuses if status.name == WELL), None)
        return (
            status is not None
            and WELL not in route.failed
            and obstacle(status, route.tokens[0], self._router.board, self._router.policy, route.decided_at)
            is None
        )


async def write(email: str, db: Connection) -> int:
    """Note one more write."""
    await db.execute("INSERT INTO day_of_a_service VALUES ($1)", email)
    return 1


async def count(email: str, db: Connection) -> int:
    """Return how many writes there are."""
    return int(await db.fetchval("SELECT count(*) FROM day_of_a_service WHERE email = $1", email))


class Day:
    """The replicas as the service knows them, and what befalls them."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self._cluster = cluster
        self._directory = directory
        self._servers = {name: cluster.replicas[number] for name, number in BEHIND.items()}
        self.links: dict[str, Proxy] = {}

    @contextlib.asynccontextmanager
    async def addresses(self) -> AsyncIterator[Mapping[str, str]]:
        """Give the address of each node, by its name: each with a role of its own, behind a link of its own."""
        await self._on_primary("CREATE TABLE day_of_a_service (email text)")
        await self._on_primary("GRANT SELECT, INSERT ON day_of_a_service TO rocket_monitor")
        for name in BEHIND:
            await self._on_primary(f"CREATE ROLE day_{name} LOGIN IN ROLE rocket_monitor")
        await self._cluster.wait_for_catchup()
        addresses = dsns(self._cluster, self._cluster.primary.name)
        try:
            async with contextlib.AsyncExitStack() as stack:
                for port, (name, server) in enumerate(self._servers.items(), start=1):
                    upstream = socket_path(self._cluster.socket_dir, server.port)
                    link = Proxy(socket_path(self._directory, port), functools.partial(Path, upstream))
                    await stack.enter_async_context(link.listening())
                    self.links[name] = link
                    addresses[name] = f"postgresql://day_{name}@/{DATABASE}?host={self._directory}&port={port}"
                yield addresses
        finally:
            for name in BEHIND:
                await self._on_primary(f"DROP ROLE day_{name}")
            await self._on_primary("DROP TABLE day_of_a_service")

    async def befall(self, name: str) -> None:
        """Have the replica of that name fail, for the rest of the day."""
        link = self.links[name]
        match name:
            case "slow":
                link.turn(Mode.DELAYED, delay_s=SLOW_S / 2)
            case "refusing":
                link.turn(Mode.REFUSING)
            case "silent":
                link.turn(Mode.SILENT)
            case "repointed":
                link.upstream = self.links[WELL].upstream
            case "full":
                await self._on_primary(f"ALTER ROLE day_{name} CONNECTION LIMIT 1")
                await self._cluster.wait_for_catchup()
        if name in {"refusing", "repointed", "full"}:
            connection = await self._servers[name].connect(DATABASE)
            await connection.fetch(_END_POOLED, f"day_{name}")
            await connection.close()

    async def _on_primary(self, statement: str) -> None:
        connection = await self._cluster.primary.connect(DATABASE)
        await connection.execute(statement)
        await connection.close()


@pytest.mark.vouched
@pytest.mark.parametrize(
    ("together", "phase_s"), [(True, 4.0), pytest.param(False, 8.0, marks=pytest.mark.long)], ids=["short", "long"]
)
async def test_one_replica_that_is_well_serves_the_reads(
    cluster: LocalCluster, together: bool, phase_s: float
) -> None:
    """Whatever becomes of the five others: none of them holds up a request for long, and the primary is spared."""
    with fresh_dir() as directory:
        day = Day(cluster, directory)
        faults: dict[str, float] = {}
        async with day.addresses() as nodes, await Router.open(nodes) as router:
            service = Service(router)
            async with service.serving():
                await asyncio.sleep(1)
                for name in BEHIND:
                    if name != WELL:
                        faults[name] = service.now()
                        await day.befall(name)
                        await asyncio.sleep(0 if together else phase_s)
                await asyncio.sleep(phase_s if together else 0)

    reads = [
        each for each in service.requests if each.reason is not Reason.WRITE and each.at >= max(faults.values())
    ]
    shares = Counter(each.node for each in reads)
    _log.info("reads once all faults were on: %s", shares)
    # One name leads to the server that is well by then.
    assert (shares[WELL] + shares["repointed"]) / len(reads) >= 0.95
    assert [] == [each for each in service.requests if each.in_vain or each.node is None]
    assert [] == [
        each for each in service.requests
        if each.took_s > (2 * LONGEST_S if together else LONGEST_S)  # machines that run many tests are slow
        and not any(at - each.took_s <= each.at <= at + SETTLED_S for at in faults.values())
    ]  # fmt: skip
