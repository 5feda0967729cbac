"""Promotions that rocket did not make: who is followed, who is closed, and what sessions are told."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from rocket import Freshness, Lsn, OutcomeUnknown, Reason, Role, Router, Unavailable
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.supervisor import local_cluster
from rocket.consistency import Board, SessionToken
from rocket.lab.api.rides import INSERT_RIDE, SELECT_RIDE
from rocket.lab.api.users import INSERT_USER
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.routing.commits import Commits
from rocket.routing.observer import Observer
from tests.support.commits import committing
from tests.support.races import lose_a_backend
from tests.support.servers import dsns, paused, schema, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Answer, Connection
    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

CLIENTS = """
    SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rocket' AND pid <> pg_backend_pid()
"""
PIDS = "SELECT array_agg(pid) FROM pg_stat_activity"
SEEMS_FIT = """
    SELECT received_tli >= 2 AND status = 'streaming' AND pg_last_wal_replay_lsn() >= $1
       AND NOT EXISTS (SELECT FROM rides WHERE id = $2)
      FROM pg_stat_wal_receiver
"""
"""Says that a replica streams the new timeline and has passed the floor, and yet does not show the write."""

BEAT_S = 0.1
FOLLOWED_WITHIN_S = 2.0


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    """A cluster without a supervisor, which would otherwise notice what is promoted here."""
    # A replica past the fork asks for WAL from the start of a segment, which the new primary has to have reached.
    settings = ClusterSettings(replicas=2, port=0, database=DATABASE, schema=schema(), wal_segment_mib=16)
    async with local_cluster(settings) as cluster:
        yield cluster


@pytest_asyncio.fixture
async def watched(cluster: LocalCluster) -> AsyncIterator[Observer]:
    """An observer at work, which has seen every node."""
    observer = Observer(dsns(cluster), Board(), interval_s=BEAT_S)
    async with background(observer.run(), "observer"):
        await until(lambda: len(observer.board.replicas) == 2 and observer.board.primary is not None)
        await until(lambda: all(status.epoch == observer.board.epoch for status in observer.board.replicas))
        yield observer


@pytest_asyncio.fixture
async def router(cluster: LocalCluster, watched: Observer) -> AsyncIterator[Router]:
    """A router on what that observer sees."""
    async with await Router.open(dsns(cluster), observer=watched) as router:
        yield router


class Session:
    """A client that sends its token back."""

    def __init__(self, router: Router, email: str) -> None:
        self.router = router
        self.email = email
        self.token: SessionToken | None = None

    async def write(self) -> Answer[Any]:
        """Write a ride, and the user with the first one."""

        async def work(primary: Connection) -> int:
            await primary.execute(INSERT_USER, self.email)
            ride = await primary.fetchrow(INSERT_RIDE, self.email, 1.5, None)
            assert ride is not None
            return int(ride["id"])

        answer = await self.router.write(work, subject=self.email, token=self.token)
        self.token = answer.token
        return answer

    async def read(self, ride_id: int) -> Answer[Any]:
        """Look for a ride; the answer's value says whether it is there."""

        async def work(node: Connection) -> bool:
            row = await node.fetchrow(SELECT_RIDE, self.email, ride_id)
            return row is not None and row["id"] is not None

        answer = await self.router.read(work, subject=self.email, token=self.token)
        self.token = answer.token
        return answer


async def sql(node: Node, *statements: str) -> Any:
    """Run statements on a node, and return the first value of the last."""
    connection = await node.connect(DATABASE)
    try:
        for statement in statements[:-1]:
            await connection.execute(statement)
        return await connection.fetchval(statements[-1])
    finally:
        connection.terminate()


async def promote(node: Node) -> None:
    """Promote a replica as a stranger would; checkpoint it, as those who fail over for a living do."""
    assert await sql(node, "SELECT pg_promote(true, 30)")
    await sql(node, "CHECKPOINT", "SELECT 1")


