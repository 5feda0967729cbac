"""What responses say: the session's token, what a promotion may have cost, and why a request failed."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

from rocket import InvalidToken, OutcomeUnknown, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket import Session
    from rocket.web.carriers import Carrier, Values

FORESEEN = (InvalidToken, OutcomeUnknown, Unavailable)
"""Errors that do not point to a bug in the service."""

NOT_TO_BE_CACHED = ("Cache-Control", "no-store")
"""A cached response bypasses the session; set where the service says nothing about caching itself."""

_log = logging.getLogger("rocket.web")


class Problem(NamedTuple):
    """An error response."""

    status: HTTPStatus
    text: str
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> bytes:
        """The text as JSON."""
        return json.dumps({"error": self.text}).encode()

    @property
    def fields(self) -> list[tuple[str, str]]:
        """Every header of the response."""
        return [
            ("Content-Type", "application/json; charset=utf-8"),
            ("Content-Length", str(len(self.body))),
            NOT_TO_BE_CACHED,
            *self.headers,
        ]


def problem_of(error: Exception, request: str) -> Problem:
    """Return the response to a request that ended in one of `FORESEEN`, and log the reason."""
    if isinstance(error, InvalidToken):
        _log.info("%s: %s", request, error)
        return Problem(HTTPStatus.BAD_REQUEST, "The session token is invalid.")
    _log.warning("%s: %s", request, error)
    if isinstance(error, OutcomeUnknown):
        return Problem(HTTPStatus.GATEWAY_TIMEOUT, "The outcome of this write is unknown.")
    text = "No database server can answer this now. Please try again."
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, text, (("Retry-After", "1"),))


def session_fields(
    session: Session, carrier: Carrier, values: Values, *, secure: bool, route: bool
) -> Sequence[tuple[str, str]]:
    """Return the header fields for what the session has done; with `route`, also where its last answer came from.

    `Rocket-Lost` describes what a promotion may have cost the session.
    """
    fields = list(carrier.hand_out(session, values, secure=secure))
    if session.lost is not None:
        fields.append(("Rocket-Lost", str(session.lost)))
    if route and (last := session.last) is not None:
        fields += (
            ("Rocket-Served-By", last.node),
            ("Rocket-Served-As", last.role),
            ("Rocket-Route-Reason", last.reason),
        )
    return fields
