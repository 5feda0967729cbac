"""How a connection is opened: what is asked of its server first, and what is set in its session."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar, cast

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from rocket.consistency import Epoch, Incarnation
from rocket.dsn import Node, read_dsn
from rocket.routing.connection import (
    CURRENT_EPOCH,
    SERVER_STARTED,
    TIMELINE,
    NodeConnection,
    answered_or_lost,
    discard,
)
from rocket.routing.failures import REFUSED, UnfitPooler

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from rocket.routing.connection import OwnedTasks

ConnectionT = TypeVar("ConnectionT", bound="asyncpg.Connection[Any]")

CONNECT_TIMEOUT_S = 10.0
"""How long opening a connection may take, with what is asked first, where a DSN has no `connect_timeout`.

No request waits for that: who needs a connection sooner goes elsewhere, and it is kept for the next.
"""
_OBSERVING_S = 2.0
"""How long a statement of the observer's may take, where nothing else is said."""

_LOOK_EVERY_S = 5.0
"""How often the server is asked whether a COMMIT that was given up still runs: its answer may never come."""

_CACHED_STATEMENTS = 100
_INCARNATIONS_REMEMBERED = 32
_MIXED_S = 30.0
"""How long a pooler's address is not used after servers of different roles were found there."""

_EPOCH_OR_NULL = f"CASE WHEN direct AND NOT in_recovery THEN {CURRENT_EPOCH} END"

_WHERE = f"""
    SELECT direct, in_recovery,
           CASE WHEN direct AND in_recovery THEN
               (SELECT pid || '@' || (extract(epoch FROM backend_start) * 1000000)::bigint
                  FROM pg_stat_activity
                 WHERE backend_type = 'startup')
           END AS incarnation,
           {_EPOCH_OR_NULL} AS epoch,
           {SERVER_STARTED} AS server_started,
           ARRAY[host(inet_client_addr()), inet_client_port()::text,
                 host(inet_server_addr()), inet_server_port()::text] AS tcp_ends,
           CASE WHEN inet_client_addr() IS NULL AND pg_has_role('pg_read_all_settings', 'usage')
                THEN current_setting('unix_socket_directories')
           END AS socket_directories,
           current_setting('port') AS port,
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

_WHERE_IF_LOCKED = _WHERE.replace(
    _EPOCH_OR_NULL, f"NULL::text AS epoch, CASE WHEN direct AND NOT in_recovery THEN {TIMELINE} END"
).replace("AS epoch,\n", "AS timeline,\n")
"""The same without the table `epochs`, which another session has locked: a statement that names it would wait."""

_UNLOCKED_WITHIN_MS = 500
"""How long a lock on `epochs` is waited for when a connection is opened."""
_BEGIN = f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {_UNLOCKED_WITHIN_MS}"


async def connect(node: str | Node) -> NodeConnection:
    """Open a connection outside of any pool, to observe with."""
    name = f"rocket observer, process {os.getpid()}"
    return await open_connection(Node.of(node), name, learn_where, command_timeout_s=_OBSERVING_S)


async def open_connection(
    node: Node,
    application_name: str,
    learn: Callable[[NodeConnection], Awaitable[None]],
    *,
    command_timeout_s: float | None = None,
) -> NodeConnection:
    """Open a connection, and have `learn` ask its server something, within the time that the DSN gives for both.

    Raise `TimeoutError`, what asyncpg raises, and `ConnectionError` if the node's own functions fail.
    """
    timeout_s = read_dsn(node.dsn).numbers["connect_timeout"] or CONNECT_TIMEOUT_S
    async with asyncio.timeout(timeout_s):
        connection = await connect_to(node, application_name, NodeConnection, command_timeout_s)
        try:
            with untraced():
                await learn(connection)
        except BaseException:
            connection.terminate()  # closing it would wait for a server that may have fallen silent
            raise
    return connection


def untraced() -> contextlib.AbstractContextManager[None]:
    """Have the body's statements make no spans, if the process has OpenTelemetry's instrumentation."""
    instrumentation = sys.modules.get("opentelemetry.instrumentation.utils")
    suppressed: Callable[[], contextlib.AbstractContextManager[None]]
    suppressed = getattr(instrumentation, "suppress_instrumentation", contextlib.nullcontext)
    return suppressed()


async def connect_to(
    node: Node, application_name: str, kind: type[ConnectionT], command_timeout_s: float | None = None
) -> ConnectionT:
    """Connect to a node; the application's own name in its DSN is kept. The caller sets the deadline.

    What PGTARGETSESSIONATTRS holds is meant for others: a node may have any role.
    """
    address = read_dsn(node.dsn)
    options: dict[str, Any] = {
        "connection_class": kind,
        "timeout": address.numbers["connect_timeout"] or CONNECT_TIMEOUT_S,
        "command_timeout": command_timeout_s,
        "statement_cache_size": 0,  # see `_cache_statements`
        "target_session_attrs": None if "target_session_attrs" in address.dsn else SessionAttribute.any,
        "server_settings": {"application_name": address.application_name or application_name, **node.settings},
    }
    if node.ssl is not None:
        options["ssl"] = node.ssl
    if node.password is not None:
        options["password"] = await _password_of(node.password)
    if node.connect is None:
        connection = cast("ConnectionT", await asyncpg.connect(address.dsn, **options))
    else:
        with _without_its_text("connect", but=_OF_ASYNCPG):
            connection = cast("ConnectionT", await node.connect(address.dsn, **options))
    if kind not in type(connection).__mro__:  # for asyncpg's metaclass each connection is an instance of any class
        if isinstance(connection, asyncpg.Connection):
            connection.terminate()
        raise ConnectionError("the node's `connect` returned no connection of the `connection_class` it was given")
    try:
        _keep_alive(connection, address.numbers)
    except OSError:  # a number that the system does not take
        connection.terminate()
        raise
    return connection


_OF_ASYNCPG = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""Errors whose texts are the server's, or asyncpg's own."""


