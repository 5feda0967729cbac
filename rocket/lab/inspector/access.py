"""Who may view the inspector, who may send commands, and what a browser may do with the page."""

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
INDEX = "index.html"
_NO_TOKEN = "1"  # noqa: S105 - its presence alone keeps other sites' pages out
_LONGEST_COMMAND = 4096
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")
"""Headers added by a proxy on this machine, whose client may be elsewhere."""
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
NOT_LOCAL = "Commands are accepted from clients on this machine only; --inspector-token admits others."


def page_files() -> Mapping[str, tuple[bytes, str]]:
    """Return the page's files by name, each with its content type; nothing else is served."""
    page = resources.files("rocket.lab.inspector").joinpath("page")
    return {
        file.name: (file.read_bytes(), _TYPES[suffix])
        for file in (page.iterdir() if page.is_dir() else ())
        if (suffix := file.name.rpartition(".")[2]) in _TYPES
    }


def check_may_view(request: web.Request, token: str | None) -> None:
    """Raise a 403 unless the client is on this machine or sends the token."""
    if is_local(request):
        return
    if token is None:
        raise _forbidden("The inspector is for clients on this machine; --inspector-token admits others.")
    given = (request.headers.get(HEADER), request.cookies.get(COOKIE), request.query.get("token"))
    if not any(each is not None and _equal(each, token) for each in given):
        raise _forbidden("From another machine, the inspector requires its token: /inspector?token=...")


def check_may_fetch(request: web.Request, token: str | None) -> None:
    """Raise a 403 unless the client may view, and is not a page of another site, for which we should not work."""
    check_may_view(request, token)
    if not _is_same_origin(request):
        raise _forbidden("The inspector sends requests to no page of another site.")


def check_may_command(request: web.Request, token: str | None) -> None:
    """Raise a 403 unless the client sends the token, or, if there is none, is on this machine."""
    given = request.headers.get(HEADER)
    if given is None:
        raise _forbidden(f"A command needs the header '{HEADER}'.")
    if not _is_same_origin(request):
        raise _forbidden("Commands are accepted from the inspector's own page only.")
    if token is not None:
        if not _equal(given, token):
            raise _forbidden("The inspector's token is a different one.")
    elif not is_local(request):
        raise _forbidden(NOT_LOCAL)
    elif given != _NO_TOKEN:
        raise _forbidden(f"The header '{HEADER}' has to be '{_NO_TOKEN}'.")


async def read_command(request: web.Request) -> Mapping[str, Any]:
    """Read the command that a request holds; raise a `Problem` if it holds none."""
    if request.content_type != "application/json":
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A command is 'application/json'.")
    body = await request.content.read(_LONGEST_COMMAND + 1)
    while len(body) <= _LONGEST_COMMAND and (more := await request.content.read(_LONGEST_COMMAND + 1)):
        body += more
    if len(body) > _LONGEST_COMMAND:
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A command has at most {_LONGEST_COMMAND} bytes.")
    try:
        command = json.loads(body)
    except (ValueError, RecursionError):
        raise Problem(HTTPStatus.BAD_REQUEST, "The command is not JSON.") from None
    if not isinstance(command, dict):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "A command is a JSON object.")
    return command


def is_local(request: web.Request) -> bool:
    """Return whether the client is on this machine, and no proxy here has forwarded its request."""
    if request.remote is None or any(name in request.headers for name in _FORWARDED):
        return False
    return _is_loopback(request.remote) and _is_loopback(urlsplit(f"//{request.host}").hostname or "")


def _forbidden(text: str) -> Problem:
    return Problem(HTTPStatus.FORBIDDEN, text, SECURITY_HEADERS)


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode())


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_same_origin(request: web.Request) -> bool:
    """Return whether a page of ours made a browser send this, or the client is not a browser."""
    if request.headers.get("Sec-Fetch-Site", "none") not in {"same-origin", "none"}:
        return False
    origin = request.headers.get("Origin")
    if origin is None:
        return True
    parts = urlsplit(origin)
    return parts.scheme in {"http", "https"} and parts.netloc.lower() == request.host.lower()
