"""One Postgres server of this machine as its clients see it: where it is, and whether it lets them in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from rocket.cluster.binaries import SUPERUSER
from rocket.cluster.timelines import Lineage
from rocket.errors import describe

if TYPE_CHECKING:
    from rocket.cluster.binaries import Installation

CONNECT_TIMEOUT_S = 5.0
"""For a server on this machine; many connect while it is starting."""
LOST = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What asyncpg raises when a server refuses or goes away; the last one if it goes between two statements."""

_SENDS_WAL = """
    SELECT EXISTS (
        SELECT FROM pg_stat_replication WHERE application_name = $1 AND state IN ('catchup', 'streaming')
    )
"""


class Server:
    """A server with a name and a port, which its superuser reaches over the private socket."""

    def __init__(self, name: str, port: int, installation: Installation) -> None:
        self.name = name
        self.port = port
        self.installation = installation
        self.refusal = ""
        """What it said when it last let no client in, though it ran (SQLSTATE 57P03)."""

    async def connect(
        self, database: str = "postgres", *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> asyncpg.Connection[Any]:
        """Connect as the superuser over the private socket, whatever PG* in the environment is meant for."""
        return await asyncpg.connect(
            host=str(self.installation.socket_dir),
            port=self.port,
            user=SUPERUSER,
            database=database,
            timeout=timeout_s,
            command_timeout=timeout_s,
            ssl=False,
            target_session_attrs=SessionAttribute.any,
            server_settings={"application_name": "rocket"},
        )

    async def lets_in(self) -> bool:
        """Return whether it takes connections; `refusal` is what a server that runs says instead."""
        refusal, connection = "", None
        try:
            connection = await self.connect()
        except asyncpg.CannotConnectNowError as error:
            refusal = f"{describe(error)}. {error.detail}" if error.detail else describe(error)
        except LOST:
            pass
        self.refusal = refusal
        if connection is not None:
            connection.terminate()
        return connection is not None

    async def is_sent_wal(self, upstream_port: int) -> bool:
        """Return whether the server at a port sends it WAL; True if it cannot be asked."""
        upstream = Server("upstream", upstream_port, self.installation)
        try:
            connection = await upstream.connect()
            try:
                return bool(await connection.fetchval(_SENDS_WAL, self.name))
            finally:
                connection.terminate()
        except LOST:
            return True

    async def lineage(self) -> Lineage:
        """Return its timeline's history; raise `NotThePrimary` in recovery, and what asyncpg raises (`LOST`)."""
        connection = await self.connect()
        try:
            return await Lineage.read(connection)
        finally:
            connection.terminate()

    def dsn(self, database: str) -> str:
        """Return the address of a database on this node, over the private socket."""
        host = quote(str(self.installation.socket_dir), safe="")
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={host}&port={self.port}&sslmode=disable"

    def tcp_dsn(self, database: str, password: str) -> str:
        """Return the address of a database on this node, by TCP."""
        return (
            f"postgresql://{SUPERUSER}:{quote(password, safe='')}@127.0.0.1:{self.port}/{quote(database, safe='')}"
        )
