"""Epochs in the database: one row for each primary's reign, written once, replicated like any other.

A replica that shows the row of the current reign has replayed WAL of that reign, so its history is the primary's
(design fact F11); no timeline number that it reports proves as much.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rocket.consistency import Epoch, Lsn, SessionToken, timeline_of
from rocket.errors import InvalidToken, Unavailable

if TYPE_CHECKING:
    from rocket.routing.connections import Connection, PrimaryConnection

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_RANDOM_CHARACTERS = 10

_REIGN = """
    SELECT flush_lsn, timeline,
           (SELECT epoch FROM epochs WHERE epochs.timeline = now.timeline) AS epoch
      FROM (SELECT pg_current_wal_flush_lsn() AS flush_lsn,
                   ('x' || substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8))::bit(32)::int AS timeline
           ) AS now
"""
"""Right after a promotion pg_control_checkpoint() still names the old timeline. Fails on a replica."""

_BEGIN = "INSERT INTO epochs (timeline, epoch) VALUES ($1, $2) ON CONFLICT (timeline) DO NOTHING"
_KNOWN = "SELECT epoch FROM epochs WHERE epoch = $1"


@dataclass(frozen=True, slots=True)
class Reign:
    """What a primary says of itself."""

    epoch: Epoch
    flush_lsn: Lsn


async def reign_of(primary: Connection) -> Reign:
    """Return a primary's epoch, and name it if it has none yet; raise asyncpg's errors on a replica."""
    while True:
        row = await primary.fetchrow(_REIGN)
        assert row is not None  # noqa: S101 - it has no WHERE
        if row["epoch"] is not None:
            return Reign(Epoch(row["epoch"]), Lsn.from_wire(row["flush_lsn"]))
        name = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))
        await primary.execute(_BEGIN, row["timeline"], f"{row['timeline']}-{name}")


def epoch_of(primary: Connection) -> Epoch:
    """Return the reign that a pooled connection to the primary was opened in."""
    # The pool's proxy shows the attributes of the connection that it stands for.
    return cast("PrimaryConnection", primary).epoch


async def checked(token: SessionToken | None, primary: Connection) -> SessionToken | None:
    """Return a token of this primary's epoch as it is, and None for one of an earlier reign that led to it.

    Raise `InvalidToken` for an epoch that is not known here, and `Unavailable` if it may be one of a later reign
    than this server's: then this is no primary any more, or somebody made the token up.
    """
    epoch = epoch_of(primary)
    if token is None or token.epoch == epoch:
        return token
    if timeline_of(token.epoch) > timeline_of(epoch):
        raise Unavailable(f"the session has seen a later primary than that of epoch {epoch}")
    if await primary.fetchval(_KNOWN, token.epoch) is None:
        raise InvalidToken(f"epoch {token.epoch} is unknown here")
    return None
