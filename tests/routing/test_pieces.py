"""Writes without a transaction: what cannot run in one, and is covered all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg
import pytest
import pytest_asyncio

from rocket import OutcomeUnknown, Role, Router, Unavailable
from rocket.cluster.binaries import SUPERUSER
from rocket.lab.app import DATABASE
from tests.support.between import pgbouncer
from tests.support.servers import dsns, paused, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster

COUNT, INSERT = "SELECT count(*) FROM pieces", "INSERT INTO pieces VALUES (1)"
PROCEDURE = """
    CREATE OR REPLACE PROCEDURE add_pieces() LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO pieces VALUES (1);
        COMMIT;
        INSERT INTO pieces VALUES (1);
    END $$;
"""


@pytest_asyncio.fixture
async def router(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router beside a table that is empty."""
    primary = await cluster.primary.connect(DATABASE)
    await primary.execute(f"DROP TABLE IF EXISTS pieces; CREATE TABLE pieces (number int); {PROCEDURE}")
    await primary.execute("GRANT ALL ON pieces TO PUBLIC")
    await cluster.wait_for_catchup()
    async with await Router.open(dsns(cluster), observer_interval_s=0.05) as router:
        await until(lambda: len(router.board.replicas) == 2)
        yield router
    await primary.execute("DROP TABLE pieces; DROP PROCEDURE add_pieces")
    await primary.close()


async def count(node: Connection) -> int:
    """Work that reads."""
    return int(await node.fetchval(COUNT))


async def seen_by(session: Session) -> tuple[int, Role | None]:
    """Return what the session's next read sees, and where."""
    return await session.read(count), None if session.last is None else session.last.role


@pytest.mark.parametrize("unflushed", [False, True])
async def test_a_procedure_that_commits_is_covered(
    router: Router, cluster: LocalCluster, *, unflushed: bool
) -> None:
    """Also what it did not have flushed; by replicas, and while they are late."""

    async def add(db: Connection) -> None:
        if unflushed:
            await db.execute("SET synchronous_commit = off")
        await db.execute("CALL add_pieces()")

    session = router.session()
    with pytest.raises(asyncpg.InvalidTransactionTerminationError):
        await session.write(add)
    for number in range(1, 6):
        await session.write(add, transaction=False)
        assert (2 * number, Role.REPLICA) == await seen_by(session)
    async with paused(cluster):
        await session.write(add, transaction=False)
        assert (12, Role.PRIMARY) == await seen_by(session)
    assert "on" == await session.write(lambda db: db.fetchval("SHOW synchronous_commit"))


@pytest.mark.superuser
async def test_what_cannot_run_in_a_transaction_runs(router: Router) -> None:
    """It returns what work returns; in a transaction Postgres refuses it."""
    session = router.session()
    for statement in ("VACUUM pieces", "CREATE INDEX CONCURRENTLY ON pieces (number)"):
        with pytest.raises(asyncpg.ActiveSQLTransactionError):
            await session.write(lambda db: db.execute(statement))  # noqa: B023 - it is awaited here
        said = await session.write(lambda db: db.execute(statement), transaction=False)  # noqa: B023
        assert said == " ".join(statement.split()[: 2 if "INDEX" in statement else 1])


async def test_an_error_covers_what_was_committed_before_it(router: Router, cluster: LocalCluster) -> None:
    """It is raised as it is, and work is not run again."""
    runs = 0

    async def add_and_fail(db: Connection) -> None:
        nonlocal runs
        runs += 1
        await db.execute(INSERT)
        raise LookupError("sold out")

    session = router.session()
    async with paused(cluster):
        with pytest.raises(LookupError, match="sold out"):
            await session.write(add_and_fail, transaction=False)
        assert (1, Role.PRIMARY) == await seen_by(session)
    assert 1 == runs


async def test_a_connection_that_is_lost_leaves_the_outcome_unknown(router: Router) -> None:
    """Some of it may be there: it is not run again."""
    runs = 0

    async def add_and_die(db: Connection) -> None:
        nonlocal runs
        runs += 1
        await db.execute(INSERT)
        await db.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    session = router.session()
    with pytest.raises(OutcomeUnknown):
        await session.write(add_and_die, transaction=False)
    assert (1, 1) == (runs, (await seen_by(router.session()))[0])


async def test_one_that_takes_too_long_ends_in_time(router: Router) -> None:
    """With a time of its own it may take longer."""

    async def sleep(db: Connection) -> None:
        await db.execute(INSERT)
        await db.execute("SELECT pg_sleep(0.4)")

    with pytest.raises(OutcomeUnknown):
        await router.session().write(sleep, transaction=False, timeout=0.2)
    await router.session().write(sleep, transaction=False, timeout=5)
    assert 2 == (await seen_by(router.session()))[0]


async def test_what_makes_no_sense_is_refused(router: Router, cluster: LocalCluster) -> None:
    """There is no isolation level without a transaction, and behind a pooler no session to be alone in."""
    for options in ({"isolation": "serializable"}, {"settings": {"rocket.tenant": "acme"}}):
        with pytest.raises(ValueError, match="without a transaction"):
            await router.session().write(count, transaction=False, **options)
    with pgbouncer(cluster, SUPERUSER) as nodes:
        async with await Router.open(nodes, observer_interval_s=0.05) as pooled:
            with pytest.raises(ValueError, match="behind a pooler"):
                await pooled.session().write(count, transaction=False)
    primary = router.board.primary
    assert primary is not None
    await router.remove(primary.name)
    with pytest.raises(Unavailable):
        await router.session().write(count, transaction=False, timeout=1)
