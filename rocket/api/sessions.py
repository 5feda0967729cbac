"""The session token in the header `Rocket-Session`, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket import InvalidToken, SessionToken

if TYPE_CHECKING:
    from aiohttp import web

HEADER = "Rocket-Session"
_MOST_TOKENS = 16
"""A client with concurrent requests may hold several."""


def token_of(request: web.Request) -> SessionToken | None:
    """Return what the client brings, merged if it is several tokens; raise `InvalidToken`.

    Of tokens of several reigns the latest count: a replica that shows that reign has all that is left of the
    earlier ones.
    """
    given = [text.strip() for value in request.headers.getall(HEADER, []) for text in value.split(",")]
    texts = [text for text in given if text]  # a list in a header may have empty elements
    if not texts:
        return None
    if len(texts) > _MOST_TOKENS:
        raise InvalidToken(f"more than {_MOST_TOKENS} session tokens")
    try:
        tokens = [SessionToken.parse(text) for text in texts]
        latest = max(token.timeline for token in tokens)
        merged, *others = [token for token in tokens if token.timeline == latest]
        for other in others:
            merged = merged.merged_with(other)
    except ValueError as error:
        raise InvalidToken(str(error)) from None
    return merged
