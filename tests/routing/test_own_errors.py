"""Errors of work: whose fault they are, and what only a late replica does not know."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Unpack

import asyncpg
import pytest
import pytest_asyncio

from rocket import Role, Router
from rocket.cluster.binaries import SUPERUSER
from rocket.lab.app import DATABASE
from rocket.routing.connection import unwrap
from tests.support.servers import dsns, paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster
    from rocket.routing.answer import ReadOptions

BEAT_S = 0.05
DEADLINE_S = 15.0


@pytest_asyncio.fixture(scope="module")
async def opened(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router of all nodes."""
    async with await Router.open(dsns(cluster, who=SUPERUSER), observer_interval_s=BEAT_S) as router:
        yield router


async def caught_up(router: Router, cluster: LocalCluster) -> Session:
    """Return a session whose reads go to replicas."""
    session = router.session("ann")
    await session.write(lambda db: db.fetchval("SELECT pg_logical_emit_message(true, 'test', '')"))
    await cluster.wait_for_catchup()
    async with asyncio.timeout(DEADLINE_S):
        while session.last is None or session.last.role is not Role.REPLICA:
            await session.read(lambda db: db.fetchval("SELECT 1"))
    return session


def raising(code: str) -> str:
    """Return a statement that raises an SQLSTATE."""
    return f"DO $$ BEGIN RAISE 'its own' USING ERRCODE = '{code}'; END $$"


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize("code", ["XX000", "XX001", "53400", "53100", "58P01", "08001", "08006", "57P01", "57P03"])
async def test_an_error_of_work_is_its_own_whatever_its_code(
    cluster: LocalCluster, opened: Router, code: str, how: str
) -> None:
    """PostGIS, foreign servers and the like: raised as it is after one more try at most, and no node is blamed."""
    session = await caught_up(opened, cluster)
    backends: list[int] = []

    async def work(db: Connection) -> None:
        backends.append(unwrap(db).get_server_pid())
        await db.execute(raising(code))

    with pytest.raises(asyncpg.PostgresError, match="its own") as caught:
        await getattr(session, how)(work)
    assert code == caught.value.sqlstate
    assert len(backends) <= (2 if how == "read" else 1)
    if how == "write":  # its connection was kept
        assert backends == [await session.write(lambda db: asyncio.sleep(0, unwrap(db).get_server_pid()))]


@pytest.mark.parametrize("how", ["read", "write"])
async def test_a_serialization_failure_that_work_raises_by_itself_is_repeated_a_few_times(
    cluster: LocalCluster, opened: Router, how: str
) -> None:
    """By RAISE, or in Python; then it is raised as it is."""
    session = await caught_up(opened, cluster)
    runs = 0

    async def by_sql(db: Connection) -> None:
        nonlocal runs
        runs += 1
        await db.execute(raising("40001"))

    async def by_python(_db: Connection) -> None:
        nonlocal runs
        runs += 1
        raise asyncpg.SerializationError("its own")

    for work in (by_sql, by_python):
        runs = 0
        with pytest.raises(asyncpg.SerializationError, match="its own"):
            await getattr(session, how)(work)
        assert 1 < runs <= 4


@contextlib.asynccontextmanager
async def impatient(cluster: LocalCluster) -> AsyncIterator[None]:
    """Have replicas cancel at once what keeps them from replaying."""
    admins = [await replica.connect(DATABASE) for replica in cluster.replicas]
    try:
        for admin in admins:
            await admin.execute("ALTER SYSTEM SET max_standby_streaming_delay = 0")
            await admin.execute("SELECT pg_reload_conf()")
        yield
    finally:
        for admin in admins:
            await admin.execute("ALTER SYSTEM RESET max_standby_streaming_delay")
            await admin.execute("SELECT pg_reload_conf()")
            await admin.close()


