"""The connections to one node, lent to one piece of work after another, and the limits to their number."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import asyncpg

from rocket.errors import describe
from rocket.routing.connection import (
    CONNECT_TIMEOUT_S,
    NodeConnection,
    OwnedTasks,
    answered,
    discard,
    is_lost,
    learn_where,
    runs_on,
    still_runs,
    unwrap,
)
from rocket.routing.failures import (
    REFUSED,
    UNREACHABLE,
    NodeChanged,
    OwnError,
    StatementsOutdated,
    may_be_outdated,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from rocket.consistency import Incarnation
    from rocket.routing.connection import Connection, Work

_LOOK_EVERY_S = 5.0
"""How often the server is asked whether a COMMIT that was given up still runs: its answer may never come."""
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
    """Connections per node, with those whose COMMIT was given up and still runs on the server."""
    queue: int = 100
    """Waiters per node before further requests are rejected."""
    primary_reads: int = 7
    """How many of the primary's connections reads may take: when all replicas lag, writes go on."""
    close_s: float = 2.0
    """Closing a pool gracefully."""


class Timeout:
    """What `asyncio.timeout` is, at a third of its cost, which every read pays; a plain context manager.

    Cancels the current task once `timeout_s` is over, and raises `TimeoutError` in place of that cancellation.
    """

    __slots__ = ("_cancelled_before", "_is_over", "_task", "_timer")

    def __init__(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._task = task
        self._cancelled_before = task.cancelling()
        self._is_over = False
        self._timer = loop.call_later(timeout_s, self._end)

    def _end(self) -> None:
        self._is_over = True
        self._task.cancel()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        self._timer.cancel()
        # A cancellation by others, at the same time, stays one.
        if self._is_over and self._task.uncancel() <= self._cancelled_before and kind is asyncio.CancelledError:
            raise TimeoutError from error


class TooManyWaiting(ConnectionError):
    """The queue for a connection is full."""


class Place:
    """One of a limiter's places, which is taken."""

    __slots__ = ("_limiter", "_nested")

    def __init__(self, limiter: CapacityLimiter) -> None:
        self._limiter: CapacityLimiter | None = limiter
        self._nested = 0

    def give_back(self) -> None:
        """Let another one have it."""
        if (limiter := self._limiter) is not None:
            self._limiter = None
            limiter.inside -= 1
            limiter._places.release()  # noqa: SLF001 - they are made for each other
            limiter._stuck -= self._nested > 0  # noqa: SLF001

    def is_of(self, limiter: CapacityLimiter) -> bool:
        """Return whether it is still one of a limiter's."""
        return self._limiter is limiter

    @contextlib.contextmanager
    def waiting_for_another(self) -> Iterator[None]:
        """Count it among those that will not be given back until another one of the same limiter is."""
        limiter = self._limiter
        assert limiter is not None  # noqa: S101 - see `is_of`
        self._nested += 1
        limiter._stuck += self._nested == 1  # noqa: SLF001
        try:
            yield
        finally:
            self._nested -= 1
            limiter._stuck -= self._nested == 0 and self._limiter is limiter  # noqa: SLF001


_HELD: ContextVar[tuple[Place, ...]] = ContextVar("held", default=())
"""The places that what is running now was given; a task that it starts inherits them."""


class CapacityLimiter:
    """Lets `width` through at a time; `queue` more may wait, and further ones are rejected.

    An asynchronous context manager that many use at once: it waits for a place, keeps it for the body, and raises
    `TooManyWaiting` at once if the queue is full. Where each place is held by something that waits for another one
    of them, as work does that reads by another session, none would ever be free: raise `RuntimeError` then.
    """

    __slots__ = ("_places", "_queue", "_stuck", "_what", "inside", "waiting", "width")

    def __init__(self, what: str, *, width: int, queue: int) -> None:
        self._what = what
        self._queue = queue
        self._places = asyncio.Semaphore(width)
        self._stuck = 0
        self.width = width
        """How many places there are."""
        self.waiting = 0
        """How many wait for a place."""
        self.inside = 0
        """How many have one."""

    async def take(self) -> Place:
        """Wait for a place."""
        if self._places.locked():
            await self._wait()
        else:
            await self._places.acquire()
        self.inside += 1
        place = Place(self)
        _HELD.set((*_HELD.get(), place))
        return place

    async def _wait(self) -> None:
        if self.waiting >= self._queue:
            raise TooManyWaiting(f"{self.waiting} wait already for {self._what}")
        outer = next((place for place in _HELD.get() if place.is_of(self)), None)
        self.waiting += 1
        try:
            with contextlib.nullcontext() if outer is None else outer.waiting_for_another():
                if self._stuck >= self.width:
                    raise RuntimeError(
                        f"this read or write is nested in work that has {self._what}, and would wait for ever for "
                        f"another one: all {self.width} are held by work like that. Use the connection that work "
                        "is given, or do it before or after"
                    )
                await self._places.acquire()
        finally:
            self.waiting -= 1

    async def __aenter__(self) -> None:
        await self.take()

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give back the place that was taken last."""
        held = _HELD.get()
        place = next(place for place in reversed(held) if place.is_of(self))
        _HELD.set(tuple(other for other in held if other is not place))
        place.give_back()


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
        self._longest_s = max(limits.read_s, limits.write_s + 2 * limits.commit_s)
        self._cancellations = OwnedTasks(name)
        self._commits = OwnedTasks(name)
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
    async def lease(
        self, within_s: float | None = None
    ) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy[asyncpg.Record]]:
        """Lend a connection; the caller sets the deadline.

        One that was lost, left in the middle of something, or not given back soon after `within_s` is discarded
        and not waited for. Raise `ConnectionError` when no connection can be opened, or when it is lost while
        it is lent, `StatementsOutdated`, and `TooManyWaiting` when the queue for one is full.
        """
        place = await self.limiter.take()
        held, outlasts = _HELD.get(), False
        try:
            try:
                connection = await self._pool.acquire()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
                # Whatever it says (a database that a replica has not replayed yet, say), it is the node's failure.
                raise ConnectionError(f"no connection: {describe(error)}") from error
            inner = unwrap(connection)
            inner.due_after(self._longest_s if within_s is None else within_s)
            task = asyncio.current_task()
            cancelled_before = 0 if task is None else task.cancelling()
            try:
                yield connection
            except Exception as error:
                raised = error.error if isinstance(error, OwnError) else error
                failure = _speaks_of_connection(error, connection)
                if failure is None:
                    inner.changed = True  # to be looked at: something may be under way
                    inner.due_after(0)
                    if may_be_outdated(raised, inner.keeps):
                        self._prepare_again()
                        raise StatementsOutdated(error) from error
                    raise
                discard(connection)
                if task is not None and task.cancelling() > cancelled_before:
                    # The connection has failed, or ended overdue, while work was being cancelled.
                    raise asyncio.CancelledError from error
                if failure is error:
                    raise
                raise failure from error
            except BaseException:
                discard(connection)
                raise
            finally:
                if runs_on(inner):
                    outlasts = True
                    inner.not_due()
                    self._commits.start(self._outlast(inner, place), "wait for a COMMIT")
                else:
                    await self._release(connection)
        finally:
            _HELD.set(held[:-1])
            if not outlasts:
                place.give_back()

    def _prepare_again(self) -> None:
        """Do on all connections what asyncpg's `reload_schema_state` does; the lent one may have ended."""
        pool = cast("Any", self._pool)
        pool._drop_type_cache()  # noqa: SLF001
        pool._drop_statement_cache()  # noqa: SLF001

    async def _outlast(self, connection: NodeConnection, place: Place) -> None:
        """Keep a connection, and its place, for as long as a COMMIT that was given up runs on the server.

        It may wait for a synchronous replica. To end the connection would not end it, and one more of them would
        be on the server each time.
        """
        pid = connection.get_server_pid()
        answer = asyncio.create_task(answered(connection), name=f"the answer to a COMMIT on {self.name}")
        try:
            while not answer.done():
                await asyncio.wait((answer,), timeout=_LOOK_EVERY_S)
                if not answer.done() and connection.direct and not await still_runs(self.dsn, pid):
                    break
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            connection.commits = connection.cut_off = False
            discard(connection)
            place.give_back()

    async def _release(self, connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record]) -> None:
        """Give a connection back; the caller, who is done with it, never learns of a failure."""
        try:
            await self._pool.release(connection)
        except REFUSED as error:  # asyncpg has ended the connection
            _log.info("a connection to %s was lost when it was given back: %s", self.name, describe(error))
        except asyncio.CancelledError:  # asyncpg goes on giving it back by itself
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
        await self._commits.finish(0)
        try:
            async with asyncio.timeout(timeout_s):
                await self._pool.close()
        except REFUSED:
            self._pool.terminate()
        await self._commits.finish(0)
        await self._cancellations.finish(timeout_s)


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
