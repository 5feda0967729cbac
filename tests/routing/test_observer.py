"""The observer on a real cluster."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, NoReturn

import pytest

from rocket import Policy, Role, Router
from rocket.consistency import Board
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.lab.workers import table_state
from rocket.routing import connection, heartbeat, opening
from rocket.routing.observer import Observer
from tests.support.races import write_ride
from tests.support.servers import dsns, paused, recorded, table, until

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster
    from rocket.dsn import Node
    from rocket.routing.connection import Connection


@pytest.mark.vouched
async def test_observes_every_replica_and_the_primary(
    cluster: LocalCluster, observer: Observer, board: Board
) -> None:
    """One look fills the board and the table."""
    await cluster.wait_for_catchup()
    await recorded(observer, cluster, {"replica0", "replica1"})
    assert {"replica0", "replica1"} == {status.name for status in board.replicas}
    assert board.primary is not None
    for status in board.replicas:
        assert status.streaming
        assert status.vouches_for(status.incarnation)
        assert 0 == board.lag_bytes(status) or status.replay_lsn <= board.primary.flush_lsn
    assert {status.name: int(status.replay_lsn) for status in board.replicas} == await table(cluster)


async def test_table_holds_just_the_replicas_that_exist(
    cluster: LocalCluster, observer: Observer, tmp_path: Path
) -> None:
    """A row of a replica that is gone, or never answers, is removed."""
    await recorded(observer, cluster, {"replica0", "replica1"})
    connection = await cluster.primary.connect(DATABASE)
    await connection.execute("INSERT INTO replica_statuses (name, last_lsn) VALUES ('ghost', '0/1')")
    await connection.close()
    await observer.run_once()
    assert {"replica0", "replica1"} == set(await table(cluster))
    observer.close()
    partly = Observer(
        dsns(cluster, "primary", "replica0") | {"gone": f"postgresql:///x?host={tmp_path}&port=1"},
        Board(),
        interval_s=1,
        record_statuses=True,
    )
    await recorded(partly, cluster, {"replica0"})
    partly.close()


async def test_paused_replica_is_seen_to_fall_behind(
    cluster: LocalCluster, observer: Observer, board: Board
) -> None:
    """Its status stays where its replay stopped."""
    async with paused(cluster, "replica0"):
        connection = await cluster.primary.connect(DATABASE)
        await connection.execute("SELECT pg_logical_emit_message(true, 'test', 'behind')")
        await connection.close()
        await observer.run_once()
        status = board.replica("replica0")
        assert status is not None
        assert board.lag_bytes(status)


async def test_heartbeat_writes_even_if_nothing_changed(cluster: LocalCluster, observer: Observer) -> None:
    """Each look flushes WAL: no replica waits for a record that ends inside the last flush (design fact F2)."""
    await recorded(observer, cluster, {"replica0", "replica1"})
    connection = await cluster.primary.connect(DATABASE)
    before = await connection.fetchval("SELECT pg_current_wal_flush_lsn()")
    await observer.run_once()
    after = await connection.fetchval("SELECT pg_current_wal_flush_lsn()")
    await connection.close()
    assert before < after


async def test_only_one_observer_writes_the_table(cluster: LocalCluster, observer: Observer) -> None:
    """The second one waits for the first one's connection to end."""
    await recorded(observer, cluster, {"replica0", "replica1"})
    second = Observer(dsns(cluster, "primary"), Board(), interval_s=1, record_statuses=True)
    await second.run_once()
    assert {"replica0", "replica1"} == set(await table(cluster))
    observer.close()
    await recorded(second, cluster, set())
    second.close()


@pytest.mark.parametrize("last", ["SELECT 1", "BEGIN"])
async def test_writer_that_falls_silent_gives_the_table_up(cluster: LocalCluster, last: str) -> None:
    """Between two statements of a transaction as well: its process may halt anywhere."""
    dsn = dsns(cluster, "primary")["primary"]
    silent, other = await opening.connect(dsn), await opening.connect(dsn)
    try:
        assert await heartbeat.elect(silent, heartbeat.BEAT_LOCK, 0.05)
        await silent.execute(last)
        async with asyncio.timeout(10):
            while not await heartbeat.elect(other, heartbeat.BEAT_LOCK, 0.05):
                await asyncio.sleep(0.05)
    finally:
        silent.terminate()
        other.terminate()


