"""Connections that know which incarnation or epoch of a server they belong to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, overload

import asyncpg
from asyncpg import connect_utils

from rocket.errors import describe
from rocket.routing.failures import REFUSED, UNREACHABLE, NodeChanged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence

    from asyncpg import Record

    from rocket.consistency import Epoch, Incarnation

    RecordT = TypeVar("RecordT", bound=Record)

    # asyncpg has no types without its stubs, which are another package: here are those of what work does most.
    # ruff: disable[ASYNC109, D101, D102]
    class Connection(asyncpg.Connection):
        async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str: ...
        async def executemany(
            self, command: str, args: Iterable[Sequence[Any]], *, timeout: float | None = None
        ) -> None: ...
        @overload  # type: ignore[override]
        async def fetch(
            self, query: str, *args: Any, timeout: float | None = None, record_class: None = None
        ) -> list[Record]: ...
        @overload
        async def fetch(
            self, query: str, *args: Any, timeout: float | None = None, record_class: type[RecordT]
        ) -> list[RecordT]: ...
        def fetch(self, *_: Any, **__: Any) -> Any: ...
        @overload  # type: ignore[override]
        async def fetchrow(
            self, query: str, *args: Any, timeout: float | None = None, record_class: None = None
        ) -> Record | None: ...
        @overload
        async def fetchrow(
            self, query: str, *args: Any, timeout: float | None = None, record_class: type[RecordT]
        ) -> RecordT | None: ...
        def fetchrow(self, *_: Any, **__: Any) -> Any: ...
        async def fetchval(
            self, query: str, *args: Any, column: int | str = 0, timeout: float | None = None
        ) -> Any: ...
        def is_in_transaction(self) -> bool: ...

    # ruff: enable[ASYNC109, D101, D102]
    _PlainConnection = Connection
else:
    Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
    """What work is given: a connection of asyncpg's, to the node that was chosen."""
    _PlainConnection = asyncpg.Connection

ResultT = TypeVar("ResultT")
Work: TypeAlias = Callable[[Connection], Awaitable[ResultT]]
"""What the router runs for a caller, perhaps more than once: its effects stay inside the database.

What it sets in the session does not last. On a replica the session is reset only after statements whose text may
change it: a function that does so by itself has to set things for its transaction only, as `SET LOCAL` and
`set_config(..., true)` do.
"""

Isolation: TypeAlias = Literal["read_committed", "repeatable_read", "serializable"]
"""Levels of isolation, as asyncpg names them."""

_CANCEL_TIMEOUT_S = 2.0
"""How long a server may take to accept a cancel request."""

_GIVING_BACK_S = 1.0
"""How long the way back of a connection may take, once the time for what ran on it is over."""

OF_THIS_CLUSTER = "system_id = (SELECT system_identifier FROM pg_control_system())"
"""Selects the rows of `epochs` that belong to this cluster; a dump or pg_upgrade may have brought others."""

TIMELINE = "('x' || substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8))::bit(32)::int"
"""The timeline that a primary writes; fails on a replica.

Right after a promotion pg_control_checkpoint() still names the old timeline.
"""

SERVER_STARTED = "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint"
"""When the server was started, in microseconds."""

CURRENT_EPOCH = f"""(
    SELECT epoch FROM epochs WHERE {OF_THIS_CLUSTER} AND timeline = {TIMELINE} ORDER BY generation DESC LIMIT 1
)"""  # noqa: S608 - our own text
"""The epoch of the primary that is asked; fails on a replica."""

_RESET = """
    CLOSE ALL;
    RESET SESSION AUTHORIZATION;
    RESET ROLE;
    RESET ALL;
    UNLISTEN *;
    SELECT pg_advisory_unlock_all();
    DISCARD SEQUENCES;
    DISCARD TEMP;
    DO $$
    DECLARE statement text;
    BEGIN
        FOR statement IN SELECT name FROM pg_prepared_statements WHERE from_sql LOOP
            EXECUTE format('DEALLOCATE %I', statement);
        END LOOP;
    END $$;
"""
"""All that DISCARD ALL does, but for the statements that asyncpg has prepared."""

_RESET_ON_REPLICA = f"""{_RESET}
    SET default_transaction_read_only = on;
    SET default_transaction_isolation = 'read committed';
"""
"""What `opening` has set holds on."""

_READ_ONLY = "SET default_transaction_read_only = on;"
_AS_BY_DEFAULT = "RESET default_transaction_read_only;"
"""The server itself may be read-only."""

