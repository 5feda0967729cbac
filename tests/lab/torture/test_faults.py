"""Faults that use a replica up, or hold it up: that they do so, and that they end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import asyncpg
import pytest

from rocket.cluster import faults
from rocket.lab.app import DATABASE

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster


async def test_a_full_replica_takes_no_connection(cluster: LocalCluster) -> None:
    """Those of pools end; once it is over, it takes connections again."""
    node = cluster.replicas[0]
    pooled = await node.connect(DATABASE)
    async with faults.full(cluster, node):
        with pytest.raises(asyncpg.TooManyConnectionsError):
            await node.connect()
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await pooled.execute("SELECT 1")
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(asyncpg.TooManyConnectionsError):
                await (await node.connect()).close()
                break


async def test_replay_waits_for_a_long_query_and_cancels_it(cluster: LocalCluster, email: str) -> None:
    """More than once; once it is over, nothing is left of it."""
    node = cluster.replicas[0]
    primary = await cluster.primary.connect(DATABASE)
    await primary.execute("INSERT INTO users (email) VALUES ($1)", email)
    async with faults.long_query(cluster, node, "users") as detail, asyncio.timeout(20):
        while detail["cancelled"] < 2:
            await primary.execute("UPDATE users SET email = email WHERE email = $1", email)
            await asyncio.sleep(0.01)
    await primary.close()
    replica = await node.connect()
    assert "30s" == await replica.fetchval("SHOW max_standby_streaming_delay")
    await replica.close()
    await cluster.wait_for_catchup()
