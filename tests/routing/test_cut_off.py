"""Replicas that are cut off stop serving after a while, on a quiet cluster too, and those that follow never do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import asyncpg
import pytest

from rocket import Lsn, Policy, Reason, Role, Router
from rocket.cluster import faults
from rocket.cluster.promotion import promote
from rocket.consistency import SessionToken
from rocket.health import Code, examine, obstacle_of
from rocket.lab.app import DATABASE
from tests.routing.test_histories import a_cluster
from tests.support.servers import dsns, paused, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

BEAT_S = 0.05
MESSAGES = """
    DO $$ BEGIN EXECUTE (
        SELECT string_agg(format('{}', oid::regprocedure), '; ') FROM pg_proc
         WHERE proname = 'pg_logical_emit_message'
    ); END $$
"""
FAR_S = 1e6
"""A time after which each bound is met, unless nothing is missing."""


async def one(db: Connection) -> int:
    """Read anything."""
    return int(await db.fetchval("SELECT 1"))


@contextlib.asynccontextmanager
async def cut_off(cluster: LocalCluster, *names: str) -> AsyncIterator[None]:
    """Keep replicas from their primary: they answer, and receive nothing."""
    nodes = [cluster.node(name) for name in names]
    try:
        for node in nodes:
            await faults.cut(node, cluster.upstream_port(node))
        yield
    finally:
        for node in nodes:
            await faults.reconnect(node, cluster.upstream_port(node))
        await cluster.wait_for_catchup()


@contextlib.asynccontextmanager
async def configured(cluster: LocalCluster, change: str, back: str) -> AsyncIterator[None]:
    """Have the primary run otherwise for a time."""
    writable = {"default_transaction_read_only": "off"}
    admin = await asyncpg.connect(cluster.primary.dsn(DATABASE), server_settings=writable)
    try:
        await admin.execute(change)
        await admin.execute("SELECT pg_reload_conf()")
        yield
    finally:
        await admin.execute(back)
        await admin.execute("SELECT pg_reload_conf()")
        await admin.close()


def obstacles(router: Router, policy: Policy, later_s: float = 0.0) -> set[Reason | None]:
    """Return what keeps the replicas from serving, or would after a time in which nothing more is heard."""
    now = time.monotonic() + later_s
    return {obstacle_of(status.name, router.board, policy, now) for status in router.board.replicas}


def in_time(router: Router, later_s: float = FAR_S) -> bool:
    """Return whether neither replica would lie beyond the default bound in seconds, however much later."""
    return {None} == obstacles(router, Policy(lease_s=1e9), later_s)


async def beats(router: Router, count: int) -> None:
    """Wait until the observer has looked at the primary this often."""
    for _ in range(count):
        before = router.board.primary
        await until(lambda: router.board.primary is not before)  # noqa: B023


@pytest.mark.vouched
async def test_replicas_that_are_cut_off_stop_serving_though_nothing_is_written(cluster: LocalCluster) -> None:
    """After a minute by default; the bound is met by the clock alone, and what is far too late is said."""
    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as router:
        session = router.session()
        await session.write(one)
        await until(lambda: in_time(router))
        async with cut_off(cluster, "replica0", "replica1"):
            await until(lambda: {Reason.TOO_FAR_BEHIND} == obstacles(router, Policy(lease_s=1e9), 61.0))
            assert {None} == obstacles(router, Policy())
            router.policy = Policy(max_lag_s=2 * BEAT_S)
            await until(lambda: {Reason.TOO_FAR_BEHIND} == obstacles(router, router.policy))
            await session.read(one)
            assert session.last is not None
            assert (Role.PRIMARY, Reason.TOO_FAR_BEHIND) == (session.last.role, session.last.reason)
            (finding,) = (await examine(router)).degraded
            assert Code.NO_REPLICA_FIT == finding.code
            assert "replica0: too-far-behind" in finding.text
            router.policy = Policy()
        await until(lambda: in_time(router))
        async with asyncio.timeout(5):
            while session.last.role is not Role.REPLICA:
                await session.read(one)


@pytest.mark.vouched
async def test_replicas_that_follow_are_in_time_however_long_nothing_is_written(cluster: LocalCluster) -> None:
    """From the first look on: the only WAL is what beats write."""
    worst_s = 0.0
    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as router:

        def look(_: object) -> None:
            nonlocal worst_s
            late = [router.board.lag_seconds(each, each.observed_at) or 0.0 for each in router.board.replicas]
            worst_s = max(worst_s, *late)

        router.board.on_status.append(look)
        await beats(router, 40)
        await until(lambda: in_time(router))
    assert worst_s < 40 * BEAT_S


@pytest.mark.superuser
@pytest.mark.parametrize(
    ("change", "back"),
    [
        (
            MESSAGES.format("REVOKE EXECUTE ON FUNCTION %s FROM public"),
            MESSAGES.format("GRANT EXECUTE ON FUNCTION %s TO public"),
        ),
        (
            "ALTER SYSTEM SET default_transaction_read_only = on",
            "ALTER SYSTEM RESET default_transaction_read_only",
        ),
    ],
    ids=["may not beat", "read-only"],
)
async def test_without_beats_no_replica_that_follows_is_late(
    cluster: LocalCluster, change: str, back: str
) -> None:
    """WAL stands still then, and all of it is replayed; also where a segment of it has just ended."""
    async with configured(cluster, change, back):
        admin = await asyncpg.connect(cluster.primary.dsn(DATABASE))
        nodes = dsns(cluster, who="rocket_monitor")
        async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
            for ends in (None, "SELECT pg_switch_wal()"):
                if ends is not None:
                    await admin.execute(ends)
                await beats(router, 5)
                await until(lambda: in_time(router))
                await beats(router, 5)
                assert in_time(router)
        await admin.close()


@pytest.mark.vouched
async def test_an_observer_that_was_away_for_longer_than_the_bound_finds_replicas_in_time(
    cluster: LocalCluster,
) -> None:
    """As in a process that was halted, while others wrote: what it knew before is old, and not the replicas."""
    policy = Policy(lease_s=4 * BEAT_S, max_lag_s=6 * BEAT_S)
    reasons = []
    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S, policy=policy) as router:
        session = router.session()
        await session.write(one)
        await until(lambda: in_time(router))
        other = await cluster.primary.connect(DATABASE)
        writing = asyncio.create_task(
            other.execute("SELECT pg_sleep(0.2); SELECT pg_logical_emit_message(true, 'test', '')"), name="write"
        )
        await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251 - all of the process stands still
        async with asyncio.timeout(10):
            while session.last is None or session.last.role is not Role.REPLICA:
                await session.read(one)
                reasons.append(session.last and session.last.reason)
        await writing
        await other.close()
    assert Reason.TOO_FAR_BEHIND not in reasons


@pytest.mark.vouched
async def test_while_the_primary_is_away_replicas_serve_as_they_did(cluster: LocalCluster) -> None:
    """Also the one that lacks the last of its WAL: how long that lasts is not how far it is behind."""
    async with await Router.open(dsns(cluster), observer_interval_s=BEAT_S) as router:
        board = router.board
        assert board.epoch is not None
        token = SessionToken(board.epoch, Lsn(0))
        async with paused(cluster):
            await router.write(one, subject=None)
            await until(lambda: all(board.lag_seconds(each, FAR_S) for each in board.replicas))
            cluster.primary.freeze()
            try:
                await until(lambda: board.primary_is_lost)
                assert in_time(router)
                assert Role.REPLICA is (await router.read(one, subject=None, token=token)).role
            finally:
                cluster.primary.thaw()
        await until(lambda: not board.primary_is_lost)


@pytest.mark.vouched
async def test_after_a_promotion_no_replica_that_follows_is_late() -> None:
    """What the former primary had written, and when, is no measure of it."""
    policy = Policy(max_lag_s=5.0)
    async with a_cluster(2) as ours, await Router.open(dsns(ours), observer_interval_s=BEAT_S) as router:
        router.policy = policy
        await until(lambda: in_time(router))
        before, seen = router.board.epoch, set()
        router.board.on_status.append(lambda _: seen.update(obstacles(router, policy)))
        await promote(ours, "replica0")
        await until(lambda: router.board.epoch not in {None, before})
        await until(lambda: in_time(router), 20)
    assert Reason.TOO_FAR_BEHIND not in seen
