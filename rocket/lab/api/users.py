"""Users: who asks, what they must see, and how they come into being."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from rocket import Lsn
from rocket.lab.api import parameters, queries
from rocket.lab.api.answers import answer_json
from rocket.lab.api.keys import METRICS, ROUTER
from rocket.lab.api.problems import invalid_credentials, missing_credentials
from rocket.lab.api.recorder import Asked, telling
from rocket.web.aiohttp import tokens_of

if TYPE_CHECKING:
    from aiohttp import web

    from rocket import Connection


class UserFloors:
    """Keeps each user's floor in `users.min_lsn`; the subject is the e-mail address. A `rocket.FloorStore`."""

    async def look_up(self, primary: Connection, subject: str | None) -> Lsn | None:
        """Return the user's floor; raise a 401 if there is no such user."""
        row = await primary.fetchrow(queries.LOOK_UP_FLOOR, subject)
        if row is None or not row["known"]:
            raise invalid_credentials()
        if row["min_lsn"] is None:
            return None
        floor = Lsn.from_wire(row["min_lsn"])
        if floor == Lsn.PENDING:
            settled = await primary.fetchval(queries.FINISH_FLOOR, subject)
            return floor if settled is None else Lsn.from_wire(settled)
        return floor

    async def begin_write(self, primary: Connection, subject: str | None, floor: Lsn) -> str | None:
        """Set the user's floor within a write, and have that flushed."""
        flushed: str | None = await primary.fetchval(queries.MARK_FLOOR, subject, floor.wire)
        return flushed

    async def record_floor(self, primary: Connection, subject: str | None) -> Lsn:
        """Record the floor of a write that has been committed."""
        return Lsn.from_wire(await primary.fetchval(queries.SETTLE_FLOOR, subject))

    async def wait_for_writes(self, primary: Connection, subject: str | None) -> None:
        """Wait until the user's commits under way are visible."""
        await primary.execute(queries.WAIT_FOR_WRITES, subject)


def who_asks(request: web.Request) -> str:
    """Return the e-mail address in the Authorization header; raise a 401 if it is missing or cannot be one."""
    credentials = request.headers.get("Authorization", "")
    if not credentials:
        raise missing_credentials()
    if not parameters.is_email(credentials):
        raise invalid_credentials()
    return credentials


async def create(request: web.Request) -> web.Response:
    """`POST /users`: make a user, or say that it is there."""
    tokens = tokens_of(request)
    email = parameters.email(await parameters.body_parameter(request, "email"))

    async def insert(primary: Connection) -> tuple[int, HTTPStatus]:
        user_id = await primary.fetchval(queries.INSERT_USER, email)
        if user_id is not None:
            return user_id, HTTPStatus.CREATED
        return await primary.fetchval(queries.SELECT_USER, email), HTTPStatus.OK

    with request.app[METRICS].write(), telling(request.app, Asked.JOIN, email, tokens, None) as tale:
        tale.answer = answer = await request.app[ROUTER].write(insert, subject=email, token=tokens)
    user_id, status = answer.value
    return answer_json(answer, {"email": email, "id": user_id}, status)
