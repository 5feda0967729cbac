"""Servers that do not have the history that their address stands for: foreign, restored, or promoted in secret."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from rocket import InvalidToken, Role, Router, Unavailable
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.supervisor import local_cluster
from rocket.health import Code, examine
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.schema import tables
from rocket.topology.nodes_file import check_usable, follow
from tests.support.servers import dsns, schema, until, write_nodes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

BEAT_S = 0.05
NOTES = "CREATE TABLE IF NOT EXISTS notes (id bigint PRIMARY KEY, text text);"
GRANTED = "GRANT SELECT, INSERT, UPDATE, DELETE ON notes TO rocket_monitor, rocket_plain;"


@contextlib.asynccontextmanager
async def a_cluster(replicas: int = 1) -> AsyncIterator[LocalCluster]:
    """Run a cluster of its own, without a supervisor."""
    sql = schema() + NOTES + GRANTED
    async with local_cluster(
        ClusterSettings(replicas=replicas, port=0, database=DATABASE, schema=sql, wal_segment_mib=16)
    ) as cluster:
        yield cluster


async def open_router(nodes: dict[str, str]) -> Router:
    """Open a router that looks often."""
    return await Router.open(nodes, observer_interval_s=BEAT_S)


async def sql(node: Node, *statements: str) -> Any:
    """Run statements on a node, and return the first value of the last."""
    connection = await node.connect(DATABASE)
    try:
        for statement in statements[:-1]:
            await connection.execute(statement)
        return await connection.fetchval(statements[-1])
    finally:
        connection.terminate()


async def looked_at_again(router: Router, node: Node) -> None:
    """Wait for the status of a replica that a look gave which begins from now on."""
    now = time.monotonic()

    def is_new() -> bool:
        status = router.board.replica(node.name)
        return status is not None and status.observed_at > now

    await until(is_new)


async def write(session: Session, number: int, text: str = "x") -> None:
    """Write a note."""
    await session.write(
        lambda db: db.execute(
            "INSERT INTO notes VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET text = excluded.text", number, text
        )
    )


async def read(session: Session, number: int) -> str | None:
    """Read a note."""

    async def work(db: Connection) -> str | None:
        text: str | None = await db.fetchval("SELECT text FROM notes WHERE id = $1", number)
        return text

    return await session.read(work)


async def writable(router: Router, within_s: float = 10) -> None:
    """Wait until the router takes writes."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await write(router.session("any"), 0)
            except Unavailable:
                await asyncio.sleep(0.01)
            else:
                return


async def promoted(node: Node) -> None:
    """Promote a replica."""
    assert await sql(node, "SELECT pg_promote(true, 30)")


async def served_by(session: Session, role: Role) -> None:
    """Read until a node in this role serves."""
    async with asyncio.timeout(10):
        while session.last is None or session.last.role is not role:
            await read(session, 0)


async def named_epoch_of(cluster: LocalCluster) -> None:
    """Have a router of its own name a cluster's epoch."""
    async with await open_router(dsns(cluster)) as router:
        await writable(router)
    await cluster.wait_for_catchup()


# --- servers of another cluster ---


