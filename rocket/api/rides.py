"""Rides: what users write and read back."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from rocket import Unavailable
from rocket.api import parameters, queries
from rocket.api.answers import answer_json, route_headers
from rocket.api.keys import METRICS, ROUTER
from rocket.api.problems import (
    invalid_credentials,
    key_used_otherwise,
    not_found,
    wrong_idempotency_key,
)
from rocket.api.sessions import token_of
from rocket.api.users import who_asks

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


class _UserNotHere(Exception):
    """The node does not show the user who asks: there is none, or this session's token does not cover it."""


async def _read(request: web.Request, work: Work[ResultT], email: str) -> Answer[ResultT]:
    """Read for a session; that there is no such user is the primary's to say."""
    router = request.app[ROUTER]
    token = token_of(request)
    began = time.monotonic()
    try:
        try:
            answer = await router.read(work, subject=email, token=token)
        except _UserNotHere:
            # Without the token the user's floor is looked up on the primary, which knows whether there is one.
            answer = await router.read(work, subject=email)
            if token is not None and answer.token is not None and token.epoch == answer.token.epoch:
                answer = replace(answer, token=answer.token.merged_with(token))
    except _UserNotHere:
        raise invalid_credentials() from None
    except Unavailable:
        request.app[METRICS].count_refused_read()
        raise
    request.app[METRICS].count_read(answer, began)
    return answer


async def create(request: web.Request) -> web.Response:
    """`POST /rides`: write a ride; with an Idempotency-Key, at most one for each key."""
    email = who_asks(request)
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
        raise wrong_idempotency_key(_LONGEST_KEY)
    token = token_of(request)
    distance = parameters.distance(await parameters.body_parameter(request, "distance"))

    async def insert(primary: Connection) -> Record:
        ride = await primary.fetchrow(queries.INSERT_RIDE, email, distance, key)
        if ride is not None:
            return ride
        earlier = None if key is None else await primary.fetchrow(queries.SELECT_RIDE_BY_KEY, email, key)
        if earlier is None:
            raise invalid_credentials()
        if earlier["distance"] != distance:
            raise key_used_otherwise()
        return earlier

    with request.app[METRICS].write():
        answer = await request.app[ROUTER].write(insert, subject=email, token=token)
    return answer_json(answer, _as_json(answer.value), HTTPStatus.CREATED)


async def show(request: web.Request) -> web.Response:
    """`GET /rides/{id}`: one ride, of the user who asks."""
    email = who_asks(request)
    given_id = request.match_info["id"]
    ride_id = parameters.ride_id(given_id)

    async def select(node: Connection) -> Record | None:
        row = await node.fetchrow(queries.SELECT_RIDE, email, ride_id)
        if row is None:
            raise _UserNotHere
        return None if row["id"] is None else row

    answer = await _read(request, select, email)
    _log.info("Reading ride %s from server '%s'", ride_id, answer.node)
    if answer.value is None:
        raise not_found("ride", given_id, route_headers(answer))
    return answer_json(answer, _as_json(answer.value))


async def page(request: web.Request) -> web.Response:
    """`GET /rides?limit=&before=`: the user's own rides, newest first."""
    email = who_asks(request)
    limit = parameters.page_limit(request, default=_PAGE, most=_LARGEST_PAGE)
    before = parameters.page_before(request)

    async def select(node: Connection) -> list[Record]:
        rows = await node.fetch(queries.SELECT_RIDES, email, before, limit + 1)
        if not rows:
            raise _UserNotHere
        return [row for row in rows if row["id"] is not None]

    answer = await _read(request, select, email)
    _log.info("Reading rides from server '%s'", answer.node)
    rides = answer.value[:limit]
    more = len(answer.value) > limit
    return answer_json(
        answer, {"rides": [_as_json(ride) for ride in rides], "next": rides[-1]["id"] if more else None}
    )
