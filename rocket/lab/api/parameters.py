"""The parameters of requests, from forms, JSON and queries: bounded and checked."""

from __future__ import annotations

import asyncio
import json
import math
import re
from http import HTTPStatus
from urllib.parse import parse_qsl

from aiohttp import web

from rocket import Freshness
from rocket.lab.api.limits import ADMISSION, BOUNDS
from rocket.lab.api.problems import Problem, missing_parameter, unreadable_body, wrong_parameter

FRESHNESS = "Rocket-Freshness"
"""The header that says how fresh a read has to be."""
BIGINT_MAX = 2**63 - 1
_MOST_FIELDS = 100
_FLOAT = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")  # in linear time
_WHOLE = re.compile(r"[0-9]{1,19}")
_LONGEST_EMAIL = 255


async def body_parameter(request: web.Request, name: str) -> object:
    """Return one parameter of a form or JSON body: a string, or any value of JSON.

    Raise a 422 if it is missing, a 400 if the body does not match its headers, a 408 if it does not arrive in
    time, a 413 if it is too large, and a 503 if too many bodies are arriving.
    """
    try:
        if request.content.is_eof():  # most bodies arrive with their headers
            body = await request.read()
        else:
            with request.app[ADMISSION].waiting_for_a_body():
                async with asyncio.timeout(request.app[BOUNDS].body_s):
                    body = await request.read()
    except TimeoutError:
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, "The request body did not arrive in time.") from None
    except (ConnectionError, web.RequestPayloadError, RuntimeError):  # the last one if it was lost before
        raise Problem(HTTPStatus.BAD_REQUEST, "The request body did not arrive in full.") from None
    values = _values(request, body)
    value = values.get(name)
    if value is None or value == "":
        raise missing_parameter(name)
    return value


def _values(request: web.Request, body: bytes) -> dict[str, object]:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Request bodies must not be compressed.")
    charset = request.charset or "utf-8"
    match request.content_type:
        case "application/json":
            return _json_object(body, charset)
        case "application/x-www-form-urlencoded":
            return _form(body, charset)
    return {}


def _json_object(body: bytes, charset: str) -> dict[str, object]:
    try:
        value = json.loads(body.decode(charset))
    except (ValueError, LookupError, RecursionError):
        raise unreadable_body("JSON") from None
    return value if isinstance(value, dict) else {}


def _form(body: bytes, charset: str) -> dict[str, object]:
    try:
        text = body.decode(charset)
        return dict(
            parse_qsl(text, keep_blank_values=True, encoding=charset, errors="strict", max_num_fields=_MOST_FIELDS)
        )
    except (ValueError, LookupError):
        raise unreadable_body("a form") from None


def distance(value: object) -> float:
    """Return a distance: a finite number, from JSON or decimal notation; raise a 422 for all else."""
    number = math.nan
    if isinstance(value, str) and _FLOAT.fullmatch(value.strip()):
        number = float(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise wrong_parameter("distance", "a floating-point number")
    return number


def email(value: object) -> str:
    """Return an e-mail address; raise a 422 for what cannot be one."""
    if not isinstance(value, str) or not is_email(value):
        raise wrong_parameter("email", f"an e-mail address of at most {_LONGEST_EMAIL} characters")
    return value


def is_email(text: str) -> bool:
    """Return whether a text may be an e-mail address (printable, so Postgres can store it)."""
    local, at, domain = text.partition("@")
    return (
        len(text) <= _LONGEST_EMAIL
        and bool(local and at and domain)
        and "@" not in domain
        and " " not in text
        and text.isprintable()
    )


def ride_id(text: str) -> int:
    """Return a ride's ID; a text that cannot be one becomes 0, which no ride has."""
    if not _WHOLE.fullmatch(text) or int(text) > BIGINT_MAX:
        return 0
    return int(text)


def page_limit(request: web.Request, *, default: int, most: int) -> int:
    """Return how many rides a page holds at most; raise a 422."""
    text = request.query.get("limit", str(default))
    if not _WHOLE.fullmatch(text) or not 1 <= int(text) <= most:
        raise wrong_parameter("limit", f"a whole number from 1 to {most}")
    return int(text)


def page_before(request: web.Request) -> int:
    """Return the ID that all rides of a page lie below, by default above all IDs; raise a 422."""
    text = request.query.get("before")
    if text is None:
        return BIGINT_MAX
    before = ride_id(text)
    if before == 0:
        raise wrong_parameter("before", "the ID of a ride")
    return before


def freshness(request: web.Request) -> Freshness:
    """Return how fresh a request's reads have to be, by the header `Rocket-Freshness`; raise a 400."""
    text = request.headers.get(FRESHNESS)
    if text is None:
        return Freshness.SESSION
    try:
        return Freshness.parse(text)
    except ValueError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"Header '{FRESHNESS}' {error}.") from None
