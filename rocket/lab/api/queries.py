"""The SQL of the demonstration."""

from rocket import FORCE_FLUSH, READ_BOUND

INSERT_USER = """
    INSERT INTO users (email) VALUES ($1)
    ON CONFLICT (email) DO NOTHING
    RETURNING id
"""
SELECT_USER = "SELECT id FROM users WHERE email = $1"

INSERT_RIDE = """
    INSERT INTO rides (distance, user_id, idempotency_key)
    SELECT $2, users.id, $3 FROM users WHERE users.email = $1
    ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
    RETURNING id, distance, user_id
"""
SELECT_RIDE_BY_KEY = """
    SELECT rides.id, rides.distance, rides.user_id
      FROM users JOIN rides ON rides.user_id = users.id AND rides.idempotency_key = $2
     WHERE users.email = $1
"""
_SELECT_RIDE = """
    SELECT rides.id, rides.distance, rides.user_id, {shown} AS shown
      FROM users LEFT JOIN rides ON rides.user_id = users.id AND rides.id = $2
     WHERE users.email = $1
"""
"""No row: no such user. A row of NULLs: no such ride of that user."""

_SELECT_RIDES = """
    SELECT page.id, page.distance, page.user_id, {shown} AS shown
      FROM users
      LEFT JOIN LATERAL (
               SELECT id, distance, user_id FROM rides
                WHERE rides.user_id = users.id AND rides.id < $2
                ORDER BY id DESC LIMIT $3
           ) AS page ON true
     WHERE users.email = $1
     ORDER BY page.id DESC
"""
"""As above: no row where there is no user, a row of NULLs where there is no ride."""

SELECT_RIDE, SELECT_RIDES = (query.format(shown=READ_BOUND) for query in (_SELECT_RIDE, _SELECT_RIDES))
"""These tell the router what they have shown."""

PLAIN_SELECT_RIDE, PLAIN_SELECT_RIDES = (query.format(shown="NULL") for query in (_SELECT_RIDE, _SELECT_RIDES))
"""The same for a router that guarantees nothing, and so has no use for it."""

# --- floors: see rocket.FloorStore for what each has to do ---

LOOK_UP_FLOOR = """
    SELECT EXISTS (SELECT FROM users WHERE email = $1) AS known,
           (SELECT min_lsn FROM users WHERE email = $1) AS min_lsn,
           pg_current_wal_flush_lsn() AS flush_lsn
"""
"""The flush LSN is asked for because that fails on a server that is not the primary."""

_MARK_FLOOR = "UPDATE users SET min_lsn = $2 WHERE email = $1 RETURNING {flushed}"
MARK_FLOOR = _MARK_FLOOR.format(flushed=FORCE_FLUSH)

SETTLE_FLOOR = """
    WITH settled AS (
        UPDATE users
           SET min_lsn = pg_current_wal_flush_lsn()
         WHERE email = $1
           AND min_lsn = 'FFFFFFFF/FFFFFFFF'
           -- A crash before this is flushed leaves the mark: slower, never stale.
           AND set_config('synchronous_commit', 'off', true) = 'off'
        RETURNING min_lsn
    )
    SELECT coalesce((SELECT min_lsn FROM settled), pg_current_wal_flush_lsn())
"""
"""Runs after COMMIT, so either LSN covers the write. A concurrent write of the same user makes the UPDATE wait
for its row and compute anew, or has put an LSN there itself."""

WAIT_FOR_WRITES = "SELECT FROM users WHERE email = $1 FOR SHARE"
"""Each write has the row locked, by the UPDATE that marks it, until it is visible."""

FINISH_FLOOR = """
    UPDATE users
       SET min_lsn = pg_current_wal_flush_lsn()
     WHERE id = (SELECT id FROM users
                  WHERE email = $1 AND min_lsn = 'FFFFFFFF/FFFFFFFF'
                    FOR NO KEY UPDATE SKIP LOCKED)
       AND set_config('synchronous_commit', 'off', true) = 'off'
    RETURNING min_lsn
"""
"""Puts an LSN where a crashed writer left the mark; waits for nobody who is still writing."""
