"""Explains a read in sentences: where it could have gone, what kept it from there, and which node served it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rocket.consistency import Freshness, Lsn, Reason
from rocket.errors import Unavailable, describe
from rocket.routing.answer import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rocket.consistency import ReplicaStatus, SessionToken
    from rocket.routing.answer import Answer, Route

_TO_THE_PRIMARY = {
    Reason.NO_STATUS: "No replica was observed lately",
    Reason.TOO_FAR_BEHIND: "Every replica lies too far behind",
    Reason.OTHER_EPOCH: "No replica is known to follow this primary, or the token is of an earlier one",
    Reason.DIVERGED: "The replicas have replayed what this primary never wrote",
    Reason.NOT_CAUGHT_UP: "No replica was there",
    Reason.UNREACHABLE: "No replica that was there can be reached",
    Reason.REPLICAS_FAILED: "Each replica that was asked failed",
    Reason.ASKED: "It was to go to the primary",
}
_UNCHECKED = {Reason.UNCHECKED, Reason.ASKED}
"""Reasons of reads for which no floor counted."""
_MOST_NAMED = 2
"""How many replicas that are behind are named."""
_PRIMARY = "primary"
"""A node may have that for its name, and keeps it when another one is promoted."""


class Candidate(NamedTuple):
    """One replica at the decision."""

    name: str
    replay_lsn: Lsn
    vouched_lsn: Lsn
    """How far that is known to be WAL of the epoch: what counts."""
    behind: int | None
    """Bytes from there to the floor, 0 if it was caught up; None if no floor is known."""
    obstacle: Reason | None = None
    """Why it could not serve the read; None if it could, or if that was not asked."""


def explain(outcome: Answer[Any] | Unavailable | None) -> str:
    """Return in a few sentences how a read came to its answer, or why it got none; of a write, what covers it.

    They are made of what the router noted on the way (`Answer.route`), and cost nothing before this is called.
    None is what `Session.last` is before anything was read or written.
    """
    if outcome is None:
        return "Nothing was read or written yet."
    if isinstance(outcome, Unavailable):
        answer, route = None, outcome.route
    elif outcome.reason is Reason.WRITE and isinstance(outcome.value, BaseException):
        return f"Work on {_primary_named(outcome.node)} ended in {type(outcome.value).__name__}."
    elif outcome.reason is Reason.WRITE:
        floor = "" if outcome.token is None else f"; {outcome.token.write_floor} is the session's floor from now"
        return f"Committed on {_primary_named(outcome.node).removesuffix(',')}{floor}."
    else:
        answer, route = outcome, outcome.route
    floored = route is not None and (answer is None or answer.reason not in _UNCHECKED)
    return " ".join(
        sentences_of(
            answer,
            route,
            floor_of(route, None if answer is None else answer.node) if floored else None,
            () if route is None else candidates_of(route),
            error=None if answer is not None else outcome,
        )
    )


def sentences_of(
    answer: Answer[Any] | None,
    route: Route | None,
    floor: Lsn | None,
    candidates: Sequence[Candidate],
    *,
    error: object = None,
    by_table: bool = False,
) -> list[str]:
    """Return where a read went and why, in sentences; without an answer, the `error` that came instead.

    With `by_table`, an unchecked replica was looked up in the table of statuses, not picked at random.
    """
    sentences = [] if route is None else _asked_for(route)
    sentences += [] if floor is None else [f"Floor {floor}."]
    if answer is None or answer.reason is not Reason.CAUGHT_UP:
        sentences += _behind(candidates)
    if route is not None:
        sentences += [f"{name} failed it ({why})." for name, why in route.failed.items()]
        if answer is None or answer.reason is not Reason.CAUGHT_UP:
            left_alone = route.left_alone.keys() - route.failed.keys()
            sentences += [f"{name} was left alone ({route.left_alone[name]})." for name in sorted(left_alone)]
    if answer is None:
        why = describe(error) if isinstance(error, BaseException) else "it was given up"
        return [*sentences, f"No node answered: {why.removesuffix('.')}."]
    waited_ms = None if route is None or route.waited_s is None else route.waited_s * 1000
    return [*sentences, _served(answer, waited_ms, by_table=by_table)]


def _asked_for(route: Route) -> list[str]:
    freshness = route.freshness
    if freshness is Freshness.GLOBAL:
        return ["It was to see all that was committed when it began."]
    if freshness is Freshness.ANY:
        return ["It asked for any node."]
    return [] if freshness.max_age_s is None else [f"It asked for nothing older than {freshness.max_age_s:g} s."]


def _behind(candidates: Sequence[Candidate]) -> list[str]:
    behind = sorted((one for one in candidates if one.behind), key=lambda one: one.behind or 0)
    sentences = [
        f"{replica_named(one.name)} was at {_place(one)}, {_bytes(one.behind or 0)} behind." for one in behind
    ]
    more = len(behind) - _MOST_NAMED
    were = "1 more was" if more == 1 else f"{more} more were"
    return sentences[:_MOST_NAMED] + ([f"{were} further behind."] if more > 0 else [])


def _place(one: Candidate) -> str:
    if one.vouched_lsn == one.replay_lsn:
        return f"{one.replay_lsn}"
    return f"{one.vouched_lsn} for certain ({one.replay_lsn} as it said itself)"


def _bytes(count: int) -> str:
    return f"{count} byte{'' if count == 1 else 's'}" if count < 10_000 else f"{count / 1000:.0f} kB"  # noqa: PLR2004


def _served(answer: Answer[Any], waited_ms: float | None, *, by_table: bool) -> str:
    if answer.role is Role.PRIMARY:
        waited = "" if waited_ms is None else f", also after {waited_ms:.1f} ms"
        why = _TO_THE_PRIMARY.get(answer.reason, f"{answer.reason}")
        return f"{why}{waited}: {_primary_named(answer.node)} served the read."
    name = replica_named(answer.node)
    match answer.reason:
        case Reason.CAUGHT_UP:
            return f"{name} had replayed that far, and served the read."
        case Reason.WAITED:
            return f"{name} caught up after {waited_ms or 0.0:.1f} ms, and served the read."
        case Reason.RETRIED:
            return f"{name} had replayed that far as well, and served the read."
    how = f"The table of statuses said that {name} was there" if by_table else f"{name} was picked at random"
    if answer.route is not None and answer.route.freshness is Freshness.ANY:
        how = f"{name} was up"
    return f"{how}: it served the read, unchecked."


def _primary_named(name: str) -> str:
    """Return the name of a node in the primary's role, as the subject of a sentence."""
    return "the primary" if name == _PRIMARY else f"{name}, the primary,"