async def test_servers_of_another_cluster_take_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A primary and a replica of a later timeline, by wrong addresses: refused by name, loudly, once."""
    async with a_cluster() as ours, a_cluster(2) as other:
        first, theirs, its_replica = other.nodes.values()
        await first.stop()
        await promoted(theirs)
        other.set_primary(theirs, 2)
        its_replica.reconfigure(theirs.port)
        async with await open_router(dsns(other, theirs.name, its_replica.name)) as router:
            await writable(router)
            await served_by(router.session("ann"), Role.REPLICA)
        foreign = {
            "q": dsns(other, theirs.name)[theirs.name],
            "s": dsns(other, its_replica.name)[its_replica.name],
        }

        async with await open_router(dsns(ours)) as router:
            await writable(router)
            epoch = router.board.epoch
            for name, dsn in foreign.items():
                await router.add(name, dsn)
            await until(lambda: {"q", "s"} == set(router.board.refused))
            session = router.session("ann")
            await write(session, 1)
            assert ("primary", epoch) == (session.last and session.last.node, router.board.epoch)
            found = next(
                finding for finding in (await examine(router)).degraded if finding.code == Code.NODE_REFUSED
            )
            assert "q: it is of another cluster" in found.text

            await ours.primary.stop()
            await until(lambda: router.board.primary_is_lost)
            with pytest.raises(Unavailable, match="q: it is of another cluster"):
                await write(router.session("ann"), 2)
            await ours.primary.start(ours.primary.port)
            await writable(router)
            assert epoch == router.board.epoch

            for name in foreign:
                await router.remove(name)
            assert {} == dict(router.board.refused)
            await write(session, 3)
            assert "x" == await read(session, 3)
        assert 0 == await sql(theirs, "SELECT count(*) FROM notes WHERE id > 0")
        loud = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
        assert 1 == sum(message.startswith("q is left alone") for message in loud)

        mixed = {**foreign, **dsns(ours), "r2": dsns(ours, "replica0")["replica0"]}
        async with await open_router(mixed) as router:
            await writable(router)  # the most nodes are of ours
            assert epoch == router.board.epoch


async def test_a_cluster_made_anew_at_the_same_addresses_is_accepted() -> None:
    """At a lower timeline, as by initdb; sessions of the old one learn of losses."""
    async with a_cluster() as ours, a_cluster(0) as made:
        old, node = ours.nodes.values()
        await promoted(node)
        await old.stop()
        async with await open_router({node.name: dsns(ours, node.name)[node.name]}) as router:
            await writable(router)
            session = router.session("ann")
            await write(session, 1)
            token = session.token
            await node.stop()
            await made.primary.stop()
            shutil.rmtree(node.data_dir)
            shutil.move(made.primary.data_dir, node.data_dir)
            await node.start(node.port)
            await writable(router)
            assert (router.board.epoch or "").startswith("1-")
            session = router.session("ann", token)
            assert await read(session, 1) is None
            assert session.lost is not None


async def test_a_replica_that_was_promoted_for_another_use_is_left_once_it_is_off_the_list(kept_dir: Path) -> None:
    """It is followed, as a failover is; by a corrected file the router goes back to the primary that is left."""
    async with a_cluster() as ours:
        old, new = ours.nodes.values()
        async with await open_router(dsns(ours)) as router:
            await writable(router)
            first = router.board.epoch
            await promoted(new)
            await until(lambda: router.board.primary is not None and router.board.primary.name == new.name)
            await writable(router)
            session = router.session("ann")
            await write(session, 1, "astray")
            file = kept_dir / "nodes"
            write_nodes(file, dsns(ours, old.name))

            async with background(follow(file, dsns(ours), router, poll_s=0.02), "nodes"):
                await until(lambda: router.board.primary is not None and router.board.primary.name == old.name)
                await writable(router)
            assert first == router.board.epoch
            assert await read(session, 1) is None
            assert session.lost is not None
            assert session.lost.writes


# --- servers that have lost WAL ---


@contextlib.asynccontextmanager
async def set_back(node: Node) -> AsyncIterator[None]:
    """Take a snapshot of a stopped node's directory; go back to it at the end."""
    await node.stop()
    snapshot = node.data_dir.with_name("snapshot")
    shutil.copytree(node.data_dir, snapshot)
    for path in (snapshot, *snapshot.rglob("*")):
        node.installation.own(path)
    await node.start(node.port)
    yield
    await node.stop()
    shutil.rmtree(node.data_dir)
    snapshot.rename(node.data_dir)
    await node.start(node.port)


@pytest.mark.parametrize("later", [False, True], ids=["seen", "by its replica"])
async def test_a_primary_set_back_to_a_snapshot_has_lost(later: bool) -> None:
    """Its replica goes on with what was lost: it serves no read, and sessions learn of it."""
    async with a_cluster() as ours, contextlib.AsyncExitStack() as stack:
        router = await stack.enter_async_context(await open_router(dsns(ours)))
        await writable(router)
        async with set_back(ours.primary):
            await writable(router)
            session, reader = router.session("ann"), router.session("bob")
            for number in range(1, 60):
                await write(session, number, "acknowledged")
            await ours.wait_for_catchup()
            await read(reader, 1)
            tokens, before = (session.token, reader.token), router.board.epoch
            if later:  # a process that was started after all that
                await router.aclose()
        if later:
            router = await stack.enter_async_context(await open_router(dsns(ours)))
        await writable(router)
        assert before != router.board.epoch
        for number in range(100, 400):
            session = router.session("cy")
            await write(session, number, "z" * 200)
            assert "z" * 200 == await read(session, number)
        for token in tokens:
            session = router.session("ann", token)
            assert await read(session, 1) is None
            assert session.lost is not None
        session = router.session("ann", tokens[0])
        await write(session, 1, "again")
        assert session.lost is not None
        assert session.lost.writes


