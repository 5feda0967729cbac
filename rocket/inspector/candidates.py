"""What a read's decision saw of each replica, made out afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rocket import Lsn
from rocket.consistency import obstacle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket import Board, Policy, Reason, Route, SessionToken


class Candidate(NamedTuple):
    """One replica at the decision."""

    name: str
    replay_lsn: Lsn
    vouched_lsn: Lsn
    """How far that is known to be WAL of the reign: what counts."""
    behind: int | None
    """Bytes from there to the floor that held, 0 if it was caught up; None if no floor is known."""
    obstacle: Reason | None
    """Why it could not serve the read; None if it could."""


def floor_of(route: Route, node: str | None) -> Lsn | None:
    """Return what a replica had to have replayed: that one, or any that the session had not been reading from."""
    token = _only_token(route)
    if token is None:
        return None
    own = next((status for status in route.statuses if status.name == node), None)
    floor = max(token.write_floor, token.read_floor)
    if own is not None:
        floor = token.floor_on(own.name, own.incarnation)
    return None if floor == Lsn.UNKNOWN else floor


def candidates_of(route: Route, board: Board, policy: Policy, *, guarded: bool) -> Sequence[Candidate]:
    """Return the replicas among which a read was decided; `board` is as it was about then.

    Without a guarantee nothing keeps a replica from serving.
    """
    token = _only_token(route)
    candidates = []
    for status in route.statuses:
        behind = why = None
        if token is not None:
            floor = token.floor_on(status.name, status.incarnation)
            behind = None if floor == Lsn.UNKNOWN else max(0, floor - status.vouched_lsn)
            if guarded:
                why = obstacle(status, token, board, policy, route.decided_at)
        candidates.append(Candidate(status.name, status.replay_lsn, status.vouched_lsn, behind, why))
    return candidates


def _only_token(route: Route) -> SessionToken | None:
    return route.tokens[0] if len(route.tokens) == 1 else None
