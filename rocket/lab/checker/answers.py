"""Which answers a client may get at all."""

from __future__ import annotations

from bisect import bisect_left
from http import HTTPStatus
from typing import TYPE_CHECKING

from rocket.lab.checker.history import Outcome, Request
from rocket.lab.checker.promotions import SETTLED_S, Promotions
from rocket.lab.checker.verdict import Rule

if TYPE_CHECKING:
    from rocket.lab.checker.history import History, Op
    from rocket.lab.checker.verdict import Findings

_DOCUMENTED = {
    Request.JOIN: {200, 201, 503, 504},
    Request.WRITE: {201, 401, 503, 504},
    Request.READ: {200, 401, 404, 503},
    Request.LIST: {200, 401, 503},
}
"""What the API answers to a request that is right in itself."""


def look_at_answers(history: History, findings: Findings) -> None:
    """Find statuses that should never have come, users that were forgotten, and losses that cannot have been."""
    promotions = Promotions(history.faults)
    of_users: dict[str, list[Op]] | None = None
    for op in history.ops:
        if op.lost is not None and not promotions.between(0.0, op.done):
            findings.add(
                Rule.LOSS_INVENTED,
                f"Session {op.session} was told of a loss, and there had been no promotion at all.",
                op,
            )
        if op.status is None or op.status in _DOCUMENTED[op.request] - {HTTPStatus.UNAUTHORIZED}:
            continue
        if op.status not in _DOCUMENTED[op.request]:
            findings.add(
                Rule.UNEXPECTED_ANSWER, f"Status {op.status} is no answer to a '{op.request}' that was right.", op
            )
            continue
        if of_users is None:
            of_users = _successes(history)
        known_by = _last_before(of_users.get(op.user, []), op.at)
        if known_by is not None and not promotions.between(known_by.done - SETTLED_S, op.done):
            findings.add(
                Rule.UNEXPECTED_ANSWER,
                f"{op.user} was turned away as unknown, and had been known before; no promotion in between.",
                known_by,
                op,
            )


def _successes(history: History) -> dict[str, list[Op]]:
    """Return what proves that each user exists, in the order in which it was done."""
    of_users: dict[str, list[Op]] = {}
    for op in sorted(history.ops, key=lambda op: op.done):
        if op.outcome is Outcome.OK:
            of_users.setdefault(op.user, []).append(op)
    return of_users


def _last_before(ops: list[Op], moment: float) -> Op | None:
    place = bisect_left(ops, moment, key=lambda op: op.done)
    return ops[place - 1] if place else None
