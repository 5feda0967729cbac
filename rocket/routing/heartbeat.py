"""The heartbeat, which keeps WAL flowing on a quiet cluster, and the table `replica_statuses`.

The table is written where that is asked for, for people and for the technique as published. Never-stale routing
does not read it: it cannot tell one incarnation of a replica from the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket.consistency import ReplicaStatus
    from rocket.routing.connection import Connection

WRITERS_LOCK = 0x726F636B6574
"""Key of the advisory lock that elects the one process, of those that record statuses, that writes the table."""
BEAT_LOCK = WRITERS_LOCK + 1
"""The same for those that do not: the one that is elected beats without the table."""

_ELECT = """
    SELECT CASE WHEN pg_try_advisory_lock($1) THEN (
        SELECT count(set_config(name, CASE pg_backend_pid() WHEN $2 THEN $3 ELSE current_setting(name) END, false))
          FROM unnest('{idle_session_timeout, idle_in_transaction_session_timeout}'::text[]) AS silences(name)
    ) END IS NOT NULL
"""
"""A holder of the lock that falls silent (halted, cut off, on a machine that is gone) loses it with its session.

It may do so between two statements of a transaction as well. Behind a transaction pooler other clients share the
session, which then must not be ended.
"""

_SILENT_BEATS = 3
_SHORTEST_SILENCE_S = 1.0
"""How long the holder of the lock may be silent: three beats, and at least a second."""
_LONGEST_SILENCE_MS = 2**31 - 1  # what the setting holds

_ELECT_FOR_NOW = "SELECT pg_try_advisory_xact_lock($1)"

_BEAT = "SELECT set_config('synchronous_commit', 'local', true), pg_logical_emit_message(true, 'rocket', '')"
"""Writes WAL whose commit is flushed, and which ends a wait for the rest of a record (design fact F2).

It leaves no dead row: the WAL of pruning those would conflict with every old snapshot on the replicas (F18). The
setting holds for its transaction: it is flushed whatever the role's settings say, and waits for no standby.
"""

_RECORD = """
    WITH seen AS (
        SELECT name, last_lsn FROM unnest($1::text[], $2::pg_lsn[]) AS seen(name, last_lsn)
    ), gone AS (
        DELETE FROM replica_statuses WHERE name <> ALL ($1)
    )
    INSERT INTO replica_statuses AS known (name, last_lsn)
    SELECT name, last_lsn FROM seen
    ON CONFLICT (name) DO UPDATE SET last_lsn = excluded.last_lsn
"""
"""Writes, and so flushes WAL, even when no status has changed. It leaves dead rows, which `_BEAT` does not."""


async def elect(primary: Connection, lock: int, beat_s: float) -> bool:
    """Return whether the connection's owner is elected by an advisory lock, for as long as the connection lasts.

    The server ends it if the owner lets three beats pass, or a second, whichever takes longer.
    """
    silence_ms = min(round(1000 * max(_SILENT_BEATS * beat_s, _SHORTEST_SILENCE_S)), _LONGEST_SILENCE_MS)
    return bool(await primary.fetchval(_ELECT, lock, primary.get_server_pid(), f"{silence_ms}ms"))


async def elect_for_now(primary: Connection, lock: int) -> bool:
    """Return the same for the transaction under way."""
    return bool(await primary.fetchval(_ELECT_FOR_NOW, lock))


async def beat(primary: Connection) -> None:
    """Have WAL written and flushed, and nothing else."""
    await primary.execute(_BEAT)


async def record(primary: Connection, statuses: Sequence[ReplicaStatus]) -> None:
    """Make the table hold these statuses and no others."""
    await primary.execute(
        _RECORD,
        [status.name for status in statuses],
        [status.replay_lsn.wire for status in statuses],
    )
