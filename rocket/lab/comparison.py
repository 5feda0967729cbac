"""Routings to compare with: as published, on any replica, on the primary alone. They guarantee nothing."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from rocket.consistency import Lsn, Reason, SessionToken, merged
from rocket.errors import OutcomeUnknown, Unavailable, describe
from rocket.routing.answer import Answer, Role, Route
from rocket.routing.commits import Commits
from rocket.routing.failures import NotAsObserved, speaks_against_node
from rocket.routing.limits import TooManyWaiting
from rocket.routing.pool import NodePool
from rocket.routing.router import Router
from rocket.routing.session import Session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from rocket.consistency import PrimaryStatus, Tokens
    from rocket.routing.answer import OnError, ReadOptions, WriteOptions
    from rocket.routing.connection import Connection, NodeConnection, Work
    from rocket.routing.nodes import Nodes

    Lease = Callable[[str], AbstractAsyncContextManager[Connection]]
    """Lends a connection to the node of a name."""

ResultT = TypeVar("ResultT")

_RECORD_FLOOR_AS_PUBLISHED = "UPDATE users SET min_lsn = pg_current_wal_lsn() WHERE email = $1"
"""Lies before the commit record (design fact F1)."""
_LOOK_UP_FLOOR = "SELECT min_lsn FROM users WHERE email = $1"
_CAUGHT_UP = "SELECT name FROM replica_statuses WHERE last_lsn >= $1"
_WRITE_SOMETHING = "SELECT pg_logical_emit_message(true, 'rocket', '')"

_log = logging.getLogger("rocket.router")


class Routing(enum.StrEnum):
    """How reads are routed. Only the first keeps the guarantee; the others are there to compare it with.

    Nor does the guarantee cover what was written under another one, which records no floor that holds; but see
    `ComparisonRouter.switch`.
    """

    NEVER_STALE = "never-stale"
    ARTICLE = "article"
    """As published: floor taken inside the transaction, replicas looked up in `replica_statuses`.

    Each connection is reset when it is given back, as asyncpg's pool does unless it is told otherwise.
    """
    RANDOM = "random"
    """Any replica."""
    PRIMARY = "primary"
    """No replica."""


class ComparedCommits(Commits):
    """Leaves the writes of wrong routings as they would be without rocket."""

    def statements(self, subject: str | None) -> str:
        """Return what to commit by; whether that is flushed is up to the session's settings."""
        return "COMMIT" if _WRONG.get() else super().statements(subject)

    async def floor(self, primary: Connection) -> Lsn:
        """Return what covers a write, which nothing asks for under a wrong routing."""
        return Lsn.PENDING if _WRONG.get() else await super().floor(primary)


_WRONG: ContextVar[bool] = ContextVar("whether the write under way is of a wrong routing", default=False)


@contextlib.contextmanager
def _right(*, right: bool) -> Iterator[None]:
    before = _WRONG.set(not right)
    try:
        yield
    finally:
        _WRONG.reset(before)


def _recording(work: Work[ResultT], subject: str | None) -> Work[ResultT]:
    """Return work that records a floor as published: from inside the transaction, and so too low."""

    async def recording(primary: Connection) -> ResultT:
        value = await work(primary)
        await primary.execute(_RECORD_FLOOR_AS_PUBLISHED, subject)
        return value

    return recording


