"""Sessions for aiohttp applications."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from aiohttp import web

from rocket import InvalidToken, Session
from rocket.consistency import SessionToken
from rocket.routing.session import tokens_from
from rocket.web.carriers import HEADER, Carrier, Header
from rocket.web.problems import FORESEEN, problem_of
from rocket.web.responses import NOT_TO_BE_CACHED, session_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiohttp.typedefs import Handler

    from rocket import Router


SESSION = web.RequestKey("rocket", Session)
"""Under which a request holds its session."""


def setup(
    app: web.Application,
    router: Callable[[], Router],
    *,
    subject: Callable[[web.Request], str | None] | None = None,
    carrier: Carrier | None = None,
) -> None:
    """Put a `rocket.Session` at hand for each request of an application: `request[SESSION]`.

    Its token comes in and goes out by `carrier` (`Header` unless another one is given): with every response of a
    request that has read or written, whatever becomes of it, streams included. The headers of a stream hold what
    was read before they went out.

    A `rocket.Unavailable` that no handler catches becomes a 503 with Retry-After, `OutcomeUnknown` a 504 and
    `InvalidToken` a 400. `router` returns the router, once there is one; `subject` names whom a request's writes
    belong to, which a handler may also do by setting `session.subject`.
    """
    carries = carrier or Header()

    @web.middleware
    async def at_hand(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            request[SESSION] = router().session(
                None if subject is None else subject(request),
                carries.bring(functools.partial(_values, request)),
                lenient=carries.lenient,
            )
            return await handler(request)
        except FORESEEN as error:
            if request.writer.output_size > 0:  # a stream, which another answer would be a part of
                raise
            problem = problem_of(error, f"{request.method} {request.rel_url.raw_path}")
            return web.Response(body=problem.body, status=problem.status, headers=dict(problem.fields))

    async def hand_out(request: web.Request, response: web.StreamResponse) -> None:
        session = request.get(SESSION)
        if session is None:
            return
        values = functools.partial(_values, request)
        for name, value in session_fields(session, carries, values, secure=request.secure):
            response.headers.add(name, value)
        if session.last is not None:
            response.headers.setdefault(*NOT_TO_BE_CACHED)

    app.middlewares.append(at_hand)
    app.on_response_prepare.append(hand_out)


def tokens_of(request: web.Request) -> Sequence[SessionToken]:
    """Return what a request brings in `Rocket-Session`: no token, one or several; raise `InvalidToken`.

    For services that go by `Router.read` and `Router.write` themselves.
    """
    given = request.headers.getall(HEADER, ())
    if len(given) == 1 and given[0] and "," not in given[0]:  # as most have it
        try:
            return [SessionToken.parse(given[0])]
        except ValueError as error:
            raise InvalidToken(str(error)) from None
    return tokens_from(given)


def _values(request: web.Request, name: str) -> Sequence[str]:
    return request.headers.getall(name, ())