async def test_a_loss_that_only_a_token_shows_is_reported() -> None:
    """Every process was restarted, and the replica is gone: a token lies beyond the primary."""
    async with a_cluster(0) as ours:
        async with await open_router(dsns(ours)) as router:
            await writable(router)
            async with set_back(ours.primary):
                await writable(router)
                session = router.session("ann")
                for number in range(1, 60):
                    await write(session, number, "acknowledged")
                token = session.token
                await router.aclose()
        async with await open_router(dsns(ours)) as router:
            await writable(router)
            before = router.board.epoch
            session = router.session("ann", token)
            assert await read(session, 1) is None
            assert session.lost is not None
            assert session.lost.writes
            await until(lambda: router.board.epoch not in {before, None})  # and so are those with earlier tokens
            again = router.board.epoch
            assert token is not None
            forged = token.replace(str(before), str(again)).replace("~0/", "~F/")
            with pytest.raises(InvalidToken):
                await read(router.session("eve", forged), 1)
            assert again == router.board.epoch


@pytest.mark.vouched
async def test_a_server_that_takes_the_epoch_without_a_timeline_of_its_own_is_refused() -> None:
    """By removing standby.signal; once the old primary is off the list it is followed, and losses are told."""
    async with a_cluster(2) as ours:
        old, new, _ = ours.nodes.values()
        async with await open_router(dsns(ours)) as router:
            await writable(router)
            await ours.wait_for_catchup()
            await new.stop()
            session = router.session("ann")
            await write(session, 1, "acknowledged")
            await served_by(session, Role.REPLICA)  # which the observer has seen to have it, while it streamed
            await old.stop()
            (new.data_dir / "standby.signal").unlink()
            await new.start(new.port)
            await until(lambda: new.name in router.board.refused)
            before = router.board.epoch
            with pytest.raises(Unavailable, match="is another server"):
                await write(router.session("bob"), 2)
            assert "acknowledged" == await read(session, 1)  # of a replica
            await sql(new, "INSERT INTO notes SELECT g, 'other' FROM generate_series(500, 900) AS g", "SELECT 1")
            await asyncio.sleep(4 * BEAT_S)
            assert new.name in router.board.refused

            await router.remove(old.name)
            await writable(router)
            assert new.name == (router.board.primary and router.board.primary.name)
            assert before != router.board.epoch
            assert await read(session, 1) is None
            assert session.lost is not None
            assert session.lost.writes


async def test_a_copy_of_a_server_that_takes_the_epoch_is_not_taken_for_the_replica_that_it_was() -> None:
    """It has the epoch's row and an LSN beyond every floor, and lacks what was acknowledged."""
    async with a_cluster(2) as ours:
        old, new, copy = ours.nodes.values()
        async with await open_router(dsns(ours)) as router:
            await writable(router)
            await ours.wait_for_catchup()
            await new.stop()
            session = router.session("ann")
            await write(session, 1, "acknowledged")
            await old.stop()
            (new.data_dir / "standby.signal").unlink()
            await new.start(new.port)
            await until(lambda: new.name in router.board.refused)
            await copy.stop()
            await sql(new, "INSERT INTO notes SELECT g, 'other' FROM generate_series(500, 9000) AS g", "SELECT 1")
            await copy.directory.back_up(new.port)
            await copy.start(new.port)
            async with asyncio.timeout(10):
                while not await sql(copy, "SELECT status = 'streaming' FROM pg_stat_wal_receiver"):
                    await asyncio.sleep(BEAT_S)
            for _ in range(10):  # a first one may fail for want of a connection to what runs there now
                await looked_at_again(router, copy)
                with pytest.raises(Unavailable):
                    await read(session, 1)

            await router.remove(old.name)
            await writable(router)
            assert await read(session, 1) is None
            assert session.lost is not None
            assert session.lost.writes
            await served_by(session, Role.REPLICA)  # which has the row of the epoch that was begun there


