"""Sessions that wait on the primary for commits of others, which a replica may have shown, hold up no write."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket import Limits, Policy, Role, Router
from rocket.cluster.binaries import SUPERUSER
from rocket.lab.app import DATABASE
from rocket.routing.connection import unwrap
from tests.support.between import pgbouncer
from tests.support.commits import GATES, gates
from tests.support.servers import commits_wait, dsns, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import asyncpg

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster

BEAT_S = 0.05
DEADLINE_S = 15.0
AT_ONCE_S = 3.0
"""Far less than a write may wait, and time enough for a machine that is busy."""
NO_REPLICA = Policy(lease_s=0.0)

_IN_COMMIT = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%COMMIT')"
_WAITS = f"SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid <> {GATES}"  # noqa: S608


@pytest_asyncio.fixture
async def admin(cluster: LocalCluster) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection to look at the primary with."""
    admin = await cluster.primary.connect(DATABASE)
    yield admin
    await admin.close()


@pytest_asyncio.fixture
async def table(cluster: LocalCluster, admin: asyncpg.Connection[asyncpg.Record]) -> str:
    """An empty table, on each node."""
    table = f"notes_{secrets.token_hex(4)}"
    await admin.execute(f"CREATE TABLE {table} (id int)")
    await admin.execute(f"GRANT ALL ON {table} TO PUBLIC")
    await cluster.wait_for_catchup()
    return table


async def waiting(admin: asyncpg.Connection[asyncpg.Record], count: int, *asking: asyncio.Task[int]) -> None:
    """Wait until this number of those who ask waits for advisory locks."""
    async with asyncio.timeout(DEADLINE_S):
        while count != await admin.fetchval(_WAITS):
            assert not any(task.done() for task in asking)
            await asyncio.sleep(0.01)


def adding(table: str) -> Callable[[Connection], Awaitable[int]]:
    """Return work that adds a row, whose COMMIT waits for no replica."""

    async def add(db: Connection) -> int:
        await db.execute("SET LOCAL synchronous_commit TO local")
        await db.execute(f"INSERT INTO {table} VALUES (1)")  # noqa: S608 - our own
        return unwrap(db).get_server_pid()

    return add


def counting(table: str) -> Callable[[asyncpg.Connection[asyncpg.Record]], Awaitable[int]]:
    """Return work that counts the rows."""

    async def count(db: asyncpg.Connection[asyncpg.Record]) -> int:
        found: int = await db.fetchval(f"SELECT count(*)::int FROM {table}")  # noqa: S608 - our own
        return found

    return count