_LOOK = "SELECT 1"
"""Behind a pooler clients share the session, and nothing is reset in it."""


class NodeConnection(_PlainConnection):
    """A connection that knows what its server was when it was opened.

    It is good for one incarnation of a replica, whose crash would have ended it, or for one epoch of a primary,
    which is restarted before it becomes a replica. Only a promotion does not end it (design fact F14). Behind a
    transaction pooler it is good for nothing but the transaction under way.
    """

    __slots__ = (
        "cancellations", "changed", "commits", "copies", "cut_off", "direct", "epoch", "idle_since", "incarnation",
        "left_clean", "opened_at", "overdue", "prepared", "read_only", "reported", "round_trip_s",
        "server_started", "timeline", "to_replica",
    )  # fmt: skip

    direct: bool
    """Whether it leads to the server itself, and not to a pooler."""
    to_replica: bool
    """Whether the server was in recovery when it was opened."""
    incarnation: Incarnation | None
    """The incarnation of the startup process; None on a primary, and where it is unknown."""
    epoch: Epoch | None
    """The primary's epoch; None on a replica, on a primary whose epoch has no name yet, and behind a pooler."""
    timeline: int | None
    """The timeline of a primary whose epoch cannot be read, since another session has locked the table."""
    server_started: int
    """When the server was started, in microseconds by its own clock."""
    round_trip_s: float
    """How long the server took to answer a statement that costs it nothing, when it was opened."""
    opened_at: float
    """Monotonic seconds after which the server was asked."""
    idle_since: float
    """Monotonic seconds at which it was given back to its pool."""
    left_clean: bool
    """Whether only statements of ours were sent, which leave nothing in the session: then it needs no reset."""
    read_only: bool
    """Whether its transactions are read-only; on the primary that goes from use to use (see `set_read_only`)."""
    changed: bool
    """Whether a statement was sent that may have left something in the session, or work has failed on it."""
    overdue: asyncio.TimerHandle | None
    """Ends it if it is not given back in time."""
    cut_off: bool
    """Whether a statement was given up before the server had answered it."""
    commits: bool
    """Whether that would be a COMMIT, which is never cancelled: it may wait for a replica's confirmation."""
    prepared: set[str]
    """The names of statements that were prepared since it was lent, and some others."""
    reported: tuple[str, int] | None
    """A read bound that work has reported, and `statements` at that time (see `rocket.routing.bound`)."""
    copies: int
    """How many COPYs were sent, which asyncpg does not count as statements."""
    cancellations: OwnedTasks | None
    """Who cancels a statement that was given up; None on a connection of the observer's."""
    _loop: asyncio.AbstractEventLoop
    _addr: Any  # asyncpg's own, like the following
    _params: Any
    _top_xact: Any
    _listeners: Any
    _log_listeners: Any
    _proxy: Any
    _protocol: Any  # whose count of queries asyncpg's pool relies on as well
    _stmt_cache: Any
    _stmt_cache_enabled: bool

    @property
    def lacks_epoch(self) -> bool:
        """Whether it leads to a primary whose epoch had no name yet: then nothing is done there."""
        return self.direct and not self.to_replica and self.epoch is None and self.timeline is None

    def due_after(self, seconds: float) -> None:
        """End the connection unless it is given back soon after that.

        Nothing that is awaited on it outlasts that: neither a ROLLBACK that work's own `transaction()` sends once
        the time for it is over, nor what work does when it ignores that.
        """
        self.not_due()
        self.overdue = self._loop.call_later(seconds + _GIVING_BACK_S, self._end_overdue)

    def not_due(self) -> None:
        """Do not end it: it is given back."""
        if self.overdue is not None:
            self.overdue.cancel()
            self.overdue = None

    def _end_overdue(self) -> None:
        self.cut_off, self.commits = True, False
        discard(self)

    def _cancel_current_command(self, sent: asyncio.Future[None], *answered: Any) -> None:
        self.cut_off = True
        if self.commits:
            sent.set_result(None)  # nothing is; `answered` tells once the server has answered
        else:
            super()._cancel_current_command(sent, *answered)  # type: ignore[misc]

    def _cleanup(self) -> None:
        super()._cleanup()  # type: ignore[misc]
        if self._proxy is not None:
            self._proxy._detach()  # noqa: SLF001 - as asyncpg's own pool does

    async def end_transaction_left_open(self) -> None:
        """Roll back what work has left open, and forget its listeners."""
        if self._listeners:
            self._listeners.clear()
        if self._log_listeners:
            self._log_listeners.clear()
        if self._top_xact is not None or self._protocol.is_in_transaction():
            self.due_after(0)
            self._top_xact = None
            try:
                await super().execute("ROLLBACK")
            except asyncpg.InterfaceError:
                self._end_busy()
                raise

    async def clear_session(self) -> None:
        """Clear what a piece of work may have left behind.

        A replica's connection holds something only if a statement's text has shown it, and one that only had
        statements of ours holds nothing: that saves a round trip for each read (design fact F9).
        """
        clean = self.left_clean or self.to_replica or not self.direct
        self.left_clean = self.cut_off = self.commits = False
        if self.changed or not clean:
            self.due_after(0)
            await self.reset_session()
            self.changed = False
        if self.prepared:
            self.prepared = set()
        self.not_due()

    async def reset_session(self) -> None:
        """Do that in one round trip; end the connection if that cannot be."""
        query = _LOOK if not self.direct else _RESET_ON_REPLICA if self.to_replica else _RESET
        if self.read_only and not self.to_replica:
            query += _READ_ONLY
        try:
            await super().execute(query)
        except asyncpg.InterfaceError:
            self._end_busy()
            raise

    async def look(self, timeout_s: float) -> None:
        """Find out whether the server still answers; raise what speaks against that."""
        await super().execute(_LOOK, timeout=timeout_s)

    async def set_read_only(self, wanted: bool) -> None:
        """Have its transactions be read-only, or not. It stays so when it is given back, which spares the next."""
        if self.read_only != wanted:
            await super().execute(_READ_ONLY if wanted else _AS_BY_DEFAULT)
            self.read_only = wanted

    def _end_busy(self) -> None:
        """End a connection on which work has left a statement under way, and that statement."""
        self.cut_off = not is_lost(self)
        discard(self)

    def _note(self, query: str) -> None:
        """Note what a statement that is about to be sent may leave in the session."""
        if effect := _effect(query) if len(query) <= _LONGEST_REMEMBERED else _effect.__wrapped__(query):
            self.changed = True
            if effect is _VOIDS:
                cast("Any", self)._drop_local_statement_cache()  # noqa: SLF001

    def keeps(self, query: str | None) -> bool:
        """Return whether a statement (any, for None) has been kept prepared since before it was lent."""
        return any(
            query in {statement.query, None} and statement.name not in self.prepared
            for statement in self._stmt_cache.iter_statements()
        )

    def _get_unique_id(self, prefix: str) -> str:
        name: str = super()._get_unique_id(prefix)  # type: ignore[misc]
        self.prepared.add(name)
        return name

    def execute(self, query: str, *arguments: Any, **options: Any) -> Coroutine[Any, Any, str]:
        """Execute statements, as asyncpg does."""
        self._note(query)
        return super().execute(query, *arguments, **options)

    def _get_statement(self, query: str, *arguments: Any, **options: Any) -> Any:
        self._note(query)
        return super()._get_statement(query, *arguments, **options)  # type: ignore[misc]

    async def _copy_out(self, copy_statement: str, *arguments: Any) -> Any:
        self.copies += 1
        self._note(copy_statement)
        return await super()._copy_out(copy_statement, *arguments)  # type: ignore[misc]

    async def _copy_in(self, *arguments: Any) -> Any:
        self.copies += 1
        return await super()._copy_in(*arguments)  # type: ignore[misc]

    async def end_transaction(self, statements: str) -> str:
        """Send statements that end asyncpg's transaction; return the tag of the last one."""
        self._top_xact = None
        return await self.execute(statements)

    @property
    def statements(self) -> int:
        """How many statements were sent; an `AttributeError`, as from asyncpg, once the connection has ended."""
        return self._protocol.queries_count + self.copies  # type: ignore[no-any-return]


