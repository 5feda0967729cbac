"""Reads that check by themselves: for replicas in whose statuses nobody can find the life that a connection is of.

So it is for a role that may not see the startup process, behind a connection pooler, and behind an address that
several servers share. There a read runs in a transaction, and so on one backend, which a crash of its server would
have ended: what its first statement finds holds for all that come after it (design facts F3, F5).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from rocket.consistency import Lsn, obstacle
from rocket.routing import bound
from rocket.routing.connection import in_one_piece
from rocket.routing.failures import NotAsObserved
from rocket.routing.looking import STATUS_QUERY, replica_status_from

if TYPE_CHECKING:
    from rocket.consistency import Board, Policy, PrimaryStatus, SessionToken
    from rocket.routing.connection import Connection, Work

ResultT = TypeVar("ResultT")


async def read_on_replica(
    work: Work[ResultT], replica: Connection, *, name: str, token: SessionToken, board: Board, policy: Policy
) -> tuple[ResultT, str, Lsn | None]:
    """Run work once the replica has shown that it may serve this session; return as `bound.read_on_replica` does.

    Raise as that does, and `NotAsObserved` if the replica is not fit.
    """
    async with in_one_piece(replica):
        asked_at = time.monotonic()
        row = await replica.fetchrow(STATUS_QUERY)
        assert row is not None  # noqa: S101 - it has no WHERE
        if not row["in_recovery"]:
            raise bound.NoLongerReplica("the server is no replica")
        found = obstacle(replica_status_from(name, row, None, asked_at), token, board, policy, time.monotonic())
        if found is not None:
            raise NotAsObserved(f"where it was asked, it was not fit: {found}")
        return await bound.read_on_replica(work, token.epoch, replica)


async def shown_at_most(token: SessionToken, primary: Connection, status: PrimaryStatus) -> Lsn:
    """Return an LSN that covers whatever a replica of the token's reign can have shown until now.

    Nothing gets to a replica before its primary has flushed it. And as long as that answers, no other one has been
    promoted: what the replica applied was of this reign, which some roles may not see on the replica itself.
    """
    if status.epoch != token.epoch:
        raise NotAsObserved(f"epoch {token.epoch} was over when its primary was asked")
    return bound.shown_by_primary(str(await primary.fetchval(bound.ASKED)), status.epoch)
