"""The races by which a read after a write comes back stale, played step by step.

Each is first shown to break the technique as published, and then, on the same steps, not to break ours.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from rocket import Limits, Lsn, Reason, Role, Router
from rocket.cluster import faults
from rocket.consistency import Board, SessionToken
from rocket.lab.api.rides import INSERT_RIDE
from rocket.lab.api.users import INSERT_USER
from rocket.lab.app import DATABASE
from rocket.lab.comparison import ComparedCommits, ComparisonRouter, Routing
from rocket.lab.shutdown import background
from rocket.routing.bound import ReadBound
from tests.support.clusters import EVERY_POSTGRES, on
from tests.support.commits import MOST, gates
from tests.support.races import Ride, come_back_behind, read_ride, restart_point_now, write_ride
from tests.support.servers import dsns, paused, recorded, role

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster
    from rocket.consistency import Epoch
    from rocket.routing.observer import Observer


@pytest.fixture
def cluster(request: pytest.FixtureRequest, postgres: str, cluster: LocalCluster) -> LocalCluster:
    """The cluster on the Postgres that a test asks for."""
    return on(request, postgres, cluster)


async def replayed_so_far(cluster: LocalCluster) -> None:
    """Have what is written flushed, and replayed everywhere."""
    other = await cluster.primary.connect(DATABASE)
    await other.execute("SELECT pg_logical_emit_message(true, 'test', 'flush')")
    await other.close()
    await cluster.wait_for_catchup()


@contextlib.asynccontextmanager
async def written_without_its_commit(
    cluster: LocalCluster, observer: Observer, board: Board, email: str, routing: Routing
) -> AsyncIterator[tuple[ComparisonRouter, Ride]]:
    """Write a ride, and have replicas replay all of that but the commit; they are observed, and halt."""
    async with (
        gates(cluster) as held,
        await held.on(ComparisonRouter, ComparedCommits).open(dsns(cluster), board=board) as router,
    ):
        await router.switch(routing)
        writing = asyncio.create_task(write_ride(router, email))
        await held.wait(1)
        await replayed_so_far(cluster)
        await observer.run_once()
        async with paused(cluster):
            await held.open(*range(MOST))
            yield router, await writing


@EVERY_POSTGRES
@pytest.mark.parametrize(("routing", "fresh"), [(Routing.ARTICLE, False), (Routing.NEVER_STALE, True)])
async def test_floor_taken_inside_the_transaction_is_stale_and_ours_is_not(
    cluster: LocalCluster, observer: Observer, board: Board, email: str, routing: Routing, *, fresh: bool
) -> None:
    """A replica that has replayed all but the commit passes the published check (design fact F1)."""
    await recorded(observer, cluster, {replica.name for replica in cluster.replicas})
    async with written_without_its_commit(cluster, observer, board, email, routing) as (router, ride):
        seen, node, reason = await read_ride(router, email, ride)
    assert fresh == seen
    if fresh:
        assert ("primary", Reason.NOT_CAUGHT_UP) == (node, reason)
    else:
        assert Reason.UNCHECKED == reason


@pytest.mark.parametrize("with_token", [False, True])
async def test_what_was_written_as_published_is_not_missed_once_the_guarantee_is_back(
    cluster: LocalCluster, observer: Observer, board: Board, email: str, *, with_token: bool
) -> None:
    """Its floor lies before its commit, and no token covers it: the switch has to."""
    await recorded(observer, cluster, {replica.name for replica in cluster.replicas})
    assert board.epoch is not None
    token = SessionToken(board.epoch, Lsn(1)) if with_token else None
    held = written_without_its_commit(cluster, observer, board, email, Routing.ARTICLE)
    async with held as (router, ride):
        assert not (await read_ride(router, email, ride))[0]
        await router.switch(Routing.NEVER_STALE)
        assert (True, "primary", Reason.NOT_CAUGHT_UP) == await read_ride(router, email, ride, token)


@EVERY_POSTGRES
@pytest.mark.parametrize(("routing", "fresh"), [(Routing.ARTICLE, False), (Routing.NEVER_STALE, True)])
async def test_replica_that_comes_back_behind_is_read_stale_as_published_and_not_by_us(
    cluster: LocalCluster,
    observer: Observer,
    router: ComparisonRouter,
    email: str,
    routing: Routing,
    *,
    fresh: bool,
) -> None:
    """A status outlives the incarnation that it was taken in (design fact F3)."""
    await router.switch(routing)
    await recorded(observer, cluster, {replica.name for replica in cluster.replicas})
    async with restart_point_now(cluster):
        ride = await write_ride(router, email)
        await cluster.wait_for_catchup()
        await observer.run_once()
        assert (await read_ride(router, email, ride))[1] != "primary"
        async with come_back_behind(cluster, email):
            seen, node, reason = await read_ride(router, email, ride)
            if fresh:
                assert (True, "primary", Reason.REPLICAS_FAILED) == (seen, node, reason)
                await observer.run_once()
                assert (True, "primary", Reason.NOT_CAUGHT_UP) == await read_ride(router, email, ride)
            else:
                assert (False, Reason.UNCHECKED) == (seen, reason)
    await observer.run_once()
    assert (await read_ride(router, email, ride))[0]


async def test_an_unknown_floor_stays_unknown_across_switches(
    cluster: LocalCluster, observer: Observer, router: ComparisonRouter, email: str
) -> None:
    """Of a write after the switch: what was flushed at the switch lies before it."""
    await router.switch(Routing.ARTICLE)
    assert Routing.ARTICLE is await router.switch(Routing.NEVER_STALE)
    await cluster.wait_for_catchup()
    async with paused(cluster):
        await observer.run_once()
        ride = await write_ride(router, email)
        assert router.board.epoch is not None
        token = SessionToken(router.board.epoch, Lsn.PENDING)
        assert (True, "primary", Reason.NOT_CAUGHT_UP) == await read_ride(router, email, ride, token)


async def test_after_the_published_technique_reads_are_read_only_again(
    cluster: LocalCluster, observer: Observer, router: ComparisonRouter, email: str
) -> None:
    """Its pool resets connections, and with that what made them so."""
    await router.switch(Routing.ARTICLE)
    await write_ride(router, email)
    await cluster.wait_for_catchup()
    await recorded(observer, cluster, {replica.name for replica in cluster.replicas})
    for _ in range(5):
        await router.read(no_work, subject=email)
    await router.switch(Routing.NEVER_STALE)
    token = (await write_ride(router, email)).token
    await cluster.wait_for_catchup()
    await observer.run_once()
    shows = "SHOW default_transaction_read_only"
    answers = [await router.read(lambda node: node.fetchval(shows), subject=email, token=token) for _ in range(5)]
    assert {("on", Role.REPLICA)} == {(answer.value, answer.role) for answer in answers}


async def test_what_was_committed_and_not_flushed_is_covered_by_a_switch_back(
    cluster: LocalCluster, observer: Observer, router: ComparisonRouter, email: str
) -> None:
    """As with `synchronous_commit = off`, where a COMMIT returns before it is flushed."""
    await router.switch(Routing.RANDOM)
    unflushed = "SET LOCAL synchronous_commit = off"

    async def work(primary: Connection) -> int:
        await primary.execute(unflushed)
        await primary.fetchval(INSERT_USER, email)
        ride = await primary.fetchrow(INSERT_RIDE, email, 1.5, None)
        assert ride is not None
        return int(ride["id"])

    async with paused(cluster):
        written = await router.write(work, subject=email)
        ride = Ride(written.value, written.token)
        await router.switch(Routing.NEVER_STALE)
        await observer.run_once()
        assert router.board.epoch is not None
        token = SessionToken(router.board.epoch, Lsn(1))
        seen, node, _ = await read_ride(router, email, ride, token)
        assert (True, "primary") == (seen, node)


async def test_switching_back_waits_for_writes_under_way(router: ComparisonRouter, email: str) -> None:
    """They may commit after the LSN that is to cover them."""
    await router.switch(Routing.RANDOM)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(_primary: Connection) -> None:
        begun.set()
        await go_on.wait()

    async with asyncio.TaskGroup() as group, asyncio.timeout(10):
        group.create_task(router.write(slowly, subject=email))
        await begun.wait()
        switching = group.create_task(router.switch(Routing.NEVER_STALE))
        for _ in range(5):  # as much as the switch would need if it did not wait
            assert await router.primary_answers()
        assert (Routing.RANDOM, False) == (router.routing, switching.done())
        go_on.set()
        await switching
    assert router.routing is Routing.NEVER_STALE


async def no_work(_node: Connection) -> None:
    """Read or write nothing."""


HELD_READ = """
    SELECT (SELECT count(*) FROM rides JOIN users ON user_id = users.id AND email = $1),
           pg_advisory_xact_lock_shared(1)
