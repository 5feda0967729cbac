"""Which names the API answers to.

A page of another site can make a browser send requests here by pointing a name of its own at 127.0.0.1 (DNS
rebinding). It cannot change the Host header, so only known names and plain addresses are served.
"""

from __future__ import annotations

import ipaddress
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket.api.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiohttp.typedefs import Handler, Middleware


def known_hosts_only(names: Collection[str]) -> Middleware:
    """Return a middleware that refuses requests for any host but `names`, localhost and IP addresses."""
    known = {"localhost", *(name.lower().rstrip(".") for name in names)}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        name = _without_port(request.headers.get("Host", "")).lower().rstrip(".")
        if name not in known and not _is_address(name):
            raise Problem(HTTPStatus.MISDIRECTED_REQUEST, f"Host '{name}' is not served here.")
        return await handler(request)

    return check


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
