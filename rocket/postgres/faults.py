"""Faults on demand: what the control socket, and later torture, does to a running cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import asyncpg

from rocket.errors import NodeNotRunning, NotAReplica, in_words

if TYPE_CHECKING:
    from rocket.postgres.cluster import LocalCluster
    from rocket.postgres.node import Node

_STATUS_TIMEOUT_S = 1.0

_PAUSE = "SELECT pg_wal_replay_pause()"
_RESUME = "SELECT pg_wal_replay_resume()"
_RELOAD = "SELECT pg_reload_conf()"
_PRIMARY_STATUS = "SELECT pg_current_wal_flush_lsn()::text"
_REPLICA_STATUS = """
    SELECT pg_last_wal_replay_lsn()::text AS replay_lsn,
           pg_wal_lsn_diff($1::text::pg_lsn, pg_last_wal_replay_lsn())::bigint AS lag_bytes,
           pg_is_wal_replay_paused() AS paused,
           (SELECT status FROM pg_stat_wal_receiver) AS receiver
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


async def kill_backend(node: Node) -> None:
    """Kill one of a node's backends: its postmaster then ends all sessions and starts recovery anew."""
    async with _connection(node) as connection:
        os.kill(connection.get_server_pid(), signal.SIGKILL)


async def _on_replica(node: Node, statement: str) -> None:
    _refuse_primary(node)
    async with _connection(node) as connection:
        await connection.execute(statement)


def _refuse_primary(node: Node) -> None:
    if not node.is_replica:
        raise NotAReplica(f"{node.name} is the primary: only a replica replays")


@contextlib.asynccontextmanager
async def _connection(node: Node) -> Any:
    if node.pid is None or node.frozen:
        raise NodeNotRunning(f"{node.name} is {state(node)}")
    try:
        connection = await node.connect()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise NodeNotRunning(f"{node.name} does not answer: {in_words(error)}") from None
    try:
        yield connection
    finally:
        connection.terminate()


def state(node: Node) -> str:
    """Say in a word how a node is."""
    if node.pid is None:
        return "restarting" if node.wanted else "stopped"
    if node.frozen:
        return "frozen"
    return "up" if node.up.is_set() else "starting"


async def describe(cluster: LocalCluster) -> list[dict[str, object]]:
    """Say of each node how it is and where it stands; one that does not answer is described without."""
    primary = cluster.primary
    flush_lsn: str | None = None
    with contextlib.suppress(NodeNotRunning, OSError, asyncpg.PostgresError):
        async with _connection(primary) as connection:
            flush_lsn = await connection.fetchval(_PRIMARY_STATUS, timeout=_STATUS_TIMEOUT_S)
    return await asyncio.gather(*(_describe(node, primary, flush_lsn) for node in cluster.nodes.values()))


async def _describe(node: Node, primary: Node, flush_lsn: str | None) -> dict[str, object]:
    said: dict[str, object] = {
        "name": node.name,
        "role": "primary" if node is primary else "replica",
        "state": state(node),
        "pid": node.pid,
        "port": node.port,
        "lsn": flush_lsn if node is primary else None,
        "lag_bytes": None,
        "paused": False,
        "delay_ms": node.apply_delay_ms,
        "receiver": None,
    }
    if node is not primary:
        with contextlib.suppress(NodeNotRunning, OSError, asyncpg.PostgresError):
            async with _connection(node) as connection:
                row = await connection.fetchrow(_REPLICA_STATUS, flush_lsn, timeout=_STATUS_TIMEOUT_S)
                said |= {
                    "lsn": row["replay_lsn"],
                    "lag_bytes": None if row["lag_bytes"] is None else max(0, row["lag_bytes"]),
                    "paused": row["paused"],
                    "receiver": row["receiver"],
                }
    return said
