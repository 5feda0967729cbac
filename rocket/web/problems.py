"""What a client is told where a read or a write could not be carried out."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import NamedTuple

from rocket import InvalidToken, OutcomeUnknown, Unavailable

FORESEEN = (InvalidToken, OutcomeUnknown, Unavailable)
"""Errors that say nothing against the service's own code."""

_log = logging.getLogger("rocket.web")


class Problem(NamedTuple):
    """An answer that tells of an error."""

    status: HTTPStatus
    text: str
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> bytes:
        """What the client reads."""
        return json.dumps({"error": self.text}).encode()

    @property
    def fields(self) -> list[tuple[str, str]]:
        """Every header of the answer."""
        return [
            ("Content-Type", "application/json; charset=utf-8"),
            ("Content-Length", str(len(self.body))),
            ("Cache-Control", "no-store"),
            *self.headers,
        ]


def problem_of(error: Exception, request: str) -> Problem:
    """Return the answer to a request that ended in one of `FORESEEN`, and log why it did."""
    if isinstance(error, InvalidToken):
        _log.info("%s: %s", request, error)
        return Problem(HTTPStatus.BAD_REQUEST, "The session token is invalid.")
    _log.warning("%s: %s", request, error)
    if isinstance(error, OutcomeUnknown):
        return Problem(HTTPStatus.GATEWAY_TIMEOUT, "The outcome of this write is unknown.")
    text = "No database server can answer this now. Please try again."
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, text, (("Retry-After", "1"),))
