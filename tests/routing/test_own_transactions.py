"""Work that ends or breaks the transaction of its write, what runs at COMMIT, and work that is none."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import pytest_asyncio

from rocket import OutcomeUnknown, Router, TransactionEnded
from rocket.cluster.binaries import SUPERUSER
from rocket.lab.app import DATABASE
from rocket.lab.comparison import ComparisonRouter, Routing
from tests.support.between import pgbouncer
from tests.support.servers import dsns, paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

BEAT_S = 0.05
QUIET_S = 60.0
"""No heartbeat comes in between, whose flush would help."""


class NotFound(Exception):
    """The application's own error."""


class Notes:
    """A table for a test."""

    def __init__(self) -> None:
        self.table = f"notes_{secrets.token_hex(4)}"

    async def add(self, db: Connection) -> None:
        """Write a row."""
        await db.execute(f"INSERT INTO {self.table} VALUES (1)")  # noqa: S608

    async def count(self, db: Connection) -> int:
        """Return how many rows are seen."""
        found: int = await db.fetchval(f"SELECT count(*)::int FROM {self.table}")  # noqa: S608
        return found


@pytest_asyncio.fixture
async def notes(cluster: LocalCluster) -> Notes:
    """An empty table, on each node."""
    notes = Notes()
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(f"CREATE TABLE {notes.table} (id int)")
    await admin.execute(f"GRANT ALL ON {notes.table} TO PUBLIC")
    await admin.close()
    await cluster.wait_for_catchup()
    return notes


@pytest_asyncio.fixture(scope="module")
async def opened(cluster: LocalCluster) -> AsyncIterator[Router]:
    """A router of all nodes."""
    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as router:
        yield router


# --- work that ends its transaction by itself ---


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("then", [None, NotFound("then"), asyncpg.DivisionByZeroError("then")])
async def test_work_that_ends_its_transaction_raises_what_holds(
    cluster: LocalCluster, opened: Router, notes: Notes, end: str, then: Exception | None
) -> None:
    """What it has committed stays, and its session sees that."""

    async def work(db: Connection) -> None:
        await notes.add(db)
        await db.execute(end)
        if isinstance(then, asyncpg.PostgresError):
            await db.execute("SELECT 1 / 0")
        if then is not None:
            raise then

    session = opened.session("ann")
    await session.write(lambda db: db.fetchval("SELECT 1"))
    await cluster.wait_for_catchup()
    async with paused(cluster):
        with pytest.raises(TransactionEnded, match="by itself") as caught:
            await session.write(work)
        assert isinstance(caught.value, OutcomeUnknown)  # nor will callers that know only that write again
        cause = caught.value.__cause__
        assert type(cause) is (type(None) if then is None else type(then))
        assert (1 if end == "COMMIT" else 0) == await session.read(notes.count)
    await session.write(notes.add)  # the connection is good for the next one


async def test_behind_a_pooler_a_read_that_ends_its_transaction_is_refused(cluster: LocalCluster) -> None:
    """What comes after that is read by any server, and no proof goes with it."""
    with pgbouncer(cluster, SUPERUSER) as nodes:
        async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
            session = router.session("ann")
            await session.write(lambda db: db.fetchval("SELECT 1"))
            with pytest.raises(TransactionEnded):
                await session.read(lambda db: db.execute("COMMIT"))
            assert 1 == await session.read(lambda db: db.fetchval("SELECT 1"))


async def swallows(db: Connection) -> None:
    """Have a statement fail, and go on as if it had not."""
    with contextlib.suppress(asyncpg.DivisionByZeroError):
        await db.execute("SELECT 1 / 0")


@pytest.mark.parametrize("routing", list(Routing))
async def test_a_write_that_commit_rolls_back_is_not_acknowledged(
    cluster: LocalCluster, notes: Notes, routing: Routing
) -> None:
    """COMMIT of an aborted transaction is answered by ROLLBACK, and raises nothing."""

    async def work(db: Connection) -> None:
        await notes.add(db)
        await swallows(db)

    async with await ComparisonRouter.open(dsns(cluster), observer_interval_s=BEAT_S) as router:
        await router.switch(routing)
        session = router.session("ann")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await session.write(work)
        await session.write(notes.add)
        await cluster.wait_for_catchup()
        assert 1 == await session.read(notes.count)


# --- what runs at COMMIT ---

_TRIGGER = """
    CREATE FUNCTION {0}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        {1};
        RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER {0} AFTER INSERT ON {0} DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION {0}();
"""


@pytest.mark.parametrize("how", ["SET LOCAL synchronous_commit = off", "SET synchronous_commit = off"])
async def test_what_runs_at_commit_does_not_take_back_that_it_is_flushed(
    cluster: LocalCluster, notes: Notes, how: str
) -> None:
    """Were the setting of a deferred trigger to hold, the floor would lie before the commit."""
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(_TRIGGER.format(notes.table, how))
    await cluster.wait_for_catchup()
    async with await Router.open(dsns(cluster), observer_interval_s=QUIET_S) as router:
        session = router.session("ann")
        for number in range(1, 6):
            await session.write(notes.add)
            floor = session.token
            flushed = await admin.fetchval("SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()")
            assert (number, floor is not None) == (await session.read(notes.count), True), flushed
    await admin.close()


async def test_what_a_deferred_constraint_raises_is_raised_as_it_is(
    cluster: LocalCluster, opened: Router, notes: Notes
) -> None:
    """Whatever its code: it is certain that nothing was committed, and the connection is kept."""
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(_TRIGGER.format(notes.table, "RAISE 'its own' USING ERRCODE = '08006'"))
    await admin.close()
    session = opened.session("ann")
    with pytest.raises(asyncpg.PostgresConnectionError, match="its own"):
        await session.write(notes.add)
    assert session.last is not None
    assert 0 == await session.write(notes.count)


# --- work that is none ---


def plain(_db: Connection) -> int:
    """No coroutine function."""
    return 1


async def generates(_db: Connection) -> Any:
    """No coroutine function either."""
    yield 1


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize("work", [plain, generates])
async def test_work_that_is_no_coroutine_function_is_refused_by_name(
    opened: Router, work: Callable[[Connection], Any], how: str
) -> None:
    """A function that returns something to await is work as well."""
    session = opened.session("ann")
    with pytest.raises(TypeError, match=f"coroutine function.*{work.__name__}"):
        await getattr(session, how)(work)
    assert 1 == await getattr(session, how)(lambda db: db.fetchval("SELECT 1"))


async def test_a_router_of_another_loop_says_so(opened: Router) -> None:
    """At once: its connections belong to the loop that it was opened on."""

    async def use(how: str) -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await getattr(opened.session("ann"), how)(lambda db: db.fetchval("SELECT 1"))

    for how in ("read", "write"):
        await asyncio.to_thread(asyncio.run, use(how))
