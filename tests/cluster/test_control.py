"""The control socket of a running cluster."""

from __future__ import annotations

import asyncio
import json
import signal
import stat
from typing import TYPE_CHECKING, Any

import pytest

from rocket.cluster import cluster as clusters
from rocket.cluster import control
from rocket.cluster.datadir import CONFIGURATION
from rocket.cluster.errors import ClusterNotFound, Refused

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node


async def status(cluster: LocalCluster, name: str) -> dict[str, Any]:
    """Return what the cluster says of one node."""
    return next(node for node in await control.ask(cluster.run_dir, "status") if node["name"] == name)


@pytest.mark.usefixtures("downs")
async def test_only_the_user_may_connect(cluster: LocalCluster) -> None:
    """The socket is private."""
    assert 0o600 == stat.S_IMODE(cluster.control_socket.stat().st_mode)


async def test_the_api_beside_it_is_described(cluster: LocalCluster) -> None:
    """A program that has found the cluster finds the API, too."""
    api = {"url": "http://127.0.0.1:5005", "workers": 2}
    async with control.listening(cluster, lambda: None, api=api):
        assert api == await control.ask(cluster.run_dir, "api")
    async with control.listening(cluster, lambda: None):
        assert await control.ask(cluster.run_dir, "api") is None


async def test_down_is_passed_on(cluster: LocalCluster, downs: list[str]) -> None:
    """The program decides how it ends."""
    await control.ask(cluster.run_dir, "down")
    assert ["down"] == downs


@pytest.mark.usefixtures("downs")
@pytest.mark.parametrize(
    ("command", "details", "words"),
    [
        ("explode", {"node": "primary"}, "no command 'explode'"),
        ("pause", {"node": "replica9"}, "no node 'replica9'"),
        ("pause", {"node": "primary"}, "only a replica"),
        ("delay", {"node": "replica0", "delay_ms": -1}, "between 0 and"),
        ("delay", {"node": "replica0", "delay_ms": "soon"}, "invalid literal"),
        ("pause", {}, "node"),
    ],
)
async def test_wrong_commands_are_refused_with_a_reason(
    cluster: LocalCluster, command: str, details: dict[str, object], words: str
) -> None:
    """Nothing is done, and the socket stays open."""
    with pytest.raises(Refused, match=words):
        await control.ask(cluster.run_dir, command, **details)
    assert await control.ask(cluster.run_dir, "status")


@pytest.mark.usefixtures("downs")
@pytest.mark.parametrize("line", [b"\n", b"not json\n", b"[]\n", b"{}\n", b'"x"\n', b"{" * 100_000 + b"\n", b""])
async def test_garbage_gets_an_error(cluster: LocalCluster, line: bytes) -> None:
    """Whatever comes in, one line goes out."""
    reader, writer = await asyncio.open_unix_connection(cluster.control_socket)
    writer.write(line)
    writer.write_eof()
    assert "error" in json.loads(await reader.readline())
    writer.close()


async def test_cluster_is_found_by_port_or_directory(cluster: LocalCluster) -> None:
    """And what is not there is said to be not there."""
    assert cluster.run_dir == control.find(cluster.data_dir, None)
    assert cluster.run_dir == control.find(None, cluster.node("replica1").port)
    with pytest.raises(ClusterNotFound, match=str(cluster.data_dir)):
        control.find(None, 1)


async def test_pending_command_is_cancelled_when_the_socket_closes(cluster: LocalCluster) -> None:
    """Nothing is started on a cluster that goes down, and its client does not wait for it."""
    node = cluster.node("replica1")
    await node.stop()
    async with control.listening(cluster, lambda: None):
        asking = asyncio.create_task(control.ask(cluster.run_dir, "start", node="replica1"), name="start")
        async with asyncio.timeout(10):
            while node.pid is None:
                await asyncio.sleep(0.001)
    with pytest.raises((Refused, ClusterNotFound)):
        await asking
    assert "stopped" == node.state
    await node.start(cluster.primary.port)
    await cluster.wait_for_catchup()


