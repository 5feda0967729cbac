"""Floor stores: they keep the floors of subjects, for reads that bring no token."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from typing import TYPE_CHECKING, Protocol

import asyncpg

from rocket.consistency import Lsn
from rocket.errors import Unavailable
from rocket.routing.connection import unwrap
from rocket.routing.failures import REFUSED, NotAsObserved, check_tables

if TYPE_CHECKING:
    from rocket.routing.connection import Connection
    from rocket.routing.nodes import Nodes

FORCE_FLUSH = """(
    CASE current_setting('synchronous_commit')
         WHEN 'off' THEN set_config('synchronous_commit', 'local', true)
         ELSE current_setting('synchronous_commit')
    END
    || left(set_config('idle_in_transaction_session_timeout', '5s', true), 0)
)"""
"""Has the transaction's COMMIT flushed before it returns: the floor is a flush LSN (design fact F2).

From here to COMMIT the subject's lock is held: should this program be halted in between, the server ends the
transaction after five seconds.
"""

FORCE_FLUSH_STATEMENT = f"SELECT {FORCE_FLUSH}"


class FloorStore(Protocol):
    """Holds, on the primary, the floor of each subject's reads (a user's, say), and a lock for its writes.

    `SubjectLocks` and `FloorTable` come with rocket; an application may have a store of its own, with a column of
    its users' table, say. It passes one to `Router`, which calls it on connections to the primary. An error that
    an implementation raises (an unknown user, say) reaches the caller of `read` or `write` as it is.
    """

    async def look_up(self, primary: Connection, subject: str | None) -> Lsn | None:
        """Return the subject's floor; None where none is recorded, so that only the primary will do.

        `Lsn.PENDING` stands for a write whose commit LSN is not recorded yet. The statement must fail on a
        server that is not the primary, which a call of `pg_current_wal_flush_lsn()` in it ensures, and leave
        nothing in the session, which is not reset after it.
        """

    async def begin_write(self, primary: Connection, subject: str | None, floor: Lsn) -> str | None:
        """Within a write's transaction, set the subject's floor (to `Lsn.PENDING`).

        Return `rocket.FORCE_FLUSH` if the statement has evaluated it, which saves the router a statement, or None.
        """

    async def record_floor(self, primary: Connection, subject: str | None) -> Lsn:
        """After COMMIT, in a statement of its own, put `pg_current_wal_flush_lsn()` where `Lsn.PENDING` stands.

        Return the LSN put there or, where another write of the subject has done so, the flush LSN.
        """

    async def wait_for_writes(self, primary: Connection, subject: str | None) -> None:
        """Wait until every write of the subject that has begun to commit is visible on the primary.

        A replica can show a commit before the primary does (design fact F13). In a statement of its own, take a
        lock that each write of the subject holds until it is visible: the subject's row, say, in shared mode.
        """


_SUBJECT_CLASS, _WRITE_CLASS = 0x726F636B, 0x726F6378
"""The first of the two keys of an advisory lock on a subject, and on a write: keep clear of the application's."""

_HOLD_WRITE = f"""pg_advisory_xact_lock({_WRITE_CLASS}, pg_current_xact_id_if_assigned()::xid::text::oid::int)"""
"""Locks a write by the id of its transaction: one without an id has written nothing that could be shown."""

_HOLD = f"SELECT {FORCE_FLUSH}, {_HOLD_WRITE} FROM pg_advisory_xact_lock_shared($1, $2)"  # noqa: S608 - our own text
_WAIT = f"""
    WITH held AS MATERIALIZED (
        SELECT pid, classid::int AS class, objid::int AS key
          FROM pg_locks
         WHERE locktype = 'advisory' AND objsubid = 2 AND granted AND classid IN ($1::int, {_WRITE_CLASS})
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    )
    SELECT pg_advisory_xact_lock_shared(write.class, write.key)
      FROM held AS subject JOIN held AS write USING (pid)
     WHERE (subject.class, subject.key, write.class) = ($1, $2, {_WRITE_CLASS})
       AND NOT (SELECT CASE WHEN pg_try_advisory_lock($1, $2) THEN pg_advisory_unlock($1, $2) ELSE false END)
"""  # noqa: S608 - the same
"""Waits for the writes of a subject that are under way when it begins, and holds up none that begins later.

A write holds both of its locks before its COMMIT is sent, and until it is visible. So either the subject's can be
had, which is given back at once, and none is under way; or one look at all locks (`pg_locks` shows one moment)
finds the lock of each that is, which no other write will ever hold: an id of a transaction is not used again.
"""
_FLUSH_LSN = "SELECT pg_current_wal_flush_lsn()"


class SubjectLocks:
    """Keeps no floors, and needs no table: without a token a read goes to the primary. A router's default.

    Each write of a subject holds, from just before COMMIT until it is visible, an advisory lock in shared mode on
    the subject and one on itself, so that a session which comes from a replica to the primary can wait for what
    it has seen there (design fact F13). None is a subject as well, shared by all callers that name none: their
    writes wait neither for each other nor for sessions that wait, yet a session of None waits for the writes of
    all of them that are under way.
    """

    async def look_up(self, primary: Connection, subject: str | None) -> Lsn | None:  # noqa: ARG002 - it keeps none
        """Return None: only the primary will do, which the read itself finds out to be one."""
        return None

    async def begin_write(self, primary: Connection, subject: str | None, floor: Lsn) -> str | None:  # noqa: ARG002
        """Hold the write's locks until it is visible, and have the COMMIT flushed."""
        flushed: str | None = await primary.fetchval(_HOLD, *_lock_of(subject))
        return flushed

    async def record_floor(self, primary: Connection, subject: str | None) -> Lsn:  # noqa: ARG002
        """Return the flush LSN."""
        return Lsn.from_wire(await primary.fetchval(_FLUSH_LSN))

    async def wait_for_writes(self, primary: Connection, subject: str | None) -> None:
        """Wait for the subject's writes under way; none that begins later waits for that."""
        inner = unwrap(primary)
        changed = inner.changed
        await primary.execute(_WAIT, *_lock_of(subject))
        inner.changed = changed  # the lock of the session is given back in the same statement


