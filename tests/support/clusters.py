"""Small clusters for tests, and what their nodes hold."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest

from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.process import server_processes
from rocket.cluster.supervisor import local_cluster, supervise
from rocket.lab.shutdown import background

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node
    from rocket.cluster.process import ServerProcess

EVERY_POSTGRES = pytest.mark.parametrize("postgres", ["wheel", "system"])
"""For tests of a cluster on each Postgres: the wheel's, and the system's where there is one."""
SCHEMA = "CREATE TABLE IF NOT EXISTS kept (what text)"


def settings(**others: object) -> ClusterSettings:
    """Return settings of a small cluster on free ports, with a table `kept`."""
    return ClusterSettings(**{"replicas": 1, "port": 0, "schema": SCHEMA} | others)  # type: ignore[arg-type]


def on(request: pytest.FixtureRequest, postgres: str, wheel: LocalCluster) -> LocalCluster:
    """Return the session's cluster on a Postgres; `wheel` is the one on the wheel's."""
    return wheel if postgres == "wheel" else request.getfixturevalue("system_cluster")


@contextlib.asynccontextmanager
async def supervised(
    data_dir: Path | None = None, replicas: int = 2, **others: object
) -> AsyncIterator[LocalCluster]:
    """Run a small cluster that is kept alive; check that no process of it is left."""
    wanted = settings(replicas=replicas, data_dir=data_dir, **others)
    async with local_cluster(wanted) as cluster, background(supervise(cluster), "supervisor"):
        yield cluster
    assert [] == processes_of(cluster)


def processes_of(cluster: LocalCluster) -> list[int]:
    """Return the ids of all processes that the cluster's servers still have."""
    return [process.pid for node in cluster.nodes.values() for process in server_processes(node.data_dir)]


async def has_run_again(node: Node, before: ServerProcess | None) -> None:
    """Wait until a node is up as another process than `before`."""
    async with asyncio.timeout(20):
        while node.process is before:
            await asyncio.sleep(0.01)
        await node.up.wait()


async def fetch(node: Node, statement: str) -> Any:
    """Return one value from a node."""
    connection = await node.connect()
    try:
        return await connection.fetchval(statement)
    finally:
        connection.terminate()


async def keep(node: Node, what: str) -> None:
    """Write a row of the table `kept`."""
    await fetch(node, f"INSERT INTO kept VALUES ('{what}')")  # noqa: S608


async def rows(node: Node) -> set[str]:
    """Return the rows of the table `kept` that a node has."""
    return set(await fetch(node, "SELECT coalesce(array_agg(what), '{}') FROM kept"))


async def received(node: Node, lsn: str) -> None:
    """Wait until a replica has received WAL up to `lsn`, replayed or not."""
    async with asyncio.timeout(10):
        while not await fetch(node, f"SELECT pg_last_wal_receive_lsn() >= '{lsn}'::pg_lsn"):
            await asyncio.sleep(0.01)


async def settled(cluster: LocalCluster) -> None:
    """Wait until every node is up and follows the primary."""
    async with asyncio.timeout(20):
        while not all(node.up.is_set() and not node.suspect for node in cluster.nodes.values()):
            await asyncio.sleep(0.01)
        await cluster.wait_for_catchup()
    assert [cluster.primary.name] == [node.name for node in cluster.nodes.values() if not node.is_replica]


async def all_have(cluster: LocalCluster, expected: Iterable[str]) -> None:
    """Check that every node has just these rows, and that each replica gets one more."""
    await settled(cluster)
    assert {node.name: set(expected) for node in cluster.nodes.values()} == {
        node.name: await rows(node) for node in cluster.nodes.values()
    }
    last = f"last {time.monotonic_ns()}"
    await keep(cluster.primary, last)
    await cluster.wait_for_catchup()
    for node in cluster.replicas:
        assert last in await rows(node)
    await fetch(cluster.primary, f"DELETE FROM kept WHERE what = '{last}'")  # noqa: S608