async def test_primary_that_ended_a_silent_writers_session_stays_current(
    cluster: LocalCluster, observer: Observer, board: Board
) -> None:
    """It is none the worse for it, and is looked at on a new connection at once."""
    await recorded(observer, cluster, {"replica0", "replica1"})
    gone: list[str] = []
    board.on_gone.append(gone.append)
    primary = await cluster.primary.connect(DATABASE)
    async with asyncio.timeout(10):
        while (await table_state(primary)).writer is not None:
            await asyncio.sleep(0.05)
    await primary.close()
    asked_at = time.monotonic()
    await observer.run_once()
    assert "primary" not in gone
    assert board.primary is not None
    assert board.primary.observed_at > asked_at


@pytest.mark.vouched
async def test_lost_replica_loses_its_status_and_gets_it_back(
    cluster: LocalCluster, observer: Observer, board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once when it goes, once when it comes, and the incarnation is another one."""
    caplog.set_level(logging.INFO, "rocket.observer")
    async with background(observer.run(), "observer"):
        await until(lambda: board.replica("replica0") is not None)
        before = board.replica("replica0")
        await cluster.node("replica0").stop()
        try:
            await until(lambda: board.replica("replica0") is None)
            assert board.replica("replica1") is not None
        finally:
            await cluster.node("replica0").start(cluster.primary.port)
        await until(lambda: board.replica("replica0") is not None)
        after = board.replica("replica0")
    assert before is not None
    assert after is not None
    assert not before.vouches_for(after.incarnation)
    said = [record.getMessage() for record in caplog.records if "replica0" in record.getMessage()]
    assert ["out of reach", "is back"] == [
        "out of reach" if "out of reach" in line else "is back" for line in said
    ]


async def test_frozen_replica_holds_up_no_other(cluster: LocalCluster, observer: Observer, board: Board) -> None:
    """Each node has a beat of its own."""
    async with background(observer.run(), "observer"):
        await until(lambda: len(board.replicas) == 2)
        cluster.node("replica0").freeze()
        try:
            frozen_at = time.monotonic()

            def goes_on() -> bool:
                other = board.replica("replica1")
                return other is not None and other.observed_at > frozen_at + 0.5

            await until(goes_on, timeout_s=2)
            await until(lambda: board.replica("replica0") is None)
        finally:
            cluster.node("replica0").thaw()
        await until(lambda: board.replica("replica0") is not None)


async def test_observer_survives_the_primary(cluster: LocalCluster, observer: Observer, board: Board) -> None:
    """Replicas are observed on while it is away, and the table is written again when it is back."""
    async with background(observer.run(), "observer"):
        await until(lambda: len(board.replicas) == 2)
        await cluster.primary.stop()
        try:
            away_at = time.monotonic()
            await until(lambda: all(status.observed_at > away_at for status in board.replicas))
            assert 2 == len(board.replicas)
        finally:
            await cluster.primary.start(cluster.primary.port)
        back_at = time.monotonic()
        await until(lambda: board.primary is not None and board.primary.observed_at > back_at)
    await cluster.wait_for_catchup()


async def test_another_way_to_the_primary_is_no_replica(cluster: LocalCluster) -> None:
    """A primary behind a second name is not read from as a replica, and takes no office from the first."""
    board = Board()
    nodes = {"primary": cluster.primary.dsn(DATABASE), "replica0": cluster.primary.dsn(DATABASE)}
    observer = Observer(nodes, board, interval_s=1)
    current_primary = set()
    for _ in range(3):
        await observer.run_once()
        assert not board.replicas
        assert board.primary is not None
        current_primary.add(board.primary.name)
    observer.close()
    assert 1 == len(current_primary)


async def test_role_that_may_not_see_the_startup_process_vouches_for_nothing(cluster: LocalCluster) -> None:
    """An unknown incarnation equals nothing."""
    connection = await cluster.primary.connect(DATABASE)
    await connection.execute("""
        DO $$ BEGIN CREATE ROLE modest LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
        GRANT SELECT ON epochs TO modest;
    """)
    await connection.close()
    await cluster.wait_for_catchup()
    board = Board()
    dsn = cluster.node("replica0").dsn(DATABASE).replace("postgres@", "modest@")
    observer = Observer(dsns(cluster, "primary") | {"replica0": dsn}, board, interval_s=1)
    await observer.run_once()
    observer.close()
    status = board.replica("replica0")
    assert status is not None
    assert status.incarnation is None
    assert not status.vouches_for(status.incarnation)


@pytest.mark.vouched
async def test_whatever_a_node_does_the_observer_goes_on(
    cluster: LocalCluster, board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    """An unforeseen error takes the status away, is logged with its traceback, and ends nothing."""

    class Odd(connection.NodeConnection):
        __slots__ = ()

        async def fetchrow(self, *_: object, **__: object) -> NoReturn:
            raise KeyError("cannot switch to state 12")

    async def connect(node: Node) -> connection.NodeConnection:
        opened = await opening.connect(node)
        if is_odd and node.dsn == nodes["replica0"]:
            opened.__class__ = Odd
        return opened

    nodes, is_odd = dsns(cluster), False
    observer = Observer(nodes, board, interval_s=0.05, connect=connect)
    await observer.run_once()
    watch = observer.watches["replica0"]
    watch.close()
    is_odd = True
    await observer.run_once()
    assert board.replica(watch.name) is None
    assert isinstance(watch.failure, KeyError)
    assert [True] == [bool(record.exc_info) for record in caplog.records if watch.name in record.getMessage()]
    is_odd = False
    await observer.run_once()
    assert board.replica(watch.name) is not None
    observer.close()


async def test_backends_ended_under_its_hands_do_not_end_it(cluster: LocalCluster, board: Board) -> None:
    """Between a server's last words and the end of the connection asyncpg raises errors of its own kind."""
    observer = Observer(
        dsns(cluster),
        board,
        interval_s=0.001,
    )
    end_observers = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'rocket observer%'"
    )
    admins = [await node.connect() for node in cluster.nodes.values()]
    async with background(observer.run(), "observer"):
        for _ in range(60):
            for admin in admins:
                await admin.execute(end_observers)
            await asyncio.sleep(0.01)
        await until(lambda: len(board.replicas) == 2)
    for admin in admins:
        await admin.close()


