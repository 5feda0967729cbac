"""The connections to one node, lent to one piece of work after another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import weakref
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from rocket.dsn import Node
from rocket.errors import describe
from rocket.routing.connection import NodeConnection, OwnedTasks, answered, discard, runs_on, speaks_of_connection
from rocket.routing.failures import REFUSED, NotAsObserved, OwnError, StatementsOutdated, may_be_outdated
from rocket.routing.limits import HELD, CapacityLimiter
from rocket.routing.opening import IncarnationHistory, learn_where, open_connection, outlast

if TYPE_CHECKING:
    from collections.abc import Callable

    from rocket.routing.connection import Connection, Work
    from rocket.routing.limits import Limits, Place

_LOOK_AFTER_S = 10.0
"""A connection that was idle for longer is looked at before it is used: a firewall may have forgotten it."""
_LOOK_S = 0.5  # how long it has to answer then
_SLOW_S = 0.5  # reads go elsewhere while opening the first connection takes longer
_FIRST_PROBE_S, _LAST_PROBE_S = 0.1, 5.0
"""How soon a node is asked again for a connection that it has refused or ended, at first and the longest."""
_CLOSED = "no connection: its pool is closed"
_proxy = cast("Any", asyncpg.pool.PoolConnectionProxy)

_log = logging.getLogger("rocket.router")


class NodePool:
    """The connections to one node, whatever its role is."""

    def __init__(
        self,
        name: str,
        node: str | Node,
        limits: Limits,
        *,
        on_shared_address: Callable[[], None] | None = None,
        init: Work[None] | None = None,
        refusing: dict[str, str] | None = None,
        on_open: Callable[[], None] | None = None,
    ) -> None:
        """Begin without a connection.

        `on_shared_address` is called once several servers are found there, `init` with each new connection,
        `on_open` when one was opened in the background. `refusing` holds, by its name, why none can be opened.
        """
        self.name = name
        self.node = Node.of(node)
        self.limiter = CapacityLimiter(f"a connection to {name}", width=limits.connections, queue=limits.queue)
        """Lets as many in as there may be connections."""
        self._on_shared_address = on_shared_address
        self._on_open = on_open
        self._init = init
        self._incarnations = IncarnationHistory()
        self._longest_s = max(limits.read_s, limits.write_s + 2 * limits.commit_s)
        self._cancellations = OwnedTasks(name)
        self._commits = OwnedTasks(name)
        self._openings = OwnedTasks(name)
        self._connections: weakref.WeakSet[NodeConnection] = weakref.WeakSet()
        self._idle: list[NodeConnection] = []  # last used last
        self._idle_timer: asyncio.TimerHandle | None = None
        self._waiters: deque[asyncio.Future[NodeConnection]] = deque()  # each has a place, and an opening
        self.round_trip_s = 0.0
        """How long the way to the node and back took, when a connection was last opened."""
        self._limits = limits
        self._warm = 0
        self._suspected_at = 0.0
        self._refusing = {} if refusing is None else refusing
        self._failed_at = 0.0
        self._probe_after_s = _FIRST_PROBE_S
        self._probe_timer: asyncio.TimerHandle | None = None
        self._is_closing = False
        self._all_back = asyncio.Event()
        self.holder = cast("Any", SimpleNamespace(_pool=self))
        """Where asyncpg looks for the pool of a connection that is lent."""

    def drop(self) -> None:
        """Terminate every connection, those in use included: the node is not what it was when they were opened."""
        self._warm = 0
        for connection in list(self._connections):
            connection.terminate()
        self._connections.clear()
        self._idle.clear()

    @property
    def in_use(self) -> int:
        """How many of its connections are lent, or waited for."""
        return self.limiter.inside

    @property
    def _alive(self) -> list[Any]:
        return [connection for connection in self._connections if not connection.is_closed()]

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, in use or not; it may be dead without our knowing."""
        return bool(self._alive)

    @property
    def has_idle(self) -> bool:
        """Whether a connection is unused; it may have ended."""
        return bool(self._idle)

    @property
    def idle(self) -> int:
        """How many open connections are unused."""
        return sum(not connection.is_closed() for connection in self._idle)

    # --- opening ---

    async def _open(self) -> NodeConnection:
        """Open a connection that is fit to be lent; raise `ConnectionError`, or what speaks against the node."""
        try:
            connection = await open_connection(self.node, "rocket", self._learn)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            # Whatever it says (a database that a replica has not replayed yet, say), it is the node's failure.
            raise ConnectionError(f"no connection: {describe(error)}") from error
        if self._on_shared_address is not None and self._incarnations.is_shared_address(connection):
            self._on_shared_address()
            self._on_shared_address = None
        return connection

    async def _learn(self, connection: NodeConnection) -> None:
        await learn_where(connection, self._cancellations)
        self._connections.add(connection)
        connection.add_termination_listener(self._ended)
        self.round_trip_s = connection.round_trip_s
        if self._init is not None:
            await self._init(connection)

    def warm_up(self) -> None:
        """Keep as many connections open as `Limits.warm` says, in the background, until they are dropped."""
        for connection in list(self._idle):
            if connection.lacks_epoch:
                connection.terminate()
        self._warm = min(self._limits.warm, self.limiter.width)
        for _ in range(self._cold):
            self._open_another()

    def want_one(self) -> None:
        """Open a connection in the background unless there is one, or will be."""
        if not (self.is_open or self._openings or self._probe_timer):
            self._open_another()

    @property
    def _cold(self) -> int:
        """How many connections there are too few, of those that are kept open."""
        return 0 if self._is_closing else max(0, self._warm - len(self._alive) - len(self._openings))

    def _ended(self, _connection: object) -> None:
        self._idle = [connection for connection in self._idle if not connection.is_closed()]
        if self._cold:
            self._open_later()

    def _open_another(self) -> None:
        """Open a connection in the background, if there may be one more; the first who waits gets it."""
        if len(self._alive) + len(self._openings) < self.limiter.width:
            self._openings.start(self._open(), "open a connection").add_done_callback(self._opened)

    def _opened(self, opening: asyncio.Task[NodeConnection]) -> None:
        error = ConnectionError(_CLOSED) if opening.cancelled() else opening.exception()
        if error is None:
            self._refusing.pop(self.name, None)
            self._keep(opening.result())
            if self._cold:
                self._open_later()
            if self._on_open is not None:
                self._on_open()
            return
        self._note_refused(describe(error))
        if (waiter := self._next_waiter()) is not None:
            waiter.set_exception(error)

    def _next_waiter(self) -> asyncio.Future[NodeConnection] | None:
        while self._waiters:
            if not (waiter := self._waiters.popleft()).done():
                return waiter
        return None

    def _note_refused(self, why: str) -> None:
        """Have reads go elsewhere; find out by another connection, after a growing while, if that is over."""
        if self._is_closing:
            return
        if self.name not in self._refusing:
            _log.info("connections to %s cannot be opened: %s", self.name, why)
        self._refusing[self.name] = why
        self._open_later()

    def _open_later(self) -> None:
        """Open a connection after a while, which grows when they fail one soon after another."""
        if self._probe_timer is not None or self._is_closing:
            return
        now = time.monotonic()
        if now > self._failed_at + 2 * _LAST_PROBE_S:
            self._probe_after_s = _FIRST_PROBE_S
        self._failed_at = now
        after_s = self._probe_after_s * random.uniform(0.5, 1.0)  # noqa: S311 - many processes, not at once
        self._probe_timer = asyncio.get_running_loop().call_later(after_s, self._probe)
        self._probe_after_s = min(2 * self._probe_after_s, _LAST_PROBE_S)

    def _probe(self) -> None:
        self._probe_timer = None
        why = self._refusing.get(self.name)
        for _ in range(self._cold if why is None else not self._openings):  # of those refused one is enough
            self._open_another()
        if why is not None and not self._openings:  # all that there may be are open
            self._note_refused(why)

    def _keep(self, connection: NodeConnection) -> None:
        """Hand a connection to the first who waits for one, or have it wait for its next use."""
        if self._is_closing:
            connection.terminate()
            return
        now = connection.idle_since = time.monotonic()
        if (waiter := self._next_waiter()) is not None:
            waiter.set_result(connection)
            return
        self._idle.append(connection)
        if self._idle_timer is None and self._limits.idle_s:
            self._end_idle_after(self._limits.idle_s + self._idle[0].idle_since - now)

    def _end_idle_after(self, seconds: float) -> None:
        self._idle_timer = asyncio.get_running_loop().call_later(seconds, self._end_idle)

    def _end_idle(self) -> None:
        """Terminate the connections that were not used for long, but for those that are kept ready."""
        self._idle_timer = None
        while len(self._idle) > self._warm:
            if (left_s := self._idle[0].idle_since + self._limits.idle_s - time.monotonic()) > 0:
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

    async def acquire(self, read_only: bool | None = None) -> NodeConnection:
        """Return a connection for who has a place: one that is idle, or the next that is given back or opened."""
        while self._idle:
            connection = self._idle.pop(self._position(read_only))
            if not connection.is_closed() and (
                connection.idle_since > max(time.monotonic() - _LOOK_AFTER_S, self._suspected_at)
                or await self._answers(connection)
            ):
                return connection
        if self._is_closing:
            raise ConnectionError(_CLOSED)
        waiter: asyncio.Future[NodeConnection] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._open_another()
        began = time.monotonic()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                if time.monotonic() - began > _SLOW_S / 2 and self._openings and not self._alive:
                    self._note_refused("opening a connection takes long")
            elif waiter.exception() is None:  # at the same time
                self._keep(waiter.result())
            raise

    async def _answers(self, connection: NodeConnection) -> bool:
        """Look at a connection that was idle for long; when it is dead, end all the idle ones with it."""
        try:
            await connection.look(_LOOK_S)
        except REFUSED as error:
            _log.info("an idle connection to %s has died: %s", self.name, describe(error))
            for other in (connection, *self._idle):
                other.terminate()
            self._idle.clear()
            return False
        except BaseException:
            connection.terminate()
            raise
        return True

    def suspect_idle(self) -> None:
        """Have the connections that are idle now looked at before they are used: another one fell silent."""
        self._suspected_at = time.monotonic()

    def _position(self, read_only: bool | None) -> int:
        """Return which idle connection to use: the one used last of those preferred, or else of all."""
        positions = range(len(self._idle) - 1, -1, -1)
        return next((i for i in positions if read_only in {None, self._idle[i].read_only}), -1)

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
        for connection in self._alive:
            connection._drop_local_type_cache()  # noqa: SLF001

    def _drop_statement_cache(self) -> None:
        for connection in self._alive:
            connection._drop_local_statement_cache()  # noqa: SLF001

    async def _outlast(self, connection: NodeConnection, place: Place) -> None:
        """Keep a connection, and its place, for as long as a COMMIT that was given up runs on the server."""
        try:
            await outlast(self.node, connection, self._commits)
        finally:
            self.free(place)

    async def _take_back(self, connection: NodeConnection) -> None:
        """Keep a connection for its next use; the caller, who is done with it, never learns of a failure."""
        try:
            if connection.cut_off:
                connection.due_after(0)
                await answered(connection)
            await connection.end_transaction_left_open()
            await connection.clear_session()
            if self._is_closing or 0 < self._limits.lifetime_s < time.monotonic() - connection.opened_at:
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

    async def close(self, timeout_s: float) -> None:
        """Close every connection, by force when `timeout_s` is over, or when the server has gone first."""
        self._is_closing = True
        await self._openings.finish(0)
        await self._commits.finish(0)
        for timer in filter(None, (self._idle_timer, self._probe_timer)):
            timer.cancel()
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
        "_cancelled_before", "_check", "_has_queued", "_held", "_inner", "_lent", "_place", "_pool", "_read_only",
        "_task", "is_lent", "was_idle", "within_s",
    )  # fmt: skip

    def __init__(
        self,
        pool: NodePool,
        within_s: float,
        check: Callable[[NodeConnection], None] | None,
        read_only: bool | None,
    ) -> None:
        self._pool = pool
        self.within_s = within_s
        """How long it may last, in seconds."""
        self._check = check
        self._read_only = read_only
        self._has_queued = False
        self.is_lent = False
        """Whether there was a connection."""
        self.was_idle = False
        """Whether there was a connection that did not have to be waited for."""

    @property
    def patience_s(self) -> float:
        """How long a read waits for a connection that is to be the node's first, or for any other one."""
        is_open = self._pool.has_idle or self._pool._alive  # noqa: SLF001 - they are made for each other
        return self.within_s if is_open else min(self.within_s, _SLOW_S)

    @property
    def has_to_queue(self) -> bool:
        """Whether all connections are in use."""
        return self._pool.limiter.is_full

    async def queue(self) -> None:
        """Wait until a connection is free, before it is used by `async with`, or left; raise `TooManyWaiting`."""
        held = HELD.get()
        self._place = await self._pool.limiter.take()
        self._held, self._has_queued = held, True

    def leave(self) -> None:
        """Do not use what was waited for."""
        HELD.set(self._held)
        self._pool.free(self._place)

    async def __aenter__(self) -> Connection:
        pool = self._pool
        if not self._has_queued:
            await self.queue()
        self.was_idle = pool.has_idle
        try:
            inner = self._inner = await pool.acquire(self._read_only)
        except BaseException:
            self.leave()
            raise
        self.is_lent = True
        inner.due_after(self.within_s)
        self._lent = _proxy(pool.holder, inner)
        task = self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._cancelled_before = task.cancelling()
        if self._check is not None:
            try:
                self._check(inner)
            except NotAsObserved as error:
                await self.__aexit__(None, error, None)
                raise
        return cast("Connection", self._lent)

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
            if inner.cut_off:
                self._pool.suspect_idle()
            discard(inner)
            return None
        failure = speaks_of_connection(error, inner)
        if failure is None:
            inner.changed = True  # to be looked at: something may be under way
            inner.due_after(0)
            if not may_be_outdated(error.error if isinstance(error, OwnError) else error, inner.keeps):
                return None
            self._pool.prepare_again()
            return StatementsOutdated(error)
        self._pool.suspect_idle()
        discard(inner)
        if self._task.cancelling() > self._cancelled_before:
            # The connection has failed, or ended overdue, while work was being cancelled.
            return asyncio.CancelledError()
        return None if failure is error else failure