_CHANGES, _VOIDS = "changes the session", "voids prepared statements"
_LONGEST_REMEMBERED = 4096
_MAY_CHANGE = re.compile(
    r"""(?: \A | ; | \*/ | --[^\n\r]*[\n\r] ) \s*  # where a statement can begin
        (?: set \b (?! \s+ (?: local | transaction | constraints) \b )
          | (?: reset | load | do | call | prepare | declare | listen | unlisten | (deallocate | discard) ) \b )
      | \b set_config \b (?! \s* \( [^()]*, \s* true \s* \) )
      | \b pg_ (?: try_ )? advisory_lock""",
    re.IGNORECASE | re.VERBOSE,
)
"""Rather too much than too little: where a text in quotes looks like that, a round trip is lost."""


@functools.lru_cache(maxsize=512)
def _effect(query: str) -> str | None:
    """Return what the text of a statement may leave in the session."""
    effect = None
    for word in _MAY_CHANGE.finditer(query):
        if word[1]:
            return _VOIDS
        effect = _CHANGES
    return effect


@contextlib.asynccontextmanager
async def in_one_piece(connection: Connection, *, read_only: bool = True) -> AsyncIterator[None]:
    """Run all statements of the body on one backend, and so in one incarnation of one server.

    Each sees what is visible when it begins. An error of the body rolls back and is raised as it is; a connection
    that is lost, or whose time is over, is left as it is, to be discarded.
    """
    transaction = connection.transaction(isolation="read_committed", readonly=read_only)
    await transaction.start()
    try:
        yield
    except (NodeChanged, *UNREACHABLE):
        raise
    except Exception:
        with contextlib.suppress(AttributeError, *REFUSED):  # the first from one that was ended meanwhile
            await transaction.rollback()
        raise
    await transaction.commit()


