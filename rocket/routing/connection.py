"""Connections that know which life of a server they belong to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import asyncpg
from asyncpg import connect_utils

from rocket.consistency import Epoch, Incarnation
from rocket.routing.epochs import CURRENT_EPOCH
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

On a replica the session is not reset after it (design fact F9), so that whoever comes next finds what it has set
there. Let it be for one transaction, by `SET LOCAL` or `set_config(..., true)`.
"""

CONNECT_TIMEOUT_S = 2.0
"""A server that takes longer to let one in is not one to read from."""

_CACHED_STATEMENTS = 100

_WHERE = f"""
    SELECT direct, in_recovery,
           CASE WHEN direct AND in_recovery THEN
               (SELECT pid || '@' || (extract(epoch FROM backend_start) * 1000000)::bigint
                  FROM pg_stat_activity
                 WHERE backend_type = 'startup')
           END AS incarnation,
           CASE WHEN direct AND NOT in_recovery THEN {CURRENT_EPOCH} END AS epoch,
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
"""Behind a pooler the session is everybody's, and nothing is set in it."""

_log = logging.getLogger("rocket.router")


class NodeConnection(_PlainConnection):
    """A connection that knows what its server was when it was opened.

    It is good for one incarnation of a replica, whose crash would have ended it, or for one reign of a primary,
    which is restarted before it becomes a replica. Only a promotion it outlives (design fact F14). Behind a
    transaction pooler it is good for nothing but the transaction under way.
    """

    __slots__ = (
        "_note", "commits", "cut_off", "direct", "epoch", "incarnation", "left_clean", "opened_at", "to_replica",
    )  # fmt: skip

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
    cut_off: bool
    """Whether a statement was given up before the server had answered it."""
    commits: bool
    """Whether that would be a COMMIT: a server that waits for a replica's confirmation is not to be hurried."""
    _note: tuple[str, int] | None
    _addr: Any  # asyncpg's own, as is what follows
    _params: Any
    _protocol: Any  # whose count of queries asyncpg's pool relies on as well
    _stmt_cache: Any
    _stmt_cache_enabled: bool

    def _cancel_current_command(self, *waiters: Any) -> None:
        self.cut_off = True
        super()._cancel_current_command(*waiters)  # type: ignore[misc]

    async def _copy_out(self, *arguments: Any) -> Any:
        self._note = None  # COPY is no query to asyncpg, which does not count it
        return await super()._copy_out(*arguments)  # type: ignore[misc]

    async def _copy_in(self, *arguments: Any) -> Any:
        self._note = None
        return await super()._copy_in(*arguments)  # type: ignore[misc]

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
    connection.left_clean = connection.cut_off = connection.commits = False
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
    """Return the connection itself, behind a pool's proxy; raise `ConnectionError` if the pool has ended it."""
    # What is no proxy is the connection; a proxy has none once the pool has it back.
    inner = cast("NodeConnection | None", getattr(connection, "_con", connection))
    if inner is None:
        raise ConnectionResetError("the connection was ended, since its node is not what it was")
    return inner


def is_lost(connection: Connection) -> bool:
    """Tell whether a connection has ended, by whomever."""
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # it has left the pool already
        return True


MAYBE_OWN = (OSError, TimeoutError)
"""What work may raise by itself, and asyncpg as well where a node fails."""


def answers(connection: NodeConnection) -> bool:
    """Tell whether a connection was neither lost nor left without an answer: such an error is then work's own."""
    return not (connection.cut_off or is_lost(connection))


def discard(connection: Connection) -> None:
    """End a pooled connection without a word; the pool opens another one when it needs it.

    The server is told to end the statement that was given up, if there is one: it would go on with it otherwise,
    and hold its locks. asyncpg's own attempt at that ends with the connection.
    """
    inner = cast("NodeConnection | None", getattr(connection, "_con", connection))
    if inner is not None and inner.cut_off and not inner.commits and not inner.is_closed():
        protocol = inner._protocol  # noqa: SLF001
        ending = asyncio.ensure_future(_end_statement(inner, protocol.backend_pid, protocol.backend_secret))
        _ENDING.add(ending)
        ending.add_done_callback(_ENDING.discard)
    with contextlib.suppress(asyncpg.InterfaceError):  # it has ended by itself, and left the pool
        connection.terminate()


_ENDING: set[asyncio.Future[None]] = set()


async def _end_statement(connection: NodeConnection, backend_pid: int, backend_secret: int) -> None:
    """Ask a server to end what one of its backends is doing, as far as it listens."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await cast("Any", connect_utils)._cancel(  # noqa: SLF001
                loop=asyncio.get_running_loop(),
                addr=connection._addr,  # noqa: SLF001
                params=connection._params,  # noqa: SLF001
                backend_pid=backend_pid,
                backend_secret=backend_secret,
            )
