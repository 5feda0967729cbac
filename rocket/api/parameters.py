"""Reading what clients send: form or JSON, bounded, and never trusted."""

from __future__ import annotations

import asyncio
import json
import math
import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from rocket.api.problems import (
    MAX_BODY_BYTES,
    Problem,
    missing_parameter,
    unreadable_body,
    wrong_parameter,
)

if TYPE_CHECKING:
    from aiohttp import web

BIGINT_MAX = 2**63 - 1
_BODY_TIMEOUT_S = 5.0
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[0-9]{1,19}")
_LONGEST_EMAIL = 255


async def body_parameter(request: web.Request, name: str) -> object:
    """Return one parameter of a form or JSON body: a string, or whatever JSON holds.

    Raise a 422 where it is missing, a 400 where the body is not what it says, a 408 where it does not come,
    and a 413 where it is too large.
    """
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            if request.content_type == "application/json":
                values = await _json_object(request)
            else:
                values = await _form(request)
    except TimeoutError:
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, "The request body did not arrive in time.") from None
    value = values.get(name)
    if value is None or value == "":
        raise missing_parameter(name)
    return value


async def _json_object(request: web.Request) -> dict[str, object]:
    body = await request.read()
    try:
        value = json.loads(body.decode(request.charset or "utf-8"))
    except (ValueError, LookupError, RecursionError):
        raise unreadable_body("JSON") from None
    return value if isinstance(value, dict) else {}


async def _form(request: web.Request) -> dict[str, object]:
    try:
        return dict(await request.post())
    except (ValueError, LookupError):
        raise unreadable_body("a form") from None


def distance(value: object) -> float:
    """Read a distance: a finite number, in JSON or in decimal notation."""
    number = math.nan
    if isinstance(value, str) and len(value) <= MAX_BODY_BYTES and _FLOAT.fullmatch(value.strip()):
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
    """Read an e-mail address, as far as it can be told from something else."""
    if not isinstance(value, str) or not is_email(value):
        raise wrong_parameter("email", f"an e-mail address of at most {_LONGEST_EMAIL} characters")
    return value


def is_email(text: str) -> bool:
    """Tell whether a text may be an e-mail address (printable, so Postgres can store it)."""
    local, at, domain = text.partition("@")
    return (
        len(text) <= _LONGEST_EMAIL
        and bool(local and at and domain)
        and "@" not in domain
        and " " not in text
        and text.isprintable()
    )


def ride_id(text: str) -> int:
    """Read a ride's ID; what cannot be one becomes 0, which no ride has."""
    if not _WHOLE.fullmatch(text) or int(text) > BIGINT_MAX:
        return 0
    return int(text)


def page_limit(request: web.Request, *, default: int, most: int) -> int:
    """Read how many a page shall hold."""
    text = request.query.get("limit", str(default))
    if not _WHOLE.fullmatch(text) or not 1 <= int(text) <= most:
        raise wrong_parameter("limit", f"a whole number from 1 to {most}")
    return int(text)


def page_before(request: web.Request) -> int:
    """Read below which ride a page shall begin; without it, at the newest."""
    text = request.query.get("before")
    if text is None:
        return BIGINT_MAX
    before = ride_id(text)
    if before == 0:
        raise wrong_parameter("before", "the ID of a ride")
    return before
