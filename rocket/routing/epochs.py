"""Epochs in the database: one row for each primary since its promotion, replicated like any other.

A replica that shows the current epoch's row has replayed WAL of that epoch; the timeline that it receives proves
nothing (design fact F11). Nor does the row alone: a replica with a foreign tail could, if that happens to end
where a record of the new timeline begins, continue with it, and get the row. But it never enters the timeline, for
which it would have to replay the record at the fork. So a replica is asked, too, which timeline it *applies*: it
writes that to its control file with every commit that removes a file. One is made when an epoch is named: a table
is made and dropped in one transaction, a new one each time, so that no reader holds a lock that this waits for.

A timeline has more than one epoch if its primary was found to have lost WAL: it was set back to a snapshot, or it
is another server, started without a timeline of its own. They are told apart by their generation. Rows that are of
no cluster (system identifier 0) name epochs that were followed for a time, and then given up.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.consistency import Epoch, Lsn, SessionToken, rank_of, switch_point, timeline_of
from rocket.errors import InvalidToken, Unavailable
from rocket.routing.connection import CURRENT_EPOCH, OF_THIS_CLUSTER, SERVER_STARTED, TIMELINE
from rocket.routing.failures import NotAsObserved

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rocket.consistency.status import Rank
    from rocket.routing.connection import Connection

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_RANDOM_CHARACTERS = 10

NEWEST_SHOWN = f"""(
    SELECT epoch FROM epochs WHERE {OF_THIS_CLUSTER} ORDER BY timeline DESC, generation DESC LIMIT 1
)"""  # noqa: S608 - our own text
"""The newest epoch whose row a node shows."""

TAKES_NO_WRITES = "current_setting('default_transaction_read_only')::bool"
"""On a connection on which nothing else was set."""

_PRIMARY_STATE = f"""
    SELECT pg_current_wal_flush_lsn() AS flush_lsn, {TIMELINE} AS timeline, here.epoch,
           {SERVER_STARTED} AS started, (SELECT system_identifier FROM pg_control_system()) AS system_id,
           (SELECT checkpoint_lsn FROM pg_control_checkpoint()) AS checkpoint_lsn, {TAKES_NO_WRITES} AS read_only,
           coalesce(pg_postmaster_start_time() > (SELECT max(began_at) FROM epochs WHERE {OF_THIS_CLUSTER}), false)
               AS restarted,
           (SELECT max(lsn) FROM covers WHERE covers.epoch = here.epoch) AS covered_lsn
      FROM (SELECT {CURRENT_EPOCH} AS epoch OFFSET 0) AS here
"""  # noqa: S608 - the same
"""Fails on a replica."""

_PRIMARY_STATE_IF_LOCKED = f"""
    SELECT pg_current_wal_flush_lsn() AS flush_lsn, {TIMELINE} AS timeline, {SERVER_STARTED} AS started,
           (SELECT system_identifier FROM pg_control_system()) AS system_id,
           (SELECT checkpoint_lsn FROM pg_control_checkpoint()) AS checkpoint_lsn, {TAKES_NO_WRITES} AS read_only
"""  # noqa: S608 - the same
"""The same without the tables `epochs` and `covers`, of which another session has locked one."""

_EPOCH_IF_PRIMARY = f"SELECT CASE WHEN NOT pg_is_in_recovery() THEN {CURRENT_EPOCH} END"

_NAME_EPOCH = """
    INSERT INTO epochs (system_id, timeline, generation, epoch)
    SELECT system_identifier, $1, $2, $3 FROM pg_control_system()
    ON CONFLICT (system_id, timeline, generation) DO NOTHING
"""
_COVER = f"""
    WITH here AS (SELECT {CURRENT_EPOCH} AS epoch, pg_current_wal_flush_lsn() AS lsn), stored AS (
        INSERT INTO covers (epoch, lsn) SELECT epoch, lsn FROM here ON CONFLICT DO NOTHING
    )
    SELECT epoch, lsn FROM here
"""  # noqa: S608 - the same
"""What was acknowledged before this statement began is flushed: a synchronous commit is, before it returns."""
_ABANDON_EPOCH = """
    INSERT INTO epochs (system_id, timeline, generation, epoch)
    SELECT 0, $1, coalesce((SELECT max(generation) + 1 FROM epochs WHERE system_id = 0 AND timeline = $1), 0), $2
    ON CONFLICT DO NOTHING
