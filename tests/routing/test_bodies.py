"""Reads and writes without functions: the body of an `async with` is given a connection, once."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import asyncpg
import pytest
import pytest_asyncio

from rocket import Freshness, Role, Router, Unavailable, WriteInRead
from rocket.lab.app import DATABASE
from tests.support.servers import dsns, paused, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

# ruff: noqa: PT012 - the bodies are what is tested

COUNT, INSERT = "SELECT count(*) FROM bodies", "INSERT INTO bodies VALUES (1)"
PID = "SELECT pg_backend_pid()"


@pytest_asyncio.fixture
async def router(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router beside a table that is empty."""
    primary = await cluster.primary.connect(DATABASE)
    await primary.execute(
        "DROP TABLE IF EXISTS bodies; CREATE TABLE bodies (number int UNIQUE DEFERRABLE);"
        "GRANT ALL ON bodies TO PUBLIC"
    )
    await cluster.wait_for_catchup()
    async with await Router.open(dsns(cluster), observer_interval_s=0.05) as router:
        await until(lambda: len(router.board.replicas) == 2)
        yield router
    await primary.execute("DROP TABLE bodies")
    await primary.close()


async def count(node: Connection) -> int:
    """Work that reads."""
    return int(await node.fetchval(COUNT))


def in_use(router: Router) -> int:
    """Return how many connections are lent."""
    return sum(pool.in_use for pool in router.pools)


async def test_a_body_reads_what_the_session_wrote(router: Router) -> None:
    """On a replica, once it has it, and as often as the body likes."""
    session = router.session()
    async with session.writing() as db:
        await db.execute(INSERT)
    async with session.reading(max_wait=2) as db:
        assert [1, 1] == [await count(db), await count(db)]
    assert session.last is not None
    assert Role.REPLICA is session.last.role
    assert 0 == in_use(router)


async def test_what_a_body_has_seen_counts_however_it_is_left(router: Router, cluster: LocalCluster) -> None:
    """By its end, by an error, by a cancellation: the session's next read does not go back."""

    async def by_end() -> None:
        async with session.reading(on="primary") as db:
            await count(db)

    async def by_error() -> None:
        with pytest.raises(LookupError, match="sold out"):
            async with session.reading(on="primary") as db:
                await count(db)
                raise LookupError("sold out")

    async def by_cancellation() -> None:
        seen = asyncio.Event()

        async def read() -> None:
            async with session.reading(on="primary") as db:
                await count(db)
                seen.set()
                await asyncio.Event().wait()

        reading = asyncio.create_task(read())
        await seen.wait()
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading

    for number, leave in enumerate((by_end, by_error, by_cancellation), start=1):
        async with paused(cluster):
            await router.session().write(lambda db: db.execute("INSERT INTO bodies SELECT count(*) FROM bodies"))
            session = router.session()
            await leave()
            assert number == await router.session(token=session.token).read(count)
        await cluster.wait_for_catchup()
        assert 0 == in_use(router)


async def test_a_body_that_raises_writes_nothing(router: Router) -> None:
    """Nor one that is cancelled."""
    session = router.session()
    with pytest.raises(LookupError):
        async with session.writing() as db:
            await db.execute(INSERT)
            raise LookupError

    async def write() -> None:
        async with session.writing() as db:
            await db.execute(INSERT)
            begun.set()
            await asyncio.Event().wait()

    begun = asyncio.Event()
    writing = asyncio.create_task(write())
    await begun.wait()
    writing.cancel()
    await asyncio.wait({writing})
    assert writing.cancelled()
    assert 0 == await session.read(count, freshness=Freshness.GLOBAL)
    assert 0 == in_use(router)


async def test_a_body_has_its_time(router: Router) -> None:
    """Then it is cancelled, on whatever it waits, and its connection is not kept."""
    session = router.session()
    with pytest.raises(Unavailable, match="not over within"):
        async with session.reading(freshness=Freshness.ANY, timeout=0.3) as db:
            await count(db)
            await asyncio.Event().wait()
    with pytest.raises(Unavailable, match="not over within"):
        async with session.writing(timeout=0.3) as db:
            await db.execute(INSERT)
            await db.execute("SELECT pg_sleep(10)")
    await until(lambda: in_use(router) == 0)
    assert 0 == await session.read(count, on="primary")


