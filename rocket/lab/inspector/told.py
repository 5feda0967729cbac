"""What a request that was told of says, in the terms of HTTP and of rides."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from rocket import InvalidToken, Lsn, OutcomeUnknown, Unavailable
from rocket.errors import describe
from rocket.lab.api.problems import Problem
from rocket.lab.api.recorder import Asked
from rocket.lab.checker.history import Outcome

if TYPE_CHECKING:
    from rocket.lab.api.recorder import RequestRecord
    from rocket.lab.inspector.event_log import Page

_STATUSES = {
    InvalidToken: HTTPStatus.BAD_REQUEST,
    OutcomeUnknown: HTTPStatus.GATEWAY_TIMEOUT,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}
_WRITES = {Asked.JOIN, Asked.WRITE}


class Failure(Exception):
    """What is kept of a request's error: not the frames that it came through, with all that they hold."""

    def __init__(self, error: BaseException, request: Asked) -> None:
        super().__init__(describe(error))
        known = isinstance(error, Unavailable | InvalidToken | Problem) or request not in _WRITES
        self.outcome = Outcome.FAIL if known else Outcome.UNKNOWN
        self.status = _status_of_failure(error, request)
        self.route = getattr(error, "route", None)


def outcome_of(told: RequestRecord) -> Outcome:
    """Return what the client knows afterwards."""
    failure = _failure(told)
    return Outcome.OK if failure is None else failure.outcome


def status_of(told: RequestRecord) -> int:
    """Return the status of the answer, as the API gives it."""
    failure = _failure(told)
    return _status_of_success(told) if failure is None else failure.status


def _failure(told: RequestRecord) -> Failure | None:
    assert told.error is None or isinstance(told.error, Failure)  # noqa: S101 - the journal keeps no other
    return told.error


def _status_of_failure(error: BaseException, request: Asked) -> int:
    if isinstance(error, Problem):
        return error.status
    if isinstance(error, asyncio.CancelledError):  # by the API's last resort against requests that never end
        return HTTPStatus.GATEWAY_TIMEOUT if request in _WRITES else HTTPStatus.SERVICE_UNAVAILABLE
    return next(
        (status for kind, status in _STATUSES.items() if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR
    )


def _status_of_success(told: RequestRecord) -> int:
    assert told.answer is not None  # noqa: S101 - there was no error
    match told.request:
        case Asked.WRITE:
            return HTTPStatus.CREATED
        case Asked.JOIN:
            status: int = told.answer.value[1]
            return status
        case Asked.READ if ride_of(told) is None:
            return HTTPStatus.NOT_FOUND
    return HTTPStatus.OK


def ride_of(told: RequestRecord) -> tuple[int, float] | None:
    """Return id and distance of the ride that was written, or that a read found."""
    if told.answer is None or told.error is not None or told.request not in {Asked.WRITE, Asked.READ}:
        return None
    row = told.answer.value
    return None if row["id"] is None else (row["id"], round(row["distance"], 1))


def page_of(told: RequestRecord) -> Page | None:
    """Return the rides that a list showed."""
    if told.answer is None or told.error is not None or told.request is not Asked.LIST:
        return None
    page: Page = told.answer.value
    return page


def is_of_unknown_user(told: RequestRecord) -> bool:
    """Tell whether a read was answered by a node that knows of no such user."""
    return told.answer is not None and told.error is not None and status_of(told) == HTTPStatus.UNAUTHORIZED


def shown_lsn(told: RequestRecord) -> Lsn | None:
    """Return how far the replica that served a read said, with the answer, that it has replayed."""
    route = None if told.answer is None else told.answer.route
    if route is None or route.bound is None or not route.bound.is_replica:
        return None
    return route.bound.lsn