"""
_REMOVE_A_FILE = "SELECT rocket_note_timeline()"
"""Its commit makes every replica note the timeline that it applies."""
_FLUSHED = "SELECT pg_current_wal_flush_lsn()"

_KNOWN = f"""
    SELECT EXISTS (SELECT FROM epochs WHERE {OF_THIS_CLUSTER} AND timeline = $1::bigint) AS timeline_is_known,
           (SELECT epoch FROM epochs WHERE {OF_THIS_CLUSTER} AND timeline = $1::bigint
             ORDER BY generation DESC LIMIT 1) AS last_of_timeline,
           EXISTS (SELECT FROM epochs WHERE epoch = $2) AS is_known
"""  # noqa: S608 - the same
_MAY_READ_HISTORY = "SELECT has_function_privilege('pg_read_file(text, bigint, bigint, boolean)', 'execute')"
_HISTORY = "SELECT pg_read_file('pg_wal/' || upper(lpad(to_hex($1::int), 8, '0')) || '.history', 0, 1000000, true)"


_NO_COVER = Lsn(0)


@dataclass(frozen=True, slots=True)
class PrimaryState:
    """What a primary says of itself."""

    epoch: Epoch
    flush_lsn: Lsn
    system_id: int
    started: int
    """When its server was started, in microseconds by its own clock."""
    checkpoint_lsn: Lsn
    """Its last checkpoint, be it that with which its server was started."""
    restarted: bool
    """Whether that was after its epoch was named."""
    read_only: bool
    """Whether its transactions are read-only by default."""
    covered_lsn: Lsn = _NO_COVER
    """The highest cover of its epoch."""
    is_new: bool = False
    """Whether the epoch was named just now: then replicas have yet to be made to note their timeline."""


@dataclass(frozen=True, slots=True)
class PossibleLoss:
    """What a session may have lost whose floors reach beyond what was kept of an earlier epoch."""

    epoch: Epoch
    """The earlier epoch."""
    switch_lsn: Lsn | None
    """What its primary wrote beyond this was lost; None if that is unknown."""
    writes: bool
    """Whether acknowledged writes may be among it, and not only what the session has read."""

    def __str__(self) -> str:
        what = "Writes of this session that were acknowledged" if self.writes else "What this session has read"
        where = "" if self.switch_lsn is None else f", which had WAL up to {self.switch_lsn} of it"
        return (
            f"{what} may have been lost: the primary of epoch {self.epoch} was replaced by another server{where}."
        )


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a session's tokens mean to a primary."""

    token: SessionToken | None
    """The floors of the current epoch; None if the session has none."""
    lost: PossibleLoss | None = None
    """The worst of what they may have lost."""


async def read_primary_state(primary: Connection, timeout_s: float | None = None) -> PrimaryState:
    """Return a primary's epoch, and name it if it has none yet; raise asyncpg's errors on a replica.

    And `TimeoutError` if it does not answer in time.
    """
    named = False
    while True:
        row = await primary.fetchrow(_PRIMARY_STATE, timeout=timeout_s)
        assert row is not None  # noqa: S101 - it has no WHERE
        if row["epoch"] is not None:
            return PrimaryState(
                epoch=Epoch(row["epoch"]),
                flush_lsn=Lsn.from_wire(row["flush_lsn"]),
                system_id=row["system_id"],
                started=row["started"],
                checkpoint_lsn=Lsn.from_wire(row["checkpoint_lsn"]),
                restarted=row["restarted"],
                read_only=row["read_only"],
                covered_lsn=Lsn.from_wire(row["covered_lsn"] or 0),
                is_new=named,
            )
        await _name(primary, row["timeline"], 0)
        named = True


async def read_known_primary_state(primary: Connection, epoch: Epoch, *, restarted: bool) -> PrimaryState:
    """Return the state of a primary whose epoch was read on this very connection, while the table is locked.

    Raise `NotAsObserved` if it writes another timeline.
    """
    row = await primary.fetchrow(_PRIMARY_STATE_IF_LOCKED)
    assert row is not None  # noqa: S101 - it has no WHERE
    if row["timeline"] != timeline_of(epoch):
        raise NotAsObserved(f"it writes timeline {row['timeline']} and not that of epoch {epoch}")
    return PrimaryState(
        epoch=epoch,
        flush_lsn=Lsn.from_wire(row["flush_lsn"]),
        system_id=row["system_id"],
        started=row["started"],
        checkpoint_lsn=Lsn.from_wire(row["checkpoint_lsn"]),
        restarted=restarted,
        read_only=row["read_only"],
    )


