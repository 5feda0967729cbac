"""The connections to one node, lent to one piece of work after another."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import weakref
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from rocket.errors import describe
from rocket.routing.connection import NodeConnection, OwnedTasks, discard, is_lost, runs_on
from rocket.routing.failures import (
    REFUSED,
    UNREACHABLE,
    NodeChanged,
    NotAsObserved,
    OwnError,
    StatementsOutdated,
    may_be_outdated,
)
from rocket.routing.limits import HELD, CapacityLimiter
from rocket.routing.opening import CONNECT_TIMEOUT_S, learn_where

if TYPE_CHECKING:
    from collections.abc import Callable

    from rocket.consistency import Incarnation
    from rocket.routing.connection import Connection, Work
    from rocket.routing.limits import Limits, Place

_LOOK_EVERY_S = 5.0
"""How often the server is asked whether a COMMIT that was given up still runs: its answer may never come."""
_INCARNATIONS_REMEMBERED = 32
_IDLE_S = 300.0  # connections that were not used for so long are closed
_LIFETIME_S = 3600.0  # so are those that were opened so long ago, when they are given back: backends grow
_proxy = cast("Any", asyncpg.pool.PoolConnectionProxy)

_log = logging.getLogger("rocket.router")


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
        """Begin without a connection.

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
        self._longest_s = max(limits.read_s, limits.write_s + 2 * limits.commit_s)
        self._cancellations = OwnedTasks(name)
        self._commits = OwnedTasks(name)
        self._openings = OwnedTasks(name)
        self._connections: weakref.WeakSet[NodeConnection] = weakref.WeakSet()
        self._idle: list[NodeConnection] = []  # last used last
        self._idle_timer: asyncio.TimerHandle | None = None
        self._is_closing = False
        self._all_back = asyncio.Event()
        self.holder = cast("Any", SimpleNamespace(_pool=self))
        """Where asyncpg looks for the pool of a connection that is lent."""

    def drop(self) -> None:
        """Terminate every connection, those in use included: the node is not what it was when they were opened."""
        for connection in list(self._connections):
            connection.terminate()
        self._connections.clear()
        self._idle.clear()

    @property
    def in_use(self) -> int:
        """How many of its connections are lent, or being opened to be."""
        return self.limiter.inside

    @property
    def idle(self) -> int:
        """How many open connections are unused."""
        return sum(not connection.is_closed() for connection in self._idle)

    # --- opening ---

    async def _open(self) -> NodeConnection:
        """Open a connection that is fit to be lent; raise `ConnectionError`, or what speaks against the node."""
        try:
            connection: NodeConnection = await asyncpg.connect(
                self.dsn,
                timeout=CONNECT_TIMEOUT_S,
                connection_class=NodeConnection,
                statement_cache_size=0,  # see `learn_where`
                server_settings={"application_name": "rocket"},
            )
            try:
                await learn_where(connection, self._cancellations)
                self._connections.add(connection)
                if self._init is not None:
                    await self._init(connection)
            except BaseException:
                connection.terminate()  # closing it would wait for a server that may have fallen silent
                raise
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            # Whatever it says (a database that a replica has not replayed yet, say), it is the node's failure.
            raise ConnectionError(f"no connection: {describe(error)}") from error
        if self._on_shared_address is not None and self._incarnations.is_shared_address(connection):
            self._on_shared_address()
            self._on_shared_address = None
        return connection

    def _opened_late(self, opening: asyncio.Task[NodeConnection], place: Place) -> None:
        """Keep a connection that was opened after its caller had given up."""
        if not opening.cancelled():
            if (error := opening.exception()) is not None:
                _log.info("a connection to %s was not opened: %s", self.name, describe(error))
            else:
                self._keep(opening.result())
        self.free(place)

    def _keep(self, connection: NodeConnection) -> None:
        """Have a connection wait for its next use."""
        if self._is_closing:
            connection.terminate()
            return
        now = connection.idle_since = time.monotonic()
        self._idle.append(connection)
        if self._idle_timer is None:
            self._end_idle_after(_IDLE_S + self._idle[0].idle_since - now)

    def _end_idle_after(self, seconds: float) -> None:
        self._idle_timer = asyncio.get_running_loop().call_later(seconds, self._end_idle)

    def _end_idle(self) -> None:
        """Terminate the connections that were not used for long."""
        self._idle_timer = None
        now = time.monotonic()
        while self._idle:
            if (left_s := self._idle[0].idle_since + _IDLE_S - now) > 0:
                self._end_idle_after(left_s)
                break
            self._idle.pop(0).terminate()

    def free(self, place: Place) -> None:
        """Give back a place, unless it was passed on."""
        place.give_back()
        if self._is_closing and not self.limiter.inside:
            self._all_back.set()

    # --- lending ---

    def lease(
        self,
        within_s: float | None = None,
        check: Callable[[NodeConnection], None] | None = None,
        *,
        read_only: bool | None = None,
    ) -> Lease:
        """Lend a connection, as a context manager; the caller sets the deadline, and `check` may refuse it.

        With `read_only` one that is like that is preferred.

        One that was lost, left in the middle of something, or not given back soon after `within_s` is discarded
        and not waited for. One that takes longer to open than its caller waits is kept for the next. Raise
        `ConnectionError` when none can be opened, or when it is lost while it is lent, `StatementsOutdated`, and
        `TooManyWaiting` when the queue for one is full.
        """
        return Lease(self, self._longest_s if within_s is None else within_s, check, read_only)

    async def acquire(self, place: Place, read_only: bool | None = None) -> NodeConnection:
        """Return a connection for who has a place, which goes to the opening of one if that is cancelled."""
        while self._idle:
            if not (connection := self._idle.pop(self._position(read_only))).is_closed():
                return connection
        opening = None if self._is_closing else self._openings.start(self._open(), "open a connection")
        if opening is not None:
            try:
                await asyncio.wait((opening,))
            except asyncio.CancelledError:
                opening.add_done_callback(functools.partial(self._opened_late, place=place.pass_on()))
                raise
            if not opening.cancelled():
                return opening.result()
        raise ConnectionError("no connection: its pool is closed")

    def _position(self, read_only: bool | None) -> int:
        """Return which idle connection to use: the one used last of those preferred, or else of all."""
        if read_only is not None:
            for position in range(len(self._idle) - 1, -1, -1):
                if self._idle[position].read_only == read_only:
                    return position
        return -1

    async def give_back(self, connection: NodeConnection, place: Place) -> None:
        """Take back what `acquire` returned, with its place."""
        try:
            if runs_on(connection):
                connection.not_due()
                self._commits.start(self._outlast(connection, place.pass_on()), "wait for a COMMIT")
            elif not connection.is_closed():
                await self._take_back(connection)
        finally:
            self.free(place)

    def prepare_again(self) -> None:
        """Do on all connections what asyncpg's `reload_schema_state` does; the lent one may have ended."""
        self._drop_type_cache()
        self._drop_statement_cache()

    def _drop_type_cache(self) -> None:  # asyncpg's connections call this and the next of their pool
        for connection in self._open_connections():
            connection._drop_local_type_cache()  # noqa: SLF001

    def _drop_statement_cache(self) -> None:
        for connection in self._open_connections():
            connection._drop_local_statement_cache()  # noqa: SLF001

    def _open_connections(self) -> list[Any]:
        return [connection for connection in self._connections if not connection.is_closed()]

    async def _outlast(self, connection: NodeConnection, place: Place) -> None:
        """Keep a connection, and its place, for as long as a COMMIT that was given up runs on the server.

        It may wait for a synchronous replica. To end the connection would not end it, and one more of them would
        be on the server each time.
        """
        pid = connection.get_server_pid()
        answer = asyncio.create_task(_answered(connection), name=f"the answer to a COMMIT on {self.name}")
        try:
            while not answer.done():
                await asyncio.wait((answer,), timeout=_LOOK_EVERY_S)
                if not answer.done() and connection.direct and not await _still_runs(self.dsn, pid):
                    break
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            connection.commits = connection.cut_off = False
            discard(connection)
            self.free(place)

    async def _take_back(self, connection: NodeConnection) -> None:
        """Keep a connection for its next use; the caller, who is done with it, never learns of a failure."""
        try:
            if connection.cut_off:
                connection.due_after(0)
                await _answered(connection)
            await connection.end_transaction_left_open()
            await self._reset(connection)
            if self._is_closing or time.monotonic() > connection.opened_at + _LIFETIME_S:
                connection.due_after(0)
                await connection.close()
                connection.not_due()
            else:
                self._keep(connection)
        except REFUSED as error:
            discard(connection)
            _log.info("a connection to %s was lost when it was given back: %s", self.name, describe(error))
        except BaseException:
            discard(connection)
            raise

    async def _reset(self, connection: NodeConnection) -> None:
        """Clear what a piece of work may have left behind.

        A replica's connection holds something only if a statement's text has shown it, and one that only had
        statements of ours holds nothing: that saves a round trip for each read (design fact F9).
        """
        clean = connection.left_clean or connection.to_replica or not connection.direct
        connection.left_clean = connection.cut_off = connection.commits = False
        if connection.changed or not clean:
            connection.due_after(0)
            await connection.reset_session()
            connection.changed = False
        if connection.prepared:
            connection.prepared = set()
        connection.not_due()

    async def close(self, timeout_s: float) -> None:
        """Close every connection, by force when `timeout_s` is over, or when the server has gone first."""
        self._is_closing = True
        await self._openings.finish(0)
        await self._commits.finish(0)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        idle, self._idle = self._idle, []
        with contextlib.suppress(*REFUSED):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(connection.close() for connection in idle))
                if self.limiter.inside:
                    await self._all_back.wait()
        self.drop()
        await self._commits.finish(0)
        await self._cancellations.finish(timeout_s)