async def follow(node: Node, upstream: Node | None) -> None:
    """Point a replica to another node, or to none, by what goes before its configuration file."""
    socket_dir = node.installation.socket_dir
    where = "" if upstream is None else f"host={socket_dir} port={upstream.port} user=postgres"
    await sql(node, f"ALTER SYSTEM SET primary_conninfo = '{where}'", "SELECT pg_reload_conf()")
    if upstream is None:
        async with asyncio.timeout(10):
            while await sql(node, "SELECT count(*) FROM pg_stat_wal_receiver"):
                await asyncio.sleep(0.01)


async def clients_of(node: Node) -> int:
    """Count the router's connections to a node."""
    return int(await sql(node, CLIENTS))


async def test_a_promotion_is_followed_and_the_old_primary_closed(
    cluster: LocalCluster, watched: Observer, router: Router, email: str
) -> None:
    """Unfenced, the old one would take writes; within two seconds it gets nothing from us any more."""
    old, new, other = cluster.nodes.values()
    session = Session(router, email)
    await session.write()
    await follow(other, None)  # what the old one writes from now on is not what it shall have
    await promote(new)
    promoted_at = time.monotonic()
    await until(lambda: watched.board.primary is not None and watched.board.primary.name == new.name)
    assert time.monotonic() - promoted_at < FOLLOWED_WITHIN_S
    written = await session.write()
    assert (new.name, Role.PRIMARY) == (written.node, written.role)
    assert 0 == await clients_of(old)
    read = await session.read(written.value)
    assert (True, new.name, Reason.OTHER_EPOCH) == (read.value, read.node, read.reason)
    await follow(other, new)

    async with asyncio.timeout(10):
        while (read := await session.read(written.value)).node != other.name:
            assert read.value
    assert (True, Role.REPLICA) == (read.value, read.role)


async def test_a_thawed_old_primary_gets_nothing(
    cluster: LocalCluster, watched: Observer, router: Router, email: str
) -> None:
    """It still says that it is the primary, and is asked again and again, but no read or write goes there."""
    old, new, _ = cluster.nodes.values()
    session, tokenless = Session(router, email), Session(router, email)
    first = await session.write()
    await cluster.wait_for_catchup()
    old.freeze()
    await promote(new)
    await until(lambda: watched.board.primary is not None and watched.board.primary.name == new.name)
    written = await session.write()
    old.thaw()
    await until(lambda: watched.watches[old.name].state == "not accepted as primary")
    for _ in range(20):
        tokenless.token = None
        for reader in (session, tokenless):
            assert (await reader.read(written.value)).value
            assert (await reader.read(first.value)).value
        assert new.name == (await session.write()).node
    assert 0 == await clients_of(old)
    assert 1 == await sql(old, "SELECT count(*) FROM rides")


async def test_a_connection_that_outlives_a_promotion_leaves_its_pool(
    cluster: LocalCluster, watched: Observer, router: Router
) -> None:
    """Opened to a replica, it would read what no status vouches for (design fact F14)."""
    _, new, _ = cluster.nodes.values()
    pool = next(pool for pool in router.pools if pool.name == new.name)
    async with pool.lease() as connection:
        pid = connection.get_server_pid()
    await promote(new)
    await until(lambda: watched.board.primary is not None and watched.board.primary.name == new.name)
    assert pid not in await sql(new, PIDS)
    async with pool.lease() as connection:
        assert "off" == await connection.fetchval("SHOW default_transaction_read_only")


async def test_a_read_under_way_on_a_replica_that_is_promoted_goes_elsewhere(
    cluster: LocalCluster, watched: Observer, router: Router, email: str
) -> None:
    """What it would have answered is covered by nothing."""
    session = Session(router, email)
    await session.write()
    await cluster.wait_for_catchup()
    await until(lambda: all(status.streaming for status in watched.board.replicas))
    nodes: list[str] = []

    async def work(node: Connection) -> None:
        nodes.append(await node.fetchval("SHOW cluster_name"))
        if 1 == len(nodes):
            assert await sql(cluster.node(nodes[0]), "SELECT pg_promote(true, 30)")

    async with asyncio.timeout(10):
        while not nodes or nodes[0] == "primary":
            nodes.clear()
            answer = await router.read(work, subject=email, token=session.token)
    assert nodes[0] != nodes[-1] or answer.role is Role.PRIMARY
    assert len(nodes) > 1


