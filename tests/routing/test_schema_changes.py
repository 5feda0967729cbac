"""The schema changes under load: statements that were prepared before are prepared again, and no call fails."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import pytest_asyncio

from rocket import Role, Router
from rocket.lab.app import DATABASE
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

AT_ONCE = 5

CHANGES = {
    "a column more": "ALTER TABLE {t} ADD COLUMN more text DEFAULT 'x'",
    "a column less": "ALTER TABLE {t} DROP COLUMN extra",
    "a column of another type": "ALTER TABLE {t} ALTER COLUMN extra TYPE text",
    "a parameter of another type": "ALTER TABLE {t} ALTER COLUMN id TYPE bigint",
    "a composite type": "ALTER TYPE {t}_pair ADD ATTRIBUTE c int",
    "a composite type's attribute": (
        "ALTER TYPE {t}_pair DROP ATTRIBUTE b; ALTER TYPE {t}_pair ADD ATTRIBUTE b text"
    ),
    "an enum's label": "ALTER TYPE {t}_mood ADD VALUE 'sad'",
    "an enum made anew": (
        "ALTER TYPE {t}_mood RENAME TO {t}_old; CREATE TYPE {t}_mood AS ENUM ('well', 'ill');"
        "ALTER TABLE {t} ALTER COLUMN mood TYPE {t}_mood USING mood::text::{t}_mood; DROP FUNCTION {t}_f(int);"
        "CREATE FUNCTION {t}_f(int) RETURNS {t}_mood LANGUAGE sql AS $$ SELECT 'ill'::{t}_mood $$;"
        "DROP TYPE {t}_old"
    ),
    "a function": (
        "DROP FUNCTION {t}_f(int);CREATE FUNCTION {t}_f(int) RETURNS bigint LANGUAGE sql AS $$ SELECT 7::bigint $$"
    ),
    "a table renamed": (
        "ALTER TABLE {t} RENAME TO {t}_old; CREATE TABLE {t} AS SELECT id, 1.5 AS extra, 'x' AS other FROM {t}_old"
    ),
}


@pytest_asyncio.fixture
async def opened(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router of its own."""
    async with await Router.open(dsns(cluster), observer_interval_s=0.05) as router:
        yield router


async def change(cluster: LocalCluster, statements: str) -> None:
    """Change the schema, everywhere."""
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(statements)
    await admin.close()
    await cluster.wait_for_catchup()


@pytest.mark.superuser
@pytest.mark.parametrize("what", CHANGES)
async def test_no_call_fails_because_the_schema_has_changed(
    cluster: LocalCluster, opened: Router, what: str
) -> None:
    """In writes, in reads that use a transaction, and in plain ones; on all connections at once."""
    table = f"changes_{secrets.token_hex(4)}"
    await change(
        cluster,
        f"CREATE TYPE {table}_pair AS (a int, b int); CREATE TYPE {table}_mood AS ENUM ('well', 'ill');"  # noqa: S608
        f"CREATE TABLE {table} (id int, extra int, mood {table}_mood, pair {table}_pair);"
        f"INSERT INTO {table} VALUES (1, 1, 'well', (1, 2));"
        f"CREATE FUNCTION {table}_f(int) RETURNS {table}_mood LANGUAGE sql AS $$ SELECT 'well'::{table}_mood $$",
    )
    texts = (f"SELECT * FROM {table} WHERE id = $1", f"SELECT {table}_f($1)")  # noqa: S608
    inside = asyncio.Barrier(AT_ONCE)

    async def work(db: Connection) -> list[Any]:
        return [await db.fetch(text, 1) for text in texts]

    async def in_transaction(db: Connection) -> list[Any]:
        async with db.transaction():
            return await work(db)

    async def together(db: Connection) -> list[Any]:
        async with asyncio.timeout(5):
            await inside.wait()
        return await work(db)

    session = opened.session("ann")
    await session.write(work)
    roles = set()
    for _ in range(20):  # on each node
        await session.read(in_transaction)
        assert session.last is not None
        roles.add(session.last.role)
    assert Role.REPLICA in roles
    await opened.session().read(in_transaction)
    await asyncio.gather(*(opened.session("ann").write(together) for _ in range(AT_ONCE)))  # on each connection

    await change(cluster, CHANGES[what].format(t=table))
    for _ in range(2):
        await asyncio.gather(*(opened.session("ann").write(work) for _ in range(AT_ONCE)))
        await asyncio.gather(*(session.read(in_transaction) for _ in range(AT_ONCE)))
        await asyncio.gather(*(opened.session().read(in_transaction) for _ in range(AT_ONCE)))
        await session.read(work)
    others = "" if what != "a table renamed" else f"DROP TABLE {table}_old CASCADE;"
    await change(
        cluster,
        f"DROP TABLE {table} CASCADE; {others} DROP FUNCTION {table}_f(int); DROP TYPE {table}_pair, {table}_mood",
    )