async def test_a_long_body_has_the_time_that_it_asks_for(router: Router) -> None:
    """A stream of rows, longer than an attempt on a replica may take by default."""
    session = router.session()
    rows = 0
    async with session.reading(freshness=Freshness.ANY, timeout=10) as db, db.transaction():
        async for _ in db.cursor("SELECT pg_sleep(0.15) FROM generate_series(1, 9)", prefetch=2):
            rows += 1
    assert 9 == rows


async def test_a_body_is_not_run_again_when_its_node_fails(router: Router, cluster: LocalCluster) -> None:
    """Its caller gets to know that, and may ask again."""
    session = router.session()
    killer = {node.name: await node.connect(DATABASE) for node in cluster.replicas}
    runs = 0
    with pytest.raises(Unavailable, match="cannot run again"):
        async with session.reading(freshness=Freshness.GLOBAL) as db:
            runs += 1
            pid = await db.fetchval(PID)
            for connection in killer.values():
                await connection.execute("SELECT pg_terminate_backend($1)", pid)
            await count(db)
    assert 1 == runs
    assert 0 == await session.read(count, freshness=Freshness.GLOBAL)
    for connection in killer.values():
        await connection.close()


async def test_an_error_of_a_body_is_raised_as_it_is(router: Router) -> None:
    """A wrong name, a write in a read, a serialization failure, a constraint that is broken at COMMIT."""
    session = router.session()
    with pytest.raises(asyncpg.UndefinedColumnError):
        async with session.reading(freshness=Freshness.GLOBAL) as db:
            await db.fetchval("SELECT nothing FROM bodies")
    with pytest.raises((WriteInRead, asyncpg.ReadOnlySQLTransactionError)):
        async with session.reading(freshness=Freshness.GLOBAL) as db:
            await db.execute(INSERT)
    with pytest.raises(asyncpg.UniqueViolationError):
        async with session.writing() as db:
            await db.execute(INSERT)
            await db.execute("SET CONSTRAINTS ALL DEFERRED")
            await db.execute(INSERT)
    async with session.writing() as db:
        await db.execute(INSERT)
    with pytest.raises(Unavailable, match="could not serialize"):
        async with session.writing(isolation="repeatable_read") as db:
            await count(db)
            await session.write(lambda other: other.execute("UPDATE bodies SET number = 2"))
            await db.execute("UPDATE bodies SET number = 3")


async def test_options_of_transactions_hold_for_them_alone(router: Router) -> None:
    """A tenant's setting, and a level of isolation, in reads and writes."""
    session = router.session()
    shown = "SELECT current_setting('rocket.tenant', true), current_setting('transaction_isolation')"
    settings = {"rocket.tenant": "O'Hara"}
    for run in (session.read, session.write):
        row = await run(lambda db: db.fetchrow(shown), settings=settings, isolation="repeatable_read", timeout=3)
        assert ["O'Hara", "repeatable read"] == list(row or ())
    async with session.reading(settings=settings) as db:
        assert ["O'Hara", "read committed"] == list(await db.fetchrow(shown) or ())
    async with session.writing(settings=settings, isolation="serializable") as db:
        assert ["O'Hara", "serializable"] == list(await db.fetchrow(shown) or ())
    for run in (session.read, session.write):
        assert await run(lambda db: db.fetchval("SELECT current_setting('rocket.tenant', true)")) in {None, ""}
    assert "serializable" == await session.read(
        lambda db: db.fetchval("SELECT current_setting('transaction_isolation')"), isolation="serializable"
    )
    assert session.last is not None
    assert Role.PRIMARY is session.last.role


async def test_a_repeatable_read_on_a_replica_shows_one_moment(router: Router, cluster: LocalCluster) -> None:
    """Its statements see the same, whatever is replayed meanwhile."""
    session = router.session()
    async with session.reading(freshness=Freshness.GLOBAL, isolation="repeatable_read") as db:
        before = await count(db)
        await router.session().write(lambda primary: primary.execute(INSERT))
        await cluster.wait_for_catchup()
        assert before == await count(db)
    assert before + 1 == await session.read(count, freshness=Freshness.GLOBAL)
