"""Error responses: all their texts in one place; and which host names the API answers to."""

from __future__ import annotations

import functools
import ipaddress
import logging
import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket import InvalidToken, OutcomeUnknown, Unavailable
from rocket.routing.limits import Timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from aiohttp.typedefs import Handler, Middleware

MAX_BODY_BYTES = 64 * 1024

_RETRY_AFTER_S = "1"
_HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[^][:]+))(:[0-9]*)?")

_log = logging.getLogger("rocket.api")


class Problem(Exception):
    """An error response to a request; the text is for the client."""

    def __init__(self, status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers or {}

    def response(self) -> web.Response:
        """Return the response."""
        return web.json_response({"error": str(self)}, status=self.status, headers=self.headers)


def missing_parameter(name: str) -> Problem:
    """Return the problem of a required parameter that is missing."""
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"Please specify parameter '{name}'.")


def wrong_parameter(name: str, what: str) -> Problem:
    """Return the problem of a parameter with a wrong value."""
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"Parameter '{name}' must be {what}.")


def unreadable_body(what: str) -> Problem:
    """Return the problem of a body that does not match its headers."""
    return Problem(HTTPStatus.BAD_REQUEST, f"Request body could not be read as {what}.")


def missing_credentials() -> Problem:
    """Return the problem of a request without credentials."""
    return Problem(HTTPStatus.UNAUTHORIZED, "Please specify credentials in the Authorization header.")


def invalid_credentials() -> Problem:
    """Return the problem of credentials of no user."""
    return Problem(HTTPStatus.UNAUTHORIZED, "Credentials in Authorization were invalid.")


def not_found(kind: str, given_id: str) -> Problem:
    """Return the problem of an object that does not exist, or that belongs to another user."""
    return Problem(HTTPStatus.NOT_FOUND, f"Object of type '{kind}' with ID '{given_id}' was not found.")


def key_used_otherwise() -> Problem:
    """Return the problem of an Idempotency-Key that came with another request before."""
    return Problem(HTTPStatus.CONFLICT, "Idempotency-Key was used before with other parameters.")


def wrong_idempotency_key(longest: int) -> Problem:
    """Return the problem of an Idempotency-Key that cannot be stored."""
    return Problem(HTTPStatus.BAD_REQUEST, f"Idempotency-Key must be 1 to {longest} printable characters.")


def answer_problems(timeout_s: float, check_host: Callable[[web.Request], None]) -> Middleware:
    """Return a middleware that answers errors in JSON; an unexpected one is a 500, and logged with a traceback.

    A request that takes longer than `timeout_s` is cut off. `check_host` is called for each request.
    """

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            check_host(request)
            with Timeout(timeout_s):
                response = await handler(request)
        except Problem as problem:
            response = problem.response()
        except web.HTTPException as error:
            response = _problem_of(error, request).response()
        except InvalidToken as error:
            _log.info("%s: %s", _request_line(request), error)
            response = Problem(
                HTTPStatus.BAD_REQUEST, "The session token in Rocket-Session is invalid."
            ).response()
        except (OutcomeUnknown, Unavailable, TimeoutError) as error:
            why = str(error) or type(error).__name__
            _log.warning("%s: %s", _request_line(request), why, extra={"alike": why})
            # A write that was cut off may have been committed.
            unknown = isinstance(error, OutcomeUnknown) or (
                isinstance(error, TimeoutError) and request.method == "POST"
            )
            response = (outcome_unknown() if unknown else unavailable()).response()
        except Exception:  # noqa: BLE001 - logged with its traceback
            _log.exception("%s failed", _request_line(request))
            response = internal_error().response()
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    return answer


def _request_line(request: web.BaseRequest) -> str:
    # The path as it was encoded: a decoded one could forge log lines.
    return f"{request.method} {request.rel_url.raw_path}"


def outcome_unknown() -> Problem:
    """Return the problem of a write that may have been committed, or not."""
    return Problem(HTTPStatus.GATEWAY_TIMEOUT, "The outcome of this write is unknown.")


def unavailable() -> Problem:
    """Return the problem of a request that changed nothing, and may be repeated."""
    return Problem(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "No database server can answer this now. Please try again.",
        {"Retry-After": _RETRY_AFTER_S},
    )


def internal_error() -> Problem:
    """Return the problem of an unexpected error, whose details are in the log."""
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error.")


def _problem_of(error: web.HTTPException, request: web.Request) -> Problem:
    """Return, with a text of ours, what aiohttp would answer in plain text."""
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


# --- hosts ---


def known_hosts_only(names: Collection[str]) -> Callable[[web.Request], None]:
    """Return a function that raises a `Problem` for a request to any host but loopback and `names`.

    A page of another site can make a browser send requests here by pointing a name of its own at 127.0.0.1 (DNS
    rebinding). It cannot change the Host header, so checking that header keeps it out.
    """
    known = {"localhost", *(plain for name in names if (plain := _plain(name)))}

    @functools.lru_cache(maxsize=256)
    def is_known(host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = _plain(match["address"] or match["name"])
        return name in known or _is_loopback(name)

    def check(request: web.Request) -> None:
        given = request.headers.get("Host", "")
        if not is_known(given):
            raise Problem(HTTPStatus.MISDIRECTED_REQUEST, f"Host '{given}' is not served here.")

    return check


def _plain(name: str) -> str:
    return name.strip().lower().rstrip(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
