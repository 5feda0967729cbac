"""The heartbeat on a real cluster: it keeps WAL flowing, and disturbs no other user of the database."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from typing import TYPE_CHECKING, cast

import pytest

from rocket import Router
from rocket.consistency import Board
from rocket.lab.app import DATABASE
from rocket.routing import epochs, heartbeat, watch
from rocket.routing.observer import Observer
from tests.routing.test_histories import a_cluster
from tests.support.between import pgbouncer
from tests.support.servers import dsns, paused, table, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractContextManager

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node
    from rocket.consistency import Lsn
    from rocket.routing.connection import Connection

BEAT_S = 0.05
DAY_S = 86400.0


@contextlib.asynccontextmanager
async def on(node: Node) -> AsyncIterator[Connection]:
    """Connect to a node as its superuser."""
    connection = await node.connect(DATABASE)
    try:
        yield cast("Connection", connection)
    finally:
        connection.terminate()


@contextlib.asynccontextmanager
async def configured(nodes: list[Node], setting: str, value: str) -> AsyncIterator[None]:
    """Have servers run with another value of a setting."""
    try:
        for node in nodes:
            async with on(node) as admin:
                await admin.execute(f"ALTER SYSTEM SET {setting} = '{value}'")
                await admin.execute("SELECT pg_reload_conf()")
        yield
    finally:
        for node in nodes:
            async with on(node) as admin:
                await admin.execute(f"ALTER SYSTEM RESET {setting}")
                await admin.execute("SELECT pg_reload_conf()")


def addresses(cluster: LocalCluster, *, pooled: bool) -> AbstractContextManager[dict[str, str]]:
    """Give the nodes' own addresses, or those behind a pooler."""
    return pgbouncer(cluster) if pooled else contextlib.nullcontext(dsns(cluster))


async def beats(board: Board, count: int) -> None:
    """Wait until the observer has looked at the primary this often, and has beaten each time."""
    for _ in range(count):
        before = board.primary
        await until(lambda: board.primary is not None and board.primary is not before)  # noqa: B023


async def flushed(primary: Connection) -> int:
    """Return how far the primary has flushed WAL."""
    return int(await primary.fetchval("SELECT pg_current_wal_flush_lsn()"))


@pytest.mark.parametrize("pooled", [False, True])
async def test_a_beat_moves_replay_and_writes_no_row(*, cluster: LocalCluster, pooled: bool) -> None:
    """On a quiet cluster, by a router of default settings."""
    async with on(cluster.primary) as primary, on(cluster.replicas[0]) as replica:
        await primary.execute("DELETE FROM replica_statuses")
        with addresses(cluster, pooled=pooled) as nodes:
            async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
                await beats(router.board, 5)
                for _ in range(5):
                    before = await flushed(primary)
                    async with asyncio.timeout(10):
                        while await replica.fetchval("SELECT pg_last_wal_replay_lsn() <= $1", before):
                            await asyncio.sleep(0.01)
                assert {} == await table(cluster)


async def test_all_that_beats_write_are_messages_and_their_commits() -> None:
    """No row, dead or alive, and no lock: there is nothing that replay could wait for, or cancel a query for."""
    async with a_cluster() as ours, configured([ours.primary], "autovacuum", "off"):
        async with (
            on(ours.primary) as primary,
            await Router.open(dsns(ours), observer_interval_s=BEAT_S) as router,
        ):
            await until(lambda: all(status.epoch is not None for status in router.board.replicas))
            await beats(router.board, 10)
            begin = await primary.fetchval("SELECT pg_current_wal_flush_lsn()::text")
            await beats(router.board, 20)
            end = await primary.fetchval("SELECT pg_current_wal_flush_lsn()::text")
        records = wal_of(ours.primary, begin, end)
    assert any("LogicalMessage" in record for record in records)
    about_rows = [r for r in records if r.startswith(("rmgr: Heap", "rmgr: Btree")) or "desc: LOCK" in r]
    assert [] == about_rows


