"""Connections that know which life of a server they belong to, and pools of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import asyncpg

from rocket.consistency import Epoch, Incarnation
from rocket.errors import in_words
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
    """What work is given: a connection of asyncpg's, to the node that was chosen."""
    _PlainConnection = asyncpg.Connection

ResultT = TypeVar("ResultT")
Work: TypeAlias = Callable[["Connection"], Awaitable[ResultT]]
"""What the router runs for a caller, perhaps more than once: its effects stay inside the database.

On a replica the session is not reset after it (design fact F9), so that whoever comes next finds what it has set
there. Let it be for one transaction, by `SET LOCAL` or `set_config(..., true)`.
"""

CONNECT_TIMEOUT_S = 2.0
"""A server that takes longer to let one in is not one to read from."""

_RELEASE_TIMEOUT_S = 1.0
_CACHED_STATEMENTS = 100
_LIVES_REMEMBERED = 32
_IDLE_S = 300.0  # a pool gives connections that nobody used for so long back to the server

_WHERE = """
    SELECT direct, in_recovery,
           CASE WHEN direct AND in_recovery THEN
               (SELECT pid || '@' || (extract(epoch FROM backend_start) * 1000000)::bigint
                  FROM pg_stat_activity
                 WHERE backend_type = 'startup')
           END AS incarnation,
           CASE WHEN direct AND NOT in_recovery THEN
               (SELECT epoch FROM epochs
                 WHERE timeline = ('x' || substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8))::bit(32)::int)
           END AS epoch,
           -- A replica that gets promoted does not take a write through here.
           CASE WHEN direct AND in_recovery
                THEN set_config('default_transaction_read_only', 'on', false)
           END,
           -- The snapshot of a read must be younger than its check.
           CASE WHEN direct AND in_recovery
                THEN set_config('default_transaction_isolation', 'read committed', false)
           END
      FROM (SELECT pg_backend_pid() = $1 AS direct, pg_is_in_recovery() AS in_recovery OFFSET 0) AS here
"""
"""Behind a pooler the session is everybody's, and nothing is set in it."""

_log = logging.getLogger("rocket.router")


class NodeConnection(_PlainConnection):
    """A connection that knows what its server was when it was opened.

    It is good for one incarnation of a replica, whose crash would have ended it, or for one reign of a primary,
    which is restarted before it becomes a replica. Only a promotion it outlives (design fact F14). Behind a
    transaction pooler it is good for nothing but the transaction under way.
    """

    __slots__ = ("_note", "direct", "epoch", "incarnation", "left_clean", "opened_at", "to_replica")

    direct: bool
    """Whether its server is the one that let it in, and not a pooler."""
    to_replica: bool
    """Whether the server was in recovery when it was opened."""
    incarnation: Incarnation | None
    """The startup process's life; None on a primary, and where it cannot be known."""
    epoch: Epoch | None
    """The reign; None on a replica, where it has no name yet, and behind a pooler."""
    opened_at: float
    """Monotonic seconds after which the server was asked."""
    left_clean: bool
    """Whether whoever has it has left nothing in its session: then it needs no reset."""
    _note: tuple[str, int] | None
    _protocol: Any  # asyncpg's own, whose count of queries its pool relies on as well
    _stmt_cache: Any  # asyncpg's own
    _stmt_cache_enabled: bool

    def note(self, shown: str | None) -> None:
        """Keep what the last statement said of the node, until another one is sent.

        A connection that was ended meanwhile has no protocol: to ask it is an `AttributeError`, as asyncpg has it.
        """
        self._note = None if shown is None else (shown, self._protocol.queries_count)

    def take_note(self) -> str | None:
        """Return what the last statement said, if anything, and forget it."""
        note, self._note = self._note, None
        if note is None or note[1] != self._protocol.queries_count:
            return None
        return note[0]


async def learn_where(connection: NodeConnection) -> None:
    """Ask a new connection what its server is, and make it read-only on a replica.

    Behind a transaction pooler a connection outlives its server: there the backend is not the one that the
    protocol announced, and neither incarnation nor epoch are known.
    """
    connection._note = None  # noqa: SLF001 - it has no __init__ of its own
    connection.left_clean = False
    connection.opened_at = time.monotonic()
    row = await connection.fetchrow(_WHERE, connection.get_server_pid(), timeout=CONNECT_TIMEOUT_S)
    assert row is not None  # noqa: S101 - it has one row
    connection.direct = row["direct"]
    connection.to_replica = row["in_recovery"]
    connection.incarnation = Incarnation(row["incarnation"]) if row["incarnation"] else None
    connection.epoch = Epoch(row["epoch"]) if row["epoch"] else None
    if connection.direct:
        _cache_statements(connection)


def _cache_statements(connection: NodeConnection) -> None:
    """Have statements kept prepared on the server, which asyncpg has to be told before it connects.

    Nobody knows by then whether there is a pooler, which would mix up the statements of its clients.
    """
    connection._stmt_cache_enabled = True  # noqa: SLF001
    connection._stmt_cache.set_max_size(_CACHED_STATEMENTS)  # noqa: SLF001


@contextlib.asynccontextmanager
async def in_one_piece(connection: Connection, *, read_only: bool = True) -> AsyncIterator[None]:
    """Have all statements of the body run on one backend, and so in one life of one server.

    Each sees what is visible when it begins. What the body raises rolls back and is raised as it is; a connection
    that is lost, or whose time is over, is left as it is, to be thrown away.
    """
    transaction = connection.transaction(isolation="read_committed", readonly=read_only)
    await transaction.start()
    try:
        yield
    except UNREACHABLE:
        raise
    except Exception:
        with contextlib.suppress(AttributeError, *REFUSED):  # the first from one that was ended meanwhile
            await transaction.rollback()
        raise
    await transaction.commit()


