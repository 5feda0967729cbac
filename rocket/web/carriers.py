"""How session tokens travel between a client and a service."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rocket import Session

    Values = Callable[[str], Sequence[str]]
    """Returns all values of a request's header, by its name in lower case."""

HEADER = "Rocket-Session"

_COOKIE_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class Carrier(Protocol):
    """Takes the session tokens out of a request, and puts them into the response."""

    lenient: bool
    """Whether tokens of another cluster are dropped, rather than refused with a 400."""

    def bring(self, values: Values) -> Sequence[str]:
        """Return the tokens of a request, as text."""

    def hand_out(self, session: Session, values: Values, *, secure: bool) -> Sequence[tuple[str, str]]:
        """Return header fields for the response to that request; `secure`: whether it came over TLS."""


class Header:
    """The header `Rocket-Session`, both ways: for clients that are programs.

    A client sends back the latest token; after concurrent requests it sends all that it got, in several headers
    or separated by commas. Every response to a request that read or wrote has the header.
    """

    lenient = False

    def bring(self, values: Values) -> Sequence[str]:
        """Return every value of the header."""
        return values(HEADER.lower())

    def hand_out(
        self,
        session: Session,
        values: Values,  # noqa: ARG002 - the request does not matter
        *,
        secure: bool,  # noqa: ARG002 - nor does TLS
    ) -> Sequence[tuple[str, str]]:
        """Return the header, if the session was used."""
        token = None if session.last is None else session.token
        return [] if token is None else [(HEADER, token)]


class Cookie:
    """Cookies: for browsers, concurrent requests included.

    Each response sets a cookie with a name of its own, `NAME.` and some random digits, and clears the cookies of
    its request, since the new token covers them. A browser whose requests overlap therefore holds several cookies
    for a while, rather than only the last, and sends them all. A response whose token has not changed sets none.

    A cookie that is malformed, or of another cluster, is ignored and cleared: a browser has no other way to drop
    it. Services on one host with different clusters need different names: cookies do not distinguish ports.
    """

    lenient = True

    def __init__(self, name: str = "rocket-session") -> None:
        if not _COOKIE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a valid cookie name")
        self.name = name
        self._is_ours = re.compile(rf"{re.escape(name)}\.[0-9a-f]{{8}}").fullmatch

    def bring(self, values: Values) -> Sequence[str]:
        """Return the value of each session cookie."""
        return [text for _, text in self._ours(values)]

    def hand_out(self, session: Session, values: Values, *, secure: bool) -> Sequence[tuple[str, str]]:
        """Return the cookies that leave the browser with the session's tokens and no others."""
        attributes = "; Path=/; HttpOnly; SameSite=Lax" + ("; Secure" if secure else "")
        tokens = [] if session.token is None else session.token.split(",")
        missing = dict.fromkeys(tokens)
        fields = []
        for name, text in self._ours(values):
            if text in missing:
                del missing[text]
            else:
                fields.append(("Set-Cookie", f"{name}={attributes}; Max-Age=0"))
        return fields + [
            ("Set-Cookie", f"{self.name}.{secrets.token_hex(4)}={token}{attributes}") for token in missing
        ]

    def _ours(self, values: Values) -> Iterator[tuple[str, str]]:
        for line in values("cookie"):
            for pair in line.split(";"):
                name, _, text = pair.strip().partition("=")
                if self._is_ours(name):
                    yield name, text.strip('"')