async def test_primary_that_cannot_be_written_to_stays_current(
    cluster: LocalCluster, observer: Observer, board: Board
) -> None:
    """The table is for people; a lock held on it costs no read and no write."""
    await recorded(observer, cluster, {"replica0", "replica1"})
    holder = await cluster.primary.connect(DATABASE)
    async with holder.transaction():
        await holder.execute("LOCK TABLE replica_statuses")
        asked_at = time.monotonic()
        await observer.run_once()
        assert board.primary is not None
        assert board.primary.observed_at > asked_at
        assert not board.primary_is_lost
    await holder.close()
    await recorded(observer, cluster, {"replica0", "replica1"})


@pytest.mark.vouched
@pytest.mark.parametrize("table", ["epochs", "covers"])
async def test_a_lock_on_a_table_holds_up_no_read_and_no_write(
    cluster: LocalCluster, email: str, table: str
) -> None:
    """ALTER TABLE that hangs, say: replicas replay its lock, and new connections are opened meanwhile."""
    policy = Policy(lease_s=1.5, primary_lease_s=1.5)
    other = await cluster.primary.connect(DATABASE)
    async with await Router.open(dsns(cluster), policy=policy, observer_interval_s=0.05) as router:
        await write_ride(router, email)
        await cluster.wait_for_catchup()
        board = router.board
        served: Counter[str] = Counter()
        async with asyncio.timeout(30), other.transaction():
            await other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            await cluster.wait_for_catchup()
            for notify in board.on_new_role:
                for name in cluster.nodes:
                    notify(name)  # so that no connection is left
            over_at = time.monotonic() + 2 * policy.lease_s
            while any(
                status is None or status.observed_at < over_at for status in (board.primary, *board.replicas)
            ) or len(board.replicas) < len(cluster.replicas):
                token = (await router.write(_count, subject=email)).token
                answer = await router.read(_count, subject=email, token=token)
                served[answer.role] += 1
        assert served[Role.REPLICA] > 0
        await other.close()
        await write_ride(router, email)


async def test_an_observer_that_begins_under_a_lock_says_who_holds_it(cluster: LocalCluster) -> None:
    """It has never read which epoch there is, so there is nothing to go by."""
    other = await cluster.primary.connect(DATABASE)
    observer = Observer(dsns(cluster, "primary"), Board(), interval_s=0.05)
    try:
        async with asyncio.timeout(30), other.transaction():
            await other.execute("LOCK TABLE epochs IN ACCESS EXCLUSIVE MODE")
            await observer.run_once()
            says = f"a table of rocket's is locked, by process {other.get_server_pid()} there"
            assert says in str(observer.failures()["primary"])
        await observer.run_once()
        assert {} == observer.failures()
    finally:
        observer.close()
        await other.close()


async def _count(node: Connection) -> int:
    return int(await node.fetchval("SELECT count(*) FROM rides"))
