"""Connections that know which incarnation or epoch of a server they belong to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import asyncpg
from asyncpg import connect_utils

from rocket.consistency import Epoch, Incarnation
from rocket.routing.failures import REFUSED, UNREACHABLE, NodeChanged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    _PlainConnection = asyncpg.Connection[asyncpg.Record]
else:  # asyncpg's classes are generic in its stubs alone
    Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
    """What work is given: a connection of asyncpg's, to the node that was chosen."""
    _PlainConnection = asyncpg.Connection

ResultT = TypeVar("ResultT")
Work: TypeAlias = Callable[[Connection], Awaitable[ResultT]]
"""What the router runs for a caller, perhaps more than once: its effects stay inside the database.

On a replica the session is not reset after it (design fact F9), so a setting made there would reach later work.
Make settings for one transaction only, by `SET LOCAL` or `set_config(..., true)`.
"""

CONNECT_TIMEOUT_S = 2.0
"""A server that takes longer to accept a connection is not one to read from."""

_CACHED_STATEMENTS = 100

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

_WHERE = f"""
    SELECT direct, in_recovery,
           CASE WHEN direct AND in_recovery THEN
               (SELECT pid || '@' || (extract(epoch FROM backend_start) * 1000000)::bigint
                  FROM pg_stat_activity
                 WHERE backend_type = 'startup')
           END AS incarnation,
           CASE WHEN direct AND NOT in_recovery THEN {CURRENT_EPOCH} END AS epoch,
           {SERVER_STARTED} AS server_started,
           -- A replica that gets promoted does not take a write through here.
           CASE WHEN direct AND in_recovery
                THEN set_config('default_transaction_read_only', 'on', false)
           END,
           -- The snapshot of a read must be younger than its check.
           CASE WHEN direct AND in_recovery
                THEN set_config('default_transaction_isolation', 'read committed', false)
           END
      FROM (SELECT pg_backend_pid() = $1 AS direct, pg_is_in_recovery() AS in_recovery OFFSET 0) AS here
"""  # noqa: S608 - our own text
"""Behind a pooler clients share the session, and nothing is set in it."""


class NodeConnection(_PlainConnection):
    """A connection that knows what its server was when it was opened.

    It is good for one incarnation of a replica, whose crash would have ended it, or for one epoch of a primary,
    which is restarted before it becomes a replica. Only a promotion does not end it (design fact F14). Behind a
    transaction pooler it is good for nothing but the transaction under way.
    """

    __slots__ = (
        "cancellations", "commits", "copies", "cut_off", "direct", "epoch", "incarnation", "left_clean",
        "opened_at", "reported", "server_started", "to_replica",
    )  # fmt: skip

    direct: bool
    """Whether it leads to the server itself, and not to a pooler."""
    to_replica: bool
    """Whether the server was in recovery when it was opened."""
    incarnation: Incarnation | None
    """The incarnation of the startup process; None on a primary, and where it is unknown."""
    epoch: Epoch | None
    """The primary's epoch; None on a replica, on a primary whose epoch has no name yet, and behind a pooler."""
    server_started: int
    """When the server was started, in microseconds by its own clock."""
    opened_at: float
    """Monotonic seconds after which the server was asked."""
    left_clean: bool
    """Whether nothing was left in its session: then it needs no reset."""
    cut_off: bool
    """Whether a statement was given up before the server had answered it."""
    commits: bool
    """Whether that would be a COMMIT, which is never cancelled: it may wait for a replica's confirmation."""
    reported: tuple[str, int] | None
    """A read bound that work has reported, and `statements` at that time (see `rocket.routing.bound`)."""
    copies: int
    """How many COPYs were sent, which asyncpg does not count as statements."""
    cancellations: Cancellations | None
    """Who cancels a statement that was given up; None on a connection of the observer's."""
    _addr: Any  # asyncpg's own, like the following
    _params: Any
    _top_xact: Any
    _protocol: Any  # whose count of queries asyncpg's pool relies on as well
    _stmt_cache: Any
    _stmt_cache_enabled: bool

    def _cancel_current_command(self, *waiters: Any) -> None:
        self.cut_off = True
        super()._cancel_current_command(*waiters)  # type: ignore[misc]

    async def _copy_out(self, *arguments: Any) -> Any:
        self.copies += 1
        return await super()._copy_out(*arguments)  # type: ignore[misc]

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


