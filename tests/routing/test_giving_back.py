"""The way back of a connection, whatever work has done with it, over a link that falls silent at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Any

import pytest

from rocket import Limits, Lsn, OutcomeUnknown, Policy, Router, Unavailable
from rocket.consistency import Board, SessionToken
from rocket.errors import RoutingError
from rocket.lab.app import DATABASE
from rocket.lab.torture.proxy import socket_path
from rocket.routing.observer import Observer
from tests.support.halting import HaltingLink
from tests.support.servers import commits_wait, dsns, role, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

LIMITS = Limits(read_s=0.4, attempt_s=0.2, write_s=0.3, commit_s=0.2, connections=2, primary_reads=2, close_s=0.3)
LONGEST_S = LIMITS.write_s + 2 * LIMITS.commit_s + 1.6
"""With what the way back may take, and some for a machine that is busy."""
MOST_PIECES = 120
AT_ONCE = 8
"""More of them would make the machine, and not the link, what calls wait for."""
OVER = 4
"""Where this number of calls in a row ended before their link halted, the exchange is over."""
PROBES = 4
"""Calls that show how many pieces pass before work begins."""
TRIES = 5
"""For a call that a limit ended before its link halted: it waited for a busy machine."""


class WorkFailed(Exception):
    """An error of work's own."""


async def returns(db: Connection) -> None:
    """Go well."""
    await db.fetchval("SELECT 1")


async def raises(db: Connection) -> None:
    """Fail between two statements."""
    await db.fetchval("SELECT 1")
    raise WorkFailed


async def raises_in_transaction(db: Connection) -> None:
    """Fail where asyncpg then rolls back by itself."""
    async with db.transaction():
        await db.execute("SET LOCAL statement_timeout = '5s'")
        await db.fetchval("SELECT 1")
        raise WorkFailed


async def leaves_a_setting(db: Connection) -> None:
    """Have the connection reset afterwards."""
    await db.execute("SET statement_timeout = '5s'")


async def goes_on_regardless(db: Connection) -> None:
    """Take no notice of being out of time."""
    for _ in range(3):
        with contextlib.suppress(BaseException):
            async with db.transaction():
                await db.fetchval("SELECT 1")
    raise WorkFailed


async def is_cancelled(db: Connection) -> None:
    """Be cancelled amid a transaction."""
    async with db.transaction():
        await db.fetchval("SELECT 1")
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.Event().wait()


WORKS = (returns, raises, raises_in_transaction, leaves_a_setting, goes_on_regardless, is_cancelled)


async def observed(cluster: LocalCluster, name: str) -> Board:
    """Return what there is to know of the primary, and of one other node, without whose status it gets no read."""
    await cluster.wait_for_catchup()
    board = Board()
    observer = Observer(dsns(cluster, "primary", name), board, interval_s=1)
    try:
        async with asyncio.timeout(20):
            while board.primary is None or (name != "primary" and board.replica(name) is None):
                await observer.run_once()  # a busy machine may be too slow for one
    finally:
        observer.close()
    return board


@contextlib.asynccontextmanager
async def behind_a_link(
    cluster: LocalCluster, board: Board, name: str, limits: Limits = LIMITS
) -> AsyncIterator[tuple[Router, HaltingLink]]:
    """Open a router that gets to one node over a link that can halt."""
    link = HaltingLink(socket_path(cluster.socket_dir, cluster.node(name).port), role(), DATABASE)
    policy = Policy(primary_lease_s=60, lease_s=60)
    async with link.listening():
        nodes = dsns(cluster, "primary", name) | {name: link.dsn}
        async with await Router.open(nodes, board=board, policy=policy, limits=limits) as router:
            yield router, link
            link.heal()


async def halts(
    cluster: LocalCluster, board: Board, name: str, call: Callable[[Router], Awaitable[object]], pieces: int
) -> tuple[bool, str]:
    """Make a call over a link that halts after `pieces`; return whether it got so far, and how it ended.

    A call whose link did not halt, and that took as long as a limit, is made again: it shows no end of the
    exchange.
    """
    for _ in range(TRIES):
        halted, took_s, how = await halts_once(cluster, board, name, call, pieces)
        if halted or took_s < LIMITS.attempt_s:
            break
    return halted, how


async def halts_once(
    cluster: LocalCluster, board: Board, name: str, call: Callable[[Router], Awaitable[object]], pieces: int
) -> tuple[bool, float, str]:
    """Do so once; return also how many seconds the call took."""
    async with behind_a_link(cluster, board, name) as (router, link):
        link.halt_after(pieces)
        begun_at = time.monotonic()
        calling = asyncio.ensure_future(call(router))
        done, _ = await asyncio.wait((calling,), timeout=LONGEST_S)
        took_s = time.monotonic() - begun_at
        where = calling.get_stack()
        calling.cancel()
        await asyncio.wait((calling,), timeout=1)
        assert done, f"after {pieces} pieces it waits: {where}"
        how = "cancelled" if calling.cancelled() else repr(calling.exception())
        halted, passed = link.halted, link.passed
        link.heal()
        pool = next(pool for pool in router.pools if pool.name == name)
        await until(lambda: pool.in_use == 0)
        async with asyncio.timeout(5), pool.lease() as one, pool.lease() as other:
            assert [1, 1] == [await one.fetchval("SELECT 1"), await other.fetchval("SELECT 1")]
        return halted, took_s, f"{how} after {passed} pieces"