async def from_replica(router: Router, table: str, subject: str | None = None) -> Session:
    """Return a session that has read on a replica."""
    session = router.session(subject)
    await session.write(adding(table))
    async with asyncio.timeout(DEADLINE_S):
        while session.last is None or session.last.role is not Role.REPLICA:
            await session.read(counting(table))
    return session


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize("subject", ["ann", None])
async def test_a_commit_that_a_replica_has_shown_is_waited_for_and_others_write_on(
    cluster: LocalCluster, table: str, subject: str | None, how: str
) -> None:
    """It waits for a synchronous standby: replicas show it, and the primary does not (design fact F13)."""
    async with (
        await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as router,
        await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as writers,
    ):
        reader = await from_replica(router, table, subject)
        released = False

        async def add_until_released() -> None:
            while not released:  # until the checkpointer, too, has heard of the standby
                await writers.session(subject).write(
                    lambda db: db.execute(f"INSERT INTO {table} VALUES (1)")  # noqa: S608 - our own
                )

        async with asyncio.TaskGroup() as tasks, commits_wait(cluster) as admin:
            tasks.create_task(add_until_released())
            async with asyncio.timeout(DEADLINE_S):
                while not await admin.fetchval(_IN_COMMIT):
                    await asyncio.sleep(0.01)
            behind = await counting(table)(admin)
            async with asyncio.timeout(DEADLINE_S):
                while behind == await reader.read(counting(table)):
                    await asyncio.sleep(0.01)
            assert behind == await counting(table)(admin)
            router.policy = NO_REPLICA
            asking = tasks.create_task(getattr(reader, how)(counting(table)))
            await waiting(admin, 1, asking)
            async with asyncio.timeout(AT_ONCE_S):
                for _ in range(3):
                    await writers.session(subject).write(adding(table))
            assert not asking.done()
            released = True
        assert behind + 4 <= asking.result()


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "behind a pooler"])
async def test_a_session_waits_for_no_write_that_began_after_it(
    cluster: LocalCluster, admin: asyncpg.Connection[asyncpg.Record], table: str, *, pooled: bool
) -> None:
    """Not even for one on the same connection as a write that it did wait for."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = (
            stack.enter_context(pgbouncer(cluster, SUPERUSER, "default_pool_size = 8"))
            if pooled
            else dsns(cluster)
        )
        held, limits = await stack.enter_async_context(gates(cluster)), Limits(connections=2)
        async with (
            await Router.open(nodes, observer_interval_s=BEAT_S) as router,
            await held.on(Router).open(nodes, observer_interval_s=BEAT_S, limits=limits) as writers,
        ):
            reader = await from_replica(router, table)
            router.policy = NO_REPLICA
            add = adding(table)
            async with asyncio.TaskGroup() as writing:

                def begin() -> asyncio.Task[int]:
                    return writing.create_task(writers.session().write(add))

                first, second = begin(), begin()
                await held.wait(2)
                asking = writing.create_task(reader.read(counting(table)))
                await waiting(admin, 1, asking)
                await held.open(0)
                await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
                later = begin()
                await held.wait(2)
                assert not asking.done()
                await held.open(1)
                async with asyncio.timeout(AT_ONCE_S):
                    assert 3 == await asking
                assert not later.done()
                await held.open(2)
        if not pooled:
            assert later.result() in {first.result(), second.result()}


async def test_sessions_that_wait_leave_connections_for_others(
    cluster: LocalCluster, admin: asyncpg.Connection[asyncpg.Record], table: str
) -> None:
    """However many there are, and whether they read or write."""
    limits = Limits(connections=3, primary_reads=2)
    async with (
        gates(cluster) as held,
        await Router.open(dsns(cluster), observer_interval_s=BEAT_S, limits=limits) as router,
        await held.on(Router).open(dsns(cluster), observer_interval_s=BEAT_S) as writers,
    ):
        reader = await from_replica(router, table)
        router.policy = NO_REPLICA
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(writers.session().write(adding(table)))
            await held.wait(1)
            asking = [
                tasks.create_task(getattr(router.session(token=reader.token), how)(counting(table)))
                for how in ("read", "write") * 4
            ]
            await waiting(admin, 2, *asking)
            await until(lambda: 6 == router.primary_reads_waiting)
            async with asyncio.timeout(AT_ONCE_S):
                for _ in range(3):
                    await router.session().write(adding(table))
                assert 4 == await router.session().read(counting(table))
            assert not any(task.done() for task in asking)
            await held.open(0)
        assert {5} == {task.result() for task in asking}


async def test_work_that_holds_a_connection_does_not_wait_to_wait(cluster: LocalCluster, table: str) -> None:
    """Who waits to wait may be waiting for that connection: where all are held like this, the last one fails."""
    limits = Limits(connections=2, primary_reads=1)
    inside = asyncio.Barrier(2)
    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S, limits=limits) as router:
        reader = await from_replica(router, table)
        router.policy = NO_REPLICA

        async def nests(_db: Connection) -> int:
            await inside.wait()
            return await router.session(token=reader.token).write(counting(table))

        began = time.monotonic()
        outcomes = await asyncio.gather(*(router.session().write(nests) for _ in range(2)), return_exceptions=True)
        assert time.monotonic() - began < AT_ONCE_S
        (failure,) = (outcome for outcome in outcomes if outcome != 1)
        assert "is nested in work" in str(failure)