@pytest.mark.superuser  # who may read the history file
async def test_what_a_promotion_lost_is_reported(
    cluster: LocalCluster, watched: Observer, router: Router, email: str
) -> None:
    """A session whose write was left behind is told once; one whose writes are all there is not."""
    old, new, other = cluster.nodes.values()
    session, lucky = Session(router, email), Session(router, f"other-{email}")
    kept = await session.write()
    kept_too = await lucky.write()
    await cluster.wait_for_catchup()
    for node in (new, other):
        await follow(node, None)
    lost = await session.write()
    epoch = lost.token.epoch if lost.token else None
    await old.stop()
    await promote(new)
    await until(lambda: watched.board.primary is not None and watched.board.primary.name == new.name)

    answer = await session.read(lost.value)
    assert not answer.value
    assert answer.lost is not None
    assert (epoch, True) == (answer.lost.epoch, answer.lost.writes)
    assert "Writes of this session that were acknowledged may have been lost" in str(answer.lost)
    assert (await session.read(kept.value)).value
    assert (await session.read(lost.value)).lost is None
    fine = await lucky.read(kept_too.value)
    assert (True, None) == (fine.value, fine.lost)


async def test_a_write_reports_the_loss_as_well(
    cluster: LocalCluster, watched: Observer, router: Router, email: str
) -> None:
    """And a session that brings an old token beside its new one, too."""
    old, new, other = cluster.nodes.values()
    session = Session(router, email)
    await session.write()
    await cluster.wait_for_catchup()
    for node in (new, other):
        await follow(node, None)
    await session.write()
    before = session.token
    await old.stop()
    await promote(new)
    await until(lambda: watched.board.primary is not None and watched.board.primary.name == new.name)
    assert (await session.write()).lost is not None
    assert (await session.write()).lost is None
    assert before is not None
    assert session.token is not None
    both = await router.read(lambda node: node.fetchval("SELECT 1"), subject=email, token=(before, session.token))
    assert both.lost is not None
    assert both.token is not None
    assert session.token.epoch == both.token.epoch


async def test_without_the_history_file_nothing_is_hidden(
    cluster: LocalCluster, watched: Observer, router: Router, email: str
) -> None:
    """Where it cannot be told whether something was lost, that is what is said."""
    session = Session(router, email)
    await session.write()
    await cluster.wait_for_catchup()
    _, new, _ = cluster.nodes.values()
    await promote(new)
    await until(lambda: watched.board.primary is not None and watched.board.primary.name == new.name)
    timeline = await sql(new, "SELECT timeline_id FROM pg_control_checkpoint()")
    (new.data_dir / "pg_wal" / f"{timeline:08X}.history").unlink()
    answer = await session.write()
    assert answer.lost is not None
    assert answer.lost.switch_lsn is None


async def test_a_write_across_a_promotion_is_an_unknown_outcome(
    cluster: LocalCluster, watched: Observer, router: Router, email: str
) -> None:
    """It was committed on a server that is the primary no more."""
    _, new, _ = cluster.nodes.values()
    session = Session(router, email)
    await session.write()

    class Slow(Commits):
        async def floor(self, primary: Connection) -> Lsn:
            floor = await super().floor(primary)
            await promote(new)
            await until(lambda: watched.board.primary is not None and watched.board.primary.name == new.name)
            return floor

    async with await committing(Router, Slow).open(dsns(cluster), board=watched.board) as slow:
        with pytest.raises(OutcomeUnknown):
            await Session(slow, email).write()


async def test_a_global_read_goes_by_the_primary_of_today(
    cluster: LocalCluster, watched: Observer, router: Router
) -> None:
    """What others have committed on the new one is shown, by its replica; the old one, cut off, knows nothing."""
    old, new, other = cluster.nodes.values()
    board = watched.board

    async def count(node: Connection) -> int:
        return int(await node.fetchval("SELECT count(*) FROM users"))

    def follows_the_new_one() -> bool:
        status = board.replica(other.name)
        of_new = board.primary is not None and board.primary.name == new.name
        return of_new and status is not None and status.streaming and status.epoch == board.epoch

    assert 0 == await router.session().read(count, freshness=Freshness.GLOBAL)
    await follow(other, None)
    await promote(new)
    await follow(other, new)
    await until(follows_the_new_one)
    async with paused(cluster, other.name):
        await sql(new, "INSERT INTO users (email) VALUES ('somewhere@else.example')", "SELECT 1")
        assert 1 == await router.session().read(count, freshness=Freshness.GLOBAL)
    assert not await sql(old, "SELECT pg_is_in_recovery()")