async def pieces_before_work(
    cluster: LocalCluster, board: Board, name: str, doing: Callable[[Any], Callable[[Router], Awaitable[object]]]
) -> int:
    """Return how many pieces pass at least before work begins; a halt among these is the same for all works."""
    passed = []
    for _ in range(PROBES):
        async with behind_a_link(cluster, board, name) as (router, link):
            link.halt_after(MOST_PIECES)

            async def notes(db: Connection) -> None:
                passed.append(link.passed)
                await returns(db)

            await doing(notes)(router)
    return min(passed) - OVER  # their number differs a little from call to call


async def backends(cluster: LocalCluster, name: str) -> int:
    """Count the clients of this kind that a node serves."""
    connection = await cluster.node(name).connect(DATABASE)
    count = await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rocket'")
    await connection.close()
    return int(count)


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("how", ["write on primary", "read on primary", "read on replica0"])
async def test_each_call_ends_in_time_wherever_the_link_halts(cluster: LocalCluster, how: str, work: Any) -> None:
    """And afterwards all places are free, no task is left, and nothing of it on the server."""
    name = how.rsplit(maxsplit=1)[-1]
    board = await observed(cluster, name)
    assert board.epoch is not None
    token = SessionToken(board.epoch, Lsn(0)) if name != "primary" else None

    def doing(work: Any) -> Callable[[Router], Awaitable[object]]:
        async def call(router: Router) -> object:
            do = router.write if how.startswith("write") else router.read
            return await do(work, subject=None, token=token)

        return call

    before = await backends(cluster, name)
    tasks = asyncio.all_tasks()
    pieces = 1 if work is returns else await pieces_before_work(cluster, board, name, doing)
    halted = [(True, "")]
    while any(each for each, _ in halted[-OVER:]):
        assert pieces < MOST_PIECES, "the exchange is longer than that"
        async with asyncio.TaskGroup() as group:
            cases = [
                group.create_task(halts(cluster, board, name, doing(work), pieces + more))
                for more in range(AT_ONCE)
            ]
        halted += [case.result() for case in cases]
        pieces += AT_ONCE
    assert any(each for each, _ in halted[1:]), {how for _, how in halted}
    async with asyncio.timeout(5):
        while await backends(cluster, name) > before or asyncio.all_tasks() > tasks:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("pieces", [2, 6])
async def test_a_write_that_fails_on_a_half_open_link_is_over_in_time(
    cluster: LocalCluster, board: Board, pieces: int
) -> None:
    """However often: no place is lost by it."""
    limits = Limits(write_s=3, commit_s=3, connections=2)
    async with behind_a_link(cluster, board, "primary", limits) as (router, link):

        async def fails(db: Connection) -> None:
            await db.fetchval("SELECT 1")
            link.halt_after(pieces)  # the ROLLBACK and its answer get through, and what the primary has shown
            raise WorkFailed

        for _ in range(3):
            await router.write(returns, subject="ann")
            async with asyncio.timeout(2.5):
                with pytest.raises(WorkFailed):
                    await router.write(fails, subject="ann")
            assert link.halted
            link.heal()
        assert [0] == [pool.in_use for pool in router.pools]


_IN_COMMIT = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest.mark.superuser  # it makes a table
async def test_commits_that_were_given_up_count_until_they_have_ended(cluster: LocalCluster, board: Board) -> None:
    """There are never more connections on the server than the limit says; all are back once it confirms again."""
    table = f"confirmed_{secrets.token_hex(4)}"
    limits = Limits(commit_s=0.1, write_s=0.3, connections=3)
    async with await Router.open(dsns(cluster, "primary"), board=board, limits=limits) as router:
        await router.write(lambda db: db.execute(f"CREATE TABLE {table} (id int)"), subject=None)
        outcomes: list[type[Exception] | None] = []

        async def write() -> None:
            try:
                await router.write(lambda db: db.execute(f"INSERT INTO {table} VALUES (1)"), subject=None)  # noqa: S608
                outcomes.append(None)
            except RoutingError as error:
                outcomes.append(type(error))

        async with commits_wait(cluster) as admin:
            async with asyncio.timeout(10):
                while OutcomeUnknown not in outcomes:  # until all of the server has heard of it
                    await write()
            for _ in range(3):
                await asyncio.gather(*(write() for _ in range(4)))
                assert 3 >= await admin.fetchval(_IN_COMMIT)
            assert 3 == await admin.fetchval(_IN_COMMIT)
            assert [Unavailable] * 4 == outcomes[-4:]
        (pool,) = router.pools
        await until(lambda: pool.in_use == 0)
        await write()
        assert outcomes[-1] is None


@pytest.mark.superuser  # it makes a table
async def test_a_closed_router_waits_for_no_commit(cluster: LocalCluster, board: Board) -> None:
    """What was given up goes on by itself."""
    table = f"confirmed_{secrets.token_hex(4)}"
    limits = Limits(commit_s=0.1)
    tasks = asyncio.all_tasks()
    async with commits_wait(cluster):
        router = await Router.open(dsns(cluster, "primary"), board=board, limits=limits)
        await router.write(lambda db: db.execute("SELECT 1"), subject=None)
        (pool,) = router.pools
        number = 0
        while not pool.in_use:  # until all of the server has heard of it
            number += 1
            with contextlib.suppress(OutcomeUnknown):
                await router.write(lambda db: db.execute(f"CREATE TABLE {table}_{number} ()"), subject=None)  # noqa: B023
        async with asyncio.timeout(1):
            await router.aclose()
        assert asyncio.all_tasks() <= tasks
