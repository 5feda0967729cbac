"""A replica that follows and lets no client in is up; one that cannot be helped ends nothing but itself."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from rocket.cluster import control
from rocket.cluster.datadir import NodeDirectory
from rocket.cluster.errors import NotHealed
from rocket.cluster.node import NodeState
from rocket.cluster.promotion import promote
from rocket.cluster.server import Server
from tests.support.clusters import all_have, fetch, keep, settled, supervised

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

PATIENCE_S = 0.3
WRITE_IN_65_SUBTRANSACTIONS = """
    DO $$ BEGIN
        FOR n IN 1..65 LOOP
            BEGIN INSERT INTO kept VALUES ('of a subtransaction'); EXCEPTION WHEN division_by_zero THEN END;
        END LOOP;
    END $$
"""
"""One more than Postgres keeps count of, and tells a replica that starts."""


@contextlib.asynccontextmanager
async def many_subtransactions(cluster: LocalCluster) -> AsyncIterator[None]:
    """Hold a transaction open on the primary, for which a replica that is started lets no client in (fact F16)."""
    connection = await cluster.primary.connect()
    await connection.execute("BEGIN")
    await connection.execute(WRITE_IN_65_SUBTRANSACTIONS)
    await begin_here(cluster)
    try:
        yield
    finally:
        await connection.close()
    await fetch(cluster.primary, "CHECKPOINT")  # tells replicas what runs; by itself within 15 s


async def begin_here(cluster: LocalCluster) -> None:
    """Have replica0 begin here when it is started again, and not before the transactions that run now."""
    for node in (cluster.primary, cluster.node("replica0")):
        await fetch(node, "CHECKPOINT")
        await cluster.wait_for_catchup()


def useless(node: Node) -> None:
    """Damage a node's directory so that its server does not start."""
    path = node.data_dir / "global" / "pg_control"
    path.write_bytes(bytes(path.stat().st_size))


async def enters(node: Node, state: NodeState) -> None:
    """Wait until a node is in a state."""
    async with asyncio.timeout(20):
        while node.state is not state:
            await asyncio.sleep(0.01)


async def states(cluster: LocalCluster) -> dict[str, object]:
    """Return each node's state as `status` shows it."""
    return {str(node["name"]): node["state"] for node in await cluster.describe_nodes()}


async def test_replica_that_follows_and_lets_no_client_in_is_up(caplog: pytest.LogCaptureFixture) -> None:
    """It is recovering, in a state of its own, as long as the primary's transaction lasts, and no copy helps."""
    caplog.set_level("INFO", "rocket.cluster")
    async with supervised(patience_s=PATIENCE_S) as cluster:
        node = cluster.node("replica0")
        async with many_subtransactions(cluster):
            node.kill()
            await enters(node, NodeState.RECOVERING)
            before = node.process
            await keep(cluster.primary, "meanwhile")
            assert {"primary": "up", "replica0": "recovering", "replica1": "up"} == await states(cluster)
            with pytest.raises(NotHealed, match=r"^replica0 follows, and lets no client in yet"):
                await control.heal(cluster, up_within_s=0.2)
            assert (before, NodeState.RECOVERING) == (node.process, node.state)
        await all_have(cluster, {"meanwhile"})
        assert before is node.process
    assert 1 == caplog.text.count("starting it again")
    assert "anew" not in caplog.text


@pytest.mark.usefixtures("downs")
async def test_replica_that_lets_no_client_in_obeys(cluster: LocalCluster) -> None:
    """It is stopped, started, frozen and killed as ever, and the answers say what it is."""
    node = cluster.node("replica0")
    node.patience_s, patient_s = PATIENCE_S, node.patience_s
    await fetch(cluster.primary, "CREATE TABLE kept (what text)")
    try:
        async with many_subtransactions(cluster):
            answer = await control.ask(cluster.run_dir, "restart", node="replica0")
            assert answer.startswith("replica0 follows, and lets no client in yet (")
            await control.ask(cluster.run_dir, "stop", node="replica0")
            assert NodeState.STOPPED is node.state
            answer = await control.ask(cluster.run_dir, "start", node="replica0")
            assert answer.startswith("replica0 follows, and lets no client in yet (")
            await control.ask(cluster.run_dir, "freeze", node="replica0")
            assert "frozen" == node.describe_state()
            await control.ask(cluster.run_dir, "kill", node="replica0")
            await enters(node, NodeState.RECOVERING)
        await settled(cluster)
    finally:
        node.patience_s = patient_s
        await fetch(cluster.primary, "DROP TABLE kept")


async def test_replica_that_lets_no_client_in_follows_a_promotion() -> None:
    """It cannot be asked what it has received, so it rejoins; and it cannot be promoted itself."""
    async with supervised(patience_s=PATIENCE_S) as cluster:
        node = cluster.node("replica0")
        async with many_subtransactions(cluster):
            node.kill()
            await enters(node, NodeState.RECOVERING)
            await promote(cluster, "replica1")
        await keep(cluster.primary, "after")
        await all_have(cluster, {"after"})


async def test_cluster_starts_with_a_replica_that_lets_no_client_in(
    kept_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The start neither waits for the end of the transaction nor fails for it."""
    caplog.set_level("INFO", "rocket.cluster")
    async with supervised(kept_dir / "data", replicas=1) as cluster:
        await keep(cluster.primary, "before")
    useless(cluster.node("replica0"))
    back_up, clients = NodeDirectory.back_up, []

    async def back_up_meanwhile(directory: NodeDirectory, port: int) -> None:
        """Begin the transaction once the primary is up, and before the replica is."""
        clients.append(await Server("primary", port, directory.installation).connect())
        for statement in ("BEGIN", WRITE_IN_65_SUBTRANSACTIONS):
            await clients[0].execute(statement)
        await back_up(directory, port)

    monkeypatch.setattr(NodeDirectory, "back_up", back_up_meanwhile)
    async with supervised(kept_dir / "data", replicas=1, patience_s=PATIENCE_S) as cluster:
        assert {"primary": "up", "replica0": "recovering"} == await states(cluster)
        for client in clients:
            await client.close()
        await fetch(cluster.primary, "CHECKPOINT")
        await all_have(cluster, {"before"})
    assert 1 == caplog.text.count("replica0 follows, and lets no client in yet")
    assert 1 == len(clients)


async def test_cluster_starts_without_a_replica_that_does_not(
    kept_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its directory is of no use, and the primary gives no copy: it alone is given up, and `heal` tries again."""
    async with supervised(kept_dir / "data", replicas=1) as cluster:
        node = cluster.node("replica0")
        await keep(cluster.primary, "before")
        settings = cluster.primary.data_dir / "postgresql.auto.conf"
    settings.write_bytes(settings.read_bytes() + b"max_wal_senders = 0\n")
    useless(node)
    async with supervised(kept_dir / "data", replicas=1) as cluster:
        assert {"primary": "up", "replica0": "given up"} == await states(cluster)
        assert "replica0 is given up, and the others go on: `start replica0` or `heal` tries again" in caplog.text
        await keep(cluster.primary, "meanwhile")
        with pytest.raises(NotHealed, match=r"^replica0 is not back \(given up\): "):
            await control.heal(cluster)
        await fetch(cluster.primary, "ALTER SYSTEM RESET max_wal_senders")
        await cluster.primary.stop()
        await control.heal(cluster)
        await all_have(cluster, {"before", "meanwhile"})
