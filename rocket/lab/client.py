"""A client of the demonstration's API: requests by HTTP, whole answers, and one class for each way to get none."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

import aiohttp

from rocket.errors import RocketError, describe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from types import TracebackType

TIMEOUT_S = 10.0
"""Longer than the API takes for anything: it gives up a request by itself after five seconds or so."""

_SESSION, _FRESHNESS = "Rocket-Session", "Rocket-Freshness"
_LOST = (
    aiohttp.ServerDisconnectedError,
    aiohttp.ClientOSError,
    aiohttp.ClientConnectionResetError,
    aiohttp.ClientPayloadError,
)


class NoAnswer(RocketError):
    """No whole answer came. Whether the request was carried out is unknown."""


class NotConnected(NoAnswer):
    """No connection could be made, so nothing was sent; says why in the system's words."""


class ConnectionLost(NoAnswer):
    """The connection was lost while an answer was due."""


class AnswerTimeout(NoAnswer):
    """No whole answer came in time."""


class UnexpectedAnswer(RocketError):
    """The API answered, but not that it has done what was asked for; quotes status and body."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, whatever its status is."""

    status: int
    headers: Mapping[str, str]
    """Names are compared without regard to case."""
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is below 400."""
        return self.status < HTTPStatus.BAD_REQUEST

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode(errors="replace")

    def expect(self, status: HTTPStatus) -> Self:
        """Return the answer if it has this status; raise `UnexpectedAnswer` if it has another."""
        if self.status != status:
            raise UnexpectedAnswer(f"{self.status} {self.text}")
        return self

    def json(self) -> Any:
        """Return the body as JSON; raise `ValueError` if it is none."""
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        """The session token that it gives to the client."""
        return self.headers.get(_SESSION)

    @property
    def node(self) -> str | None:
        """The name of the node that answered."""
        return self.headers.get("Rocket-Served-By")

    @property
    def role(self) -> str | None:
        """`primary` or `replica`: the role of that node then."""
        return self.headers.get("Rocket-Served-As")

    @property
    def reason(self) -> str | None:
        """Why that node answered."""
        return self.headers.get("Rocket-Route-Reason")

    @property
    def possible_loss(self) -> str | None:
        """A notice that a promotion may have lost writes of the session."""
        return self.headers.get("Rocket-Lost")


class Api:
    """The API at a URL, for as long as the context lasts; connections are kept and used again.

    `connections` bounds them (0: no bound). With `reconnect` each request opens one of its own, so that each of
    several processes that share a port gets some. Without `retries` a read whose kept connection turns out to be
    closed is not sent again behind the caller's back.
    """

    def __init__(
        self,
        url: str = "",
        *,
        timeout_s: float = TIMEOUT_S,
        connections: int = 0,
        reconnect: bool = False,
        retries: bool = True,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._connections = connections
        self._reconnect = reconnect
        self._retries = retries
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, force_close=self._reconnect),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
        )
        self._http._retry_connection = self._retries  # noqa: SLF001 - there is no parameter for it
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def get(
        self, path: str, *, user: str | None = None, tokens: Collection[str] = (), freshness: str | None = None
    ) -> Answer:
        """Send a GET request; see `request`."""
        return await self.request("GET", path, user=user, tokens=tokens, freshness=freshness)

    async def post(
        self,
        path: str,
        *,
        user: str | None = None,
        tokens: Collection[str] = (),
        form: Mapping[str, str] | None = None,
        json: Mapping[str, object] | None = None,
    ) -> Answer:
        """Send a POST request; see `request`."""
        return await self.request("POST", path, user=user, tokens=tokens, form=form, json=json)

    async def request(
        self,
        method: str,
        path: str,
        *,
        user: str | None = None,
        tokens: Collection[str] = (),
        form: Mapping[str, str] | None = None,
        json: Mapping[str, object] | None = None,
        freshness: str | None = None,
    ) -> Answer:
        """Send a request as a user, with session tokens, and return the answer; raise `NoAnswer`.

        `freshness` is what its reads ask to be shown, where that is not what the session has written and seen.
        """
        headers = [("Authorization", user)] if user is not None else []
        headers += [(_SESSION, token) for token in tokens]
        headers += [] if freshness is None else [(_FRESHNESS, freshness)]
        try:
            async with self._http.request(
                method, f"{self.url}{path}", headers=headers, data=form, json=json
            ) as response:
                return Answer(response.status, response.headers, await response.read())
        except aiohttp.ClientConnectorError as error:
            raise NotConnected(_why(error.os_error)) from None
        except TimeoutError:
            raise AnswerTimeout(f"no answer within {self._timeout_s:g} s") from None
        except _LOST as error:
            raise ConnectionLost(f"{type(error).__name__}: {error}") from None
        except aiohttp.ClientError as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from None


def _why(error: OSError) -> str:
    """Return why there is no connection; asyncio's own message names the call instead."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or describe(error)
