"""What a cluster does on every supported Postgres: the wheel's, and the system's where there is one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import psutil
import pytest

from rocket.cluster import control, faults
from rocket.cluster.errors import NodeNotRunning, ServerFailedToStart
from rocket.cluster.process import server_processes
from tests.support.clusters import EVERY_POSTGRES, has_run_again, on

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster


pytestmark = EVERY_POSTGRES


@pytest.fixture
def cluster(request: pytest.FixtureRequest, postgres: str, cluster: LocalCluster) -> LocalCluster:
    """The cluster on each Postgres in turn."""
    return on(request, postgres, cluster)


async def status(cluster: LocalCluster, name: str) -> dict[str, Any]:
    """Return what the cluster says of one node."""
    return next(node for node in await control.ask(cluster.run_dir, "status") if node["name"] == name)


async def test_replicas_stream_from_the_primary(cluster: LocalCluster) -> None:
    """What is written on the primary arrives."""
    connection = await cluster.primary.connect()
    await connection.execute("CREATE TABLE arrives (i int)")
    await cluster.wait_for_catchup()
    for node in cluster.replicas:
        replica = await node.connect()
        assert 0 == await replica.fetchval("SELECT count(*) FROM arrives")
        await replica.close()
    await connection.execute("DROP TABLE arrives")
    await connection.close()


async def test_servers_do_not_run_as_root(cluster: LocalCluster) -> None:
    """Each belongs to an unprivileged account, even if root has started it."""
    for node in cluster.nodes.values():
        for process in server_processes(node.data_dir):
            assert 0 != process.uids().real


async def test_servers_listen_on_a_private_socket_and_on_loopback_with_scram(cluster: LocalCluster) -> None:
    """Other users do not reach the sockets, and TCP asks for the random password."""
    assert 0o700 == stat.S_IMODE(cluster.socket_dir.stat().st_mode)
    assert 0o600 == stat.S_IMODE(cluster.password_file.stat().st_mode)
    for node in cluster.nodes.values():
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(host="127.0.0.1", port=node.port, user="postgres", password="guess", ssl=False)  # noqa: S106
        connection = await asyncpg.connect(
            host="127.0.0.1", port=node.port, user="postgres", passfile=str(cluster.password_file), ssl=False
        )
        stored = await connection.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'")
        assert stored.startswith("SCRAM-SHA-256$")
        assert "127.0.0.1" == await connection.fetchval("SHOW listen_addresses")
        await connection.close()


@pytest.mark.parametrize("name", ["replica0", "primary"])
async def test_killed_server_comes_back_with_its_data(cluster: LocalCluster, name: str) -> None:
    """By a SIGKILL from outside: it is started again, and replication goes on."""
    node = cluster.node(name)
    process = node.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    await has_run_again(node, process)
    await cluster.wait_for_catchup()


async def test_frozen_server_can_be_killed_and_comes_back(cluster: LocalCluster) -> None:
    """Its halted children do not hold the data directory."""
    node = cluster.node("replica0")
    node.freeze()
    process = node.process
    node.kill()
    await has_run_again(node, process)
    await cluster.wait_for_catchup()


async def test_stopped_server_stays_down_until_it_is_started(cluster: LocalCluster) -> None:
    """The supervisor does not take a stop for a crash."""
    node = cluster.node("replica0")
    await node.stop()
    await asyncio.sleep(0.3)
    assert node.pid is None
    with pytest.raises(NodeNotRunning):
        await faults.pause(node)
    await node.start(cluster.primary.port)
    await cluster.wait_for_catchup()


async def test_stop_during_a_start_keeps_the_node_down(cluster: LocalCluster) -> None:
    """A node that is stopped while it is being started again stays down."""
    node = cluster.node("replica0")
    for _ in range(5):
        process = node.process
        node.kill()
        async with asyncio.timeout(10):
            while node.process is process:
                await asyncio.sleep(0.001)
        await node.stop()
        async with asyncio.timeout(5):
            await asyncio.sleep(0.2)
        assert (None, False) == (node.pid, node.up.is_set())
        await node.start(cluster.primary.port)
    await cluster.wait_for_catchup()


async def test_start_that_fails_by_hand_leaves_the_node_down(cluster: LocalCluster) -> None:
    """It can be repaired and started again."""
    node = cluster.node("replica0")
    await node.stop()
    broken = node.data_dir / "postgresql.auto.conf"
    before = broken.read_bytes()
    broken.write_bytes(before + b"no_such_setting = 1\n")
    with pytest.raises(ServerFailedToStart, match="no_such_setting"):
        await node.start(cluster.primary.port)
    assert "stopped" == node.state
    broken.write_bytes(before)
    await node.start(cluster.primary.port)
    await cluster.wait_for_catchup()


async def test_kills_on_demand_never_end_the_supervision(cluster: LocalCluster) -> None:
    """Not even while the server is starting."""
    node = cluster.node("replica0")
    for _ in range(8):
        process = node.process
        node.kill()
        async with asyncio.timeout(10):
            while node.process is process or node.pid is None:
                await asyncio.sleep(0.001)
    await node.up.wait()
    await cluster.wait_for_catchup()


async def test_start_killed_before_its_lock_file_was_written_can_be_repeated(cluster: LocalCluster) -> None:
    """Postgres itself refuses to start over an empty lock file."""
    node = cluster.node("replica0")
    await node.stop()
    (node.data_dir / "postmaster.pid").touch()
    await node.start(cluster.primary.port)
    await cluster.wait_for_catchup()


async def test_delayed_replica_applies_late_and_catches_up_when_it_ends(cluster: LocalCluster) -> None:
    """The delay is in force without a restart."""
    node = cluster.node("replica1")
    await faults.delay(node, 3_600_000, cluster.primary.port)
    connection = await cluster.primary.connect()
    await connection.execute("CREATE TABLE late (i int)")
    replica = await node.connect()
    receive = "SELECT pg_last_wal_receive_lsn() >= $1::text::pg_lsn"
    flushed = await connection.fetchval("SELECT pg_current_wal_flush_lsn()::text")
    async with asyncio.timeout(10):
        while not await replica.fetchval(receive, flushed):
            await asyncio.sleep(0.01)
    assert await replica.fetchval("SELECT to_regclass('late')") is None
    await faults.delay(node, 0, cluster.primary.port)
    await cluster.wait_for_catchup()
    assert await replica.fetchval("SELECT to_regclass('late')") is not None
    await connection.execute("DROP TABLE late")
    await connection.close()
    await replica.close()


@pytest.mark.usefixtures("downs")
async def test_status_describes_every_node(cluster: LocalCluster) -> None:
    """Role, state, position."""
    await cluster.wait_for_catchup()
    nodes = await control.ask(cluster.run_dir, "status")
    assert [("primary", "primary"), ("replica0", "replica"), ("replica1", "replica")] == [
        (node["name"], node["role"]) for node in nodes
    ]
    assert {"up"} == {node["state"] for node in nodes}
    assert {"streaming"} == {node["receiver"] for node in nodes[1:]}


@pytest.mark.usefixtures("downs")
async def test_faults_come_and_go(cluster: LocalCluster) -> None:
    """Each command shows in the status, and its counterpart takes it back."""
    await control.ask(cluster.run_dir, "pause", node="replica0")
    assert (await status(cluster, "replica0"))["paused"]
    await control.ask(cluster.run_dir, "resume", node="replica0")
    assert not (await status(cluster, "replica0"))["paused"]
    await control.ask(cluster.run_dir, "delay", node="replica0", delay_ms=7)
    assert 7 == (await status(cluster, "replica0"))["delay_ms"]
    answer = await control.ask(cluster.run_dir, "delay", node="replica0", delay_ms=0)
    assert "applies commits at once again" in answer
    await control.ask(cluster.run_dir, "freeze", node="replica0")
    assert "frozen" == (await status(cluster, "replica0"))["state"]
    await control.ask(cluster.run_dir, "thaw", node="replica0")
    await control.ask(cluster.run_dir, "stop", node="replica0")
    assert "stopped" == (await status(cluster, "replica0"))["state"]
    await control.ask(cluster.run_dir, "start", node="replica0")
    assert "up" == (await status(cluster, "replica0"))["state"]
    await control.ask(cluster.run_dir, "restart", node="replica0")
    await cluster.wait_for_catchup()


@pytest.mark.usefixtures("downs")
@pytest.mark.parametrize("backend", [True, False])
async def test_killed_node_comes_back(cluster: LocalCluster, *, backend: bool) -> None:
    """A crash of a backend is recovered by the server, a crash of the server by the supervisor."""
    await control.ask(cluster.run_dir, "kill", node="replica1", backend=backend)
    async with asyncio.timeout(20):
        while (await status(cluster, "replica1"))["receiver"] != "streaming":
            await asyncio.sleep(0.02)
    await cluster.wait_for_catchup()


async def test_servers_run_the_programs_that_were_asked_for(
    cluster: LocalCluster, request: pytest.FixtureRequest
) -> None:
    """What runs on the system's Postgres is not the wheel's."""
    found = set()
    for node in cluster.nodes.values():
        for process in server_processes(node.data_dir):
            with contextlib.suppress(psutil.NoSuchProcess):  # some come and go
                found.add(Path(process.exe()).parent)
    system = "system" in request.node.callspec.id
    assert found == {request.getfixturevalue("system_postgres")} if system else len(found) == 1
