"""Sessions for ASGI applications: FastAPI, Starlette and the like."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

from rocket import Freshness
from rocket.web.carriers import Carrier, Header
from rocket.web.problems import FORESEEN, NOT_TO_BE_CACHED, Problem, problem_of, session_fields

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rocket import Router, Session

Scope: TypeAlias = MutableMapping[str, Any]
"""A connection's scope, as ASGI defines it."""
Message: TypeAlias = MutableMapping[str, Any]
"""One event of a connection, in or out."""
Receive: TypeAlias = Callable[[], Awaitable[Message]]
"""Receives the client's next message."""
Send: TypeAlias = Callable[[Message], Awaitable[None]]
"""Sends a message to the client."""
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
"""An ASGI application."""

_BEGINNINGS = {"http.response.start", "websocket.accept"}
"""Messages that carry the response's headers."""
_POLICY_VIOLATION = 1008


def session_of(request: Mapping[str, Any]) -> Session:
    """Return the session that `RocketMiddleware` gave to a request of Starlette or FastAPI, or to an ASGI scope.

    It is `request.state.rocket`, with its type.
    """
    session: Session = request["state"]["rocket"]
    return session


class RocketMiddleware:
    """Gives each request a `rocket.Session`: `session_of(request)`, or `request.state.rocket`.

    The session's token arrives and leaves by `carrier` (default: `Header`), with every response to a request that
    has read or written, errors and streams included. The headers of a stream carry what was read before its first
    byte. What the framework answers to an unhandled error (a 500) bypasses all middlewares, and acknowledges
    nothing.

    A `rocket.Unavailable` that reaches it becomes a 503 with Retry-After, `OutcomeUnknown` a 504 and
    `InvalidToken` a 400. `router` returns the router, once there is one. `subject` names the owner of a request's
    writes; a handler may set `session.subject` instead. `freshness` says what a request's reads ask for that say
    nothing themselves. `route_headers` adds `Rocket-Served-By`, `Rocket-Served-As` and `Rocket-Route-Reason` for
    the session's last answer.
    """

    def __init__(
        self,
        app: App,
        # Not generic in the subject: `add_middleware` would infer `Never`.
        router: Callable[[], Router],
        *,
        subject: Callable[[Scope], str | None] | None = None,
        carrier: Carrier | None = None,
        freshness: Callable[[Scope], Freshness] | None = None,
        route_headers: bool = False,
    ) -> None:
        self._app = app
        self._router = router
        self._subject = subject
        self._carrier = carrier or Header()
        self._freshness = freshness
        self._route_headers = route_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; pass any other scope on."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        begun = False
        session: Session | None = None

        async def send_on(message: Message) -> None:
            nonlocal begun
            if message["type"] in _BEGINNINGS:
                begun = True
                if session is not None:
                    message = {**message, "headers": self._with_session(session, scope, message)}
            await send(message)

        try:
            session = self._session(scope)
            scope["state"] = {**scope.get("state", {}), "rocket": session}
            await self._app(scope, receive, send_on)
        except FORESEEN as error:
            if begun:
                raise
            await _answer(problem_of(error, _request_line(scope)), scope, send_on)

    def _session(self, scope: Scope) -> Session:
        return self._router().session(
            None if self._subject is None else self._subject(scope),
            self._carrier.bring(functools.partial(_values, scope["headers"])),
            lenient=self._carrier.lenient,
            freshness=Freshness.SESSION if self._freshness is None else self._freshness(scope),
        )

    def _with_session(self, session: Session, scope: Scope, message: Message) -> list[tuple[bytes, bytes]]:
        headers = list(message.get("headers", ()))
        values = functools.partial(_values, scope["headers"])
        secure = scope.get("scheme") in {"https", "wss"}
        fields = session_fields(session, self._carrier, values, secure=secure, route=self._route_headers)
        if session.last is not None and not _values(headers, "cache-control"):
            fields = [*fields, NOT_TO_BE_CACHED]
        return headers + _encoded(fields)


def _values(headers: Iterable[tuple[bytes, bytes]], name: str) -> Sequence[str]:
    wanted = name.encode()
    return [value.decode("latin-1") for key, value in headers if key.lower() == wanted]


def _encoded(fields: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in fields]


def _request_line(scope: Scope) -> str:
    # The path as it was encoded: a decoded one could forge log lines.
    path = scope.get("raw_path") or scope["path"].encode()
    return f"{scope.get('method', 'websocket')} {path!r}"


async def _answer(problem: Problem, scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": problem.text})
        return
    await send({"type": "http.response.start", "status": problem.status, "headers": _encoded(problem.fields)})
    await send({"type": "http.response.body", "body": problem.body})