_LOOK_UP = """
    SELECT (SELECT min_lsn FROM rocket_floors WHERE subject = $1) AS min_lsn,
           pg_current_wal_flush_lsn() AS flush_lsn
"""
_REPAIR_FLOOR = """
    UPDATE rocket_floors
       SET min_lsn = pg_current_wal_flush_lsn()
     WHERE subject = (SELECT subject FROM rocket_floors
                       WHERE subject = $1 AND min_lsn = 'FFFFFFFF/FFFFFFFF'
                         FOR NO KEY UPDATE SKIP LOCKED)
       AND set_config('synchronous_commit', 'off', true) = 'off'
    RETURNING min_lsn
"""
"""Puts an LSN where a crashed writer left PENDING; does not wait for a write that is still under way."""

_BEGIN_WRITE = f"""
    INSERT INTO rocket_floors AS known (subject, min_lsn)
    SELECT $3::text, $4::pg_lsn FROM pg_advisory_xact_lock_shared($1, $2)
    ON CONFLICT (subject) DO UPDATE SET min_lsn = excluded.min_lsn
    RETURNING {FORCE_FLUSH}, {_HOLD_WRITE}
"""  # noqa: S608 - the same
_RECORD_FLOOR = """
    WITH recorded AS (
        UPDATE rocket_floors
           SET min_lsn = pg_current_wal_flush_lsn()
         WHERE subject = $1
           AND min_lsn = 'FFFFFFFF/FFFFFFFF'
           -- A crash before this is flushed leaves PENDING: slower, never stale.
           AND set_config('synchronous_commit', 'off', true) = 'off'
        RETURNING min_lsn
    )
    SELECT coalesce((SELECT min_lsn FROM recorded), pg_current_wal_flush_lsn())
"""
"""Runs after COMMIT, so either LSN covers the write. A concurrent write of the same subject makes the UPDATE wait
for its row and compute anew, or has put an LSN there itself."""


class FloorTable(SubjectLocks):
    """Keeps floors in the table `rocket_floors`: without a token, too, a replica may serve once it has the writes.

    A subject that has no row has not written through this store, or its row was deleted, which may be done at any
    time: then its floor is the current flush LSN. Writes of one subject wait for each other from just before
    COMMIT. For None no floor is kept: without subject and token a read goes to the primary.
    """

    async def look_up(self, primary: Connection, subject: str | None) -> Lsn | None:
        """Return the subject's floor."""
        if subject is None:
            return None
        row = await primary.fetchrow(_LOOK_UP, subject)
        assert row is not None  # noqa: S101 - it has no FROM
        if row["min_lsn"] is None:
            return Lsn.from_wire(row["flush_lsn"])
        floor = Lsn.from_wire(row["min_lsn"])
        if floor == Lsn.PENDING:
            repaired = None
            with contextlib.suppress(asyncpg.ReadOnlySQLTransactionError):  # the primary takes no writes
                repaired = await primary.fetchval(_REPAIR_FLOOR, subject)
            return floor if repaired is None else Lsn.from_wire(repaired)
        return floor

    async def begin_write(self, primary: Connection, subject: str | None, floor: Lsn) -> str | None:
        """Set the subject's floor, hold the write's locks until it is visible, and have the COMMIT flushed."""
        if subject is None:
            return await super().begin_write(primary, subject, floor)
        flushed: str | None = await primary.fetchval(_BEGIN_WRITE, *_lock_of(subject), subject, floor.wire)
        return flushed

    async def record_floor(self, primary: Connection, subject: str | None) -> Lsn:
        """Put the flush LSN where PENDING stands, and return it."""
        if subject is None:
            return await super().record_floor(primary, subject)
        return Lsn.from_wire(await primary.fetchval(_RECORD_FLOOR, subject))


def _lock_of(subject: str | None) -> tuple[int, int]:
    """Return the keys of the subject's lock; two subjects may share one: then they wait longer than they must."""
    text = b"" if subject is None else subject.encode()
    return _SUBJECT_CLASS, zlib.crc32(text) - (1 << 31)


_TRY_FLOORS = """
    EXPLAIN INSERT INTO rocket_floors AS known (subject, min_lsn)
            VALUES ('', '0/0')
            ON CONFLICT (subject) DO UPDATE SET min_lsn = excluded.min_lsn
            RETURNING known.min_lsn
"""
"""Needs the privileges that a write needs, and writes nothing."""


async def check_floor_table(floors: object, nodes: Nodes, timeout_s: float) -> None:
    """Raise `TablesUnusable` if floors are kept in a `FloorTable`, and the primary does not let us use it.

    A primary that is away, or does not answer in time, is not waited for.
    """
    if type(floors) is not FloorTable:
        return
    name = ""
    try:
        async with asyncio.timeout(timeout_s), nodes.primary() as (connection, primary):
            name = primary.name
            await connection.execute(_TRY_FLOORS)
    except asyncpg.SyntaxOrAccessError as error:
        check_tables({name: error})
    except (Unavailable, NotAsObserved, *REFUSED):
        pass