"""
"""Takes its snapshot, and then waits for the holder of the lock on the node where it runs."""
LOCK_IS_WAITED_FOR = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)"


@contextlib.asynccontextmanager
async def held_until_caught_up(cluster: LocalCluster) -> AsyncIterator[None]:
    """Let a `HELD_READ` on a replica go on only once all replicas, paused so far, have replayed everything."""

    async def let_go_when_read() -> None:
        while not any([await connection.fetchval(LOCK_IS_WAITED_FOR) for connection in holding]):
            await asyncio.sleep(0.01)
        for node in cluster.replicas:
            await faults.resume(node)
        await cluster.wait_for_catchup()
        for connection in holding:
            await connection.execute("SELECT pg_advisory_unlock(1)")
        await asyncio.Event().wait()  # the end comes as a cancellation

    holding = [await node.connect(DATABASE) for node in cluster.replicas]
    try:
        for connection in holding:
            await connection.execute("SELECT pg_advisory_lock(1)")
        async with background(let_go_when_read(), "waiting for the read"):
            yield
    finally:
        for connection in holding:
            await connection.close()


async def test_a_read_that_began_before_the_write_was_replayed_is_not_believed(
    cluster: LocalCluster, observer: Observer, board: Board, email: str
) -> None:
    """A replica may have caught up by the end of a statement that does not show the write (design fact F5)."""

    async def held_read(node: Connection) -> int:
        return int(await node.fetchval(HELD_READ, email))

    limits = Limits(attempt_s=10, read_s=20)
    async with await Router.open(dsns(cluster), board=board, limits=limits) as router:
        await cluster.wait_for_catchup()
        async with paused(cluster), held_until_caught_up(cluster):
            token = (await write_ride(router, email)).token
            await observer.run_once()
            answer = await router.read(held_read, subject=email, token=token)
    assert (1, "primary", Reason.NOT_CAUGHT_UP) == (answer.value, answer.node, answer.reason)


MANY_TABLES = 1500
MAKE_TABLES = f"""
    DO $$ BEGIN
        CREATE SCHEMA doomed AUTHORIZATION {{owner}};
        FOR n IN 1..{MANY_TABLES} LOOP EXECUTE format('CREATE TABLE doomed.t%s ()', n); END LOOP;
    END $$