async def test_a_replica_past_the_fork_is_not_believed(
    cluster: LocalCluster, watched: Observer, router: Router, email: str
) -> None:
    """It streams from the new primary, says its timeline, and a replay LSN past the floor, without the write.

    Design fact F11. First it is shown that `received_tli` and the replay LSN call it fit.
    """
    old, new, diverged = cluster.nodes.values()
    session = Session(router, email)
    await session.write()
    await cluster.wait_for_catchup()
    for node in (new, diverged):  # nothing that comes from now on reaches its disk
        await sql(node, "ALTER SYSTEM SET bgwriter_lru_maxpages = 0", "SELECT pg_reload_conf()")
    await sql(old, "CHECKPOINT", "SELECT 1")
    await cluster.wait_for_catchup()
    await sql(diverged, "CHECKPOINT", "SELECT 1")
    await follow(new, None)
    await sql(
        old,
        "INSERT INTO users (email) SELECT 'tail-' || n FROM generate_series(1, 20000) AS n",
        "SELECT 1",
    )
    tail = await sql(old, "SELECT pg_current_wal_flush_lsn()::text")
    async with asyncio.timeout(20):
        while not await sql(diverged, f"SELECT pg_last_wal_replay_lsn() >= '{tail}'::pg_lsn"):
            await asyncio.sleep(0.01)
    await promote(new)
    await until(lambda: watched.board.primary is not None and watched.board.primary.name == new.name)
    written = await session.write()
    assert written.token is not None
    old.kill()
    await follow(diverged, new)
    async with asyncio.timeout(20):
        while not list((diverged.data_dir / "pg_wal").glob("*.history")):
            await asyncio.sleep(0.01)
    await lose_a_backend(diverged)

    seen_fit = math.inf
    """From when on the observer, too, has seen a replica that looks fit."""
    gone_by: set[float] = set()
    """When it saw what was on the board at a read that was answered."""
    probe = await diverged.connect(DATABASE)
    async with asyncio.timeout(30):
        while len(gone_by) < 5:
            if not await probe.fetchval(SEEMS_FIT, written.token.write_floor.wire, written.value):
                seen_fit = math.inf
                continue
            seen_fit = min(seen_fit, time.monotonic())
            seen = watched.board.replica(diverged.name)
            with contextlib.suppress(Unavailable):  # a slow machine makes the observer lose the primary
                answer = await session.read(written.value)
                assert (True, new.name) == (answer.value, answer.node)
                if seen is not None and seen.observed_at >= seen_fit:
                    gone_by.add(seen.observed_at)
    await probe.close()


async def test_an_api_that_was_away_during_the_promotion_trusts_no_node_at_first(
    cluster: LocalCluster, watched: Observer, router: Router, email: str
) -> None:
    """A primary that was not confirmed for a lease is not used (by a process that was halted, say)."""
    session = Session(router, email)
    written = await session.write()
    primary = watched.board.primary
    assert primary is not None
    halted = Board()
    halted.publish_primary(primary)
    async with await Router.open(dsns(cluster), board=halted) as late:
        assert (await Session(late, email).read(written.value)).value
    a_lease_ago = time.monotonic() - router.policy.primary_lease_s - 0.01
    halted.publish_primary(dataclasses.replace(primary, observed_at=a_lease_ago))
    async with await Router.open(dsns(cluster), board=halted) as late:
        with pytest.raises(Unavailable):
            await Session(late, email).read(written.value)
        with pytest.raises(Unavailable):
            await Session(late, email).write()
    assert 1 == await sql(cluster.primary, "SELECT count(*) FROM rides")
