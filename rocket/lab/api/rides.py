"""Rides: what users write and read back."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from rocket import READ_BOUND, Freshness, Role, Unavailable, report_read_bound
from rocket.lab.api import parameters
from rocket.lab.api.problems import invalid_credentials, key_used_otherwise, not_found, wrong_idempotency_key
from rocket.lab.api.recorder import Asked, recorded, started
from rocket.lab.api.status import ROUTER
from rocket.lab.comparison import Routing
from rocket.web.aiohttp import SESSION

if TYPE_CHECKING:
    from asyncpg import Record

    from rocket import Answer, Connection, Session, Work

ResultT = TypeVar("ResultT")

_PAGE = 20
_LARGEST_PAGE = 100
_LONGEST_KEY = 255
_HEADERS = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store"}

INSERT_RIDE = """
    INSERT INTO rides (distance, user_id, idempotency_key)
    SELECT $2, users.id, $3 FROM users WHERE users.email = $1
    ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
    RETURNING id, distance, user_id
"""
_SELECT_RIDE_BY_KEY = """
    SELECT rides.id, rides.distance, rides.user_id
      FROM users JOIN rides ON rides.user_id = users.id AND rides.idempotency_key = $2
     WHERE users.email = $1
"""
_SELECT_RIDE = """
    SELECT rides.id, rides.distance, rides.user_id, {shown} AS shown
      FROM users LEFT JOIN rides ON rides.user_id = users.id AND rides.id = $2
     WHERE users.email = $1
"""
"""No row: the user does not exist. A row of NULLs: the user has no such ride."""

_SELECT_RIDES = """
    SELECT page.id, page.distance, page.user_id, {shown} AS shown
      FROM users
      LEFT JOIN LATERAL (
               SELECT id, distance, user_id FROM rides
                WHERE rides.user_id = users.id AND rides.id < $2
                ORDER BY id DESC LIMIT $3
           ) AS page ON true
     WHERE users.email = $1
     ORDER BY page.id DESC
"""
"""As above: no row where the user does not exist, a row of NULLs where there is no ride."""

SELECT_RIDE, SELECT_RIDES = (query.format(shown=READ_BOUND) for query in (_SELECT_RIDE, _SELECT_RIDES))
"""These report to the router what they have shown."""

_PLAIN_SELECT_RIDE, _PLAIN_SELECT_RIDES = (query.format(shown="NULL") for query in (_SELECT_RIDE, _SELECT_RIDES))
"""The same for a routing without a guarantee, which has no use for it."""

_log = logging.getLogger("rocket.api")


async def create(request: web.Request) -> web.Response:
    """`POST /rides`: write a ride; with an Idempotency-Key, at most one for each key."""
    session = request[SESSION]
    email = session.subject
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
        raise wrong_idempotency_key(_LONGEST_KEY)
    distance = parameters.distance(await parameters.body_parameter(request, "distance"))

    async def insert(primary: Connection) -> Record:
        ride = await primary.fetchrow(INSERT_RIDE, email, distance, key)
        if ride is None and key is not None:
            ride = await primary.fetchrow(_SELECT_RIDE_BY_KEY, email, key)
        if ride is None:
            raise invalid_credentials()
        if ride["distance"] != distance:
            raise key_used_otherwise()
        return ride

    with recorded(request, Asked.WRITE, distance):
        ride = await session.write(insert)
    return _response(_as_json(ride), HTTPStatus.CREATED)


async def show(request: web.Request) -> web.Response:
    """`GET /rides/{id}`: one ride of the user."""
    app, email = request.app, request[SESSION].subject
    given_id = request.match_info["id"]
    ride_id = parameters.ride_id(given_id)
    query = SELECT_RIDE if app[ROUTER].routing is Routing.NEVER_STALE else _PLAIN_SELECT_RIDE

    async def select(node: Connection) -> Record | None:
        row = await node.fetchrow(query, email, ride_id)
        if row is not None:
            report_read_bound(node, row["shown"])
        return row

    ride, answer = await _read(app, request, select, Asked.READ, ride_id)
    _log.info("Reading ride %s from server '%s'", ride_id, answer.node)
    if ride["id"] is None:
        raise not_found("ride", given_id)
    return _response(_as_json(ride))


async def page(request: web.Request) -> web.Response:
    """`GET /rides?limit=&before=`: the user's rides, newest first."""
    app, email = request.app, request[SESSION].subject
    limit = parameters.page_limit(request, default=_PAGE, most=_LARGEST_PAGE)
    before = parameters.page_before(request)
    query = SELECT_RIDES if app[ROUTER].routing is Routing.NEVER_STALE else _PLAIN_SELECT_RIDES

    async def select(node: Connection) -> list[Record] | None:
        rows = await node.fetch(query, email, before, limit + 1)
        if rows:
            report_read_bound(node, rows[0]["shown"])
        return rows or None

    rows, answer = await _read(app, request, select, Asked.LIST, (limit, before))
    _log.info("Reading rides from server '%s'", answer.node)
    found = [row for row in rows if row["id"] is not None]
    rides = found[:limit]
    more = len(found) > limit
    return _response({"rides": [_as_json(ride) for ride in rides], "next": rides[-1]["id"] if more else None})


async def _read(
    app: web.Application, request: web.Request, work: Work[ResultT | None], asked: Asked, detail: object
) -> tuple[ResultT, Answer[ResultT]]:
    """Read in the request's session, and record it; `work` returns None if it finds no such user."""
    session = request[SESSION]
    record = started(app, session, asked, detail)
    try:
        found = await session.read(work)
        if found is None and _last_of(session).role is Role.REPLICA:
            # The session's token may not cover the creation of the user.
            found = await session.read(work, freshness=Freshness.GLOBAL)
    except Unavailable as error:
        if record is not None:
            record.end(session, error)
        raise
    if found is None:
        unknown = invalid_credentials()
        if record is not None:
            record.end(session, unknown)
        raise unknown
    answer = _last_of(session)
    if record is not None:
        record.end(session)
    return found, answer


def _last_of(session: Session) -> Answer[Any]:
    assert session.last is not None  # noqa: S101 - it has read
    return session.last


def _as_json(ride: Record) -> dict[str, object]:
    return {"distance": round(ride["distance"], 1), "id": ride["id"], "user_id": ride["user_id"]}


def _response(body: object, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(body=json.dumps(body).encode(), status=status, headers=_HEADERS)
