"""A pool loses nothing: wherever its caller is cancelled, and however long a connection takes to open."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import types
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import pytest_asyncio

from rocket import Limits, Lsn, Router, WriteInRead, explain
from rocket.consistency import Board, Reason, SessionToken
from rocket.health import Code, known
from rocket.lab.app import DATABASE
from rocket.lab.torture.proxy import socket_path
from rocket.routing.observer import Observer
from rocket.routing.pool import NodePool
from tests.support.halting import HaltingLink
from tests.support.servers import dsns, role, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

LIMITS = Limits(connections=2, primary_reads=2, warm=0)
MOST_SUSPENSIONS = 60


@pytest_asyncio.fixture
async def board(cluster: LocalCluster) -> Board:
    """What there is to know of the primary and of one replica."""
    await cluster.wait_for_catchup()
    board = Board()
    observer = Observer(dsns(cluster, "primary", "replica0"), board, interval_s=1)
    await observer.run_once()
    observer.close()
    return board


@contextlib.asynccontextmanager
async def opened(cluster: LocalCluster, board: Board) -> AsyncIterator[Router]:
    """Open a router that has two connections to each node."""
    nodes = dsns(cluster, "primary", "replica0")
    async with await Router.open(nodes, board=board, limits=LIMITS) as router:
        yield router


@types.coroutine
def cancelled_at(number: int, call: Coroutine[Any, Any, object]) -> Generator[Any, Any, bool]:
    """Await a call, and cancel the task at its suspension of that number; return whether it has come to that."""
    task = asyncio.current_task()
    assert task is not None
    count, step = 0, functools.partial(call.send, None)
    while True:
        try:
            future = step()
        except StopIteration:
            return count >= number
        except asyncio.CancelledError:
            assert count >= number
            task.uncancel()
            return True
        count += 1
        if count == number:
            asyncio.get_running_loop().call_soon(task.cancel)
        try:
            value = yield future
        except BaseException as error:  # noqa: BLE001 - it is the call's
            step = functools.partial(call.throw, error)
        else:
            step = functools.partial(call.send, value)


async def plain(db: Connection) -> None:
    """Leave nothing behind."""
    await db.fetchval("SELECT 1")


async def leaves_a_setting(db: Connection) -> None:
    """Have the connection reset afterwards."""
    await db.execute("SET statement_timeout = '5s'")


async def leaves_a_transaction(db: Connection) -> None:
    """Have it rolled back afterwards."""
    with contextlib.suppress(asyncpg.PostgresError):
        async with db.transaction():
            await db.execute("SELECT 1 / 0")


async def backends(cluster: LocalCluster, name: str) -> int:
    """Count a node's clients of this kind."""
    connection = await cluster.node(name).connect(DATABASE)
    count = await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rocket'")
    await connection.close()
    return int(count)


@pytest.mark.parametrize("work", [plain, leaves_a_setting, leaves_a_transaction])
@pytest.mark.parametrize("how", ["read on replica0", "read on primary", "write on primary"])
@pytest.mark.parametrize("is_open", [False, True])
async def test_nothing_is_lost_wherever_a_call_is_cancelled(
    cluster: LocalCluster, board: Board, how: str, work: Callable[[Connection], Awaitable[None]], is_open: bool
) -> None:
    """No connection, no place and no backend: also where it is still being opened, or is being given back."""
    name = how.rsplit(maxsplit=1)[-1]
    assert board.epoch is not None
    token = SessionToken(board.epoch, Lsn(0)) if name != "primary" else None
    before = await backends(cluster, name)
    async with opened(cluster, board) as router:
        pool = next(pool for pool in router.pools if pool.name == name)
        do: Any = router.write if how.startswith("write") else router.read
        for number in range(1, MOST_SUSPENSIONS):
            if is_open:
                async with pool.lease():
                    pass
            else:
                pool.drop()
            was_cancelled = await cancelled_at(number, do(work, subject=None, token=token))
            await until(lambda: pool.in_use == 0)
            async with asyncio.timeout(5), pool.lease() as one, pool.lease() as other:
                settings = [await each.fetchval("SHOW statement_timeout") for each in (one, other)]
            assert settings == ["0", "0"]
            assert pool.idle == LIMITS.connections
            if not was_cancelled:
                break
        else:
            pytest.fail("it has more suspensions than that")
        assert number > 1
    async with asyncio.timeout(5):
        while await backends(cluster, name) > before:
            await asyncio.sleep(0.02)


async def test_a_connection_that_opens_late_is_kept(cluster: LocalCluster) -> None:
    """Its caller has given up by then, and the next has it at once."""
    link = HaltingLink(socket_path(cluster.socket_dir, cluster.node("replica0").port), role(), DATABASE)
    async with link.listening():
        pool = NodePool("replica0", link.dsn, LIMITS)
        link.halt_after(2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), pool.lease():
                pass
        assert link.halted
        assert (pool.in_use, pool.idle) == (0, 0)
        link.heal()
        await until(lambda: (pool.in_use, pool.idle) == (0, 1))
        link.halt_after(4)  # not enough to open another one
        async with asyncio.timeout(5), pool.lease() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        link.heal()
        await pool.close(1)