async def begin_epoch_anew(primary: Connection, epoch: Epoch, newest: Rank) -> None:
    """Name one more epoch on the timeline of `epoch`, whose primary lost WAL; one of several observers does."""
    timeline, generation = max(rank_of(epoch), newest)
    await _name(primary, timeline, generation + 1)


async def _name(primary: Connection, timeline: int, generation: int) -> None:
    name = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))
    rank = f"{timeline}.{generation}" if generation else f"{timeline}"
    await primary.execute(_NAME_EPOCH, timeline, generation, f"{rank}-{name}")


async def store_cover(primary: Connection) -> tuple[Epoch, Lsn]:
    """Store a cover of all that is committed now, in the caller's transaction; return its epoch and LSN."""
    row = await primary.fetchrow(_COVER)
    assert row is not None  # noqa: S101 - it has no WHERE
    return Epoch(row["epoch"]), Lsn.from_wire(row["lsn"])


async def abandon_epoch(primary: Connection, epoch: Epoch) -> None:
    """Let a primary know an epoch that is not part of its history: sessions of it learn of losses."""
    await primary.execute(_ABANDON_EPOCH, timeline_of(epoch), epoch)


async def check_epoch(primary: Connection, epoch: Epoch) -> None:
    """Raise `NotAsObserved` unless the server that answers is the primary of `epoch`."""
    if await primary.fetchval(_EPOCH_IF_PRIMARY) != epoch:
        raise NotAsObserved(f"behind the pooler there is no primary of epoch {epoch}")


async def have_timelines_noted(primary: Connection) -> Lsn:
    """Make every replica note which timeline it applies; raise asyncpg's error if that cannot be done now.

    Return a position at which they have.
    """
    await primary.execute(_REMOVE_A_FILE)
    return Lsn.from_wire(await primary.fetchval(_FLUSHED))


async def resolve_tokens(
    tokens: Iterable[SessionToken], primary: Connection, epoch: Epoch, *, is_last: bool
) -> Resolved:
    """Sort a session's tokens on the primary of `epoch`: floors of this epoch, and losses of earlier ones.

    Raise `InvalidToken` for an epoch that is not known here, and `Unavailable` if it may be a later one than this
    server's; `is_last` says that no node has a later one.
    """
    current: SessionToken | None = None
    losses: list[PossibleLoss] = []
    for token in tokens:
        if token.epoch == epoch:
            current = token if current is None else current.merged_with(token)
            continue
        found = await primary.fetchrow(_KNOWN, token.timeline, token.epoch)
        assert found is not None  # noqa: S101 - it has no WHERE
        if found["last_of_timeline"] == token.epoch:
            loss = await _loss_of(token, primary, epoch)
        elif found["is_known"] or (not found["timeline_is_known"] and token.timeline < timeline_of(epoch)):
            # Its primary lost WAL, and went on in another epoch. Or it is of another history, which this one was
            # copied from, or which was given up; or its primary was lost before its name got here, and with it all
            # that came after.
            loss = PossibleLoss(token.epoch, None, writes=bool(token.write_floor))
        elif token.timeline > timeline_of(epoch) and not is_last:
            raise Unavailable(f"the session has seen a later primary than that of epoch {epoch}")
        else:
            raise InvalidToken(f"epoch {token.epoch} is unknown here", token)
        losses += [] if loss is None else [loss]
    return Resolved(current, max(losses, key=lambda loss: loss.writes, default=None))


async def _loss_of(token: SessionToken, primary: Connection, epoch: Epoch) -> PossibleLoss | None:
    """Return what a promotion may have cost a session of an earlier epoch; None if that is nothing."""
    switch_lsn = None
    # An error would abort the transaction that there is behind a pooler.
    if await primary.fetchval(_MAY_READ_HISTORY):
        history = await primary.fetchval(_HISTORY, timeline_of(epoch))
        with contextlib.suppress(ValueError):
            switch_lsn = None if history is None else switch_point(history, token.timeline)
    if switch_lsn is not None and token.highest_floor <= switch_lsn:
        return None
    writes = bool(token.write_floor) and (switch_lsn is None or token.write_floor > switch_lsn)
    return PossibleLoss(token.epoch, switch_lsn, writes)
