"""The connections to one node, lent to one piece of work after another, and the limits to their number."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import asyncpg

from rocket.errors import describe
from rocket.routing.connection import (
    CONNECT_TIMEOUT_S,
    Cancellations,
    NodeConnection,
    discard,
    is_lost,
    learn_where,
    unwrap,
)
from rocket.routing.failures import REFUSED, UNREACHABLE, NodeChanged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rocket.consistency import Incarnation
    from rocket.routing.connection import Work

_RELEASE_TIMEOUT_S = 1.0
_INCARNATIONS_REMEMBERED = 32
_IDLE_S = 300.0  # connections that were not used for so long are closed

_log = logging.getLogger("rocket.router")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long reads and writes may take, in seconds, and how many connections there may be."""

    read_s: float = 5.0
    """A read, with all its attempts."""
    attempt_s: float = 1.0
    """One attempt on one replica."""
    replicas_tried: int = 2
    """How many replicas may fail a read before it goes to the primary."""
    write_s: float = 5.0
    """A write until its COMMIT is sent, with all its attempts."""
    commit_s: float = 5.0
    """A COMMIT, and the statement that records the floor after it."""
    connections: int = 10
    """Connections per node."""
    queue: int = 100
    """Waiters per node before further requests are rejected."""
    primary_reads: int = 7
    """How many of the primary's connections reads may take: when all replicas lag, writes go on."""
    close_s: float = 2.0
    """Closing a pool gracefully."""


class TooManyWaiting(ConnectionError):
    """The queue for a connection is full."""


class CapacityLimiter:
    """Lets `width` through at a time; `queue` more may wait, and further ones are rejected.

    An asynchronous context manager that many use at once: it waits for a place, keeps it for the body, and raises
    `TooManyWaiting` at once if the queue is full.
    """

    __slots__ = ("_places", "_queue", "_what", "inside", "waiting", "width")

    def __init__(self, what: str, *, width: int, queue: int) -> None:
        self._what = what
        self._queue = queue
        self._places = asyncio.Semaphore(width)
        self.width = width
        """How many places there are."""
        self.waiting = 0
        """How many wait for a place."""
        self.inside = 0
        """How many have one."""

    async def __aenter__(self) -> None:
        if self._places.locked() and self.waiting >= self._queue:
            raise TooManyWaiting(f"{self.waiting} wait already for {self._what}")
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.inside += 1

    async def __aexit__(self, *_: object) -> None:
        self.inside -= 1
        self._places.release()


