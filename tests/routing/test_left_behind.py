"""What work leaves in a session does not reach the work after it, and costs nothing where there is none."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket import Limits, Role, Router
from rocket.lab.app import DATABASE
from rocket.routing.connection import unwrap
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster

NO_TENANT = "SELECT coalesce(current_setting('my.tenant', true), '') = ''"
ON_BOTH = {
    "SET statement_timeout = '77s'": "SELECT current_setting('statement_timeout') <> '77s'",
    "-- whose\n/* it is */ set ROLE rocket_monitor": "SELECT current_user <> 'rocket_monitor'",
    "SET SESSION AUTHORIZATION rocket_monitor": "SELECT session_user <> 'rocket_monitor'",
    "SELECT set_config('my.tenant', 'blue', false)": NO_TENANT,
    "PREPARE left_behind AS SELECT 1": "SELECT NOT EXISTS (SELECT FROM pg_prepared_statements WHERE from_sql)",
    "DECLARE c_left CURSOR WITH HOLD FOR SELECT 1": "SELECT 'c_left' NOT IN (SELECT name FROM pg_cursors)",
    "SELECT pg_advisory_lock(77)": (
        "SELECT NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())"
    ),
    "DO $$ BEGIN PERFORM set_config('my.tenant', 'green', false); END $$": NO_TENANT,
}
ON_PRIMARY = ON_BOTH | {
    "CREATE TEMP TABLE notes_left (id int)": "SELECT to_regclass('pg_temp.notes_left') IS NULL",
    "LISTEN left_behind": "SELECT NOT EXISTS (SELECT FROM pg_listening_channels())",
    "CREATE TEMP SEQUENCE s_left; SELECT nextval('s_left')": "SELECT to_regclass('pg_temp.s_left') IS NULL",
}


@pytest_asyncio.fixture
async def opened(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router with a single connection to each node."""
    limits = Limits(connections=1, primary_reads=1)
    async with await Router.open(
        dsns(cluster, "primary", "replica0"), observer_interval_s=0.05, limits=limits
    ) as router:
        yield router


async def pid(db: Connection) -> int:
    """Return which backend it is."""
    return int(await db.fetchval("SELECT pg_backend_pid()"))


async def on_replica(router: Router) -> Session:
    """Return a session that reads on the replica."""
    session = router.session("ann")
    await session.write(lambda db: db.fetchval("SELECT 1"))
    while session.last is None or session.last.role is not Role.REPLICA:
        await session.read(lambda db: db.fetchval("SELECT 1"))
    return session


@pytest.mark.superuser
@pytest.mark.parametrize("left", ON_PRIMARY)
async def test_what_a_write_leaves_in_the_session_does_not_last(opened: Router, left: str) -> None:
    """The next one runs on the same connection, with the statements that are prepared there."""
    session = opened.session("ann")
    text = f"SELECT pg_backend_pid() /* {secrets.token_hex(4)} */"

    async def leaves(db: Connection) -> int:
        await db.execute(left)
        return int(await db.fetchval(text))

    first = await session.write(leaves)

    async def finds(db: Connection) -> tuple[int, bool, bool]:
        kept = await db.fetchval("SELECT EXISTS (SELECT FROM pg_prepared_statements WHERE statement = $1)", text)
        return int(await db.fetchval(text)), bool(await db.fetchval(ON_PRIMARY[left])), bool(kept)

    assert (first, True, True) == await session.write(finds)


@pytest.mark.superuser
@pytest.mark.parametrize("left", ON_BOTH)
async def test_what_a_read_leaves_in_the_session_does_not_last(opened: Router, left: str) -> None:
    """On a replica, where the connection stays as read-only as it was."""
    session = await on_replica(opened)

    async def leaves(db: Connection) -> int:
        await db.execute(left)
        return unwrap(db).get_server_pid()

    first = await session.read(leaves)
    assert session.last is not None
    assert Role.REPLICA is session.last.role

    async def finds(db: Connection) -> tuple[int, bool, str, str]:
        return (
            unwrap(db).get_server_pid(),
            bool(await db.fetchval(ON_BOTH[left])),
            str(await db.fetchval("SELECT current_setting('default_transaction_read_only')")),
            str(await db.fetchval("SELECT current_setting('default_transaction_isolation')")),
        )

    assert (first, True, "on", "read committed") == await session.read(finds)
    assert Role.REPLICA is session.last.role


@pytest.mark.vouched
async def test_a_read_that_changes_nothing_costs_no_reset(opened: Router) -> None:
    """Nor does one that sets something for its transaction only (design fact F9)."""
    session = await on_replica(opened)

    async def clean(db: Connection) -> int:
        async with db.transaction():
            await db.execute("SET LOCAL work_mem = '5MB'")
            await db.fetchval("SELECT set_config('my.tenant', $1, true)", "blue")
        await db.fetchval("SELECT 'do' AS load, 'set' AS call")
        return unwrap(db).statements

    async def counts(db: Connection) -> int:
        return unwrap(db).statements

    before = await session.read(clean)
    assert before + 1 == await session.read(counts)  # the bound of the first one


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize("voids", ["DEALLOCATE ALL", "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"])
async def test_prepared_statements_that_work_has_deallocated_are_prepared_again(
    opened: Router, how: str, voids: str
) -> None:
    """A connection is not spoilt by it, whether the statement shows it or not."""
    session = await on_replica(opened)
    do = getattr(session, how)
    text = f"SELECT 7 /* {secrets.token_hex(4)} */"
    assert 7 == await do(lambda db: db.fetchval(text))
    await do(lambda db: db.execute(voids))
    for _ in range(5):
        assert 7 == await do(lambda db: db.fetchval(text))


async def test_they_are_prepared_again_after_a_write_that_failed(opened: Router) -> None:
    """What it had seen was asked for by a statement that is prepared, and is void like all others."""
    session = opened.session("ann")

    async def fails(_db: Connection) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await session.write(fails)
    await session.write(lambda db: db.fetchval("SELECT 7"))
    await session.write(lambda db: db.execute("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"))
    assert 7 == await session.write(lambda db: db.fetchval("SELECT 7"))


@pytest.mark.superuser
async def test_a_tenant_does_not_see_the_rows_of_the_one_before(cluster: LocalCluster, opened: Router) -> None:
    """Row-level security goes by role or setting: on primary and replica alike, the next work has its own."""
    table = f"tenants_{secrets.token_hex(4)}"
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(
        f"CREATE TABLE {table} (tenant text); INSERT INTO {table} VALUES ('blue'), ('green');"  # noqa: S608
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY; GRANT SELECT ON {table} TO rocket_plain;"
        f"CREATE POLICY own ON {table} USING (tenant = current_setting('my.tenant', true))"
    )
    await admin.close()
    await cluster.wait_for_catchup()
    session = await on_replica(opened)

    async def as_blue(db: Connection) -> list[str]:
        await db.execute("SET ROLE rocket_plain; SET my.tenant = 'blue'")
        return [row[0] for row in await db.fetch(f"SELECT tenant FROM {table}")]  # noqa: S608

    async def as_nobody(db: Connection) -> list[str]:
        async with db.transaction():
            await db.execute("SET LOCAL ROLE rocket_plain")
            return [row[0] for row in await db.fetch(f"SELECT tenant FROM {table}")]  # noqa: S608

    for _ in range(2):
        assert ["blue"] == await session.read(as_blue)
        assert [] == await session.read(as_nobody)
    before = opened.session("ann")  # without a token: on the primary
    assert ["blue"] == await before.read(as_blue)
    assert [] == await opened.session("ann").read(as_nobody)