class ComparisonRouter(Router):
    """A router whose routing can be switched to one that is wrong, and back to never-stale.

    Open it like a `Router`: it begins as never-stale.
    """

    _commits_type = ComparedCommits

    def __init__(self, nodes: Nodes, **parts: Any) -> None:
        super().__init__(nodes, **parts)
        self._wrongly_written: SessionToken | None = None
        """Covers what was written under wrong routings; None if there was none."""
        self._routing = self._routing_of_writes = Routing.NEVER_STALE
        self._wrong_writes = _InFlight()
        self._switching = asyncio.Lock()
        self._resetting_pools: dict[str, _ResettingPool] = {}

    @property
    def routing(self) -> Routing:
        """The routing of reads."""
        return self._routing

    @property
    def _session_type(self) -> type[Session]:
        return Session if self._routing is Routing.NEVER_STALE else _WrongSession

    async def switch(self, routing: Routing) -> Routing:
        """Route in another way from now on; return the routing until now.

        Once this has returned with never-stale, the guarantee holds for all that was acknowledged, also for what
        was written under another routing. Raise `Unavailable`, with the routing of reads left as it was, if the
        primary cannot be asked what that is.
        """
        async with self._switching:
            before, self._routing_of_writes = self._routing, routing
            if routing is Routing.NEVER_STALE is not before:
                try:
                    self._wrongly_written = await self._token_for_wrong_writes()
                except BaseException:
                    self._routing_of_writes = before
                    raise
            self._routing = routing
            return before

    async def _token_for_wrong_writes(self) -> SessionToken:
        """Return a token that covers all writes under wrong routings, those under way included."""
        try:
            async with asyncio.timeout(self.limits.write_s):
                await self._wrong_writes.wait_until_none()
        except TimeoutError:
            raise Unavailable("writes under way did not end in time") from None
        # What was committed without being flushed (`synchronous_commit = off`) is flushed with a later commit.
        with _right(right=True):
            try:
                answer = await super().write(lambda primary: primary.execute(_WRITE_SOMETHING), subject=None)
            except OutcomeUnknown as error:
                raise Unavailable(describe(error)) from error
        if answer.token is None or answer.token.write_floor == Lsn.PENDING:
            raise Unavailable("what was written until now has no known position")
        return answer.token

    async def aclose(self) -> None:
        """Close every connection."""
        pools, self._resetting_pools = self._resetting_pools, {}
        await asyncio.gather(super().aclose(), *(pool.close(self.limits.close_s) for pool in pools.values()))

    async def write(
        self,
        work: Work[ResultT],
        *,
        subject: str | None,
        token: Tokens = None,
        on_error: OnError | None = None,
        **options: Unpack[WriteOptions],
    ) -> Answer[ResultT]:
        """Run work in a transaction on the primary; under a wrong routing no token covers it."""
        routing = self._routing_of_writes
        if routing is Routing.NEVER_STALE:
            return await super().write(work, subject=subject, token=token, on_error=on_error, **options)
        if routing is Routing.ARTICLE:
            work = _recording(work, subject)
        with self._wrong_writes, _right(right=False):
            answer = await super().write(work, subject=subject, token=token, **options)
        return answer._replace(token=None)

    async def read(
        self,
        work: Work[ResultT],
        *,
        subject: str | None,
        token: Tokens = None,
        on_error: OnError | None = None,
        **options: Unpack[ReadOptions],
    ) -> Answer[ResultT]:
        """Run work on the node that the routing names."""
        if self._routing is Routing.NEVER_STALE:
            covering = self._covering(token)
            return await super().read(work, subject=subject, token=covering, on_error=on_error, **options)
        self._check_usable()
        return await self._with_hooks(self._read_wrongly(work, subject, token), self.on_read)

    def _covering(self, tokens: Tokens) -> Tokens:
        """Return tokens that cover what was written under wrong routings as well."""
        since = self._wrongly_written
        if since is None or tokens is None:
            return tokens
        return [token.merged_with(since) if token.epoch == since.epoch else token for token in merged(tokens)]

    async def _read_wrongly(self, work: Work[ResultT], subject: str | None, token: Tokens) -> Answer[ResultT]:
        route = Route(time.monotonic() + self.limits.read_s, merged(token), self.policy)
        try:
            match self._routing:
                case Routing.ARTICLE:
                    names = await self._names_as_published(subject, route)
                    return await self._read_on_any(names, work, route, self._lease_resetting)
                case Routing.RANDOM:
                    primary = self.board.primary
                    names = [pool.name for pool in self.pools if primary is None or pool.name != primary.name]
                    return await self._read_on_any(names, work, route, self._lease)
                case _:
                    return await self._read_on_primary(work, Reason.ASKED, route, self._lease)
        except Unavailable as error:
            error.route = route
            raise

    async def _names_as_published(self, subject: str | None, route: Route) -> Sequence[str]:
        """Return the replicas that had replayed the subject's floor when the table was last written."""
        lease = self._lease_resetting
        floor, primary = await self._ask_primary(
            lambda connection: connection.fetchval(_LOOK_UP_FLOOR, subject), route, lease
        )
        if floor is None:
            return ()
        floor = Lsn.from_wire(floor)
        route.tokens = (SessionToken(primary.epoch, floor),)
        rows, _ = await self._ask_primary(lambda primary: primary.fetch(_CAUGHT_UP, floor.wire), route, lease)
        return [row["name"] for row in rows]

    async def _read_on_any(
        self, names: Sequence[str], work: Work[ResultT], route: Route, lease: Lease
    ) -> Answer[ResultT]:
        route.decided_at, route.statuses = time.monotonic(), self.board.replicas
        if not names:
            return await self._read_on_primary(work, Reason.NOT_CAUGHT_UP, route, lease)
        name = random.choice(names)  # noqa: S311
        attempt_s = min(self.limits.attempt_s, (route.deadline - time.monotonic()) / 2)
        try:
            async with asyncio.timeout(attempt_s), lease(name) as connection:
                value = await work(connection)
        except Exception as error:
            if not speaks_against_node(error):
                raise
            _log.info("%s failed a read, trying elsewhere: %s", name, describe(error))
            route.failed = {name: describe(error)}
            return await self._read_on_primary(work, Reason.REPLICAS_FAILED, route, lease)
        return Answer(value, name, Role.REPLICA, Reason.UNCHECKED, route=route)

    async def _read_on_primary(
        self, work: Work[ResultT], reason: Reason, route: Route, lease: Lease
    ) -> Answer[ResultT]:
        value, primary = await self._ask_primary(work, route, lease)
        return Answer(value, primary.name, Role.PRIMARY, reason, route=route)

    async def _ask_primary(
        self, ask: Callable[[Connection], Awaitable[ResultT]], route: Route, lease: Lease
    ) -> tuple[ResultT, PrimaryStatus]:
        """Ask the primary something, twice if it must be: a restart shows on an old connection only in use."""
        for last in (False, True):
            primary = self._nodes.current_primary()
            try:
                async with asyncio.timeout(route.deadline - time.monotonic()), lease(primary.name) as connection:
                    answer = await ask(connection)
                self._nodes.check_still_current(primary.epoch)
            except Exception as error:
                if not speaks_against_node(error):
                    raise
                if last or isinstance(error, TimeoutError | TooManyWaiting):
                    raise Unavailable(f"the primary does not answer: {describe(error)}") from error
            else:
                return answer, primary
        raise AssertionError("unreachable")

    def _lease(self, name: str) -> AbstractAsyncContextManager[Connection]:
        return self._nodes.replica(name, None)

    @contextlib.asynccontextmanager
    async def _lease_resetting(self, name: str) -> Any:
        dsn = next((pool.node.dsn for pool in self.pools if pool.name == name), None)
        if dsn is None:
            raise NotAsObserved(f"{name} is not one of this router's nodes")
        pool = self._resetting_pools.get(dsn)
        if pool is None:
            pool = self._resetting_pools[dsn] = _ResettingPool(name, dsn, self.limits)
        async with pool.lease() as connection:
            yield connection


class _ResettingPool(NodePool):
    """A pool that resets each connection, by the statements that asyncpg's own sends."""

    async def _reset(self, connection: NodeConnection) -> None:
        connection.cut_off = connection.commits = False
        await connection.execute(connection.get_reset_query())
        connection.changed = False
        connection.not_due()


class _WrongSession(Session):
    """Hands out no tokens."""

    def _advance(self, sent: Sequence[SessionToken], answer: Answer[ResultT]) -> ResultT:
        value = super()._advance(sent, answer)
        if answer.token is None:
            self._tokens = ()
        return value


class _InFlight:
    """Counts the bodies that run under it; an instance is a context manager for many at once."""

    def __init__(self) -> None:
        self._inside = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._inside += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._inside -= 1
        if not self._inside:
            self._none.set()

    async def wait_until_none(self) -> None:
        """Wait until none is inside."""
        await self._none.wait()