"""
RIDES_OF = "SELECT count(*) FROM rides JOIN users ON user_id = users.id AND email = $1"
DROP_TABLES = "SET LOCAL client_min_messages = error; DROP SCHEMA doomed CASCADE"


def bound_by_replay_lsn(said: ReadBound, epoch: Epoch) -> Lsn | None:
    """Take the replay LSN for the bound of a read: the wrong rule that "a replica shows what it has replayed"."""
    assert epoch
    return said.lsn


@pytest.mark.parametrize("ours", [False, True], ids=["by replay LSN", "ours"])
async def test_a_read_before_the_replay_lsn_has_moved_is_not_gone_back_behind(
    *,
    cluster: LocalCluster,
    observer: Observer,
    board: Board,
    email: str,
    monkeypatch: pytest.MonkeyPatch,
    ours: bool,
) -> None:
    """Replay shows a commit before it moves the replay LSN; with 1,500 tables to drop, long before (fact F6).

    A session that has seen the ride on one replica goes on to another, which has replayed all but the commit. With
    the replay LSN as the bound of what was seen, that other one passes for caught up.
    """
    if not ours:
        monkeypatch.setattr(ReadBound, "on_replica", bound_by_replay_lsn)
    primary = await cluster.primary.connect(DATABASE)
    await primary.execute(MAKE_TABLES.format(owner=role()), timeout=60)
    await primary.execute(INSERT_USER, email)
    await primary.close()
    await cluster.wait_for_catchup()

    async def write_and_drop(primary: Connection) -> None:
        await primary.fetchrow(INSERT_RIDE, email, 2.5, None)
        await primary.execute(DROP_TABLES, timeout=30)

    async def rides(node: Connection) -> int:
        return int(await node.fetchval(RIDES_OF, email))

    limits = Limits(write_s=60, commit_s=60, attempt_s=10)
    async with (
        gates(cluster) as held,
        await held.on(Router).open(dsns(cluster), board=board, limits=limits) as router,
        contextlib.AsyncExitStack() as replay_stopped,
    ):
        writing = asyncio.create_task(router.write(write_and_drop, subject=email))
        await held.wait(1)
        await replayed_so_far(cluster)
        await replay_stopped.enter_async_context(paused(cluster))
        await held.open(0)
        await writing
        await observer.run_once()
        behind = board.replica("replica1")
        assert behind is not None
        assert board.epoch is not None
        board.forget("replica1")
        token = SessionToken(board.epoch, Lsn(0))
        await faults.resume(cluster.node("replica0"))
        async with asyncio.timeout(20):
            while 1 != (seen := await router.read(rides, subject=email, token=token)).value:
                assert "replica0" == seen.node
        assert seen.token is not None
        board.forget("replica0")
        board.publish(behind)
        again = await router.read(rides, subject=email, token=seen.token)
    assert (again.value, again.node) == ((1, "primary") if ours else (0, "replica1"))
