"""The session token in the header `Rocket-Session`, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket import InvalidToken, SessionToken

if TYPE_CHECKING:
    from aiohttp import web

HEADER = "Rocket-Session"
_MOST_TOKENS = 16
"""A client with concurrent requests may hold several."""


def tokens_of(request: web.Request) -> list[SessionToken]:
    """Return what the client brings: no token, one or several; raise `InvalidToken`."""
    given = request.headers.getall(HEADER, ())
    try:
        if len(given) == 1 and given[0] and "," not in given[0]:
            return [SessionToken.parse(given[0])]
        # A list in a header may have empty elements.
        texts = [text for each in ",".join(given).split(",") if (text := each.strip())]
        if len(texts) > _MOST_TOKENS:
            raise InvalidToken(f"more than {_MOST_TOKENS} session tokens")
        return [SessionToken.parse(text) for text in texts]
    except ValueError as error:
        raise InvalidToken(str(error)) from None
