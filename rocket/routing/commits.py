"""How writes commit: flushed, and so that a session which has seen one on a replica can wait for it."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from rocket.consistency import Lsn
from rocket.routing.connection import unwrap

if TYPE_CHECKING:
    from rocket.routing.connection import Connection

_SUBJECT_CLASS, _WRITE_CLASS = 0x726F636B, 0x726F6378
"""The first of the two keys of an advisory lock on a subject, and on a write: keep clear of the application's."""

_COMMIT = f"""SET CONSTRAINTS ALL IMMEDIATE;
    SELECT CASE WHEN current_setting('synchronous_commit') = 'off'
                THEN set_config('synchronous_commit', 'local', true) END,
           pg_advisory_xact_lock({_WRITE_CLASS}, pg_current_xact_id_if_assigned()::xid::text::oid::int)
      FROM pg_advisory_xact_lock_shared({_SUBJECT_CLASS}, %d);
    COMMIT"""  # noqa: S608 - our own text
"""Has the COMMIT flushed before it returns, since a floor is a flush LSN (design fact F2), and takes the locks.

All of it is one message, so that nothing comes in between: neither a round trip for which locks would be held, nor
work or deferred triggers that could take back what counts at COMMIT. A write is locked by the id of its
transaction: one without an id has written nothing that could be shown.
"""

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
"""  # noqa: S608 - our own text
"""Waits for the writes of a subject that are under way when it begins, and holds up none that begins later.

A write holds both of its locks before it commits, and until it is visible. So either the subject's can be had,
which is given back at once, and none is under way; or one look at all locks (`pg_locks` shows one moment) finds
the lock of each that is, which no other write will ever hold: an id of a transaction is not used again.
"""

_FLUSH_LSN = "SELECT pg_current_wal_flush_lsn()"


class Commits:
    """Commits the writes of subjects, and waits for those that are under way.

    A replica can show a commit before the primary does (design fact F13). So each write of a subject holds, from
    its COMMIT until it is visible, an advisory lock in shared mode on the subject and one on itself, for sessions
    to wait for that come from a replica to the primary. None is a subject as well, shared by all callers that name
    none: their writes wait neither for each other nor for sessions that wait, yet a session of None waits for the
    writes of all of them that are under way.
    """

    def statements(self, subject: str | None) -> str:
        """Return what to commit a write of a subject by, in one message that ends in COMMIT."""
        return _COMMIT % _key_of(subject)

    async def floor(self, primary: Connection) -> Lsn:
        """Return what covers a write that has been committed; to be asked in a statement of its own."""
        return Lsn.from_wire(await primary.fetchval(_FLUSH_LSN))

    async def wait(self, primary: Connection, subject: str | None) -> None:
        """Wait until the subject's writes under way are visible on the primary; none that begins later waits."""
        inner = unwrap(primary)
        changed = inner.changed
        await primary.execute(_WAIT, _SUBJECT_CLASS, _key_of(subject))
        inner.changed = changed  # the lock of the session is given back in the same statement


def _key_of(subject: str | None) -> int:
    """Return the second key of a subject's lock; two may share one: then they wait longer than they must."""
    return zlib.crc32(b"" if subject is None else subject.encode()) - (1 << 31)
