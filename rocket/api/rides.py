"""Rides: what users write and read back."""

from __future__ import annotations

import logging
import time
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


async def _read(request: web.Request, work: Work[ResultT], email: str) -> Answer[ResultT]:
    began = time.monotonic()
    try:
        answer = await request.app[ROUTER].read(work, subject=email)
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
        answer = await request.app[ROUTER].write(insert, subject=email)
    return answer_json(answer, _as_json(answer.value), HTTPStatus.CREATED)


async def show(request: web.Request) -> web.Response:
    """`GET /rides/{id}`: one ride, of the user who asks."""
    email = who_asks(request)
    given_id = request.match_info["id"]
    ride_id = parameters.ride_id(given_id)

    async def select(node: Connection) -> Record | None:
        return await node.fetchrow(queries.SELECT_RIDE, email, ride_id)

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
        return await node.fetch(queries.SELECT_RIDES, email, before, limit + 1)

    answer = await _read(request, select, email)
    _log.info("Reading rides from server '%s'", answer.node)
    rides = answer.value[:limit]
    more = len(answer.value) > limit
    return answer_json(
        answer, {"rides": [_as_json(ride) for ride in rides], "next": rides[-1]["id"] if more else None}
    )
