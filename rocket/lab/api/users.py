"""Users: their credentials, their floors, and how they are created."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket import FORCE_FLUSH, Lsn
from rocket.lab.api import parameters
from rocket.lab.api.problems import invalid_credentials, missing_credentials
from rocket.lab.api.recorder import Asked, recorded
from rocket.web.aiohttp import SESSION

if TYPE_CHECKING:
    from rocket import Connection

INSERT_USER = """
    INSERT INTO users (email) VALUES ($1)
    ON CONFLICT (email) DO NOTHING
    RETURNING id
"""
SELECT_USER = "SELECT id FROM users WHERE email = $1"

# --- floors: see `rocket.FloorStore` for what each statement has to do ---

_LOOK_UP_FLOOR = """
    SELECT EXISTS (SELECT FROM users WHERE email = $1) AS known,
           (SELECT min_lsn FROM users WHERE email = $1) AS min_lsn,
           pg_current_wal_flush_lsn() AS flush_lsn
"""
"""The flush LSN is in it because that fails on a server that is not the primary."""

_BEGIN_WRITE = f"UPDATE users SET min_lsn = $2 WHERE email = $1 RETURNING {FORCE_FLUSH}"  # noqa: S608 - our own text

_RECORD_FLOOR = """
    WITH recorded AS (
        UPDATE users
           SET min_lsn = pg_current_wal_flush_lsn()
         WHERE email = $1
           AND min_lsn = 'FFFFFFFF/FFFFFFFF'
           -- A crash before this is flushed leaves the floor pending: slower, never stale.
           AND set_config('synchronous_commit', 'off', true) = 'off'
        RETURNING min_lsn
    )
    SELECT coalesce((SELECT min_lsn FROM recorded), pg_current_wal_flush_lsn())
"""
"""Runs after COMMIT, so either LSN covers the write. A concurrent write of the same user makes the UPDATE wait
for its row and compute anew, or has recorded an LSN itself."""

_WAIT_FOR_WRITES = "SELECT FROM users WHERE email = $1 FOR SHARE"
"""Each write holds a lock on the row, by the UPDATE that begins it, until it is visible."""

_REPAIR_FLOOR = """
    UPDATE users
       SET min_lsn = pg_current_wal_flush_lsn()
     WHERE id = (SELECT id FROM users
                  WHERE email = $1 AND min_lsn = 'FFFFFFFF/FFFFFFFF'
                    FOR NO KEY UPDATE SKIP LOCKED)
       AND set_config('synchronous_commit', 'off', true) = 'off'
    RETURNING min_lsn
"""
"""Records an LSN where a writer that crashed left the floor pending; does not wait for writes under way."""


class UserFloors:
    """Keeps each user's floor in `users.min_lsn`; the subject is the e-mail address. A `rocket.FloorStore`."""

    async def look_up(self, primary: Connection, subject: str | None) -> Lsn | None:
        """Return the user's floor; raise a 401 if the user does not exist."""
        row = await primary.fetchrow(_LOOK_UP_FLOOR, subject)
        if row is None or not row["known"]:
            raise invalid_credentials()
        if row["min_lsn"] is None:
            return None
        floor = Lsn.from_wire(row["min_lsn"])
        if floor == Lsn.PENDING:
            repaired = await primary.fetchval(_REPAIR_FLOOR, subject)
            return floor if repaired is None else Lsn.from_wire(repaired)
        return floor

    async def begin_write(self, primary: Connection, subject: str | None, floor: Lsn) -> str | None:
        """Set the user's floor within a write, and have the write flushed."""
        flushed: str | None = await primary.fetchval(_BEGIN_WRITE, subject, floor.wire)
        return flushed

    async def record_floor(self, primary: Connection, subject: str | None) -> Lsn:
        """Record the floor of a write that has been committed."""
        return Lsn.from_wire(await primary.fetchval(_RECORD_FLOOR, subject))

    async def wait_for_writes(self, primary: Connection, subject: str | None) -> None:
        """Wait until the user's commits under way are visible."""
        await primary.execute(_WAIT_FOR_WRITES, subject)


def who_asks(request: web.Request) -> str:
    """Return the e-mail address in the Authorization header; raise a 401 if it is missing or is no address."""
    credentials = request.headers.get("Authorization", "")
    if not credentials:
        raise missing_credentials()
    if not parameters.is_email(credentials):
        raise invalid_credentials()
    return credentials


async def create(request: web.Request) -> web.Response:
    """`POST /users`: create a user, unless it exists."""
    session = request[SESSION]
    session.subject = email = parameters.email(await parameters.body_parameter(request, "email"))

    async def insert(primary: Connection) -> tuple[int, HTTPStatus]:
        user_id = await primary.fetchval(INSERT_USER, email)
        if user_id is not None:
            return user_id, HTTPStatus.CREATED
        return await primary.fetchval(SELECT_USER, email), HTTPStatus.OK

    with recorded(request, Asked.JOIN, None):
        user_id, status = await session.write(insert)
    return web.json_response({"email": email, "id": user_id}, status=status)