@pytest.mark.parametrize("idle", [False, True])
async def test_a_read_that_replay_cancels_goes_elsewhere(
    *, cluster: LocalCluster, opened: Router, idle: bool
) -> None:
    """A recovery conflict ends a statement by an error, and an idle transaction with its connection."""
    table = f"locked_{secrets.token_hex(4)}"
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(f"CREATE TABLE {table} (id int)")
    session = await caught_up(opened, cluster)
    runs = 0

    async def work(db: Connection) -> int:
        nonlocal runs
        runs += 1
        async with db.transaction():
            found: int = await db.fetchval(f"SELECT count(*)::int FROM {table}")  # noqa: S608
            if runs == 1:
                await admin.execute(f"TRUNCATE {table}")
                if idle:
                    async with asyncio.timeout(DEADLINE_S):
                        while not unwrap(db).is_closed():
                            await asyncio.sleep(0.005)
                await db.execute("SELECT pg_sleep(30)")
            return found

    async with impatient(cluster):
        assert 0 == await session.read(work)
    assert session.last is not None
    assert session.last.route is not None
    assert (2, 1) == (runs, len(session.last.route.failed))
    await admin.close()


# --- what only a late replica does not know ---


LATE = {
    "table": ("CREATE TABLE {0} (id int)", "SELECT count(*) FROM {0}"),
    "column": ("ALTER TABLE known ADD COLUMN {0} int", "SELECT count({0}) FROM known"),
    "function": ("CREATE FUNCTION {0}() RETURNS int LANGUAGE sql AS 'SELECT 0'", "SELECT {0}()"),
    "label": ("ALTER TYPE mood ADD VALUE '{0}'", "SELECT count(*) FROM known WHERE mood = '{0}'"),
    "schema": ("CREATE SCHEMA {0}", "SELECT to_regclass('{0}.x') IS NOT NULL, '{0}'::regnamespace"),
}


@pytest_asyncio.fixture(scope="module")
async def known(cluster: LocalCluster) -> AsyncIterator[None]:
    """A table that each replica knows."""
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute("CREATE TYPE mood AS ENUM ('well')")
    await admin.execute("CREATE TABLE known (mood mood)")
    await admin.execute("CREATE UNLOGGED TABLE unlogged (id int)")
    await cluster.wait_for_catchup()
    yield
    await admin.execute("DROP TABLE known, unlogged")
    await admin.execute("DROP TYPE mood")
    await admin.close()


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("what", LATE)
async def test_what_a_late_replica_does_not_know_is_asked_again_on_the_primary(
    cluster: LocalCluster, opened: Router, what: str
) -> None:
    """After a migration that others ran: the session's floors say nothing about that."""
    name = f"late_{secrets.token_hex(4)}"
    make, ask = (sql.format(name) for sql in LATE[what])
    session = await caught_up(opened, cluster)
    admin = await cluster.primary.connect(DATABASE)
    async with paused(cluster):
        await admin.execute(make)
        await session.read(lambda db: db.fetchrow(ask))
        assert session.last is not None
        assert (Role.PRIMARY, 1) == (session.last.role, len(getattr(session.last.route, "failed", ())))
    await admin.close()


BY_NATURE = [
    "LISTEN rocket",
    "SELECT pg_current_xact_id()",
    "BEGIN; LOCK TABLE known IN SHARE MODE; COMMIT",
    "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT 1; COMMIT",
    "SELECT * FROM unlogged",
    "INSERT INTO known VALUES ('well')",
    "CREATE TABLE written (id int)",
    "SELECT 1 / 0",
]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("statement", BY_NATURE)
async def test_what_reads_may_do_does_not_depend_on_where_they_go(
    cluster: LocalCluster, opened: Router, statement: str
) -> None:
    """A replica refuses more than writes; what counts is what the primary says to a read."""

    async def outcome(session: Session, **options: Unpack[ReadOptions]) -> object:
        try:
            return type(await session.read(lambda db: db.execute(statement), **options))
        except Exception as error:  # noqa: BLE001 - whatever it is
            return type(error)

    on_replica = await caught_up(opened, cluster)
    on_primary = opened.session()
    assert await outcome(on_primary, on="primary") == await outcome(on_replica)
    assert on_primary.last is not None
    assert Role.PRIMARY == on_primary.last.role
