"""Where the rides shown come from: none is foreign, none invented, none of a write that failed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rocket.lab.checker.history import Outcome, Request
from rocket.lab.checker.verdict import Rule

if TYPE_CHECKING:
    from rocket.lab.checker.history import History, Op
    from rocket.lab.checker.verdict import Findings


def look_at_rides(history: History, findings: Findings) -> None:
    """Find rides shown that no write accounts for."""
    writes = {op.distance: op for op in history.ops if op.request is Request.WRITE and op.distance is not None}
    first_shown: dict[float, tuple[int, Op]] = {}
    vouched: dict[str, dict[tuple[int, float], float]] = {}
    for op in history.ops:
        shown = op.shown
        if not shown:
            continue
        known = vouched.setdefault(op.user, {})
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
        findings.add(rule, f"{named}, which nobody ever wrote.", op, about=distance)
    elif write.user != op.user:
        findings.add(rule, f"{named}, which is {write.user}'s and not {op.user}'s.", write, op, about=distance)
    elif write.outcome is Outcome.FAIL:
        findings.add(
            Rule.FAILED_YET_THERE, f"{named}, whose write had been reported as failed.", write, op, about=distance
        )
    elif write.at > op.done:
        findings.add(rule, f"{named} before anybody had asked to write it.", op, write, about=distance)
    elif write.outcome is Outcome.OK and write.ride != ride:
        findings.add(
            rule, f"{named}, which was given the id {write.ride} when it was written.", write, op, about=distance
        )
    else:
        # How an unknown write was called is known only from where it was shown first.
        earlier, showing = first_shown.setdefault(distance, (ride, op))
        if earlier == ride:
            return True
        findings.add(
            rule, f"{named}, which had been shown as ride {earlier} before.", write, showing, op, about=distance
        )
    return False
