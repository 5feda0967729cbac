"""What work does that is its own affair: errors, statements that are given up, COPY."""

from __future__ import annotations

import asyncio
import contextlib
import io
import secrets
from typing import TYPE_CHECKING

import asyncpg
import pytest
import pytest_asyncio

from rocket import READ_BOUND, Limits, OutcomeUnknown, Role, Router, report_read_bound
from rocket.cluster.binaries import SUPERUSER
from rocket.lab.app import DATABASE
from rocket.routing.connection import unwrap
from tests.support.servers import commits_wait, dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

LONG = "SELECT pg_sleep(30) /* given up */"
DEADLINE_S = 15.0


@pytest_asyncio.fixture
async def opened(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router whose reads are soon over."""
    limits = Limits(attempt_s=0.3, read_s=1.5)
    async with await Router.open(dsns(cluster), observer_interval_s=0.05, limits=limits) as router:
        await router.session("ann").write(lambda db: db.fetchval("SELECT 1"))
        yield router


async def reads_a_file(_db: Connection) -> None:
    """Fail for a reason that has nothing to do with the node."""
    raise FileNotFoundError("/an/absent/file")


async def waits_for_another_service(_db: Connection) -> None:
    """Give up waiting for another service."""
    async with asyncio.timeout(0.01):
        await asyncio.Event().wait()


async def sets_a_limit(db: Connection) -> None:
    """Have the server end a statement that takes too long."""
    async with db.transaction():
        await db.execute("SET LOCAL statement_timeout = '20ms'")
        await db.execute(LONG)


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize(
    ("work", "error"),
    [
        (reads_a_file, FileNotFoundError),
        (waits_for_another_service, TimeoutError),
        (sets_a_limit, asyncpg.QueryCanceledError),
    ],
)
async def test_what_work_raises_by_itself_is_raised_as_it_is(
    opened: Router, work: object, error: type[Exception], how: str
) -> None:
    """It is run once, no node is blamed, and the connection is good for the next one."""
    runs = 0
    backends: list[int] = []

    async def counted(db: Connection) -> None:
        nonlocal runs
        runs += 1
        backends.append(unwrap(db).get_server_pid())
        await work(db)  # type: ignore[operator]

    session = opened.session("ann")
    with pytest.raises(error) as caught:
        await getattr(session, how)(counted)
    assert 1 == runs
    assert type(caught.value) is error
    pools = {pool.name: pool for pool in opened.pools}
    assert 1 <= sum(pool.idle for pool in pools.values())
    if how == "write":
        assert backends == [await session.write(lambda db: asyncio.sleep(0, unwrap(db).get_server_pid()))]


async def running(cluster: LocalCluster) -> int:
    """Count the statements that still run after they were given up, on all nodes."""
    found = 0
    for node in cluster.nodes.values():
        connection = await node.connect(DATABASE)
        found += await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE query LIKE '%given up%' AND state <> 'idle' AND pid <> pg_backend_pid()"
        )
        await connection.close()
    return found


@pytest.mark.parametrize("how", ["read", "write"])
async def test_servers_end_what_was_given_up(cluster: LocalCluster, opened: Router, how: str) -> None:
    """They would go on with it, and keep its locks, since no message says that the connection was discarded."""
    begun = asyncio.Event()

    async def long(db: Connection) -> None:
        begun.set()
        await db.execute(LONG)

    doing = asyncio.create_task(getattr(opened.session("ann"), how)(long))
    await begun.wait()
    async with asyncio.timeout(DEADLINE_S):
        while not await running(cluster):
            await asyncio.sleep(0.01)
        if how == "write":
            doing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            assert isinstance((await asyncio.gather(doing, return_exceptions=True))[0], BaseException)
        while await running(cluster):
            await asyncio.sleep(0.01)


async def test_a_commit_that_is_given_up_goes_on_waiting_for_its_confirmation(cluster: LocalCluster) -> None:
    """Were it cancelled, the server would show others what a failover to a synchronous replica may yet lose."""
    table = f"confirmed_{secrets.token_hex(4)}"
    limits = Limits(commit_s=0.3)
    async with await Router.open(dsns(cluster, who=SUPERUSER), observer_interval_s=0.05, limits=limits) as router:
        await router.session().write(lambda db: db.execute(f"CREATE TABLE {table} (id int)"))
        confirmed = 0

        async def write_on() -> None:
            nonlocal confirmed
            while True:  # until the checkpointer, too, has heard of it
                await router.session().write(lambda db: db.execute(f"INSERT INTO {table} VALUES (1)"))  # noqa: S608
                confirmed += 1

        async with commits_wait(cluster) as admin, asyncio.timeout(DEADLINE_S):
            with pytest.raises(OutcomeUnknown):
                await write_on()
            for _ in range(20):
                waiting = await admin.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%COMMIT'"
                )
                seen = await admin.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608
                assert (1, confirmed) == (waiting, seen)
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("error", [LookupError, asyncpg.InterfaceError])
async def test_a_connection_on_which_something_is_under_way_is_lent_to_nobody(
    cluster: LocalCluster, opened: Router, error: type[Exception]
) -> None:
    """As when one of two things that work does at a time fails, and the other one is left alone."""
    abandoned: list[asyncio.Task[object]] = []
    backends: list[int] = []

    async def leaves_a_statement(db: Connection) -> None:
        backends.append(unwrap(db).get_server_pid())
        abandoned.append(asyncio.create_task(unwrap(db).fetch(LONG)))
        await asyncio.sleep(0.05)
        if error is asyncpg.InterfaceError:
            await db.execute("SELECT 'another operation is in progress'")
        raise LookupError

    session = opened.session("ann")
    while session.last is None or session.last.role is not Role.REPLICA:
        await session.read(lambda db: db.fetchval("SELECT 1"))
    with pytest.raises(error):
        await session.read(leaves_a_statement)
    for _ in range(5):
        assert backends[0] != await session.read(lambda db: asyncio.sleep(0, unwrap(db).get_server_pid()))
        assert 1 == await session.read(lambda db: db.fetchval("SELECT 1"))
    await asyncio.wait(abandoned)
    assert abandoned[0].exception() is not None
    async with asyncio.timeout(DEADLINE_S):
        while await running(cluster):
            await asyncio.sleep(0.01)


async def test_what_a_statement_said_does_not_cover_a_copy_after_it(opened: Router) -> None:
    """COPY reads as well, later."""

    async def copies(db: Connection) -> bool:
        report_read_bound(db, await db.fetchval(f"SELECT {READ_BOUND}"))
        await db.copy_from_query("SELECT 1", output=io.BytesIO())
        reported = unwrap(db).reported
        return reported is not None and reported[1] < unwrap(db).statements

    assert await opened.session("ann").read(copies)
