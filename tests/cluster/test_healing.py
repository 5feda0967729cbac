"""A replica that cannot go on with its own directory gets another one; a primary never does."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from rocket.cluster import control
from rocket.cluster.directories import remove_with_shared_memory
from rocket.cluster.errors import ServerKeepsDying
from rocket.cluster.node import Fault, NodeState
from rocket.cluster.promotion import promote
from rocket.cluster.rejoin import bring_up
from rocket.cluster.supervisor import local_cluster, supervise
from rocket.lab.shutdown import background
from rocket.lab.torture.proxy import Mode, Proxy, socket_path
from tests.support.clusters import all_have, fetch, keep, processes_of, settings, settled, supervised

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

_MIB = 1024 * 1024


def has_received(node: Node, segment: str, offset: int) -> bool:
    """Return whether a node has received a segment of WAL up to a page."""
    try:
        with (node.data_dir / "pg_wal" / segment).open("rb") as file:
            file.seek(offset)
            return any(file.read(24))  # a page's header
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("delay_ms", [0, 4000])
async def test_replica_killed_with_half_of_a_new_timelines_file(
    caplog: pytest.LogCaptureFixture, delay_ms: int
) -> None:
    """It gets the new timeline's file of the segment from its beginning, and dies before it is at the fork.

    Postgres prefers the newest timeline's file of a segment, comes to its end before the fork, and refuses to go
    back to the older timeline's. With a delay it has been up for a while before it dies of that.
    """
    caplog.set_level("INFO", "rocket.cluster")
    async with supervised(wal_segment_mib=16) as cluster:  # so that it takes a while to receive one
        node = cluster.node("replica1")
        link = Proxy(
            socket_path(cluster.socket_dir, 1), lambda: socket_path(cluster.socket_dir, cluster.primary.port)
        )
        async with link.listening():
            cluster.upstream_overrides["replica1"] = 1
            await promote(cluster, "replica0")
            await settled(cluster)
            # It goes on from the beginning of a segment, and the fork is far behind that.
            await fetch(cluster.primary, "SELECT pg_switch_wal()")
            await fetch(cluster.primary, "CHECKPOINT")
            await cluster.wait_for_catchup()
            await fetch(node, "CHECKPOINT")
            for _ in range(12):
                await fetch(cluster.primary, f"SELECT pg_logical_emit_message(true, '', repeat('x', {_MIB}))")
            await keep(cluster.primary, "on timeline 2")
            await cluster.wait_for_catchup()
            segment = await fetch(cluster.primary, "SELECT pg_walfile_name(pg_current_wal_lsn())")
            segment = segment.replace("00000002", "00000003", 1)
            await promote(cluster, "primary")
            async with asyncio.timeout(10):
                while not has_received(node, segment, _MIB):
                    await asyncio.sleep(0)
            link.turn(Mode.SILENT_PRIMARY)
            assert not has_received(node, segment, 11 * _MIB)
            node.impose(Fault.DELAYED, delay_ms)
            node.kill()
            link.turn(Mode.PASS)
            async with asyncio.timeout(20):
                while not node.suspect:
                    await asyncio.sleep(0.01)
            node.lift(Fault.DELAYED)
            await keep(cluster.primary, "on timeline 3")
            await all_have(cluster, {"on timeline 2", "on timeline 3"})
    assert "previous recovered WAL file came from timeline 3" in caplog.text
    assert 1 == caplog.text.count("replica1 died (by signal 9, SIGKILL): starting it again")
    assert 1 == caplog.text.count("starting it again")  # its first complaint is heard, however soon it dies
    assert "cloned anew" not in caplog.text  # what it has is good, except for one file


def _no_directory(node: Node) -> None:
    remove_with_shared_memory(node.data_dir)


def _no_control_file(node: Node) -> None:
    (node.data_dir / "global" / "pg_control").unlink()


def _garbage_in_control_file(node: Node) -> None:
    path = node.data_dir / "global" / "pg_control"
    path.write_bytes(b"garbage!" * (path.stat().st_size // 8))


def _no_wal(node: Node) -> None:
    shutil.rmtree(node.data_dir / "pg_wal")


def _no_segments(node: Node) -> None:
    for path in (node.data_dir / "pg_wal").glob("0*"):
        path.unlink()


def _zeros_in_segments(node: Node) -> None:
    for path in (node.data_dir / "pg_wal").glob("0*"):
        path.write_bytes(bytes(path.stat().st_size))


def _no_version(node: Node) -> None:
    (node.data_dir / "PG_VERSION").unlink()


DAMAGES = [
    _no_directory, _no_control_file, _garbage_in_control_file, _no_wal, _no_segments, _zeros_in_segments,
    _no_version,
]  # fmt: skip


def damaged(cluster: LocalCluster, node: Node, damage: Callable[[Node], None]) -> None:
    """Crash a server, and damage its directory before it can be started again."""
    assert cluster.node(node.name) is node
    node.kill()
    damage(node)


async def given_up(node: Node) -> None:
    """Wait until a node is no longer started again."""
    async with asyncio.timeout(60):
        while node.state is not NodeState.GIVEN_UP:
            await asyncio.sleep(0.01)


async def dies(node: Node) -> None:
    """Let a server die once it is up, by a signal from outside."""
    async with asyncio.timeout(20):
        await node.up.wait()
    pid = node.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while node.up.is_set() and node.pid in {pid, None}:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("damage", DAMAGES)
async def test_replica_with_a_damaged_directory_comes_back(damage: Callable[[Node], None]) -> None:
    """Whether Postgres finds its way out of that by itself or not; what it had is on it again."""
    async with supervised() as cluster:
        await keep(cluster.primary, "before")
        await cluster.wait_for_catchup()
        damaged(cluster, cluster.node("replica0"), damage)
        await keep(cluster.primary, "meanwhile")
        async with asyncio.timeout(20):
            while cluster.node("replica0").up.is_set():
                await asyncio.sleep(0.01)
        await all_have(cluster, {"before", "meanwhile"})


async def test_replica_is_cloned_anew_after_two_failed_starts(caplog: pytest.LogCaptureFixture) -> None:
    """No earlier, no later, and it says so; what ALTER SYSTEM has set on the primary stays there."""
    caplog.set_level("INFO", "rocket.cluster")
    async with supervised() as cluster:
        node = cluster.node("replica0")
        await fetch(cluster.primary, "ALTER SYSTEM SET cluster_name = 'for a moment'")
        damaged(cluster, node, _garbage_in_control_file)
        async with asyncio.timeout(20):
            while not node.unfit:
                await asyncio.sleep(0.01)
        await all_have(cluster, set())
        assert "for a moment" not in (node.data_dir / "postgresql.auto.conf").read_text()
    assert 2 == caplog.text.count("replica0 died while starting")
    assert "replica0 died again (while starting): it is cloned anew from primary" in caplog.text
    assert 1 == caplog.text.count("replica0 is cloned anew from primary")


async def test_replica_that_dies_again_and_again_is_cloned_anew_and_then_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At the third death within a minute, and at the fifth: it alone, until it is started by hand."""
    caplog.set_level("INFO", "rocket.cluster")
    async with supervised() as cluster:
        node = cluster.node("replica0")
        for _ in range(2):
            await dies(node)
        assert "anew" not in caplog.text
        await dies(node)
        await all_have(cluster, set())
        assert "replica0 died again (by signal 9, SIGKILL): it is cloned anew from primary" in caplog.text
        for _ in range(2):
            await dies(node)
        await given_up(node)
        assert "replica0 keeps dying (by signal 9, SIGKILL): see " in caplog.text
        assert {"primary": "up", "replica0": "given up", "replica1": "up"} == {
            each.name: each.describe_state() for each in cluster.nodes.values()
        }
        await keep(cluster.primary, "meanwhile")
        await bring_up(cluster, node)
        await dies(node)  # its count begins anew
        await all_have(cluster, {"meanwhile"})