async def connect(dsn: str) -> NodeConnection:
    """Open a connection outside of any pool, to observe with."""
    connection: NodeConnection = await asyncpg.connect(
        dsn,
        connection_class=NodeConnection,
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=CONNECT_TIMEOUT_S,
        statement_cache_size=0,  # see `_cache_statements`
        server_settings={"application_name": f"rocket observer, process {os.getpid()}"},
    )
    try:
        await learn_where(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


def behind(connection: Connection) -> NodeConnection:
    """Return the connection itself, behind a pool's proxy; raise `ConnectionError` if the pool has ended it."""
    # What is no proxy is the connection; a proxy has none once the pool has it back.
    inner = cast("NodeConnection | None", getattr(connection, "_con", connection))
    if inner is None:
        raise ConnectionResetError("the connection was ended, since its node is not what it was")
    return inner


def _is_lost(connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # it has left the pool already
        return True


def throw_away(connection: Connection) -> None:
    """End a pooled connection without a word; the pool opens another one when it needs it."""
    with contextlib.suppress(asyncpg.InterfaceError):  # it has ended by itself, and left the pool
        connection.terminate()


class Lives:
    """The incarnations found behind one address: a single server has them one after another."""

    def __init__(self) -> None:
        self._present: Incarnation | None = None
        self._since = 0.0
        self._past: deque[Incarnation] = deque(maxlen=_LIVES_REMEMBERED)

    def betray_several(self, connection: NodeConnection) -> bool:
        """Take note of a connection's; tell whether it is back after another one, as no single server's comes."""
        found = connection.incarnation
        if found is None or found == self._present:
            return False
        if found in self._past:
            return connection.opened_at > self._since
        if self._present is not None:
            self._past.append(self._present)
        self._present, self._since = found, time.monotonic()
        return False


class NodePool:
    """The connections to one node, whatever its role is."""

    def __init__(self, name: str, limits: Limits, on_several: Callable[[], None] | None = None) -> None:
        self.name = name
        self._on_several = on_several
        self._lives = Lives()
        self.resets_always = False
        """Whether each connection is reset when it is given back, as it is by asyncpg's pool as it comes."""
        self._pool: asyncpg.Pool[Any]
        self._connections: weakref.WeakSet[NodeConnection] = weakref.WeakSet()
        self.gate = Gate(f"a connection to {name}", width=limits.connections, queue=limits.queue)
        """Lets as many in as there may be connections."""

    @classmethod
    async def to(
        cls, name: str, dsn: str, limits: Limits, on_several: Callable[[], None] | None = None
    ) -> NodePool:
        """Make a pool; no connection is opened yet. `on_several`: called once several servers are found there."""
        made = cls(name, limits, on_several)
        made._pool = await asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=limits.connections,
            timeout=CONNECT_TIMEOUT_S,
            max_inactive_connection_lifetime=_IDLE_S,
            connection_class=NodeConnection,
            init=cast("Any", made._welcome),
            reset=cast("Any", made._reset),
            statement_cache_size=0,  # see `_cache_statements`
            server_settings={"application_name": "rocket"},
        )
        return made

    async def _welcome(self, connection: NodeConnection) -> None:
        try:
            await learn_where(connection)
        except BaseException:
            connection.terminate()  # the pool would take its leave of a server that may have fallen silent
            raise
        self._connections.add(connection)
        if self._on_several is not None and self._lives.betray_several(connection):
            self._on_several()
            self._on_several = None

    def drop(self) -> None:
        """End every connection, those at work included: the node is not what it was when they were opened."""
        for connection in list(self._connections):
            connection.terminate()
        self._connections.clear()

    async def expire(self) -> None:
        """Have each connection that is open now end, at the latest when it is given back."""
        await self._pool.expire_connections()

    @property
    def in_use(self) -> int:
        """How many of its connections are lent, or being opened to be."""
        return self.gate.inside

    @property
    def idle(self) -> int:
        """How many open connections nobody uses."""
        return self._pool.get_idle_size()

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy[asyncpg.Record]]:
        """Lend a connection. Whoever asks sets the deadline.

        One that was lost, or left in the middle of something, is thrown away and not waited for. Raise
        `ConnectionError` when there is none to be had, or when it is lost while it is lent, and `Overloaded`
        when too many wait for one.
        """
        async with self.gate:
            try:
                connection = await self._pool.acquire()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
                # Whatever it says (a database that a replica has not replayed yet, say), it is the node's affair.
                raise ConnectionError(f"no connection: {in_words(error)}") from error
            try:
                yield connection
            except (asyncpg.InterfaceError, asyncpg.InternalClientError, AttributeError) as error:
                # The second is what asyncpg says between a server's last words and the end of the connection, the
                # third when a connection is ended right before an answer is looked at.
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

    async def _reset(self, connection: NodeConnection) -> None:
        """Clear what a piece of work may have left behind.

        Read-only connections of our own hold no such state, nor do those that only had statements of ours: that
        saves a round trip for each read (design fact F9).
        """
        clean, connection.left_clean = connection.left_clean, False
        if self.resets_always or (connection.epoch is not None and not clean):
            await connection.execute(connection.get_reset_query())

    async def close(self, timeout_s: float) -> None:
        """Close every connection, by force when `timeout_s` is over, or when the server has gone first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._pool.close()
        except REFUSED:
            self._pool.terminate()
