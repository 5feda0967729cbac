"""Faults on demand: what the control socket, and later torture, does to a running cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, Literal

import asyncpg
import psutil

from rocket.cluster.errors import NodeFrozen, NodeNotRunning, NotAReplica
from rocket.cluster.node import CONNECT_TIMEOUT_S
from rocket.errors import describe

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

ReplicationProcess = Literal["startup", "walreceiver"]
"""As `pg_stat_activity` has it in `backend_type`: what replays, and what receives."""

_LOST = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What asyncpg makes of a server that goes away; the last one if it does so between two statements."""
_STATUS_TIMEOUT_S = 2.0  # to connect, and again to answer: somebody is looking on
_CUT_TIMEOUT_S = 5.0
_POLL_S = 0.01
_LOOKS_WITHOUT_RECEIVER = 25
"""It may be started once more, after `wal_retrieve_retry_interval`, by who has not read the configuration yet."""

_PAUSE = "SELECT pg_wal_replay_pause()"
_RESUME = "SELECT pg_wal_replay_resume()"
_RELOAD = "SELECT pg_reload_conf()"
_PROCESS = "SELECT pid FROM pg_stat_activity WHERE backend_type = $1"
_END_SENDERS = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_replication WHERE application_name = $1"
_PRIMARY_STATUS = """
    SELECT pg_current_wal_flush_lsn()::text AS lsn,
           ('x' || substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8))::bit(32)::int AS timeline
"""
_REPLICA_STATUS = """
    SELECT pg_last_wal_replay_lsn()::text AS replay_lsn,
           pg_wal_lsn_diff($1::text::pg_lsn, pg_last_wal_replay_lsn())::bigint AS lag_bytes,
           pg_is_wal_replay_paused() AS paused,
           (SELECT status FROM pg_stat_wal_receiver) AS receiver,
           (SELECT received_tli FROM pg_stat_wal_receiver) AS streamed,
           (SELECT pid || '@' || backend_start FROM pg_stat_activity WHERE backend_type = 'startup') AS incarnation
"""


async def pause(node: Node) -> None:
    """Stop a replica's replay: it goes on receiving, and falls behind."""
    await _on_replica(node, _PAUSE)


async def resume(node: Node) -> None:
    """Let a paused replica replay again."""
    await _on_replica(node, _RESUME)


async def delay(node: Node, delay_ms: int, primary_port: int) -> None:
    """Make a replica apply each commit so many milliseconds late; 0 ends it."""
    _refuse_primary(node)
    async with _connection(node) as connection:
        node.apply_delay_ms = delay_ms
        node.configure(primary_port)
        await connection.execute(_RELOAD)


async def cut(node: Node, primary_port: int) -> None:
    """Keep a replica from its primary: it stays up and answers, and receives no WAL, also after a restart.

    Raise `NodeNotRunning` if its WAL receiver does not end.
    """
    _refuse_primary(node)
    async with _connection(node) as connection:
        node.cut = True
        node.configure(primary_port)
        await connection.execute(_RELOAD)
        try:
            async with asyncio.timeout(_CUT_TIMEOUT_S):
                looks = 0
                while looks < _LOOKS_WITHOUT_RECEIVER:
                    receiver = await connection.fetchval(_PROCESS, "walreceiver")
                    if receiver is not None:
                        end_receiver(node, receiver)
                    looks = looks + 1 if receiver is None else 0
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NodeNotRunning(f"{node.name} does not let go of its primary") from None


def end_receiver(node: Node, pid: int) -> None:
    """End a replica's WAL receiver, which no SQL can; not a process that has got its id since."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.cwd() == str(node.data_dir):
            process.terminate()


async def mend(node: Node, primary_port: int) -> None:
    """Let a replica reach its primary again."""
    _refuse_primary(node)
    node.cut = False  # whatever becomes of it: its next start is with a link
    async with _connection(node) as connection:
        node.configure(primary_port)
        await connection.execute(_RELOAD)


async def kill_backend(node: Node) -> None:
    """Kill one of a node's backends: its postmaster then ends all sessions and starts recovery anew."""
    async with _connection(node) as connection:
        os.kill(connection.get_server_pid(), signal.SIGKILL)


async def halt(node: Node, kind: ReplicationProcess) -> None:
    """Halt only the process of a replica that replays, or the one that receives; `let_go` undoes it.

    Raise `NotAReplica`, or `NodeNotRunning` where there is no such process now.
    """
    _refuse_primary(node)
    if kind in node.halted:
        raise NodeFrozen(f"the {kind} process of {node.name} is halted already")
    async with _connection(node) as connection:
        pid = await connection.fetchval(_PROCESS, kind)
    missing = NodeNotRunning(f"{node.name} has no {kind} process now")
    if pid is None:
        raise missing
    try:
        process = psutil.Process(pid)
        if process.cwd() != str(node.data_dir):  # the id is somebody else's by now
            raise missing
        process.suspend()
    except psutil.Error:
        raise missing from None
    node.halted[kind] = process


