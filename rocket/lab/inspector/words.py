"""A request's whole record, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket.errors import describe
from rocket.lab.api.recorder import Asked
from rocket.lab.checker.history import Outcome
from rocket.lab.comparison import Routing
from rocket.lab.inspector.told import outcome_of, page_of, ride_of
from rocket.routing.explain import sentences_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket import Lsn
    from rocket.lab.api.recorder import RequestRecord
    from rocket.routing.explain import Candidate

_OF_REQUEST = {
    Asked.JOIN: "The user",
    Asked.WRITE: "The ride",
}


def words_of_read(
    told: RequestRecord, routing: Routing, floor: Lsn | None, candidates: Sequence[Candidate]
) -> str:
    """Say in a few sentences where a read went, and why."""
    answer = told.answer
    route = getattr(told.error, "route", None) if answer is None else answer.route
    by_table = routing is Routing.ARTICLE
    way = sentences_of(answer, route, floor, candidates, error=told.error, by_table=by_table)
    return " ".join(way if answer is None else [*way, *_shown(told)])


def _shown(told: RequestRecord) -> list[str]:
    if told.error is not None:
        return [f"It knew no such user: {describe(told.error)}"]
    if told.request is Asked.READ:
        return [] if ride_of(told) else ["There was no such ride."]
    page = page_of(told)
    return [] if page is None else [f"It showed {len(page.rides)} ride{'' if len(page.rides) == 1 else 's'}."]


def words_of_write(told: RequestRecord, lsn: Lsn | None) -> str:
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


def _why(told: RequestRecord) -> str:
    return describe(told.error).removesuffix(".") if told.error else "nobody knows why"
