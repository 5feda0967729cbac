"""Who writes `replica_statuses`, and how long it takes until somebody else does."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

from rocket.routing.heartbeat import WRITERS_LOCK

if TYPE_CHECKING:
    from rocket import Connection

_POLL_S = 0.01
_GIVEN_UP_S = 8.0

_LOOK = """
    SELECT (SELECT application_name
              FROM pg_locks JOIN pg_stat_activity USING (pid)
             WHERE locktype = 'advisory' AND granted AND objsubid = 1
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
               AND (classid::bigint << 32) + objid::bigint = $1) AS writer,
           (SELECT max(xmin::text::bigint) FROM replica_statuses) AS written
"""
"""The newest transaction that left a row in the table tells one beat from the next."""


class Look(NamedTuple):
    """What the primary says of the table."""

    writer: int | None
    """The id of the process that has the right to write it."""
    written: int | None
    """By which transaction it was written last; None while it is empty."""


async def look(primary: Connection) -> Look:
    """Ask the primary."""
    row = await primary.fetchrow(_LOOK, WRITERS_LOCK)
    assert row is not None  # noqa: S101 - it has no FROM
    process = (row["writer"] or "").rpartition(" ")[2]
    return Look(int(process) if process.isdecimal() else None, row["written"])


async def taken_over(primary: Connection, before: Look) -> float | None:
    """Wait until another process than `before` told of has written the table; return the seconds that took.

    None if that did not come.
    """
    began = time.monotonic()
    lost = before.writer
    while time.monotonic() - began < _GIVEN_UP_S:
        now = await look(primary)
        if now.writer in {None, lost}:
            before = now
        elif now.written != before.written:
            return time.monotonic() - began
        await asyncio.sleep(_POLL_S)
    return None