def wal_of(node: Node, begin: str, end: str) -> list[str]:
    """Return the records of a node's WAL between two positions, as text."""
    program = node.installation.binaries.program("pg_waldump")
    done = subprocess.run(  # noqa: S603 - our own
        [program, "-p", node.data_dir / "pg_wal", "-s", begin, "-e", end],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize("pooled", [False, True])
async def test_a_long_query_on_a_replica_outlives_beats(*, cluster: LocalCluster, pooled: bool) -> None:
    """Its snapshot is older than all that is vacuumed meanwhile, and replay waits for no query."""
    replica = cluster.replicas[0]
    async with (
        configured([replica], "max_standby_streaming_delay", "200ms"),
        on(cluster.primary) as primary,
        on(replica) as other,
    ):
        with addresses(cluster, pooled=pooled) as nodes:
            async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
                await beats(router.board, 5)
                await vacuumed(primary, cluster)
                async with other.transaction(isolation="repeatable_read", readonly=True):
                    await other.fetchval("SELECT count(*) FROM rides")
                    await beats(router.board, 10)
                    await vacuumed(primary, cluster)
                    assert 0 <= await other.fetchval("SELECT count(*) FROM rides")


async def vacuumed(primary: Connection, cluster: LocalCluster) -> None:
    """Have what beats may have left removed, and the WAL of that replayed."""
    await primary.execute("VACUUM replica_statuses")
    await primary.execute("SELECT pg_logical_emit_message(true, 'test', '')")  # else it need not be flushed
    await cluster.wait_for_catchup()


@pytest.mark.parametrize("setting", ["off", "on"])
async def test_a_beat_is_flushed_and_waits_for_no_standby(cluster: LocalCluster, setting: str) -> None:
    """Whatever the role's sessions do by default, and though no standby confirms."""
    async with on(cluster.primary) as primary, configured([cluster.primary], "synchronous_standby_names", "away"):
        await until_known(cluster.primary, "synchronous_standby_names", "away")
        await primary.execute(f"SET synchronous_commit = {setting}")
        async with asyncio.timeout(5):
            for _ in range(5):
                before = await primary.fetchval("SELECT pg_current_wal_insert_lsn()")
                await heartbeat.beat(primary)
                assert await flushed(primary) > before
        assert setting == await primary.fetchval("SHOW synchronous_commit")


async def test_a_standby_that_is_awaited_holds_up_no_look_at_the_primary(cluster: LocalCluster) -> None:
    """Its status is as young as ever, and no wait is cancelled on the primary, which would log that each time."""
    observer = Observer(dsns(cluster), Board(), interval_s=DAY_S)
    await observer.run_once()
    async with configured([cluster.primary], "synchronous_standby_names", "away"):
        await until_known(cluster.primary, "synchronous_standby_names", "away")
        async with asyncio.timeout(1.5):
            await observer.run_once()
    observer.close()


async def until_known(node: Node, setting: str, value: str) -> None:
    """Wait until a server has read its configuration again."""
    async with on(node) as admin, asyncio.timeout(10):
        while await admin.fetchval("SELECT current_setting($1)", setting) != value:
            await asyncio.sleep(0.01)


async def test_who_records_statuses_does_so_beside_those_that_do_not(cluster: LocalCluster) -> None:
    """They are elected apart: the table is written, whichever process came first."""
    only_beats = Observer(dsns(cluster, "primary"), Board(), interval_s=DAY_S)
    records = Observer(dsns(cluster), Board(), interval_s=DAY_S, record_statuses=True)
    try:
        await only_beats.run_once()
        async with asyncio.timeout(5):  # an observer of an earlier test may be elected still
            await records.run_once()
            while set(await table(cluster)) != {"replica0", "replica1"}:
                await records.run_once()
    finally:
        only_beats.close()
        records.close()


async def test_a_replica_that_stands_still_is_not_made_to_note_its_timeline_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It notes it when it goes on; each time leaves dead rows in the catalogs."""
    noted = 0
    have_noted = epochs.have_timelines_noted

    async def counted(primary: Connection) -> Lsn:
        nonlocal noted
        noted += 1
        return await have_noted(primary)

    monkeypatch.setattr(watch, "have_timelines_noted", counted)
    monkeypatch.setattr(watch, "_NOTED_AGAIN_S", 0.0)
    async with (
        a_cluster() as ours,
        paused(ours),
        await Router.open(dsns(ours), observer_interval_s=BEAT_S) as router,
    ):
        await beats(router.board, 10)
        assert [None] == [status.epoch for status in router.board.replicas]
        assert 1 == noted
        async with on(ours.replicas[0]) as replica:
            await replica.execute("SELECT pg_wal_replay_resume()")
        await until(lambda: [router.board.epoch] == [status.epoch for status in router.board.replicas])