@pytest.mark.superuser
async def test_a_statement_for_another_type_is_prepared_again(cluster: LocalCluster, opened: Router) -> None:
    """Where the parameter's type has been settled, and what it is compared with has got another one."""
    table = f"changes_{secrets.token_hex(4)}"
    await change(cluster, f"CREATE TABLE {table} (id int); INSERT INTO {table} VALUES (1)")  # noqa: S608
    session = opened.session("ann")
    text = f"SELECT count(*) FROM {table} WHERE id = $1"  # noqa: S608
    assert 1 == await session.write(lambda db: db.fetchval(text, 1))
    await change(cluster, f"ALTER TABLE {table} ALTER COLUMN id TYPE date USING '2000-01-01'")
    with pytest.raises(asyncpg.DataError):  # rightly: 1 is no date
        await session.write(lambda db: db.fetchval(text, 1))
    await change(cluster, f"ALTER TABLE {table} ALTER COLUMN id TYPE int USING 1")
    assert 1 == await session.write(lambda db: db.fetchval(text, 1))
    await change(cluster, f"DROP TABLE {table}")


@pytest.mark.superuser
@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_schema_may_change_again_and_again(cluster: LocalCluster, opened: Router, times: int) -> None:
    """While a migration runs, statements that were just prepared anew may be outdated when they are executed."""
    table = f"changes_{secrets.token_hex(4)}"
    await change(cluster, f"CREATE TABLE {table} (id int); INSERT INTO {table} VALUES (1)")  # noqa: S608
    admin = await cluster.primary.connect(DATABASE)
    runs = 0

    async def work(db: Connection) -> int:
        nonlocal runs
        runs += 1
        await db.fetchrow(f"SELECT * FROM {table}")  # noqa: S608
        if runs <= times:
            await admin.execute(f"ALTER TABLE {table} ADD COLUMN more{runs} int")
        async with db.transaction():  # outside of one, asyncpg does as much by itself
            row = await db.fetchrow(f"SELECT * FROM {table}")  # noqa: S608
        assert row is not None
        return len(row)

    assert 1 + times == await opened.session("ann").read(work, on="primary")
    assert times + 1 == runs
    await admin.close()
    await change(cluster, f"DROP TABLE {table}")


async def test_an_error_that_fresh_statements_do_not_mend_is_raised_as_it_is(opened: Router) -> None:
    """After a few runs, and not as a failure of the node's."""
    runs = 0
    name = f"lacking_{secrets.token_hex(4)}"
    function = f"pg_temp.{name}()"

    async def lacks_a_function(db: Connection) -> object:
        nonlocal runs
        runs += 1
        await db.execute(
            f"CREATE FUNCTION {function} RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN {name}(1); END $$"
        )
        return await db.fetchval(f"SELECT {function}")

    with pytest.raises(asyncpg.UndefinedFunctionError):
        await opened.session("ann").write(lacks_a_function)
    assert runs <= 4
