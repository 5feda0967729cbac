"""What kept each replica from serving a read, made out afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket.consistency import obstacle
from rocket.routing.explain import candidates_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket import Policy, Reason
    from rocket.consistency import Board, ReplicaStatus, SessionToken
    from rocket.routing.answer import Route
    from rocket.routing.explain import Candidate


def candidates_with_obstacles(route: Route, board: Board, policy: Policy, *, guarded: bool) -> Sequence[Candidate]:
    """Return the replicas among which a read was decided; `board` is as it was about then.

    Without a guarantee nothing keeps a replica from serving.
    """

    def kept(status: ReplicaStatus, token: SessionToken) -> Reason | None:
        return obstacle(status, token, board, policy, route.decided_at) if guarded else None

    return candidates_of(route, kept)