async def _password_of(given: str | Callable[[], str | Awaitable[str]]) -> str:
    with _without_its_text("password"):
        password = given() if callable(given) else given
        if inspect.isawaitable(password):
            password = await password
        if not isinstance(password, str):
            raise TypeError
        return password


@contextlib.contextmanager
def _without_its_text(what: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Make an error of a node's own function the node's failure, without its text, which may hold a secret."""
    try:
        yield
    except but:
        raise
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        raise ConnectionError(f"the node's `{what}` has failed: {type(error).__name__}") from None


def _keep_alive(connection: asyncpg.Connection[Any], numbers: Mapping[str, int]) -> None:
    """Have the system find out by itself that the other end of a connection is gone."""
    there = cast("Any", connection)._transport.get_extra_info("socket")  # noqa: SLF001
    if there is None or there.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    there.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(numbers["keepalives"] > 0))
    for option, name in _OF_TCP:
        if hasattr(socket, option) and numbers[name]:
            there.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), numbers[name])


_OF_TCP = (
    ("TCP_KEEPIDLE", "keepalives_idle"),
    ("TCP_KEEPINTVL", "keepalives_interval"),
    ("TCP_KEEPCNT", "keepalives_count"),
    ("TCP_USER_TIMEOUT", "tcp_user_timeout"),
)
"""Not every system has each of them."""


async def learn_where(connection: NodeConnection, cancellations: OwnedTasks | None = None) -> None:
    """Ask a new connection what its server is, and make it read-only on a replica.

    Behind a transaction pooler a connection outlives its server: there the backend is not the one that the
    protocol announced, and neither incarnation nor epoch is known.
    """
    # asyncpg makes it; it has no __init__ of its own.
    connection.cancellations = cancellations
    connection.reported = None
    connection.copies = 0
    connection.overdue = None
    connection.prepared = set()
    connection.changed = connection.left_clean = connection.cut_off = connection.commits = False
    connection.opened_at = time.monotonic()
    connection.timeline = None
    pid = connection.get_server_pid()
    try:
        row = await _fetch_committed(connection, _WHERE, pid)
    except asyncpg.LockNotAvailableError:
        row = await _fetch_committed(connection, _WHERE_IF_LOCKED, pid)
        connection.timeline = None if row is None else row["timeline"]
    assert row is not None  # noqa: S101 - it has one row
    connection.changed = connection.cut_off = False  # by what is meant to last
    connection.read_only = row["direct"] and row["in_recovery"]
    connection.direct = row["direct"]
    connection.to_replica = row["in_recovery"]
    connection.incarnation = Incarnation(row["incarnation"]) if row["incarnation"] else None
    connection.epoch = Epoch(row["epoch"]) if row["epoch"] else None
    connection.server_started = row["server_started"]
    if not is_end_to_end(connection, row):
        await refuse_pgpool(connection, CONNECT_TIMEOUT_S)
    if connection.direct:
        _cache_statements(connection)


async def _fetch_committed(connection: NodeConnection, query: str, pid: int) -> asyncpg.Record | None:
    """Ask what a replica answers also where serializable is the default, and with no long wait for a lock."""
    asked_at = time.monotonic()
    await connection.execute(_BEGIN)
    connection.round_trip_s = time.monotonic() - asked_at
    try:
        row = await connection.fetchrow(query, pid)
    except asyncpg.PostgresError:
        await connection.execute("ROLLBACK")
        raise
    await connection.execute("COMMIT")
    return row


def _cache_statements(connection: NodeConnection) -> None:
    """Keep statements prepared on the server; asyncpg takes that setting only before it connects.

    At that time it is unknown whether there is a pooler, which would mix up the statements of its clients.
    """
    connection._stmt_cache_enabled = True  # noqa: SLF001
    connection._stmt_cache.set_max_size(_CACHED_STATEMENTS)  # noqa: SLF001


_PGPOOL = "SHOW pool_version"
"""pgpool-II answers this by itself, if it comes as a simple query; for Postgres it is an error."""


def is_end_to_end(connection: asyncpg.Connection[asyncpg.Record], where: asyncpg.Record) -> bool:
    """Return whether the server has the other end of this very socket: then there is nothing in between."""
    inner = cast("Any", connection)
    address = inner._addr  # noqa: SLF001
    if isinstance(address, str):  # the path of a Unix socket
        directories = (where["socket_directories"] or "").split(",")
        return address in {f"{directory.strip()}/.s.PGSQL.{where['port']}" for directory in directories}
    ends = (inner._transport.get_extra_info(end) for end in ("sockname", "peername"))  # noqa: SLF001
    return [str(part) for end in ends for part in end[:2]] == list(where["tcp_ends"])


async def refuse_pgpool(connection: asyncpg.Connection[asyncpg.Record], timeout_s: float) -> None:
    """Raise `UnfitPooler` behind a pgpool-II, which sends the statements of one transaction to several servers.

    That a server says it is the primary then proves nothing for the statement after it. Where the backend is the
    one that the protocol announced, pgpool-II may still be in between.
    """
    try:
        await connection.execute(_PGPOOL, timeout=timeout_s)
    except asyncpg.SyntaxOrAccessError:
        return
    raise UnfitPooler(
        "pgpool-II answers at its address: it may send statements of one transaction to different servers, so "
        "nothing that is read there is proved to be fresh. Give the server's own address, or PgBouncer's"
    )


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


class ServersBehind:
    """Finds out whether servers of different roles answer behind a pooler, as they do if it has a list of hosts.

    If another server answers in another role, and was running already when the first one answered, there are two,
    and not one that was restarted. The next transaction may reach either of them.
    """

    def __init__(self) -> None:
        self._last: asyncpg.Record | None = None
        self._mixed_until = 0.0

    def check(self, row: asyncpg.Record) -> None:
        """Raise `UnfitPooler` if both roles were found lately; `row` is the newest answer to `STATUS_QUERY`."""
        last, self._last = self._last, row
        now = time.monotonic()
        if (
            last is not None
            and row["in_recovery"] != last["in_recovery"]
            and row["started"] != last["started"]
            and row["started"] < last["clock"]
        ):
            self._mixed_until = now + _MIXED_S
        if now < self._mixed_until:
            raise UnfitPooler(
                "a primary and a replica answer at its address in turn (a pooler with a list of hosts): give each "
                "server an address of its own"
            )


async def outlast(node: Node, connection: NodeConnection, tasks: OwnedTasks) -> None:
    """Wait for as long as a COMMIT that was given up runs on the server; then, or when cancelled, discard it.

    It may wait for a synchronous replica. To end the connection would not end it, and one more of them would be on
    the server each time.
    """
    pid = connection.get_server_pid()
    answer = tasks.start(answered_or_lost(connection), "wait for the answer to a COMMIT")
    try:
        while not answer.done():
            await asyncio.wait((answer,), timeout=_LOOK_EVERY_S)
            if not answer.done() and connection.direct and not await still_runs(node, pid):
                break
    finally:  # without an await: a pool that is closed may cancel this at any
        answer.cancel()
        connection.commits = connection.cut_off = False
        discard(connection)


_RUNS = "SELECT true FROM pg_stat_activity WHERE pid = $1 AND state IS DISTINCT FROM 'idle'"


async def still_runs(node: Node, pid: int) -> bool:
    """Ask a server whether one of its backends still runs something; without an answer it may."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            other = await connect_to(node, "rocket", asyncpg.Connection)
            try:
                return await other.fetchval(_RUNS, pid) is True
            finally:
                other.terminate()
    except (ValueError, *REFUSED):
        return True
