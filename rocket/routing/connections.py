"""Connections that know which life of a server they belong to, and pools of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import asyncpg

from rocket.consistency import Epoch, Incarnation
from rocket.errors import in_words
from rocket.routing.epochs import reign_of
from rocket.routing.failures import REFUSED, UNREACHABLE
from rocket.routing.gate import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.routing.limits import Limits

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    _PlainConnection = asyncpg.Connection[asyncpg.Record]
else:  # asyncpg's classes are generic in its stubs alone
    Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
    _PlainConnection = asyncpg.Connection

ResultT = TypeVar("ResultT")
Work: TypeAlias = Callable[["Connection"], Awaitable[ResultT]]
"""What the router runs for a caller, perhaps more than once: its effects stay inside the database."""

CONNECT_TIMEOUT_S = 2.0
"""A server that takes longer to let one in is not one to read from."""

_RELEASE_TIMEOUT_S = 1.0
_IDLE_S = 300.0  # a pool gives connections that nobody used for so long back to the server

_INCARNATION = """
    SELECT pg_backend_pid() AS backend_pid,
           (SELECT pid || '@' || (extract(epoch FROM backend_start) * 1000000)::bigint
              FROM pg_stat_activity
             WHERE backend_type = 'startup') AS incarnation
"""


_log = logging.getLogger("rocket.router")


class ReplicaConnection(_PlainConnection):
    """A connection to a replica, good for one incarnation: the server's crash would have ended it."""

    __slots__ = ("incarnation", "opened_at")

    incarnation: Incarnation | None
    """The startup process's life at the time of opening; None where it cannot be known."""
    opened_at: float
    """Monotonic seconds after which the incarnation was asked for."""


async def learn_incarnation(connection: ReplicaConnection) -> None:
    """Ask a new connection which life of its server it belongs to.

    Behind a transaction pooler a connection outlives its server: there the backend is not the one that the
    protocol announced, and the incarnation stays unknown.
    """
    connection.opened_at = time.monotonic()
    row = await connection.fetchrow(_INCARNATION, timeout=CONNECT_TIMEOUT_S)
    direct = row is not None and row["backend_pid"] == connection.get_server_pid()
    connection.incarnation = Incarnation(row["incarnation"]) if direct and row and row["incarnation"] else None


class PrimaryConnection(_PlainConnection):
    """A connection to a primary, good for one reign: a server that stops being the primary is restarted."""

    __slots__ = ("epoch",)

    epoch: Epoch
    """The reign that the server was in at the time of opening."""


async def learn_epoch(connection: PrimaryConnection) -> None:
    """Ask a new connection whose reign it belongs to; raise asyncpg's error on a server that is no primary."""
    connection.epoch = (await reign_of(connection)).epoch


async def connect_to_replica(dsn: str) -> ReplicaConnection:
    """Open a connection outside of any pool that knows its incarnation."""
    connection: ReplicaConnection = await asyncpg.connect(
        dsn,
        connection_class=ReplicaConnection,
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=CONNECT_TIMEOUT_S,
        server_settings={"application_name": "rocket observer"},
    )
    try:
        await learn_incarnation(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


def _is_lost(connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # it has left the pool already
        return True


def throw_away(connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> None:
    """End a pooled connection without a word; the pool opens another one when it needs it."""
    with contextlib.suppress(asyncpg.InterfaceError):  # it has ended by itself, and left the pool
        connection.terminate()


class NodePool:
    """The connections to one node."""

    def __init__(self, name: str, pool: asyncpg.Pool[Any], limits: Limits) -> None:
        self.name = name
        self._pool = pool
        self._gate = Gate(f"a connection to {name}", width=limits.connections, queue=limits.queue)

    @classmethod
    async def to_primary(cls, name: str, dsn: str, limits: Limits) -> NodePool:
        """Make a pool for reading and writing; no connection is opened yet."""
        pool = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=limits.connections,
            timeout=CONNECT_TIMEOUT_S,
            max_inactive_connection_lifetime=_IDLE_S,
            connection_class=PrimaryConnection,
            init=cast("Any", learn_epoch),  # whose argument is the class above
            server_settings={"application_name": "rocket"},
        )
        return cls(name, await pool, limits)

    @classmethod
    async def to_replica(cls, name: str, dsn: str, limits: Limits) -> NodePool:
        """Make a pool of read-only connections, each of which knows its incarnation; none is opened yet."""
        pool = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=limits.connections,
            timeout=CONNECT_TIMEOUT_S,
            max_inactive_connection_lifetime=_IDLE_S,
            connection_class=ReplicaConnection,
            init=cast("Any", learn_incarnation),  # whose argument is the class above
            reset=_nothing_to_reset,
            server_settings={
                "application_name": "rocket",
                # A replica that gets promoted does not take a write through here.
                "default_transaction_read_only": "on",
                # The snapshot of a read must be younger than its check.
                "default_transaction_isolation": "read committed",
            },
        )
        return cls(name, await pool, limits)

    @property
    def in_use(self) -> int:
        """How many of its connections are at work."""
        return self._pool.get_size() - self._pool.get_idle_size()

    @property
    def size(self) -> int:
        """How many connections it has open."""
        return self._pool.get_size()

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy[asyncpg.Record]]:
        """Lend a connection. Whoever asks sets the deadline.

        One that was lost, or left in the middle of something, is thrown away and not waited for. Raise
        `ConnectionError` when there is none to be had, or when it is lost while it is lent, and `Overloaded`
        when too many wait for one.
        """
        async with self._gate.passed(), self._lent() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def _lent(self) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy[asyncpg.Record]]:
        try:
            connection = await self._pool.acquire()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            # Whatever it says (a database that a replica has not replayed yet, say), it is the node's affair.
            raise ConnectionError(f"no connection: {in_words(error)}") from error
        try:
            yield connection
        except (asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            # The latter is what asyncpg says between a server's last words and the end of the connection.
            if isinstance(error, asyncpg.InternalClientError) or _is_lost(connection):
                throw_away(connection)
                raise ConnectionError(f"connection lost: {in_words(error)}") from error
            raise
        except (asyncio.CancelledError, *UNREACHABLE):
            throw_away(connection)
            raise
        finally:
            await self._give_back(connection)

    async def _give_back(self, connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> None:
        """Release a connection; what goes wrong with that is no affair of whoever had it."""
        try:
            await self._pool.release(connection, timeout=_RELEASE_TIMEOUT_S)
        except REFUSED as error:  # asyncpg has ended the connection
            _log.info("a connection to %s was lost when it was given back: %s", self.name, in_words(error))

    async def close(self, timeout_s: float) -> None:
        """Close every connection, by force when `timeout_s` is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()


async def _nothing_to_reset(_connection: object) -> None:
    """Save a round trip: read-only connections of our own hold no state to clear (design fact F9)."""
