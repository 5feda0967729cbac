"""What clients are told when something is wrong, all of it in one place."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket import InvalidToken, OutcomeUnknown, Unavailable
from rocket.lab.api.keys import METRICS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.typedefs import Handler

MAX_BODY_BYTES = 64 * 1024
REQUEST_TIMEOUT_S = 25.0
"""Longer than reading a body and writing with all its attempts may take: a last resort."""

_RETRY_AFTER_S = "1"

_log = logging.getLogger("rocket.api")


class Problem(Exception):
    """A request that is answered with an error; the text is for the client."""

    def __init__(self, status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers or {}

    def response(self) -> web.Response:
        """Return the answer that tells the client."""
        return web.json_response({"error": str(self)}, status=self.status, headers=self.headers)


def missing_parameter(name: str) -> Problem:
    """Say that a parameter which has to be there is not."""
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"Please specify parameter '{name}'.")


def wrong_parameter(name: str, what: str) -> Problem:
    """Say that a parameter is not what it must be."""
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"Parameter '{name}' must be {what}.")


def unreadable_body(what: str) -> Problem:
    """Say that the body is not what its headers say."""
    return Problem(HTTPStatus.BAD_REQUEST, f"Request body could not be read as {what}.")


def missing_credentials() -> Problem:
    """Say that nobody said who asks."""
    return Problem(HTTPStatus.UNAUTHORIZED, "Please specify credentials in the Authorization header.")


def invalid_credentials(headers: Mapping[str, str] | None = None) -> Problem:
    """Say that there is nobody of that name."""
    return Problem(HTTPStatus.UNAUTHORIZED, "Credentials in Authorization were invalid.", headers)


def not_found(kind: str, given_id: str, headers: Mapping[str, str] | None = None) -> Problem:
    """Say that there is no such thing, or not for this user to see."""
    return Problem(HTTPStatus.NOT_FOUND, f"Object of type '{kind}' with ID '{given_id}' was not found.", headers)


def key_used_otherwise() -> Problem:
    """Say that the same Idempotency-Key came with another request."""
    return Problem(HTTPStatus.CONFLICT, "Idempotency-Key was used before with other parameters.")


def wrong_idempotency_key(longest: int) -> Problem:
    """Say that the header's value cannot be kept."""
    return Problem(HTTPStatus.BAD_REQUEST, f"Idempotency-Key must be 1 to {longest} printable characters.")


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever goes wrong into an answer in JSON; what nobody foresaw is a 500 and a traceback."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            response = await handler(request)
    except Problem as problem:
        response = problem.response()
    except web.HTTPException as error:
        response = _in_our_words(error, request).response()
    except InvalidToken as error:
        _log.info("%s: %s", _called(request), error)
        request.app[METRICS].count_refused_token()
        response = Problem(HTTPStatus.BAD_REQUEST, "The session token in Rocket-Session is invalid.").response()
    except (OutcomeUnknown, Unavailable, TimeoutError) as error:
        why = str(error) or type(error).__name__
        _log.warning("%s: %s", _called(request), why, extra={"alike": why})
        # A write that was cut off by the last resort may have been committed.
        unknown = isinstance(error, OutcomeUnknown) or (
            isinstance(error, TimeoutError) and request.method == "POST"
        )
        response = (outcome_unknown() if unknown else unavailable()).response()
    except Exception:  # noqa: BLE001 - logged with its traceback
        _log.exception("%s failed", _called(request))
        response = internal_error().response()
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _called(request: web.BaseRequest) -> str:
    # As it was encoded: a decoded path could write lines of its own into the log.
    return f"{request.method} {request.rel_url.raw_path}"


def outcome_unknown() -> Problem:
    """Say that a write may have happened, or not."""
    return Problem(HTTPStatus.GATEWAY_TIMEOUT, "The outcome of this write is unknown.")


def unavailable() -> Problem:
    """Say that nothing was changed, and that it is worth asking again."""
    return Problem(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "No database server can answer this now. Please try again.",
        {"Retry-After": _RETRY_AFTER_S},
    )


def internal_error() -> Problem:
    """Say that something happened which nobody foresaw; the log knows more."""
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error.")


def _in_our_words(error: web.HTTPException, request: web.Request) -> Problem:
    """Say in JSON what aiohttp says in plain text."""
    status = HTTPStatus(error.status)
    match error:
        case web.HTTPNotFound():
            return Problem(status, f"Path '{request.path}' was not found.")
        case web.HTTPMethodNotAllowed():
            return Problem(
                status, f"Method '{request.method}' is not allowed here.", {"Allow": error.headers["Allow"]}
            )
        case web.HTTPRequestEntityTooLarge():
            return Problem(status, f"Request body is larger than {MAX_BODY_BYTES} bytes.")
    return Problem(status, f"{status.phrase}.")