class Lease:
    """The use of one connection, from `async with` to the end of its body."""

    __slots__ = (
        "_cancelled_before", "_check", "_held", "_inner", "_lent", "_place", "_pool", "_read_only", "_task",
        "_within_s",
    )  # fmt: skip

    def __init__(
        self,
        pool: NodePool,
        within_s: float,
        check: Callable[[NodeConnection], None] | None,
        read_only: bool | None,
    ) -> None:
        self._pool = pool
        self._within_s = within_s
        self._check = check
        self._read_only = read_only

    async def __aenter__(self) -> asyncpg.pool.PoolConnectionProxy[asyncpg.Record]:
        pool = self._pool
        held = HELD.get()
        place = self._place = await pool.limiter.take()
        self._held = held
        try:
            inner = self._inner = await pool.acquire(place, self._read_only)
        except BaseException:
            HELD.set(held)
            pool.free(place)
            raise
        inner.due_after(self._within_s)
        self._lent = _proxy(pool.holder, inner)
        task = self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._cancelled_before = task.cancelling()
        if self._check is not None:
            try:
                self._check(inner)
            except NotAsObserved as error:
                await self.__aexit__(None, error, None)
                raise
        return cast("asyncpg.pool.PoolConnectionProxy[asyncpg.Record]", self._lent)

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            instead = None if error is None else self._after(error)
        finally:
            HELD.set(self._held)
            self._lent._detach()  # noqa: SLF001 - work cannot use it any more
            await self._pool.give_back(self._inner, self._place)
        if instead is not None:
            raise instead from error

    def _after(self, error: BaseException) -> BaseException | None:
        """Discard a connection that an error speaks against; return what to raise in place of the error."""
        inner = self._inner
        if not isinstance(error, Exception):
            discard(inner)
            return None
        failure = _speaks_of_connection(error, inner)
        if failure is None:
            inner.changed = True  # to be looked at: something may be under way
            inner.due_after(0)
            if not may_be_outdated(error.error if isinstance(error, OwnError) else error, inner.keeps):
                return None
            self._pool.prepare_again()
            return StatementsOutdated(error)
        discard(inner)
        if self._task.cancelling() > self._cancelled_before:
            # The connection has failed, or ended overdue, while work was being cancelled.
            return asyncio.CancelledError()
        return None if failure is error else failure


