"""More than the nodes can take, and a primary that is away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextvars import Context
from typing import TYPE_CHECKING

import pytest

from rocket import Answer, Limits, Role, Router, Unavailable
from rocket.consistency import SessionToken
from rocket.lab.api.rides import SELECT_RIDE
from rocket.lab.app import DATABASE
from rocket.routing.limits import CapacityLimiter, TooManyWaiting
from tests.support.races import write_ride
from tests.support.servers import dsns, until

if TYPE_CHECKING:
    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster
    from rocket.consistency import Board
    from rocket.routing.observer import Observer


async def test_gate_turns_away_whoever_finds_the_queue_full() -> None:
    """One is through, one waits, the third need not."""
    gate = CapacityLimiter("it", width=1, queue=1)
    leave = asyncio.Event()
    inside: list[int] = []

    async def go(number: int) -> None:
        async with gate:
            inside.append(number)
            await leave.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(go(1))
        await until(lambda: inside == [1])
        group.create_task(go(2))
        await asyncio.sleep(0)
        with pytest.raises(TooManyWaiting):
            await go(3)
        leave.set()
    assert [1, 2] == inside


async def test_whoever_stops_waiting_leaves_the_queue() -> None:
    """A place in it is not lost with its owner."""
    gate = CapacityLimiter("it", width=1, queue=1)
    leave = asyncio.Event()

    async def hold() -> None:
        async with gate:
            await leave.wait()

    holding = asyncio.create_task(hold())
    await until(lambda: gate.inside == 1)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), gate:
                pytest.fail("two at a time")
    leave.set()
    await holding
    async with gate:
        pass


async def test_stampede_on_the_primary_is_shed_and_leaves_room_for_writes(
    cluster: LocalCluster, board: Board, email: str
) -> None:
    """When no replica may serve, some reads are refused at once, and writes go on."""
    limits = Limits(connections=4, primary_reads=2, queue=3)
    holder = await cluster.primary.connect(DATABASE)
    async with await Router.open(dsns(cluster, "primary"), board=board, limits=limits) as router:
        await write_ride(router, email)
        token = (await router.read(lambda node: node.fetchval("SELECT 1"), subject=email)).token

        async def held(node: Connection) -> None:
            await node.execute("SELECT pg_advisory_lock_shared(4711)")

        async def read() -> str:
            try:
                await router.read(held, subject=email, token=token)
            except Unavailable:
                return "refused"
            return "answered"

        await holder.execute("SELECT pg_advisory_lock(4711)")
        reads = [asyncio.ensure_future(read()) for _ in range(8)]
        await until(lambda: sum(read.done() for read in reads) == 3)
        async with asyncio.timeout(2):
            await write_ride(router, email)
        await holder.execute("SELECT pg_advisory_unlock(4711)")
        answers = await asyncio.gather(*reads)
    await holder.close()
    assert (5, 3) == (answers.count("answered"), answers.count("refused"))


@pytest.mark.parametrize("how", ["read", "write"])
async def test_work_that_waits_for_its_own_connection_fails_at_once(
    cluster: LocalCluster, board: Board, how: str
) -> None:
    """All connections are held by work that uses another session: no one of them would ever be free."""
    limits = Limits(connections=2, primary_reads=2)
    inside = asyncio.Barrier(2)
    async with await Router.open(dsns(cluster, "primary"), board=board, limits=limits) as router:

        async def nests(_db: Connection) -> int:
            async with asyncio.timeout(2):
                await inside.wait()
            return await router.session("bob").read(lambda db: db.fetchval("SELECT 1"))

        began = time.monotonic()
        outcomes = await asyncio.gather(
            *(getattr(router.session("ann"), how)(nests) for _ in range(2)), return_exceptions=True
        )
        assert time.monotonic() - began < 2
        (failure,) = (outcome for outcome in outcomes if outcome != 1)  # which frees a connection for the other
        assert isinstance(failure, RuntimeError)
        assert "is nested in work" in str(failure)
        assert 1 == await router.session("bob").read(lambda db: db.fetchval("SELECT 1"))


async def test_work_may_use_another_session_while_there_are_connections(
    cluster: LocalCluster, board: Board
) -> None:
    """Also when it has to wait for one that other work will give back."""
    limits = Limits(connections=2, primary_reads=2)
    free = asyncio.Event()
    async with await Router.open(dsns(cluster, "primary"), board=board, limits=limits) as router:

        async def nests(_db: Connection) -> int:
            doing = asyncio.create_task(router.session("bob").read(lambda db: db.fetchval("SELECT 1")))
            (pool,) = router.pools
            await until(lambda: pool.limiter.waiting + router.primary_reads_waiting == 1)
            free.set()
            return int(await doing)

        async def holds(_db: Connection) -> None:
            await free.wait()

        holding = asyncio.create_task(router.session("eve").write(holds))
        (pool,) = router.pools
        await until(lambda: pool.in_use == 1)
        assert 1 == await router.session("ann").write(nests)
        await holding


async def test_busy_replicas_are_waited_for(
    cluster: LocalCluster, observer: Observer, board: Board, email: str
) -> None:
    """That all connections are in use is no failure, and no reason to ask the primary."""
    limits = Limits(connections=1, queue=1, attempt_s=0.3, read_s=2)
    async with await Router.open(
        dsns(cluster),
        board=board,
        limits=limits,
    ) as router:
        token = (await write_ride(router, email)).token
        await cluster.wait_for_catchup()
        await observer.run_once()
        pools = [pool for pool in router.pools if pool.name != "primary"]

        def read() -> asyncio.Task[Answer[int]]:
            reading = router.read(lambda node: node.fetchval("SELECT 1"), subject=email, token=token)
            return asyncio.create_task(reading, context=Context())  # not nested in the leases below

        async with contextlib.AsyncExitStack() as leases:
            for pool in pools:
                await leases.enter_async_context(pool.lease())
            waiting = []
            waiting.append(read())
            await until(lambda: any(pool.limiter.waiting for pool in pools))
            waiting.append(read())  # goes where the first does not wait
            await until(lambda: all(pool.limiter.waiting for pool in pools))
            with pytest.raises(Unavailable, match="too many reads: 1 wait already"):
                await read()
            await asyncio.sleep(2 * limits.attempt_s)  # it is not an attempt
            assert not any(task.done() for task in waiting)
        answers = await asyncio.gather(*waiting)
        assert {Role.REPLICA} == {answer.role for answer in answers}

        async with pools[0].lease(), pools[1].lease():
            with pytest.raises(Unavailable, match="was free within 2 s"):
                await read()


@pytest.mark.vouched
async def test_frozen_primary_is_refused_at_once_and_replicas_go_on(
    cluster: LocalCluster, observer: Observer, board: Board, router: Router, email: str
) -> None:
    """What needs it is not let into a time-out once it is known; the rest does not need it."""
    ride = await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    epoch = board.epoch
    primary = board.primary
    assert epoch is not None
    assert primary is not None
    token = SessionToken(epoch, primary.flush_lsn)
    await observer.run_once()
    cluster.primary.freeze()
    try:
        await observer.run_once()
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await write_ride(router, email)
        with pytest.raises(Unavailable):
            await router.read(lambda node: node.fetchval("SELECT 1"), subject=email)
        assert time.monotonic() - began < 0.1
        answer = await router.read(
            lambda node: node.fetchrow(SELECT_RIDE, email, ride.id), subject=email, token=token
        )
        assert answer.value is not None
        assert answer.value["id"] == ride.id
        assert "primary" != answer.node
    finally:
        cluster.primary.thaw()
    async with asyncio.timeout(10):
        while board.primary_is_lost:
            await observer.run_once()
    assert (await write_ride(router, email)).id > ride.id
    await cluster.wait_for_catchup()