async def test_replica_is_given_up_when_not_even_a_fresh_copy_starts(caplog: pytest.LogCaptureFixture) -> None:
    """Another program has taken its port: no directory helps against that, until `heal` finds it free again."""
    caplog.set_level("INFO", "rocket.cluster")
    async with local_cluster(settings()) as cluster:
        node = cluster.node("replica0")
        async with background(supervise(cluster), "supervisor"):
            await cluster.wait_for_catchup()
        node.kill()
        async with asyncio.timeout(5):
            while node.pid is not None:
                await asyncio.sleep(0.01)
        taken = socket.socket()
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", node.port))
        taken.listen()
        async with background(supervise(cluster), "supervisor"):
            with taken:
                await given_up(node)
            assert "replica0 does not start, not even as a fresh copy: see " in caplog.text
            await keep(cluster.primary, "meanwhile")
            await control.heal(cluster)
            await all_have(cluster, {"meanwhile"})
    assert 5 + 1 == caplog.text.count("replica0 is cloned anew from primary")


async def test_primary_is_never_cloned_anew(caplog: pytest.LogCaptureFixture) -> None:
    """No other node has more than it has: five failed starts end the program, which names the log."""
    async with local_cluster(settings()) as cluster:
        damaged(cluster, cluster.primary, _garbage_in_control_file)
        async with asyncio.timeout(60):
            with pytest.raises(ServerKeepsDying, match=r"primary keeps dying \(while starting\): see .*server"):
                await supervise(cluster)
        assert not cluster.primary.suspect
    assert [] == processes_of(cluster)
    assert 5 == caplog.text.count("primary died while starting")
    assert "anew" not in caplog.text


async def test_damaged_replica_waits_for_a_primary_that_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """It is not given up meanwhile, however long that takes."""
    async with supervised(retry_s=0.1) as cluster:
        node, primary = cluster.node("replica0"), cluster.primary
        await primary.stop()
        damaged(cluster, node, _garbage_in_control_file)
        async with asyncio.timeout(30):
            while caplog.text.count("replica0 cannot rejoin now") < 6:
                await asyncio.sleep(0.05)
        await bring_up(cluster, primary)
        await all_have(cluster, set())
    assert "keeps dying" not in caplog.text


@pytest.mark.parametrize("damage", [_garbage_in_control_file, _no_version])
async def test_replica_of_a_kept_directory_is_cloned_anew_as_the_cluster_starts(
    kept_dir: Path, damage: Callable[[Node], None]
) -> None:
    """It was damaged while nothing ran, and no promotion had ever made it suspect."""
    async with supervised(kept_dir / "data") as cluster:
        await keep(cluster.primary, "kept")
    damage(cluster.node("replica1"))
    async with supervised(kept_dir / "data") as cluster:
        await all_have(cluster, {"kept"})
