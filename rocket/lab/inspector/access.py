"""Who may look, who may act, and what a browser may do with the page."""

from __future__ import annotations

import hmac
import ipaddress
import json
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rocket.lab.api.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp import web

HEADER = "Rocket-Inspector"
COOKIE = "rocket-inspector"
_NO_TOKEN = "1"  # noqa: S105 - that it is there at all keeps other sites' pages out
_LONGEST_ORDER = 4096
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")
"""Headers of a proxy on this machine: the client is somewhere else."""
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

INDEX = "index.html"


def page_files() -> Mapping[str, tuple[bytes, str]]:
    """Return the page's files by name, each with its content type: what can be served at all."""
    page = resources.files("rocket.lab.inspector").joinpath("page")
    return {
        file.name: (file.read_bytes(), _TYPES[suffix])
        for file in (page.iterdir() if page.is_dir() else ())
        if (suffix := file.name.rpartition(".")[2]) in _TYPES
    }


def may_look(request: web.Request, token: str | None) -> None:
    """Let clients on this machine look, and those that bring the token; raise a 403."""
    if is_near(request):
        return
    if token is None:
        text = "The inspector is for clients on this machine; --inspector-token lets others in."
        raise Problem(HTTPStatus.FORBIDDEN, text, SECURITY_HEADERS)
    given = (request.headers.get(HEADER), request.cookies.get(COOKIE), request.query.get("token"))
    if not any(each is not None and _same(each, token) for each in given):
        text = "The inspector asks clients on other machines for its token: /inspector?token=..."
        raise Problem(HTTPStatus.FORBIDDEN, text, SECURITY_HEADERS)


def may_be_told(request: web.Request, token: str | None) -> None:
    """Tell of requests only who may look, and no page but ours, since that is work for us; raise a 403."""
    may_look(request, token)
    if not _of_this_origin(request):
        raise _refused("Of requests, the inspector tells no page of another site.")


def may_act(request: web.Request, token: str | None) -> None:
    """Let only those act who may: by the token if there is one, else clients on this machine; raise a 403."""
    given = request.headers.get(HEADER)
    if given is None:
        raise _refused(f"Orders carry the header '{HEADER}'.")
    if not _of_this_origin(request):
        raise _refused("Orders are taken from the inspector's own page only.")
    if token is not None:
        if not _same(given, token):
            raise _refused("That is not the inspector's token.")
    elif not is_near(request):
        raise _refused("Orders are taken from clients on this machine only; --inspector-token lets others in.")
    elif given != _NO_TOKEN:
        raise _refused(f"The header '{HEADER}' has to be '{_NO_TOKEN}'.")


async def order_of(request: web.Request) -> Mapping[str, Any]:
    """Read an order; raise a `Problem` for what is none."""
    if request.content_type != "application/json":
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "An order is 'application/json'.")
    body = await request.content.read(_LONGEST_ORDER + 1)
    while len(body) <= _LONGEST_ORDER and (more := await request.content.read(_LONGEST_ORDER + 1)):
        body += more
    if len(body) > _LONGEST_ORDER:
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"An order has at most {_LONGEST_ORDER} bytes.")
    try:
        order = json.loads(body)
    except (ValueError, RecursionError):
        raise Problem(HTTPStatus.BAD_REQUEST, "The order is not JSON.") from None
    if not isinstance(order, dict):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "An order is an object.")
    return order


def _refused(text: str) -> Problem:
    return Problem(HTTPStatus.FORBIDDEN, text, SECURITY_HEADERS)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode())


def is_near(request: web.Request) -> bool:
    """Tell whether a client is on this machine, and has not been passed on by a proxy here."""
    if request.remote is None or any(name in request.headers for name in _FORWARDED):
        return False
    return _is_loopback(request.remote) and _is_loopback(urlsplit(f"//{request.host}").hostname or "")


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _of_this_origin(request: web.Request) -> bool:
    """Tell whether a browser sent this from a page of ours, or something that is no browser sent it."""
    if request.headers.get("Sec-Fetch-Site", "none") not in {"same-origin", "none"}:
        return False
    origin = request.headers.get("Origin")
    if origin is None:
        return True
    parts = urlsplit(origin)
    return parts.scheme in {"http", "https"} and parts.netloc.lower() == request.host.lower()