class IncarnationHistory:
    """The incarnations found behind one address: a single server has them one after another."""

    def __init__(self) -> None:
        self._present: Incarnation | None = None
        self._since = 0.0
        self._past: deque[Incarnation] = deque(maxlen=_INCARNATIONS_REMEMBERED)

    def is_shared_address(self, connection: NodeConnection) -> bool:
        """Record a connection's incarnation; return whether it has returned, as none of a single server does."""
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

    def __init__(
        self,
        name: str,
        dsn: str,
        limits: Limits,
        *,
        on_shared_address: Callable[[], None] | None = None,
        init: Work[None] | None = None,
    ) -> None:
        """Prepare a pool, for `open` to make ready.

        `on_shared_address` is called once several servers are found there, `init` with each new connection.
        """
        self.name = name
        self.dsn = dsn
        """Where the node is; it may hold a password."""
        self.limiter = CapacityLimiter(f"a connection to {name}", width=limits.connections, queue=limits.queue)
        """Lets as many in as there may be connections."""
        self._on_shared_address = on_shared_address
        self._init = init
        self._incarnations = IncarnationHistory()
        self._cancellations = Cancellations(name)
        self._connections: weakref.WeakSet[NodeConnection] = weakref.WeakSet()
        self._pool: asyncpg.Pool[Any] = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=limits.connections,
            timeout=CONNECT_TIMEOUT_S,
            max_inactive_connection_lifetime=_IDLE_S,
            connection_class=NodeConnection,
            init=cast("Any", self._learn),
            reset=cast("Any", self._reset),
            statement_cache_size=0,  # see `_cache_statements`
            server_settings={"application_name": "rocket"},
        )

    async def open(self) -> Self:
        """Make it ready, without opening a connection; return it."""
        await self._pool
        return self

    async def _learn(self, connection: NodeConnection) -> None:
        """Make a new connection fit to be lent."""
        try:
            await learn_where(connection, self._cancellations)
            if self._init is not None:
                await self._init(connection)
        except BaseException:
            connection.terminate()  # closing it would wait for a server that may have fallen silent
            raise
        self._connections.add(connection)
        if self._on_shared_address is not None and self._incarnations.is_shared_address(connection):
            self._on_shared_address()
            self._on_shared_address = None

    def drop(self) -> None:
        """Terminate every connection, those in use included: the node is not what it was when they were opened."""
        for connection in list(self._connections):
            connection.terminate()
        self._connections.clear()

    @property
    def in_use(self) -> int:
        """How many of its connections are lent, or being opened to be."""
        return self.limiter.inside

    @property
    def idle(self) -> int:
        """How many open connections are unused."""
        return self._pool.get_idle_size()

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy[asyncpg.Record]]:
        """Lend a connection; the caller sets the deadline.

        One that was lost, or left in the middle of something, is discarded and not waited for. Raise
        `ConnectionError` when no connection can be opened, or when it is lost while it is lent, and
        `TooManyWaiting` when the queue for one is full.
        """
        async with self.limiter:
            try:
                connection = await self._pool.acquire()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
                # Whatever it says (a database that a replica has not replayed yet, say), it is the node's failure.
                raise ConnectionError(f"no connection: {describe(error)}") from error
            try:
                yield connection
            except (asyncpg.InterfaceError, asyncpg.InternalClientError, AttributeError) as error:
                # The second is what asyncpg says between a server's last message and the end of the connection,
                # the third when a connection is ended right before an answer is looked at.
                if isinstance(error, asyncpg.InternalClientError) or is_lost(connection):
                    discard(connection)
                    raise ConnectionError(f"connection lost: {describe(error)}") from error
                await _discard_if_busy(connection)
                raise
            except (asyncio.CancelledError, NodeChanged, *UNREACHABLE):
                discard(connection)
                raise
            except Exception:
                await _discard_if_busy(connection)
                raise
            finally:
                await self._release(connection)

    async def _release(self, connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> None:
        """Give a connection back; the caller, who is done with it, never learns of a failure."""
        try:
            await self._pool.release(connection, timeout=_RELEASE_TIMEOUT_S)
        except REFUSED as error:  # asyncpg has ended the connection
            _log.info("a connection to %s was lost when it was given back: %s", self.name, describe(error))

    async def _reset(self, connection: NodeConnection) -> None:
        """Clear what a piece of work may have left behind.

        Read-only connections of our own hold no such state, nor do those that only had statements of ours: that
        saves a round trip for each read (design fact F9).
        """
        clean, connection.left_clean = connection.left_clean, False
        connection.cut_off = connection.commits = False
        if connection.epoch is not None and not clean:
            await connection.execute(connection.get_reset_query())

    async def close(self, timeout_s: float) -> None:
        """Close every connection, by force when `timeout_s` is over, or when the server has gone first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._pool.close()
        except REFUSED:
            self._pool.terminate()
        await self._cancellations.finish(timeout_s)


async def _discard_if_busy(connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> None:
    """Discard a connection on which work, which has failed, has left a statement under way."""
    if is_lost(connection):
        return
    try:
        await connection.execute("SELECT 1")
    except asyncpg.InterfaceError:
        if not is_lost(connection):
            unwrap(connection).cut_off = True
        discard(connection)
    except REFUSED:
        pass  # whatever it is: nothing else was under way
