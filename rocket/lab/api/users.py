"""Users: their credentials, and how they are created."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket.lab.api import parameters
from rocket.lab.api.problems import invalid_credentials, missing_credentials
from rocket.lab.api.recorder import Asked, recorded
from rocket.web.aiohttp import SESSION

if TYPE_CHECKING:
    from rocket import Connection

INSERT_USER = """
    INSERT INTO users (email) VALUES ($1)
    ON CONFLICT (email) DO NOTHING
    RETURNING id
"""
SELECT_USER = "SELECT id FROM users WHERE email = $1"


def who_asks(request: web.Request) -> str:
    """Return the e-mail address in the Authorization header; raise a 401 if it is missing or is no address."""
    credentials = request.headers.get("Authorization", "")
    if not credentials:
        raise missing_credentials()
    if not parameters.is_email(credentials):
        raise invalid_credentials()
    return credentials


async def create(request: web.Request) -> web.Response:
    """`POST /users`: create a user, unless it exists."""
    session = request[SESSION]
    session.subject = email = parameters.email(await parameters.body_parameter(request, "email"))

    async def insert(primary: Connection) -> tuple[int, HTTPStatus]:
        user_id = await primary.fetchval(INSERT_USER, email)
        if user_id is not None:
            return user_id, HTTPStatus.CREATED
        return await primary.fetchval(SELECT_USER, email), HTTPStatus.OK

    with recorded(request, Asked.JOIN, None):
        user_id, status = await session.write(insert)
    return web.json_response({"email": email, "id": user_id}, status=status)