async def test_a_restart_of_the_primary_goes_on_in_its_epoch() -> None:
    """Be it by a crash: nothing is lost, and no session is told so."""
    async with a_cluster() as ours, await open_router(dsns(ours)) as router:
        await writable(router)
        session = router.session("ann")
        await write(session, 1, "acknowledged")
        before = router.board.epoch
        ours.primary.kill()
        await until(lambda: router.board.primary_is_lost)
        await ours.primary.start(ours.primary.port)
        await writable(router)
        await write(session, 2)
        assert ("acknowledged", None, before) == (await read(session, 1), session.lost, router.board.epoch)


# --- naming an epoch disturbs no reader ---


async def test_replicas_note_a_new_timeline_beside_a_dump() -> None:
    """A dump holds locks on every table of a replica, rocket's included: replay goes on, and so does the dump."""
    async with a_cluster(2) as ours:
        old, new, other = ours.nodes.values()
        await named_epoch_of(ours)
        dump = await other.connect(DATABASE)
        async with dump.transaction(isolation="repeatable_read", readonly=True):
            for row in await dump.fetch(
                "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace > 16000"
                " OR relnamespace = 'public'::regnamespace AND relkind = 'r'"
            ):
                await dump.fetch(f"SELECT * FROM {row['relname']}")  # noqa: S608
            await old.stop()
            await promoted(new)
            ours.set_primary(new, 2)
            other.reconfigure(new.port)
            async with await open_router(dsns(ours, new.name, other.name)) as router:
                await writable(router)
                session = router.session("ann")
                await served_by(session, Role.REPLICA)
                await write(session, 1)
                await served_by(session, Role.REPLICA)
            assert 0 <= await dump.fetchval("SELECT count(*) FROM notes")
        await dump.close()


# --- without a primary ---


@pytest.mark.vouched
async def test_a_router_that_is_started_while_the_primary_is_away_serves_sessions(kept_dir: Path) -> None:
    """From replicas of the session's epoch that have all it must see; and the dead primary may leave the list."""
    async with a_cluster() as ours:
        async with await open_router(dsns(ours)) as router:
            await writable(router)
            session = router.session("ann")
            await write(session, 1, "acknowledged")
        await ours.wait_for_catchup()
        await ours.primary.stop()
        replica = dsns(ours, "replica0")
        async with await open_router(dsns(ours)) as router:
            late = router.session("ann", session.token)
            assert "acknowledged" == await read(late, 1)
            assert "acknowledged" == await read(late, 1)
            with pytest.raises(Unavailable):
                await write(late, 2)
            with pytest.raises(Unavailable):
                await read(router.session("bob"), 1)
            file = kept_dir / "nodes"
            write_nodes(file, replica)
            async with background(follow(file, dsns(ours), router, poll_s=0.02), "nodes"):
                await until(lambda: ["replica0"] == [pool.name for pool in router.pools])
            assert "acknowledged" == await read(late, 1)
        await check_usable(replica)


async def test_tables_of_an_earlier_version_are_brought_up_to_date(cluster: LocalCluster) -> None:
    """Which knew one epoch for each timeline; applied again, the same SQL changes nothing."""
    name = f"earlier{secrets.token_hex(4)}"
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(f"CREATE DATABASE {name}")
    owner = await cluster.primary.connect(name)
    try:
        await owner.execute(
            "CREATE TABLE epochs (system_id bigint NOT NULL DEFAULT ((pg_control_system()).system_identifier),"
            " timeline int NOT NULL, epoch text NOT NULL UNIQUE, began_at timestamptz NOT NULL DEFAULT now(),"
            " PRIMARY KEY (system_id, timeline));"
            "INSERT INTO epochs (timeline, epoch) VALUES (1, '1-aaaaaaaaaa')"
        )
        for _ in range(2):
            await owner.execute(tables())
        await owner.execute("INSERT INTO epochs (timeline, generation, epoch) VALUES (1, 1, '1.1-bbbbbbbbbb')")
        assert ["1-aaaaaaaaaa", "1.1-bbbbbbbbbb"] == await owner.fetchval(
            "SELECT array_agg(epoch ORDER BY timeline, generation) FROM epochs"
        )
    finally:
        await owner.close()
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()
