"""Answers that say how they came about."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiohttp import web

from rocket.web.carriers import HEADER

if TYPE_CHECKING:
    from rocket import Answer

_JSON = "application/json; charset=utf-8"


def route_headers(answer: Answer[Any]) -> dict[str, str]:
    """Name the node that answered, as what, and why it was that one; hand the session its token.

    `Rocket-Lost` tells a session, in so many words, what a promotion may have cost it.
    """
    headers = {
        "Rocket-Served-By": answer.node,
        "Rocket-Served-As": answer.role,
        "Rocket-Route-Reason": answer.reason,
    }
    if answer.lost is not None:
        headers["Rocket-Lost"] = str(answer.lost)
    if answer.token is not None:
        headers[HEADER] = str(answer.token)
    return headers


def answer_json(answer: Answer[Any], body: object, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    """Return a body together with how it came about."""
    headers = route_headers(answer)
    headers["Content-Type"] = _JSON
    return web.Response(body=json.dumps(body).encode(), status=status, headers=headers)