async def learn_where(connection: NodeConnection, cancellations: Cancellations | None = None) -> None:
    """Ask a new connection what its server is, and make it read-only on a replica.

    Behind a transaction pooler a connection outlives its server: there the backend is not the one that the
    protocol announced, and neither incarnation nor epoch is known.
    """
    # asyncpg makes it; it has no __init__ of its own.
    connection.cancellations = cancellations
    connection.reported = None
    connection.copies = 0
    connection.left_clean = connection.cut_off = connection.commits = False
    connection.opened_at = time.monotonic()
    row = await connection.fetchrow(_WHERE, connection.get_server_pid(), timeout=CONNECT_TIMEOUT_S)
    assert row is not None  # noqa: S101 - it has one row
    connection.direct = row["direct"]
    connection.to_replica = row["in_recovery"]
    connection.incarnation = Incarnation(row["incarnation"]) if row["incarnation"] else None
    connection.epoch = Epoch(row["epoch"]) if row["epoch"] else None
    connection.server_started = row["server_started"]
    if connection.direct:
        _cache_statements(connection)


def _cache_statements(connection: NodeConnection) -> None:
    """Keep statements prepared on the server; asyncpg takes that setting only before it connects.

    At that time it is unknown whether there is a pooler, which would mix up the statements of its clients.
    """
    connection._stmt_cache_enabled = True  # noqa: SLF001
    connection._stmt_cache.set_max_size(_CACHED_STATEMENTS)  # noqa: SLF001


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


MAYBE_OWN = (OSError, TimeoutError)
"""What work may raise by itself, and asyncpg as well where a node fails."""


def answers(connection: NodeConnection) -> bool:
    """Return whether a connection was neither lost nor left without an answer: the error is then work's own."""
    return not (connection.cut_off or is_lost(connection))


def discard(connection: Connection) -> None:
    """Terminate a pooled connection without a Terminate message; the pool replaces it on demand.

    A statement that was given up is cancelled on the server, which would otherwise finish it and hold its locks
    meanwhile. asyncpg's own attempt at that ends with the connection.
    """
    inner = cast("NodeConnection | None", getattr(connection, "_con", connection))
    if inner is not None and inner.cut_off and not inner.commits and not inner.is_closed():
        assert inner.cancellations is not None  # noqa: S101 - it is pooled
        inner.cancellations.begin(inner)
    with contextlib.suppress(asyncpg.InterfaceError):  # it has ended by itself, and left the pool
        connection.terminate()


class Cancellations:
    """Cancels statements of connections that are being discarded; a pool owns the tasks, and awaits them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, connection: NodeConnection) -> None:
        """Ask the server to cancel what the connection's backend is doing, in a task of its own."""
        protocol = connection._protocol  # noqa: SLF001 - whose key for that is gone once the connection is
        task = asyncio.create_task(
            _cancel_statement(connection, protocol.backend_pid, protocol.backend_secret),
            name=f"cancel a statement on {self._name}",
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self, timeout_s: float) -> None:
        """Wait until all servers were asked; give up those that do not listen in time."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


async def _cancel_statement(connection: NodeConnection, backend_pid: int, backend_secret: int) -> None:
    """Send a cancel request for one backend; a server that does not take it is left alone."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await cast("Any", connect_utils)._cancel(  # noqa: SLF001
                loop=asyncio.get_running_loop(),
                addr=connection._addr,  # noqa: SLF001
                params=connection._params,  # noqa: SLF001
                backend_pid=backend_pid,
                backend_secret=backend_secret,
            )