def let_go(node: Node, kind: ReplicationProcess) -> None:
    """Let a halted process go on, if it is still there: not one that has got its id since.

    Raise `NodeNotRunning` if none was halted, or its server has ended since.
    """
    process = node.halted.pop(kind, None)
    if process is None:
        raise NodeNotRunning(f"no {kind} process of {node.name} is halted")
    with contextlib.suppress(psutil.Error):
        process.resume()  # psutil compares the time at which the process began


async def cut_sender(cluster: LocalCluster, node: Node) -> None:
    """End the process of the primary that sends WAL to a replica; the replica connects again by itself.

    Raise `NotAReplica`, or `NodeNotRunning` where there is no such process now, as behind a frozen primary.
    """
    if node is cluster.primary:
        raise NotAReplica(f"{node.name} is the primary: nobody sends it WAL")
    async with _connection(cluster.primary) as connection:
        ended = await connection.fetchval(_END_SENDERS, node.name)
    if not ended:
        raise NodeNotRunning(f"{cluster.primary.name} sends {node.name} nothing now")


async def _on_replica(node: Node, statement: str) -> None:
    _refuse_primary(node)
    async with _connection(node) as connection:
        await connection.execute(statement)


def _refuse_primary(node: Node) -> None:
    if not node.is_replica:
        raise NotAReplica(f"{node.name} is the primary: only a replica replays")


@contextlib.asynccontextmanager
async def _connection(node: Node, timeout_s: float = CONNECT_TIMEOUT_S) -> Any:
    if node.pid is None or node.frozen:
        raise NodeNotRunning(f"{node.name} is {state(node)}")
    try:
        connection = await node.connect(timeout_s=timeout_s)
    except (asyncpg.PostgresError, *_LOST) as error:
        raise NodeNotRunning(f"{node.name} does not answer: {describe(error)}") from None
    try:
        yield connection
    except _LOST as error:
        raise NodeNotRunning(f"{node.name} no longer answers: {describe(error)}") from None
    finally:
        connection.terminate()


def state(node: Node) -> str:
    """Say in a word how a node is."""
    if node.mending is not None:
        return node.mending
    if node.pid is None:
        return "restarting" if node.wanted else "stopped"
    if node.frozen:
        return "frozen"
    return "up" if node.up.is_set() else "starting"


async def describe_nodes(cluster: LocalCluster) -> list[dict[str, object]]:
    """Say of each node how it is and where it stands; one that does not answer is described without."""
    primary = cluster.primary
    flush_lsn: str | None = None
    timeline: int | None = None
    with contextlib.suppress(NodeNotRunning, OSError, asyncpg.PostgresError):
        async with _connection(primary, _STATUS_TIMEOUT_S) as connection:
            row = await connection.fetchrow(_PRIMARY_STATUS)
            flush_lsn, timeline = row["lsn"], row["timeline"]
    return await asyncio.gather(
        *(_describe(node, primary, flush_lsn, timeline) for node in cluster.nodes.values())
    )


async def _describe(node: Node, primary: Node, flush_lsn: str | None, timeline: int | None) -> dict[str, object]:
    said: dict[str, object] = {
        "name": node.name,
        "role": "primary" if node is primary else "replica",
        "state": state(node),
        "pid": node.pid,
        "port": node.port,
        "timeline": timeline if node is primary else None,
        "lsn": flush_lsn if node is primary else None,
        "lag_bytes": None,
        "paused": False,
        "delay_ms": node.apply_delay_ms,
        "cut": node.cut,
        "receiver": None,
    }
    if node is not primary:
        with contextlib.suppress(NodeNotRunning, OSError, asyncpg.PostgresError):
            async with _connection(node, _STATUS_TIMEOUT_S) as connection:
                row = await connection.fetchrow(_REPLICA_STATUS, flush_lsn)
                said |= {
                    "timeline": _timeline_of(node, row["incarnation"], row["streamed"]),
                    "lsn": row["replay_lsn"],
                    "lag_bytes": None if row["lag_bytes"] is None else max(0, row["lag_bytes"]),
                    "paused": row["paused"],
                    "receiver": row["receiver"],
                }
    return said


def _timeline_of(node: Node, incarnation: str | None, streamed: int | None) -> int | None:
    """Return the timeline that a replica streams, or that it was last seen to stream in this incarnation.

    None if it was not: `pg_control_checkpoint()` goes on naming the one before until the next restartpoint.
    """
    if incarnation is None:
        return streamed
    if streamed is not None:
        node.streamed = incarnation, streamed
    if node.streamed is None or node.streamed[0] != incarnation:
        return None
    return node.streamed[1]
