"""The application's database on a fresh cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncpg

_EXISTS = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)"
_CREATE = "SELECT format('CREATE DATABASE %I', $1::text)"
"""CREATE DATABASE takes no parameters: Postgres itself quotes the name."""
_TIMEOUT_S = 30.0


class Server(Protocol):
    """What can be connected to as its superuser."""

    async def connect(self, database: str = ..., *, timeout_s: float = ...) -> asyncpg.Connection[Any]:
        """Connect to one of its databases."""


async def prepare_database(primary: Server, name: str, schema: str) -> None:
    """Make the database unless it is there, and apply the schema, in one transaction."""
    admin = await primary.connect(timeout_s=_TIMEOUT_S)
    try:
        if not await admin.fetchval(_EXISTS, name):
            await admin.execute(await admin.fetchval(_CREATE, name))
    finally:
        admin.terminate()
    connection = await primary.connect(name, timeout_s=_TIMEOUT_S)
    try:
        connection.add_log_listener(_ignore)
        async with connection.transaction():
            if schema:  # asyncpg stumbles over nothing at all
                await connection.execute(schema)
        connection.remove_log_listener(_ignore)
    finally:
        connection.terminate()


def _ignore(_connection: object, _message: asyncpg.PostgresLogMessage) -> None:
    """Swallow "already exists, skipping"."""
