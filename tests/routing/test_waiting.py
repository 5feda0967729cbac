"""Reads that wait for a replica to catch up, on a real cluster."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

import pytest
import pytest_asyncio

from rocket import Policy, Reason, Role, Router
from rocket.cluster import faults
from rocket.consistency import Board
from rocket.lab.shutdown import background
from rocket.routing.catchup import CatchUp
from rocket.routing.observer import Observer
from tests.support.clusters import fetch
from tests.support.races import read_ride, write_ride
from tests.support.servers import dsns, paused, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

FoundT = TypeVar("FoundT")

LONG_S = 10.0
"""Longer than anything here takes: what is found before is found on demand."""


@pytest_asyncio.fixture
async def rare(cluster: LocalCluster) -> AsyncIterator[Observer]:
    """An observer that runs, and looks by itself only every ten seconds."""
    observer = Observer(
        dsns(cluster),
        Board(),
        interval_s=LONG_S,
    )
    await cluster.wait_for_catchup()
    async with background(observer.run(), "observer"):
        await until(lambda: len(observer.board.replicas) == 2 and observer.board.primary is not None)
        yield observer


@pytest_asyncio.fixture
async def patient(cluster: LocalCluster, rare: Observer) -> AsyncIterator[Router]:
    """A router whose reads wait as long as it takes."""
    async with await Router.open(
        dsns(cluster),
        policy=Policy(lease_s=2 * LONG_S, max_wait_s=3.0),
        observer=rare,
    ) as router:
        yield router


async def test_read_after_write_waits_for_a_replica(patient: Router, email: str) -> None:
    """The replica that is about to catch up is looked at until it has."""
    ride = await write_ride(patient, email)
    seen, node, reason = await read_ride(patient, email, ride)
    assert (True, Reason.WAITED) == (seen, reason)
    assert node != "primary"


async def test_wait_ends_when_replay_goes_on(
    cluster: LocalCluster, rare: Observer, patient: Router, email: str
) -> None:
    """Not before, and not at the end of the time allowed."""
    await write_ride(patient, email)
    await cluster.wait_for_catchup()
    async with asyncio.TaskGroup() as group:
        async with paused(cluster):
            ride = await write_ride(patient, email)
            reading = group.create_task(read_ride(patient, email, ride), name="reading")
            await until(lambda: rare.catch_up.waiting > 0)
            assert not reading.done()
        assert (True, Reason.WAITED) == ((await reading)[0], (await reading)[2])


async def test_wait_is_bounded(cluster: LocalCluster, patient: Router, email: str) -> None:
    """Then the primary answers."""
    patient.policy = Policy(lease_s=2 * LONG_S, max_wait_s=0.1)
    async with paused(cluster):
        ride = await write_ride(patient, email)
        began = time.monotonic()
        assert (True, "primary", Reason.NOT_CAUGHT_UP) == await read_ride(patient, email, ride)
        assert time.monotonic() - began < 1


async def test_a_status_that_is_not_enough_costs_a_waiting_read_no_choice() -> None:
    """There may be thousands a second, and many reads that wait."""
    catch_up = CatchUp()
    enough, choices = False, 0

    def choose() -> str | None:
        nonlocal choices
        choices += 1
        return "there" if enough else None

    reads = [asyncio.create_task(catch_up.until(["replica0"], choose, LONG_S, lambda: enough)) for _ in range(3)]
    await until(lambda: catch_up.waiting == 3)
    for _ in range(5):
        catch_up.announce()
        await asyncio.sleep(0)
    assert choices == 0
    reads.pop().cancel()
    enough = True
    catch_up.announce()
    assert ["there"] * 2 == await asyncio.gather(*reads)
    assert choices == 2
    assert 0 == catch_up.waiting


class NoWaiting(CatchUp):
    """Refuses to wait."""

    async def until(
        self,
        names: Collection[str],
        _find: Callable[[], FoundT | None],
        _timeout_s: float,
        _may_find: Callable[[], bool] | None = None,
    ) -> FoundT | None:
        """Fail the test."""
        pytest.fail(f"waited for {names}")


async def test_hopeless_wait_is_skipped(cluster: LocalCluster, observer: Observer, email: str) -> None:
    """A replica that was late already when it was seen will not be there in time."""
    observer.catch_up = NoWaiting()
    async with await Router.open(dsns(cluster), observer=observer) as router:
        await cluster.wait_for_catchup()
        await observer.run_once()
        async with paused(cluster):
            ride = await write_ride(router, email)
            await observer.run_once()
            behind_since = time.monotonic()
            await until(lambda: time.monotonic() - behind_since > router.policy.max_wait_s)
            await observer.run_once()
            assert (True, "primary", Reason.NOT_CAUGHT_UP) == await read_ride(router, email, ride)


async def test_many_waiting_reads_share_one_look_at_a_replica(rare: Observer, patient: Router, email: str) -> None:
    """However many wait, a replica is never asked twice at the same time."""
    under_way: dict[str, int] = {}
    for watch in rare.watches.values():
        observe = watch.observe

        async def counted(
            within_s: float | None = None,
            observe: Callable[..., Awaitable[bool]] = observe,
            name: str = watch.name,
        ) -> bool:
            under_way[name] = under_way.get(name, 0) + 1
            assert under_way[name] == 1
            try:
                return await observe(within_s)
            finally:
                under_way[name] -= 1

        watch.observe = counted  # type: ignore[method-assign]
    ride = await write_ride(patient, email)
    answers = await asyncio.gather(*(read_ride(patient, email, ride) for _ in range(50)))
    assert all(seen for seen, _, _ in answers)
    assert {"replica0", "replica1"} >= {node for _, node, _ in answers}
    assert {0} == set(under_way.values())


async def test_replica_that_vanishes_while_waited_for_costs_no_answer(
    cluster: LocalCluster, rare: Observer, patient: Router, email: str
) -> None:
    """The read goes on to another one, or to the primary."""
    await write_ride(patient, email)
    await cluster.wait_for_catchup()
    async with paused(cluster):
        ride = await write_ride(patient, email)
        patient.policy = Policy(lease_s=2 * LONG_S, max_wait_s=0.5)
        reading = asyncio.ensure_future(read_ride(patient, email, ride))
        await until(lambda: rare.catch_up.waiting > 0)
        for node in cluster.replicas:
            await faults.kill_backend(node)
        assert (await reading)[0]
        for node in cluster.replicas:
            await node.stop()
            await node.start(cluster.primary.port)
    await cluster.wait_for_catchup()


_LOSE_CONNECTION = "SELECT pg_terminate_backend(pg_backend_pid())"


async def write_nothing(db: Connection) -> object:
    """Do as little as a write can."""
    return await db.fetchval("SELECT 1")


async def test_replicas_that_fail_at_once_keep_no_read_from_the_others(cluster: LocalCluster) -> None:
    """Nor do they have the primary read in their place, however many they are."""
    nodes = dsns(cluster)
    nodes |= {f"{name}-again": dsn for name, dsn in nodes.items() if name != "primary"}
    tried = 0

    async def fail_thrice(db: Connection) -> object:
        nonlocal tried
        tried += 1
        return await db.fetchval(_LOSE_CONNECTION if tried <= 3 else "SELECT 1")

    async with await Router.open(nodes, policy=Policy(max_wait_s=3.0)) as router:
        session = router.session()
        await session.write(write_nothing)
        await until(lambda: len(router.board.replicas) == len(nodes) - 1)
        assert 1 == await session.read(fail_thrice)
        assert (4, Role.REPLICA) == (tried, session.last and session.last.role)


async def test_a_read_that_failed_waits_for_another_replica(
    cluster: LocalCluster, rare: Observer, patient: Router, email: str
) -> None:
    """Where the first one was the only one that had caught up."""
    tried = 0

    async def fail_once(db: Connection) -> object:
        nonlocal tried
        tried += 1
        return await db.fetchval(_LOSE_CONNECTION if tried == 1 else "SELECT 1")

    session = patient.session()
    await session.write(write_nothing)
    await cluster.wait_for_catchup()
    async with asyncio.TaskGroup() as group:  # noqa: SIM117 - which ends once the replica goes on
        async with paused(cluster, "replica1"):
            while "paused" != await fetch(cluster.node("replica1"), "SELECT pg_get_wal_replay_pause_state()"):
                await asyncio.sleep(0.01)
            await session.write(lambda db: db.execute("INSERT INTO users (email) VALUES ($1)", email))
            assert await session.read(write_nothing)  # waits for the other one, and knows then that it is there
            reading = group.create_task(session.read(fail_once), name="reading")
            await until(lambda: reading.done() or (tried == 1 and rare.catch_up.waiting > 0))
    assert session.last is not None
    assert (2, Role.REPLICA, Reason.RETRIED) == (tried, session.last.role, session.last.reason), session.last