def unwrap(connection: Connection) -> NodeConnection:
    """Return the connection itself, without a pool's proxy; raise `ConnectionError` if the pool has ended it."""
    # What is no proxy is the connection; a proxy has none once the pool has it back.
    inner = cast("NodeConnection | None", getattr(connection, "_con", connection))
    if inner is None:
        raise ConnectionResetError("the connection was ended, since its node is not what it was")
    return inner


def is_lost(connection: Connection) -> bool:
    """Return whether a connection has ended, on either side."""
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # it has left the pool already
        return True


def answers(connection: NodeConnection) -> bool:
    """Return whether a connection was neither lost nor left without an answer: the error is then work's own."""
    return not (connection.cut_off or is_lost(connection))


def runs_on(connection: NodeConnection) -> bool:
    """Return whether a COMMIT that was given up may still run on the server, which no cancel request ends."""
    return connection.cut_off and connection.commits and not connection.is_closed()


def discard(connection: Connection) -> None:
    """Terminate a pooled connection without a Terminate message; the pool replaces it on demand.

    A statement that was given up is cancelled on the server, which would otherwise finish it and hold its locks
    meanwhile. asyncpg's own attempt at that ends with the connection. A COMMIT is left to the pool.
    """
    inner = cast("NodeConnection | None", getattr(connection, "_con", connection))
    if inner is not None:
        if runs_on(inner):
            return
        inner.not_due()
        if inner.cut_off and not inner.is_closed():
            assert inner.cancellations is not None  # noqa: S101 - it is pooled
            protocol = inner._protocol  # noqa: SLF001 - whose key for that is gone once the connection is
            inner.cancellations.start(
                _cancel_statement(inner, protocol.backend_pid, protocol.backend_secret), "cancel a statement"
            )
    with contextlib.suppress(asyncpg.InterfaceError):  # it has ended by itself, and left the pool
        connection.terminate()


def speaks_of_connection(error: Exception, connection: Connection) -> Exception | None:
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


async def answered(connection: NodeConnection) -> None:
    """Wait until the server has answered a statement that was given up, or has ended the connection."""
    await cast("Any", connection)._protocol._wait_for_cancellation()  # noqa: SLF001


async def answered_or_lost(connection: NodeConnection) -> None:
    """Wait for that, and raise nothing."""
    with contextlib.suppress(*REFUSED):
        await answered(connection)


class OwnedTasks:
    """Tasks that outlast the call that started them; a pool owns them, and ends them when it is closed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, ResultT], what: str) -> asyncio.Task[ResultT]:
        """Run `work` in a task of its own; return that."""
        task = asyncio.create_task(work, name=f"{what} on {self._name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self, timeout_s: float) -> None:
        """Wait until they are done; cancel those that are not in time."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


async def _cancel_statement(connection: NodeConnection, backend_pid: int, backend_secret: int) -> None:
    """Send a cancel request for one backend; a server that does not take it is left alone."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_CANCEL_TIMEOUT_S):
            await cast("Any", connect_utils)._cancel(  # noqa: SLF001
                loop=asyncio.get_running_loop(),
                addr=connection._addr,  # noqa: SLF001
                params=connection._params,  # noqa: SLF001
                backend_pid=backend_pid,
                backend_secret=backend_secret,
            )
