"""Requests that can be told apart: each has an id, which its log lines carry, and a line when it is answered."""

from __future__ import annotations

import logging
import random
import re
import time
from typing import TYPE_CHECKING

from aiohttp import web

from rocket.lab.logs import REQUEST_ID

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

HEADER = "X-Request-ID"
_VALID = re.compile(r"[!-~]{1,128}")
"""What a client may call its request: printable, without spaces, and short."""

_log = logging.getLogger("rocket.access")


@web.middleware
async def told_apart(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take the client's id for the request, or make one; send it back, and log what was answered.

    The line names the route and not the path, which may hold anything, and says nothing of who asked.
    """
    given = request.headers.get(HEADER, "")
    request_id = given if _VALID.fullmatch(given) else f"{random.getrandbits(64):016x}"
    REQUEST_ID.set(request_id)  # each request has a context of its own
    began = time.monotonic()
    response = await handler(request)
    took_s = time.monotonic() - began
    if not response.prepared:
        response.headers[HEADER] = request_id
    route = request.match_info.route.resource
    path = None if route is None else route.canonical
    headers = response.headers
    fields = {
        "method": request.method,
        "path": path,
        "status": response.status,
        "node": headers.get("Rocket-Served-By"),
        "reason": headers.get("Rocket-Route-Reason"),
        "ms": round(took_s * 1000, 3),
    }
    said = {name: value for name, value in fields.items() if value is not None}
    _log.info("%s %s: %d", request.method, path or "(no route)", response.status, extra={"fields": said})
    return response
