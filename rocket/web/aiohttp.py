"""Sessions for aiohttp applications."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from aiohttp import web

from rocket import Freshness, Session
from rocket.web.carriers import Carrier, Header
from rocket.web.problems import FORESEEN, NOT_TO_BE_CACHED, problem_of, session_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

    from rocket import Router
    from rocket.web.carriers import Values

SESSION = web.RequestKey("rocket", Session)
"""The key of a request's session: `request[SESSION]`."""


def setup(
    app: web.Application,
    router: Callable[[], Router],
    *,
    subject: Callable[[web.Request], str | None] | None = None,
    carrier: Carrier | None = None,
    freshness: Callable[[web.Request], Freshness] | None = None,
    only: Callable[[web.Request], bool] | None = None,
    route_headers: bool = False,
    answer_errors: bool = True,
) -> None:
    """Give each request of an application a `rocket.Session`: `request[SESSION]`.

    The session's token arrives and leaves by `carrier` (default: `Header`), with every response to a request that
    has read or written, errors and streams included. The headers of a stream carry what was read before they
    were sent.

    A `rocket.Unavailable` that no handler catches becomes a 503 with Retry-After, `OutcomeUnknown` a 504 and
    `InvalidToken` a 400; with `answer_errors` false they are raised to the application's other middlewares.
    `router` returns the router, once there is one. `subject` names the owner of a request's writes; a handler may
    set `session.subject` instead. `freshness` says what a request's reads ask for that say nothing themselves.
    `only` selects the requests that get a session (default: all). `route_headers`
    adds `Rocket-Served-By`, `Rocket-Served-As` and `Rocket-Route-Reason` for the session's last answer.
    """
    carries = carrier or Header()

    @web.middleware
    async def provide(request: web.Request, handler: Handler) -> web.StreamResponse:
        if only is not None and not only(request):
            return await handler(request)
        try:
            request[SESSION] = router().session(
                None if subject is None else subject(request),
                carries.bring(_values_of(request)),
                lenient=carries.lenient,
                freshness=Freshness.SESSION if freshness is None else freshness(request),
            )
            return await handler(request)
        except FORESEEN as error:
            # The response to a stream has begun: another one would become part of it.
            if not answer_errors or request.writer.output_size > 0:
                raise
            problem = problem_of(error, f"{request.method} {request.rel_url.raw_path}")
            return web.Response(body=problem.body, status=problem.status, headers=dict(problem.fields))

    async def hand_out(request: web.Request, response: web.StreamResponse) -> None:
        session = request.get(SESSION)
        if session is None:
            return
        headers = response.headers
        values = _values_of(request)
        headers.extend(session_fields(session, carries, values, secure=request.secure, route=route_headers))
        if session.last is not None:
            headers.setdefault(*NOT_TO_BE_CACHED)

    app.middlewares.append(provide)
    app.on_response_prepare.append(hand_out)


def _values_of(request: web.Request) -> Values:
    return functools.partial(request.headers.getall, default=())
