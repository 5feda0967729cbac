"""The connections to one node, lent to one piece of work after another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from rocket.errors import describe
from rocket.routing.connection import CONNECT_TIMEOUT_S, NodeConnection, discard, is_lost, learn_where, unwrap
from rocket.routing.failures import REFUSED, UNREACHABLE, NodeChanged
from rocket.routing.gate import CapacityLimiter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from rocket.consistency import Incarnation
    from rocket.routing.connection import Work
    from rocket.routing.limits import Limits

_RELEASE_TIMEOUT_S = 1.0
_LIVES_REMEMBERED = 32
_IDLE_S = 300.0  # connections that nobody used for so long are given back to the server

_log = logging.getLogger("rocket.router")


class IncarnationHistory:
    """The incarnations found behind one address: a single server has them one after another."""

    def __init__(self) -> None:
        self._present: Incarnation | None = None
        self._since = 0.0
        self._past: deque[Incarnation] = deque(maxlen=_LIVES_REMEMBERED)

    def is_shared_address(self, connection: NodeConnection) -> bool:
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


async def _end_if_busy(connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> None:
    """End a connection on which work, which has failed, has left a statement under way."""
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


class NodePool:
    """The connections to one node, whatever its role is."""

    def __init__(
        self, name: str, limits: Limits, on_several: Callable[[], None] | None, init: Work[None] | None
    ) -> None:
        self.name = name
        self._on_several = on_several
        self._init = init
        self._lives = IncarnationHistory()
        self.resets_always = False
        """Whether each connection is reset when it is given back, as it is by asyncpg's pool as it comes."""
        self._pool: asyncpg.Pool[Any]
        self._connections: weakref.WeakSet[NodeConnection] = weakref.WeakSet()
        self.gate = CapacityLimiter(f"a connection to {name}", width=limits.connections, queue=limits.queue)
        """Lets as many in as there may be connections."""

    @classmethod
    async def to(
        cls,
        name: str,
        dsn: str,
        limits: Limits,
        on_several: Callable[[], None] | None = None,
        init: Work[None] | None = None,
    ) -> NodePool:
        """Make a pool; no connection is opened yet.

        `on_several` is called once several servers are found there, `init` with each new connection.
        """
        made = cls(name, limits, on_several, init)
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
            if self._init is not None:
                await self._init(connection)
        except BaseException:
            connection.terminate()  # the pool would take its leave of a server that may have fallen silent
            raise
        self._connections.add(connection)
        if self._on_several is not None and self._lives.is_shared_address(connection):
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
        `ConnectionError` when there is none to be had, or when it is lost while it is lent, and `TooManyWaiting`
        when too many wait for one.
        """
        async with self.gate:
            try:
                connection = await self._pool.acquire()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
                # Whatever it says (a database that a replica has not replayed yet, say), it is the node's affair.
                raise ConnectionError(f"no connection: {describe(error)}") from error
            try:
                yield connection
            except (asyncpg.InterfaceError, asyncpg.InternalClientError, AttributeError) as error:
                # The second is what asyncpg says between a server's last words and the end of the connection, the
                # third when a connection is ended right before an answer is looked at.
                if isinstance(error, asyncpg.InternalClientError) or is_lost(connection):
                    discard(connection)
                    raise ConnectionError(f"connection lost: {describe(error)}") from error
                await _end_if_busy(connection)
                raise
            except (asyncio.CancelledError, NodeChanged, *UNREACHABLE):
                discard(connection)
                raise
            except Exception:
                await _end_if_busy(connection)
                raise
            finally:
                await self._give_back(connection)

    async def _give_back(self, connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> None:
        """Release a connection; what goes wrong with that is no affair of whoever had it."""
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
        if self.resets_always or (connection.epoch is not None and not clean):
            await connection.execute(connection.get_reset_query())

    async def close(self, timeout_s: float) -> None:
        """Close every connection, by force when `timeout_s` is over, or when the server has gone first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._pool.close()
        except REFUSED:
            self._pool.terminate()
