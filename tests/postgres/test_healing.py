"""A replica that cannot go on with its own directory gets another one; a primary never does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from rocket.torture.proxy import Mode, Proxy, socket_path
from tests.postgres.test_promotion import all_have, fetch, keep, settled, supervised

if TYPE_CHECKING:
    from rocket.postgres.node import Node

_MIB = 1024 * 1024


def last_segment(node: Node, timeline: int, number: int) -> bytes:
    """Return a segment of a node's WAL, as far as it has got it; nothing, if it has nothing of it."""
    path = node.data_dir / "pg_wal" / f"{timeline:08X}{0:08X}{number:08X}"
    return path.read_bytes().rstrip(b"\0") if path.exists() else b""


async def test_replica_killed_with_half_of_a_new_timelines_file(caplog: pytest.LogCaptureFixture) -> None:
    """It gets the new timeline's file of the segment from its beginning, and dies before it is at the fork.

    Postgres prefers the newest timeline's file of a segment, comes to its end before the fork, and refuses to go
    back to the older timeline's.
    """
    caplog.set_level("INFO", "rocket.cluster")
    async with supervised() as cluster:
        node = cluster.node("replica1")
        link = Proxy(
            socket_path(cluster.socket_dir, 1), lambda: socket_path(cluster.socket_dir, cluster.primary.port)
        )
        async with link.listening():
            cluster.detours["replica1"] = 1
            await cluster.promote("replica0")
            await settled(cluster)
            # It goes on from the beginning of a segment, and the fork is far behind that.
            await fetch(cluster.primary, "SELECT pg_switch_wal()")
            await fetch(cluster.primary, "CHECKPOINT")
            await cluster.wait_for_catchup()
            await fetch(node, "CHECKPOINT")
            for _ in range(8):
                await fetch(cluster.primary, f"SELECT pg_logical_emit_message(true, '', repeat('x', {_MIB}))")
            await keep(cluster.primary, "on timeline 2")
            await cluster.wait_for_catchup()
            segment = int((await fetch(cluster.primary, "SELECT pg_walfile_name(pg_current_wal_lsn())"))[8:], 16)
            await cluster.promote("primary")
            received = b""
            async with asyncio.timeout(10):
                while len(received := last_segment(node, 3, segment)) < 2 * _MIB:
                    await asyncio.sleep(0)
            link.turn(Mode.SILENT_PRIMARY)
            assert len(received) < 6 * _MIB
            node.kill()
            link.turn(Mode.PASS)
            await keep(cluster.primary, "on timeline 3")
            await all_have(cluster, {"on timeline 2", "on timeline 3"})
    assert "previous recovered WAL file came from timeline 3" in caplog.text
