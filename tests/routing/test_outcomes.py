"""What leaves work other than by return may say what it has read: the session is covered, as for a value."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import pytest_asyncio

from rocket import READ_BOUND, Policy, Role, Router, explain, report_read_bound
from rocket.cluster.binaries import SUPERUSER
from rocket.consistency import SessionToken
from rocket.lab.app import DATABASE
from rocket.routing.connection import unwrap
from tests.support.between import pgbouncer
from tests.support.servers import dsns, paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster

BEAT_S = 0.05
DEADLINE_S = 15.0


class NotFound(Exception):
    """What a service raises out of work: the commonest idiom of all."""


class Stage:
    """A row that was deleted: `replica1` shows it still, the other nodes do not, which sessions may find out."""

    def __init__(self, cluster: LocalCluster, ahead: Router, behind: Router, table: str, token: str) -> None:
        self.cluster = cluster
        self.ahead = ahead
        """Has the primary and `replica0`."""
        self.behind = behind
        """Has the primary and `replica1`."""
        self.table = table
        self._token = token

    def session(self) -> Session:
        """Return a session from before the row was deleted."""
        return self.ahead.session("ann", self._token)

    async def shown(self, db: asyncpg.Connection[Any]) -> int:
        """Return how many rows there are."""
        found: int = await db.fetchval(f"SELECT count(*)::int FROM {self.table}")  # noqa: S608
        return found

    async def seen_next(self, session: Session) -> int:
        """Return how many rows the session sees where the row is shown still, if that is allowed."""
        return await self.behind.session("ann", session.token).read(self.shown)

    @contextlib.asynccontextmanager
    async def only_primary(self) -> AsyncIterator[None]:
        """Send reads of `ahead` to the primary."""
        before, self.ahead.policy = self.ahead.policy, Policy(lease_s=0.0)
        try:
            yield
        finally:
            self.ahead.policy = before


@pytest_asyncio.fixture(scope="module")
async def stage(cluster: LocalCluster) -> AsyncIterator[Stage]:
    """One for all tests here: none of them writes to its table."""
    table = f"deleted_{secrets.token_hex(4)}"
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(f"CREATE TABLE {table} AS SELECT 1 AS id")
    await admin.execute(f"GRANT ALL ON {table} TO PUBLIC")
    async with (
        await Router.open(dsns(cluster, "primary", "replica0"), observer_interval_s=BEAT_S) as ahead,
        await Router.open(dsns(cluster, "primary", "replica1"), observer_interval_s=BEAT_S) as behind,
    ):
        early = ahead.session("ann")
        await early.write(lambda db: db.execute("SELECT 1"))
        await cluster.wait_for_catchup()
        async with paused(cluster, "replica1"):
            await admin.execute(f"DELETE FROM {table}")  # noqa: S608
            await admin.close()
            replica = await cluster.node("replica0").connect(DATABASE)
            stage = Stage(cluster, ahead, behind, table, early.token or "")
            async with asyncio.timeout(DEADLINE_S):
                while await stage.shown(replica):
                    await asyncio.sleep(0.005)
                while await stage.seen_next(stage.session()) == 0:  # until its replica is observed
                    await asyncio.sleep(0.005)
            await replica.close()
            yield stage


async def raises(_db: Connection) -> None:
    """Raise the application's own error."""
    raise NotFound


async def fails(db: Connection) -> None:
    """Have a statement fail."""
    await db.execute("SELECT 1 / 0")


async def fails_in_a_transaction(db: Connection) -> None:
    """Have a statement fail, and leave its transaction as it is."""
    if not db.is_in_transaction():
        await db.execute("BEGIN")
    await db.execute("SELECT 1 / 0")


async def gives_up(db: Connection) -> None:
    """Give up a statement, and raise something else."""
    try:
        await db.execute("SELECT pg_sleep(30)", timeout=0.02)
    except TimeoutError:
        raise NotFound from None


async def loses_its_connection(db: Connection) -> None:
    """Lose the connection, and raise something else."""
    unwrap(db).terminate()
    raise NotFound


LEAVE = [raises, fails, fails_in_a_transaction, gives_up, loses_its_connection]
"""How work leaves by an error."""


async def read_on_replica(
    stage: Stage,  # noqa: ARG001
    session: Session,
    work: Callable[[Connection], Awaitable[None]],
) -> None:
    """Do work on `replica0`."""
    await session.read(work)


