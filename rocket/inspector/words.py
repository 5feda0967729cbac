"""A request's whole record, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket import Reason, Role, Routing
from rocket.api.witness import Asked
from rocket.errors import in_words
from rocket.inspector.told import outcome_of, page_of, ride_of
from rocket.torture.history import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket import Answer, Lsn
    from rocket.api.witness import Told
    from rocket.inspector.candidates import Candidate

_TO_THE_PRIMARY = {
    Reason.NO_FLOOR: "Nothing is known of what its user wrote last",
    Reason.WRITE_IN_PROGRESS: "Its user's last write has no known position yet",
    Reason.NO_STATUS: "No replica was observed lately",
    Reason.TOO_FAR_BEHIND: "Every replica lies too far behind",
    Reason.OTHER_EPOCH: "No replica is known to follow this primary, or the token is of an earlier one",
    Reason.DIVERGED: "The replicas have replayed what this primary never wrote",
    Reason.NOT_CAUGHT_UP: "No replica was there",
    Reason.REPLICAS_FAILED: "Each replica that was asked failed",
    Reason.ASKED: "By this routing every read goes to the primary",
}
_MOST_NAMED = 2
"""Replicas that lie behind, by name."""
_OF_REQUEST = {
    Asked.JOIN: "The user",
    Asked.WRITE: "The ride",
}


def words_of_read(
    told: Told, routing: Routing, floor: Lsn | None, candidates: Sequence[Candidate], waited_ms: float | None
) -> str:
    """Say in a few sentences where a read went, and why."""
    answer = told.answer
    route = getattr(told.error, "route", None) if answer is None else answer.route
    sentences = [] if floor is None else [f"Floor {floor}."]
    if answer is None or answer.reason is not Reason.CAUGHT_UP:
        sentences += _behind(candidates)
    sentences += [f"{name} failed it ({why})." for name, why in (route.failed.items() if route else ())]
    if answer is None:
        return " ".join(
            [*sentences, f"Nobody answered: {in_words(told.error) if told.error else 'it was given up'}."]
        )
    return " ".join([*sentences, _served(answer, routing, waited_ms), *_shown(told)])


def _behind(candidates: Sequence[Candidate]) -> list[str]:
    behind = sorted((one for one in candidates if one.behind), key=lambda one: one.behind or 0)
    sentences = [f"{one.name} was at {_place(one)}, {_bytes(one.behind or 0)} behind." for one in behind]
    more = len(behind) - _MOST_NAMED
    return sentences[:_MOST_NAMED] + ([f"{more} more were further behind."] if more > 0 else [])


def _place(one: Candidate) -> str:
    if one.vouched_lsn == one.replay_lsn:
        return f"{one.replay_lsn}"
    return f"{one.vouched_lsn} for certain ({one.replay_lsn} as it said itself)"


def _bytes(count: int) -> str:
    return f"{count} byte{'' if count == 1 else 's'}" if count < 10_000 else f"{count / 1000:.0f} kB"  # noqa: PLR2004


def _served(answer: Answer[object], routing: Routing, waited_ms: float | None) -> str:
    name = answer.node
    if answer.role is Role.PRIMARY:
        waited = "" if waited_ms is None else f", also after {waited_ms:.1f} ms"
        why = _TO_THE_PRIMARY.get(answer.reason, f"{answer.reason}")
        return f"{why}{waited}: {name}, the primary, served the read."
    match answer.reason:
        case Reason.CAUGHT_UP:
            return f"{name} had replayed that far, and served the read."
        case Reason.WAITED:
            return f"{name} caught up after {waited_ms or 0.0:.1f} ms, and served the read."
        case Reason.RETRIED:
            return f"{name} had replayed that far as well, and served the read."
    if routing is Routing.ARTICLE:
        return f"The table of statuses said that {name} was there: it served the read, unchecked."
    return f"{name} was picked at random: it served the read, unchecked."


def _shown(told: Told) -> list[str]:
    if told.error is not None:
        return [f"It knew no such user: {in_words(told.error)}"]
    if told.request is Asked.READ:
        return [] if ride_of(told) else ["There was no such ride."]
    page = page_of(told)
    return [] if page is None else [f"It showed {len(page.rides)} ride{'' if len(page.rides) == 1 else 's'}."]


def words_of_write(told: Told, lsn: Lsn | None) -> str:
    """Say in a few sentences what became of a write."""
    what, answer = _OF_REQUEST[told.request], told.answer
    match outcome_of(told):
        case Outcome.UNKNOWN:
            return f"{what} may have been written, or not: {_why(told)}."
        case Outcome.FAIL:
            return f"{what} was not written: {_why(told)}."
    node = "" if answer is None else f" on {answer.node}"
    floor = (
        "no floor was recorded that holds" if lsn is None else f"flushed up to {lsn}, the session's floor from now"
    )
    return f"{what} was committed{node}; {floor}."


def _why(told: Told) -> str:
    return in_words(told.error).removesuffix(".") if told.error else "nobody knows why"
