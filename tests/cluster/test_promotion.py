"""A replica becomes the primary, whatever the others are doing, and every node follows it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

from rocket.cluster import control, faults
from rocket.cluster.errors import (
    NodeFrozen,
    NodeNotRunning,
    NoSuchNode,
    NotAReplica,
    PrimaryLeftOut,
    PromotionFailed,
    Refused,
)
from rocket.cluster.promotion import promote
from rocket.cluster.rejoin import bring_up
from rocket.cluster.timelines import Lineage, forks
from tests.support.clusters import all_have, fetch, keep, received, rows, settled, supervised

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node


async def cut_off(cluster: LocalCluster, node: Node) -> None:
    """Let a replica receive nothing: it follows a port where no server listens."""
    cluster.upstream_overrides[node.name] = 1  # there is no such socket
    node.reconfigure(cluster.upstream_port(node))
    async with asyncio.timeout(10):
        while await fetch(node, "SELECT count(*) FROM pg_stat_wal_receiver"):
            await asyncio.sleep(0.01)


async def test_promotion_loses_nothing_and_all_follow() -> None:
    """Even a replica that pauses is first told everything; afterwards the old primary can have its role back."""
    async with supervised() as cluster:
        await faults.pause(cluster.node("replica1"))
        await keep(cluster.primary, "one")
        said = await promote(cluster, "replica1")
        assert "is the primary now (timeline 2); primary follows it" == said
        assert cluster.node("replica1") is cluster.primary
        await keep(cluster.primary, "two")
        await all_have(cluster, {"one", "two"})
        processes = {node.name: node.process for node in cluster.nodes.values()}
        await promote(cluster, "primary")
        assert (cluster.node("primary"), 3) == (cluster.primary, cluster.timeline)
        await all_have(cluster, {"one", "two"})
        # No node was restarted but the one that had to be.
        assert ["replica1"] == [
            name for name, node in cluster.nodes.items() if node.process is not processes[name]
        ]


async def test_the_old_primary_is_not_called_what_it_is_no_longer() -> None:
    """It keeps its name."""
    async with supervised() as cluster, control.listening(cluster, lambda: None):
        await promote(cluster, "replica0")
        await settled(cluster)
        assert "primary (now a replica) does not replay until it is resumed" == await control.ask(
            cluster.run_dir, "pause", node="primary"
        )
        assert "primary (now a replica) reaches replica0 again, and follows it" == await control.ask(
            cluster.run_dir, "mend", node="primary"
        )


async def timeline(cluster: LocalCluster, name: str) -> object:
    """Return the timeline of a node, as the status has it."""
    return next(said["timeline"] for said in await cluster.describe_nodes() if said["name"] == name)


async def test_a_replica_that_is_cut_is_on_the_timeline_that_it_last_streamed() -> None:
    """Its control file still names the one before; another life of it may have come back anywhere."""
    async with supervised() as cluster:
        replica = cluster.node("replica1")
        await promote(cluster, "replica0")
        await settled(cluster)
        assert 2 == await timeline(cluster, "replica1")
        await faults.cut(replica, cluster.upstream_port(replica))
        assert 2 == await timeline(cluster, "replica1")
        await replica.stop()
        await replica.start(cluster.upstream_port(replica))
        assert await timeline(cluster, "replica1") is None
        await faults.reconnect(replica, cluster.upstream_port(replica))
        async with asyncio.timeout(10):
            while await timeline(cluster, "replica1") is None:
                await asyncio.sleep(0.01)
        assert 2 == await timeline(cluster, "replica1")


async def test_promotion_with_a_frozen_primary_and_a_delayed_replica() -> None:
    """A halted primary never goes on; a delay on demand does not hold up the promotion."""
    async with supervised() as cluster:
        old, new = cluster.node("primary"), cluster.node("replica0")
        await faults.delay(new, 3_600_000, cluster.upstream_port(new))
        await keep(old, "late")
        flushed = await fetch(old, "SELECT pg_current_wal_flush_lsn()::text")
        await received(new, flushed)
        assert set() == await rows(new)
        old.freeze()
        await promote(cluster, "replica0")
        await faults.delay(cluster.node("replica1"), 0, cluster.upstream_port(cluster.node("replica1")))
        await all_have(cluster, {"late"})


async def test_tail_that_only_others_had_is_gone_everywhere() -> None:
    """The old primary is killed and another replica is ahead of the new primary: both are turned back."""
    async with supervised() as cluster:
        old, new, ahead = (cluster.node(name) for name in ("primary", "replica0", "replica1"))
        await keep(old, "before")
        await cluster.wait_for_catchup()
        await cut_off(cluster, new)
        await keep(old, "lost")
        async with asyncio.timeout(5):
            while "lost" not in await rows(ahead):
                await asyncio.sleep(0.01)
        old.kill()
        await promote(cluster, "replica0")
        await keep(new, "after")
        await all_have(cluster, {"before", "after"})


async def test_tail_that_was_received_and_not_replayed_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """A replica that pauses, or is frozen, with foreign WAL in its files never replays it."""
    caplog.set_level("INFO", "rocket.cluster")
    async with supervised(replicas=3) as cluster:
        old, new, pausing, frozen = cluster.nodes.values()
        await cut_off(cluster, new)
        await faults.pause(pausing)
        await keep(old, "lost")
        flushed = await fetch(old, "SELECT pg_current_wal_flush_lsn()::text")
        for node in (pausing, frozen):
            await received(node, flushed)
        frozen.freeze()
        old.kill()
        await promote(cluster, "replica0")
        assert "frozen" == frozen.describe_state()
        frozen.thaw()
        await all_have(cluster, set())
    assert "replica1 fits the history of replica0 again" in caplog.text
    assert "(trimming)" in caplog.text


async def test_promotion_by_another_program_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """The old primary goes down for it, and what it took meanwhile is turned back."""
    async with supervised() as cluster:
        old, new = cluster.node("primary"), cluster.node("replica1")
        await keep(old, "before")
        await cluster.wait_for_catchup()
        assert await fetch(new, "SELECT pg_promote()")
        await keep(new, "after")
        async with asyncio.timeout(20):
            while cluster.primary is not new:
                await asyncio.sleep(0.01)
        await all_have(cluster, {"before", "after"})
    assert "replica1 was promoted, and not by rocket" in caplog.text
    assert "died" not in caplog.text


async def test_kept_directory_remembers_its_primary(kept_dir: Path) -> None:
    """Also one that a program left in the middle of a promotion, where two nodes follow no other."""
    data_dir = kept_dir / "data"
    async with supervised(data_dir) as cluster:
        await promote(cluster, "replica1")
        await keep(cluster.primary, "on timeline 2")
        await settled(cluster)
        old = cluster.node("primary")
    async with supervised(data_dir) as cluster:
        assert ("replica1", 2) == (cluster.primary.name, cluster.timeline)
        await all_have(cluster, {"on timeline 2"})
        await cluster.node("replica0").stop()
        # The program dies as soon as the next one is promoted: the old primary has not become a replica yet.
        await promote(cluster, "primary")
        await cluster.node("replica1").stop()
        await keep(cluster.primary, "on timeline 3")
    signals = [node.data_dir / "standby.signal" for node in (old, cluster.node("replica1"))]
    for path in signals:
        path.touch()
    with pytest.raises(PrimaryLeftOut, match="no primary any more"):
        async with supervised(data_dir):
            pass
    for path in signals:
        path.unlink()
    cluster.node("replica0").directory.half_rewound.touch()  # and it died while it rewound this one
    async with supervised(data_dir) as cluster:
        assert ("primary", 3) == (cluster.primary.name, cluster.timeline)
        await all_have(cluster, {"on timeline 2", "on timeline 3"})
        await promote(cluster, "replica1")
        await settled(cluster)
    with pytest.raises(PrimaryLeftOut, match="replica1"):
        async with supervised(data_dir, replicas=1):
            pass


async def test_promotion_is_refused_where_it_makes_no_sense() -> None:
    """And one that fails gives the old primary its role back."""
    async with supervised() as cluster, control.listening(cluster, lambda: None):
        node = cluster.node("replica0")
        with pytest.raises(NotAReplica, match="already"):
            await promote(cluster, "primary")
        with pytest.raises(NoSuchNode):
            await promote(cluster, "replica7")
        with pytest.raises(Refused, match="is the primary already"):
            await control.ask(cluster.run_dir, "promote", node="primary")
        node.freeze()
        with pytest.raises(NodeFrozen):
            await promote(cluster, "replica0")
        node.thaw()
        await faults.halt(node, "startup")
        with pytest.raises(NodeFrozen):
            await promote(cluster, "replica0")
        faults.let_go(node, "startup")
        await node.stop()
        with pytest.raises(NodeNotRunning):
            await promote(cluster, "replica0")
        await control.ask(cluster.run_dir, "start", node="replica0")
        await cluster.wait_for_catchup()
        process = cluster.primary.process
        startup = await fetch(node, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'startup'")
        os.kill(startup, signal.SIGSTOP)  # unknown to the node: it does not come to be promoted
        with pytest.raises(PromotionFailed, match=r"replica0 was not promoted .* primary is the primary again"):
            await promote(cluster, "replica0", timeout_s=1)
        assert cluster.primary.process is not process
        await keep(cluster.primary, "still here")
        await all_have(cluster, {"still here"})
        said = await control.ask(cluster.run_dir, "promote", node="replica0")
        assert "replica0 is the primary now (timeline 2); primary follows it" == said
        assert {"nodes": {n.name: n.dsn("postgres") for n in cluster.nodes.values()}} == await control.ask(
            cluster.run_dir, "addresses"
        )
        await settled(cluster)
        status = await control.ask(cluster.run_dir, "status")
        assert [("primary", "replica", 2), ("replica0", "primary", 2), ("replica1", "replica", 2)] == [
            (node["name"], node["role"], node["timeline"]) for node in status
        ]


async def test_single_processes_of_replication_are_halted_and_go_on(cluster: LocalCluster) -> None:
    """What replays stands still while the rest receives, and the other way round; a new sender follows one."""
    node = cluster.node("replica1")
    await cluster.wait_for_catchup()
    for kind, moved in (("startup", "receive"), ("walreceiver", "replay")):
        await faults.halt(node, kind)  # type: ignore[arg-type]
        with pytest.raises(NodeFrozen):
            await faults.halt(node, kind)  # type: ignore[arg-type]
        table = f"halted_{kind}"
        await fetch(cluster.primary, f"CREATE TABLE {table} ()")
        flushed = await fetch(cluster.primary, "SELECT pg_current_wal_flush_lsn()::text")
        if moved == "receive":
            await received(node, flushed)
        assert not await fetch(node, f"SELECT pg_last_wal_replay_lsn() >= '{flushed}'::pg_lsn")
        faults.let_go(node, kind)  # type: ignore[arg-type]
        await cluster.wait_for_catchup()
        await fetch(cluster.primary, f"DROP TABLE {table}")
    sender = f"SELECT pid FROM pg_stat_replication WHERE application_name = '{node.name}'"  # noqa: S608
    before = await fetch(cluster.primary, sender)
    await faults.cut_sender(cluster, node)
    async with asyncio.timeout(5):
        while await fetch(cluster.primary, sender) in {None, before}:
            await asyncio.sleep(0.01)
    await cluster.wait_for_catchup()


async def test_single_processes_that_are_not_there_cannot_be_halted(cluster: LocalCluster) -> None:
    """The primary has neither, and what ended with its server is not looked for under its old id."""
    node = cluster.node("replica1")
    with pytest.raises(NotAReplica):
        await faults.halt(cluster.primary, "startup")
    with pytest.raises(NotAReplica):
        await faults.cut_sender(cluster, cluster.primary)
    with pytest.raises(NodeNotRunning, match="is halted"):
        faults.let_go(node, "walreceiver")
    await faults.halt(node, "walreceiver")
    await node.stop()
    with pytest.raises(NodeNotRunning, match="is halted"):
        faults.let_go(node, "walreceiver")
    with pytest.raises(NodeNotRunning):
        await faults.halt(node, "walreceiver")
    with pytest.raises(NodeNotRunning, match="nothing now"):
        await faults.cut_sender(cluster, node)
    await bring_up(cluster, node)
    await cluster.wait_for_catchup()


async def test_end_in_the_middle_of_a_promotion_leaves_nothing(kept_dir: Path) -> None:
    """And the next start finds one primary, with everything that was acknowledged."""
    for after_s in (0.0, 0.15, 0.3):
        async with supervised(kept_dir / "data") as cluster:
            await keep(cluster.primary, f"before {after_s}")
            new = cluster.replicas[0]
            promoting = asyncio.create_task(promote(cluster, new.name), name="promote")
            await asyncio.sleep(after_s)
            promoting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await promoting
            cluster.force_stop()
    async with supervised(kept_dir / "data") as cluster:
        await all_have(cluster, {"before 0.0", "before 0.15", "before 0.3"})


def test_a_history_is_read() -> None:
    """Each ancestor was left at a position; comments and empty lines mean nothing."""
    text = "1\t0/3000148\tno recovery target specified\n\n# remark\n2\tA/5000060\twhy\n"
    assert {1: 0x3000148, 2: 0xA05000060} == forks(text)


@pytest.mark.parametrize(
    ("timeline", "end", "held"),
    [(3, 10**12, True), (2, 200, True), (2, 201, False), (1, 150, False), (4, 1, False)],
)
def test_a_lineage_holds_its_ancestors_up_to_the_fork(timeline: int, end: int, *, held: bool) -> None:
    """And nothing of a timeline that it does not descend from."""
    assert held == Lineage(3, {1: 100, 2: 200}).holds(timeline, end)