def replica_named(name: str) -> str:
    """Return the name of a node in a replica's role."""
    return f"{name} (now a replica)" if name == _PRIMARY else name


def floor_of(route: Route, node: str | None) -> Lsn | None:
    """Return what a replica had to have replayed: `node`, or any that the session had not been reading from."""
    token = _only_token(route)
    if token is None:
        return None
    own = next((status for status in route.statuses if status.name == node), None)
    floor = token.highest_floor if own is None else token.floor_on(own.name, own.incarnation)
    return None if floor == Lsn.PENDING else max(floor, route.covered_lsn)


def candidates_of(
    route: Route, keeps: Callable[[ReplicaStatus, SessionToken], Reason | None] | None = None
) -> Sequence[Candidate]:
    """Return the replicas among which a read was decided; `keeps` returns what kept one from serving it."""
    token = _only_token(route)
    candidates = []
    for status in route.statuses:
        behind = why = None
        if token is not None:
            floor = max(token.floor_on(status.name, status.incarnation), route.covered_lsn)
            behind = None if floor == Lsn.PENDING else max(0, floor - status.vouched_lsn)
            why = None if keeps is None else keeps(status, token)
        candidates.append(Candidate(status.name, status.replay_lsn, status.vouched_lsn, behind, why))
    return candidates


def _only_token(route: Route) -> SessionToken | None:
    return (route.required or route.tokens[0]) if len(route.tokens) == 1 else None