async def test_answer_that_takes_too_long_is_an_error_of_its_own(cluster: LocalCluster) -> None:
    """The cluster is there; it does not answer."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_unix_server(lambda _, writer: writers.append(writer), cluster.control_socket)
    with pytest.raises(Refused, match="no answer"):
        await control.ask(cluster.run_dir, "status", 0.05)
    for writer in writers:
        writer.close()
    server.close()


@pytest.mark.usefixtures("downs")
async def test_a_replica_that_is_cut_stays_up_and_gets_nothing_until_it_is_mended(cluster: LocalCluster) -> None:
    """Also while it does not replay, and when it has been restarted in between."""
    replica = cluster.node("replica0")
    await control.ask(cluster.run_dir, "pause", node="replica0")
    await control.ask(cluster.run_dir, "cut", node="replica0")
    assert (await status(cluster, "replica0"))["receiver"] is None
    await control.ask(cluster.run_dir, "resume", node="replica0")
    try:
        for _ in range(2):
            said = await status(cluster, "replica0")
            assert ("up", True, None) == (said["state"], said["cut"], said["receiver"])
            before = await received(replica)
            primary = await cluster.primary.connect()
            await primary.execute("SELECT pg_logical_emit_message(true, 'test', 'not for replica0')")
            await primary.close()
            await clusters.wait_for_replay(cluster.node("replica1"), await clusters.flushed_by(cluster.primary))
            assert before == await received(replica)
            await control.ask(cluster.run_dir, "restart", node="replica0")
    finally:
        await control.ask(cluster.run_dir, "mend", node="replica0")
    await cluster.wait_for_catchup()
    assert not (await status(cluster, "replica0"))["cut"]


async def received(node: Node) -> str:
    """Return how far a replica has come."""
    connection = await node.connect()
    replayed: str = await connection.fetchval("SELECT pg_last_wal_replay_lsn()::text")
    await connection.close()
    return replayed


@pytest.mark.usefixtures("downs")
async def test_heal_undoes_all_that_was_done(cluster: LocalCluster) -> None:
    """Every node is up afterwards and follows, whatever was done to it."""
    for command, node in (
        ("pause", "replica0"),
        ("cut", "replica1"),
        ("freeze", "replica0"),
        ("stop", "replica1"),
    ):
        await control.ask(cluster.run_dir, command, node=node)
    await control.ask(cluster.run_dir, "heal")
    await control.ask(cluster.run_dir, "delay", node="replica0", delay_ms=3_600_000)
    await control.ask(cluster.run_dir, "heal")
    await cluster.wait_for_catchup()
    said = await control.ask(cluster.run_dir, "status")
    assert [("up", False, False, 0)] * 3 == [
        (node["state"], node["paused"], node["cut"], node["delay_ms"]) for node in said
    ]


@pytest.mark.usefixtures("downs")
async def test_heal_is_not_overtaken_by_a_fault_that_came_before_it(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The delay waits for a server that is halted, and is set as soon as heal lets that go on."""
    caplog.set_level("INFO", "rocket.control")
    node = cluster.node("replica0")
    assert node.process is not None
    node.process.send_all(signal.SIGSTOP)
    delaying = asyncio.create_task(
        control.ask(cluster.run_dir, "delay", node="replica0", delay_ms=7), name="delay"
    )
    async with asyncio.timeout(10):
        while "delay replica0" not in caplog.messages:
            await asyncio.sleep(0.001)
    node.freeze()
    await control.ask(cluster.run_dir, "heal")
    assert "7 ms late" in await delaying
    assert 0 == (await status(cluster, "replica0"))["delay_ms"]
    assert "7ms" not in (node.data_dir / CONFIGURATION).read_text()


@pytest.mark.usefixtures("downs")
async def test_a_node_that_cannot_be_healed_does_not_keep_the_others_from_it(cluster: LocalCluster) -> None:
    """One fails at once, while the other one is still starting."""
    await control.ask(cluster.run_dir, "stop", node="replica1")
    in_the_way = cluster.node("replica0").data_dir / f"{CONFIGURATION}.new"
    in_the_way.mkdir()
    try:
        with pytest.raises(Refused, match="replica0 is not back"):
            await control.ask(cluster.run_dir, "heal")
        assert "up" == (await status(cluster, "replica1"))["state"]
    finally:
        in_the_way.rmdir()
        await control.ask(cluster.run_dir, "heal")
        await cluster.wait_for_catchup()


@pytest.mark.usefixtures("downs")
async def test_commands_are_reported(cluster: LocalCluster) -> None:
    """Those that were carried out, and those that were refused; not mere questions."""
    reported: list[tuple[str, str | None, bool]] = []
    cluster.on_command.append(lambda done: reported.append((done.command, done.node, done.ok)))
    try:
        await control.ask(cluster.run_dir, "status")
        await control.ask(cluster.run_dir, "heal")
        with pytest.raises(Refused):
            await control.ask(cluster.run_dir, "pause", node="primary")
        await control.ask(cluster.run_dir, "kill", node="replica1", backend=True)
    finally:
        cluster.on_command.clear()
    await cluster.wait_for_catchup()
    assert [("heal", None, True), ("pause", "primary", False), ("kill-backend", "replica1", True)] == reported