async def test_a_pool_that_closes_waits_for_what_is_lent(cluster: LocalCluster) -> None:
    """And lends nothing more; what is not given back in time is ended."""
    pool = NodePool("primary", dsns(cluster, "primary")["primary"], LIMITS)
    async with pool.lease() as connection:
        closing = asyncio.create_task(pool.close(5))
        await asyncio.sleep(0)
        with pytest.raises(ConnectionError, match="its pool is closed"):
            async with pool.lease():
                pass
        assert await connection.fetchval("SELECT 1") == 1
        assert not closing.done()
    async with asyncio.timeout(2):
        await closing
    with pytest.raises(asyncpg.InterfaceError):
        await connection.fetchval("SELECT 1")

    pool = NodePool("primary", dsns(cluster, "primary")["primary"], LIMITS)

    async def use_while_it_closes() -> None:
        async with pool.lease() as connection:
            await pool.close(0.05)
            await connection.fetchval("SELECT 1")

    with pytest.raises(ConnectionError, match="lost"):
        await use_while_it_closes()


async def test_a_connection_that_was_given_back_cannot_be_used(cluster: LocalCluster) -> None:
    """Work that keeps it would run in another session's."""
    pool = NodePool("primary", dsns(cluster, "primary")["primary"], LIMITS)
    async with pool.lease() as connection:
        pass
    with pytest.raises(asyncpg.InterfaceError):
        await connection.fetchval("SELECT 1")
    assert pool.idle == 1
    await pool.close(1)


async def test_a_connection_goes_from_reads_to_writes_and_back(cluster: LocalCluster, board: Board) -> None:
    """What is read-only for a read stays so for the next one, and never for a write."""

    async def is_read_only(db: Connection) -> bool:
        return bool(await db.fetchval("SELECT current_setting('transaction_read_only')::bool"))

    async with opened(cluster, board) as router:
        primary = next(pool for pool in router.pools if pool.name == "primary")
        for _ in range(2):
            assert (await router.read(is_read_only, subject=None)).value is True
            assert (await router.write(is_read_only, subject=None)).value is False
            assert primary.idle == 1  # the same

        with pytest.raises(WriteInRead):
            await router.read(lambda db: db.execute("CREATE TEMP TABLE t ()"), subject=None)
        async with primary.lease() as one, primary.lease() as other:
            pids = {
                await each.fetchval("SHOW default_transaction_read_only"): each.get_server_pid()
                for each in (one, other)
            }
        assert set(pids) == {"on", "off"}
        for wanted, setting in ((True, "on"), (False, "off")):
            async with primary.lease(read_only=wanted) as connection:
                assert connection.get_server_pid() == pids[setting]


async def test_a_node_that_refuses_connections_is_left_alone(cluster: LocalCluster, board: Board) -> None:
    """Reads go elsewhere without trying it, and none to the primary; a connection in the background ends that."""
    observer = Observer(dsns(cluster), board, interval_s=1)
    await observer.run_once()
    observer.close()
    link = HaltingLink(socket_path(cluster.socket_dir, cluster.node("replica0").port), role(), DATABASE)
    async with link.listening():
        refused = link.dsn
    assert board.epoch is not None
    token = SessionToken(board.epoch, Lsn(0))
    nodes = dsns(cluster) | {"replica0": refused}
    async with await Router.open(nodes, board=board, limits=LIMITS) as router:
        answers = [await router.read(plain, subject=None, token=token) for _ in range(40)]
        assert {"replica1"} == {answer.node for answer in answers}
        assert Reason.CAUGHT_UP is answers[-1].reason
        assert sum("replica0" in answer.route.failed for answer in answers if answer.route is not None) <= 2
        assert "replica0" in router.left_alone
        assert "replica0" in {found.code: found.text for found in known(router).degraded}[Code.NODE_CLOSED]
        board.forget("replica1")
        answer = await router.read(plain, subject=None, token=token)
        assert ("primary", Reason.UNREACHABLE) == (answer.node, answer.reason)
        assert "replica0 was left alone" in explain(answer)
        async with link.listening():
            await router.add("replica0", link.dsn)
            assert "replica0" not in router.left_alone

    refusing: dict[str, str] = {}
    pool = NodePool("replica0", refused, LIMITS, refusing=refusing)
    with pytest.raises(OSError, match="refused"):
        async with pool.lease():
            pass
    assert list(refusing) == ["replica0"]
    async with link.listening(refused):
        await until(lambda: (dict(refusing), pool.idle) == ({}, 1))
        await pool.close(1)


async def test_connections_that_fell_silent_are_found_before_they_are_used(cluster: LocalCluster) -> None:
    """Once one of them has, the others are looked at, and end together."""
    link = HaltingLink(socket_path(cluster.socket_dir, cluster.node("replica0").port), role(), DATABASE)
    async with link.listening():
        pool = NodePool("replica0", link.dsn, Limits(connections=3, warm=0))
        async with pool.lease() as one, pool.lease() as other, pool.lease() as third:
            silent = {each.get_server_pid() for each in (one, other, third)}
        link.forget()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), pool.lease() as connection:
                await connection.fetchval("SELECT 1")
        async with asyncio.timeout(2), pool.lease() as connection:
            assert connection.get_server_pid() not in silent
            assert 1 == await connection.fetchval("SELECT 1")
        assert pool.idle == 1
        await pool.close(1)


@pytest.mark.vouched
async def test_writes_go_on_when_all_connections_fell_silent(cluster: LocalCluster) -> None:
    """A firewall has forgotten them, the observer's as well: each write begins on a fresh one, and none fails."""
    link = HaltingLink(socket_path(cluster.socket_dir, cluster.primary.port), role(), DATABASE)
    async with link.listening(), await Router.open(dsns(cluster) | {"primary": link.dsn}) as router:

        async def write() -> None:
            await router.session().write(lambda db: db.execute("SELECT 1"))

        await asyncio.gather(*(write() for _ in range(10)))
        link.forget()
        async with asyncio.timeout(3):
            await asyncio.gather(*(write() for _ in range(10)))