async def read_on_primary(stage: Stage, session: Session, work: Callable[[Connection], Awaitable[None]]) -> None:
    """Do work on the primary."""
    async with stage.only_primary():
        await session.read(work)


async def write(stage: Stage, session: Session, work: Callable[[Connection], Awaitable[None]]) -> None:  # noqa: ARG001
    """Do work in a transaction on the primary."""
    await session.write(work)


DO = [read_on_replica, read_on_primary, write]


@pytest.mark.parametrize("do", DO)
@pytest.mark.parametrize("leave", LEAVE)
async def test_what_work_had_read_before_it_raised_is_never_taken_back(
    stage: Stage, leave: Callable[[Connection], Awaitable[None]], do: Any
) -> None:
    """`404` is an answer, and `409 sold out`: no later read shows the row again, on whichever node."""
    session = stage.session()
    found: list[int] = []

    async def work(db: Connection) -> None:
        found.append(await stage.shown(db))
        await leave(db)

    with pytest.raises((NotFound, asyncpg.DivisionByZeroError)):
        await do(stage, session, work)
    assert {0} == set(found)
    assert 0 == await stage.seen_next(session)
    assert session.last is not None
    assert (Role.REPLICA if do is read_on_replica else Role.PRIMARY) == session.last.role


@pytest.mark.parametrize("do", DO)
async def test_what_cancelled_work_had_read_is_never_taken_back(stage: Stage, do: Any) -> None:
    """It may have been sent off already, by work that streams; and cancelling it waits for no server."""
    session = stage.session()
    has_read = asyncio.Event()

    async def work(db: Connection) -> None:
        assert 0 == await stage.shown(db)
        has_read.set()
        await db.execute("SELECT pg_sleep(30)")

    doing = asyncio.create_task(do(stage, session, work))
    await has_read.wait()
    doing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doing
    assert 0 == await stage.seen_next(session)


async def test_a_session_without_a_token_is_covered_from_its_first_error(stage: Stage) -> None:
    """On the primary, where reads without a token go; the token is an ordinary one."""
    session = stage.ahead.session("ann")

    async def work(db: Connection) -> None:
        assert 0 == await stage.shown(db)
        raise NotFound

    for do in (session.read, session.write):
        with pytest.raises(NotFound):
            await do(work)
        assert 0 == await stage.seen_next(session)
    assert "Work on the primary ended in NotFound." == explain(session.last)
    assert SessionToken.parse(session.token or "").read_floor is not None
    again = stage.ahead.session("ann", session.token)
    assert 0 == await again.read(stage.shown)


async def test_an_error_after_a_reported_bound_is_covered_by_what_the_node_says(stage: Stage) -> None:
    """The session stays with its replica, and a bound lets others serve it."""
    session = stage.session()

    async def work(db: Connection) -> None:
        report_read_bound(db, await db.fetchval(f"SELECT {READ_BOUND}"))
        raise NotFound

    with pytest.raises(NotFound):
        await session.read(work)
    token = SessionToken.parse(session.token or "")
    assert "replica0" == token.node
    assert token.read_floor is not None


async def test_behind_a_pooler_what_work_had_read_before_it_raised_is_never_taken_back(stage: Stage) -> None:
    """There a statement that fails aborts the transaction that proves where it was read."""
    with pgbouncer(stage.cluster, SUPERUSER) as poolers:
        nodes = {name: poolers[name] for name in ("primary", "replica0")}
        async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
            for leave in (raises, fails):
                session = router.session("ann", stage.session().token)

                async def work(db: Connection, leave: Any = leave) -> None:
                    assert 0 == await stage.shown(db)
                    await leave(db)

                for do in (session.read, session.write):
                    with pytest.raises((NotFound, asyncpg.DivisionByZeroError)):
                        await do(work)
                    assert 0 == await stage.seen_next(session)
                    assert session.last is not None


async def test_callers_that_keep_tokens_themselves_get_one_by_on_error(stage: Stage) -> None:
    """With the token of that answer beside their own they are covered, too."""
    left: list[Any] = []

    async def work(db: Connection) -> None:
        await stage.shown(db)
        raise NotFound

    token = SessionToken.parse(stage.session().token or "")
    for do in (stage.ahead.read, stage.ahead.write):
        with pytest.raises(NotFound) as caught:
            await do(work, subject="ann", token=token, on_error=left.append)
        assert caught.value is left[-1].value
        answer = await stage.behind.read(stage.shown, subject="ann", token=(token, left[-1].token))
        assert 0 == answer.value
