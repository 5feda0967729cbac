"""The rules on single answers: statuses, notices of losses, tokens, and the rides shown."""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING

from rocket.consistency import Lsn, SessionToken
from rocket.lab.checker.findings import Rule
from rocket.lab.checker.history import SETTLED_S, TAKEN_BY_ANOTHER, Outcome, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket.lab.checker.findings import Findings
    from rocket.lab.checker.history import History, Op

_DOCUMENTED = {
    Request.JOIN: {200, 201, 503, 504},
    Request.WRITE: {201, 401, 503, 504},
    Request.READ: {200, 401, 404, 503},
    Request.LIST: {200, 401, 503},
}
"""The statuses with which the API answers a valid request."""


# --- statuses and notices ---


def check_answers(history: History, findings: Findings) -> None:
    """Find undocumented statuses, users that are no longer known, and losses reported without a promotion.

    And what earlier work has left to work of the same connection.
    """
    of_users: dict[str, list[Op]] | None = None
    for op in history.ops:
        if op.lost is not None and not history.promotions(0.0, op.done):
            findings.add(
                Rule.LOSS_INVENTED,
                f"Session {op.session} was notified of a loss, and there had been no promotion at all.",
                op,
            )
        if op.left is not None:
            findings.add(
                Rule.STATE_LEFT_OVER,
                f"Work of session {op.session} found what earlier work had left: {op.left}.",
                op,
            )
        if op.status is None or op.status in _DOCUMENTED[op.request] - {HTTPStatus.UNAUTHORIZED}:
            continue
        if op.status not in _DOCUMENTED[op.request]:
            findings.add(
                Rule.UNEXPECTED_ANSWER,
                f"Status {op.status} is not documented as an answer to a valid '{op.request}'.",
                op,
            )
            continue
        if of_users is None:
            of_users = _successes(history)
        known_by = _last_before(of_users.get(op.user, []), op.at)
        if known_by is not None and not history.promotions(known_by.done - SETTLED_S, op.done):
            findings.add(
                Rule.UNEXPECTED_ANSWER,
                f"{op.user} was refused as unknown, and had been known before; no promotion in between.",
                known_by,
                op,
            )


def check_other_clusters(history: History, findings: Findings) -> None:
    """Find servers of another cluster that were given something to write."""
    for fault in history.faults:
        if taken := fault.detail.get(TAKEN_BY_ANOTHER):
            findings.add(
                Rule.TAKEN_BY_ANOTHER_CLUSTER,
                f"The server of another cluster at the address of {fault.node} has {taken} users and rides.",
                faults=[fault],
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


# --- rides ---


def check_rides(history: History, findings: Findings) -> None:
    """Find rides shown that no write accounts for: of another user, invented, or of a write that failed."""
    writes = {op.distance: op for op in history.ops if op.request is Request.WRITE and op.distance is not None}
    first_shown: dict[float, tuple[int, Op]] = {}
    accounted: dict[str, dict[tuple[int, float], float]] = {}
    for op in history.ops:
        shown = op.shown
        if not shown:
            continue
        known = accounted.setdefault(op.user, {})
        rides = [(ride, distance) for distance, ride in shown.items()] if op.rides is None else op.rides
        if len(shown) < len(rides):
            findings.add(Rule.FOREIGN_OR_INVENTED, f"Session {op.session} was shown a ride twice on one page.", op)
        for one in rides:
            # Nearly always a ride that has been shown to this user before.
            if known.get(one, math.inf) > op.done:
                write = writes.get(one[1])
                if _accounts_for(write, op, one, first_shown, findings) and write is not None:
                    known[one] = write.at


def _accounts_for(
    write: Op | None,
    op: Op,
    one: tuple[int, float],
    first_shown: dict[float, tuple[int, Op]],
    findings: Findings,
) -> bool:
    ride, distance = one
    named = f"Session {op.session} was shown ride {ride} with distance {distance:.1f}"
    rule = Rule.FOREIGN_OR_INVENTED
    if write is None:
        findings.add(rule, f"{named}, which was never written.", op, about=distance)
    elif write.user != op.user:
        findings.add(rule, f"{named}, which is {write.user}'s and not {op.user}'s.", write, op, about=distance)
    elif write.outcome is Outcome.FAIL:
        findings.add(
            Rule.FAILED_YET_THERE, f"{named}, whose write had been reported as failed.", write, op, about=distance
        )
    elif write.at > op.done:
        findings.add(rule, f"{named} before its write was requested.", op, write, about=distance)
    elif write.outcome is Outcome.OK and write.ride != ride:
        findings.add(
            rule, f"{named}, which was given the id {write.ride} when it was written.", write, op, about=distance
        )
    else:
        # The id of a write of unknown outcome is known only from the answer that showed it first.
        earlier, showing = first_shown.setdefault(distance, (ride, op))
        if earlier == ride:
            return True
        findings.add(
            rule, f"{named}, which had been shown as ride {earlier} before.", write, showing, op, about=distance
        )
    return False


# --- tokens ---


def check_tokens(session: Sequence[Op], findings: Findings) -> None:
    """Find malformed tokens given to a session, and tokens with lower floors than those before them."""
    latest: tuple[int, Op] | None = None
    for op in session:
        if op.got is None:
            continue
        got = _parsed(op.got)
        if got is None:
            findings.add(
                Rule.MALFORMED_TOKEN, f"Session {op.session} was given '{op.got}', which is no session token.", op
            )
            continue
        sent = None if op.sent is None else _parsed(op.sent)
        if sent is not None and sent.epoch == got.epoch:
            _compare_floors(op, sent, got, findings)
        if not op.tokens:
            continue  # each of its requests stands for itself
        if latest is not None and got.timeline < latest[0]:
            findings.add(
                Rule.FLOORS_GO_BACK,
                f"Session {op.session} was given a token of timeline {got.timeline} after one of {latest[0]}.",
                latest[1],
                op,
            )
        else:
            latest = got.timeline, op


def _compare_floors(op: Op, sent: SessionToken, got: SessionToken, findings: Findings) -> None:
    # A floor that was pending could be served by that very replica or the primary only: it may become any LSN.
    known = max(
        (floor for floor in (sent.write_floor, sent.read_floor) if floor not in {None, Lsn.PENDING}),
        default=Lsn(0),
    )
    highest = got.highest_floor
    if sent.write_floor != Lsn.PENDING and got.write_floor < sent.write_floor:
        fall = f"The write floor of session {op.session} fell from {sent.write_floor} to {got.write_floor}."
    elif highest < known:
        fall = f"The higher of the floors of session {op.session} fell from {known} to {highest}."
    else:
        return
    findings.add(Rule.FLOORS_GO_BACK, fall, op)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> SessionToken | None:
    """Return a token, of those of several epochs the latest; None for what is none."""
    try:
        return max(map(SessionToken.parse, text.split(",")), key=lambda token: token.timeline)
    except ValueError:
        return None