def _speaks_of_connection(error: Exception, connection: Connection) -> Exception | None:
    """Return what to raise for an error after which a connection is not used again, None if it may be."""
    if isinstance(error, (NodeChanged, *UNREACHABLE)):
        return error
    if isinstance(error, asyncpg.OutdatedSchemaCacheError):
        return None  # an InternalClientError, too
    # asyncpg says the first between a server's last message and the end of the connection, the last when a
    # connection is ended right before an answer is looked at.
    if isinstance(error, asyncpg.InternalClientError) or (
        isinstance(error, (asyncpg.InterfaceError, AttributeError)) and is_lost(connection)
    ):
        return ConnectionError(f"connection lost: {describe(error)}")
    return None


async def _answered(connection: NodeConnection) -> None:
    """Wait until the server has answered a statement that was given up, or has ended the connection."""
    await cast("Any", connection)._protocol._wait_for_cancellation()  # noqa: SLF001


_RUNS = "SELECT true FROM pg_stat_activity WHERE pid = $1 AND state IS DISTINCT FROM 'idle'"


async def _still_runs(dsn: str, pid: int) -> bool:
    """Ask a server whether one of its backends still runs something; without an answer it may."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            other = await asyncpg.connect(
                dsn, statement_cache_size=0, server_settings={"application_name": "rocket"}
            )
            try:
                return await other.fetchval(_RUNS, pid) is True
            finally:
                other.terminate()
    except (ValueError, *REFUSED):
        return True
