"""Rides: what users write and read back."""

from __future__ import annotations

import logging
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from rocket import Role, Unavailable, report_read_bound
from rocket.lab.api import parameters, queries
from rocket.lab.api.answers import answer_json, route_headers
from rocket.lab.api.keys import METRICS, ROUTER
from rocket.lab.api.problems import invalid_credentials, key_used_otherwise, not_found, wrong_idempotency_key
from rocket.lab.api.recorder import Asked, tell, telling
from rocket.lab.api.users import who_asks
from rocket.lab.comparison import Routing
from rocket.web.aiohttp import tokens_of

if TYPE_CHECKING:
    from aiohttp import web
    from asyncpg import Record

    from rocket import Answer, Connection, Work

ResultT = TypeVar("ResultT")

_PAGE = 20
_LARGEST_PAGE = 100
_LONGEST_KEY = 255

_log = logging.getLogger("rocket.api")


def _as_json(ride: Record) -> dict[str, object]:
    return {"distance": round(ride["distance"], 1), "id": ride["id"], "user_id": ride["user_id"]}


async def _read(
    request: web.Request, work: Work[ResultT | None], email: str, asked: Asked, detail: object
) -> tuple[Answer[ResultT | None], ResultT]:
    """Read for a session; work returns None where it finds no such user, which only a primary may say."""
    app = request.app
    router = app[ROUTER]
    tokens = tokens_of(request)
    began = time.monotonic()
    try:
        answer = await router.read(work, subject=email, token=tokens)
        if answer.value is None and answer.role is not Role.PRIMARY:
            # The tokens do not cover the user. Without them its floor is looked up on the primary, which knows.
            latest = answer.token
            answer = await router.read(work, subject=email)
            if latest is not None and answer.token is not None:
                if latest.epoch == answer.token.epoch:
                    answer = answer._replace(token=answer.token.merged_with(latest))
                else:  # promoted in between: only the primary can tell what has become of the session's floors
                    answer = await router.read(work, subject=email, token=tokens)
    except Unavailable as error:
        app[METRICS].count_refused_read(error)
        tell(app, asked, began, email, tokens, detail, None, error)
        raise
    if answer.value is None:
        unknown = invalid_credentials(route_headers(answer))
        tell(app, asked, began, email, tokens, detail, answer, unknown)
        raise unknown
    app[METRICS].count_read(answer, began)
    tell(app, asked, began, email, tokens, detail, answer)
    return answer, answer.value


async def create(request: web.Request) -> web.Response:
    """`POST /rides`: write a ride; with an Idempotency-Key, at most one for each key."""
    email = who_asks(request)
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
        raise wrong_idempotency_key(_LONGEST_KEY)
    tokens = tokens_of(request)
    distance = parameters.distance(await parameters.body_parameter(request, "distance"))

    async def insert(primary: Connection) -> Record | None:
        ride = await primary.fetchrow(queries.INSERT_RIDE, email, distance, key)
        if ride is not None or key is None:
            return ride
        earlier = await primary.fetchrow(queries.SELECT_RIDE_BY_KEY, email, key)
        if earlier is not None and earlier["distance"] != distance:
            raise key_used_otherwise()
        return earlier

    with request.app[METRICS].write(), telling(request.app, Asked.WRITE, email, tokens, distance) as tale:
        tale.answer = answer = await request.app[ROUTER].write(insert, subject=email, token=tokens)
        if answer.value is None:
            raise invalid_credentials(route_headers(answer))
    return answer_json(answer, _as_json(answer.value), HTTPStatus.CREATED)


async def show(request: web.Request) -> web.Response:
    """`GET /rides/{id}`: one ride, of the user who asks."""
    email = who_asks(request)
    given_id = request.match_info["id"]
    ride_id = parameters.ride_id(given_id)
    guaranteed = request.app[ROUTER].routing is Routing.NEVER_STALE
    query = queries.SELECT_RIDE if guaranteed else queries.PLAIN_SELECT_RIDE

    async def select(node: Connection) -> Record | None:
        row = await node.fetchrow(query, email, ride_id)
        if row is not None:
            report_read_bound(node, row["shown"])
        return row

    answer, ride = await _read(request, select, email, Asked.READ, ride_id)
    _log.info("Reading ride %s from server '%s'", ride_id, answer.node)
    if ride["id"] is None:
        raise not_found("ride", given_id, route_headers(answer))
    return answer_json(answer, _as_json(ride))


async def page(request: web.Request) -> web.Response:
    """`GET /rides?limit=&before=`: the user's own rides, newest first."""
    email = who_asks(request)
    limit = parameters.page_limit(request, default=_PAGE, most=_LARGEST_PAGE)
    before = parameters.page_before(request)
    guaranteed = request.app[ROUTER].routing is Routing.NEVER_STALE
    query = queries.SELECT_RIDES if guaranteed else queries.PLAIN_SELECT_RIDES

    async def select(node: Connection) -> list[Record] | None:
        rows = await node.fetch(query, email, before, limit + 1)
        if rows:
            report_read_bound(node, rows[0]["shown"])
        return rows or None

    answer, rows = await _read(request, select, email, Asked.LIST, (limit, before))
    _log.info("Reading rides from server '%s'", answer.node)
    found = [row for row in rows if row["id"] is not None]
    rides = found[:limit]
    more = len(found) > limit
    return answer_json(
        answer, {"rides": [_as_json(ride) for ride in rides], "next": rides[-1]["id"] if more else None}
    )
