"""Which names the API answers to.

A page of another site can make a browser send requests here by pointing a name of its own at 127.0.0.1 (DNS
rebinding). It cannot change the Host header, so only loopback and known names are served.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket.lab.api.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiohttp.typedefs import Handler, Middleware


_HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[^][:]+))(:[0-9]*)?")


def known_hosts_only(names: Collection[str]) -> Middleware:
    """Return a middleware that refuses requests for any host but loopback and `names`."""
    known = {"localhost", *(plain for name in names if (plain := _plain(name)))}

    @functools.lru_cache(maxsize=256)
    def is_known(host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = _plain(match["address"] or match["name"])
        return name in known or _is_loopback(name)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Host", "")
        if not is_known(given):
            raise Problem(HTTPStatus.MISDIRECTED_REQUEST, f"Host '{given}' is not served here.")
        return await handler(request)

    return check


def _plain(name: str) -> str:
    return name.strip().lower().rstrip(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
