"""The router: each write to the primary, each read to a replica that has replayed what it must see."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Generic, Self, TypeAlias, TypeVar, Unpack, cast, overload

from rocket.consistency import (
    Board,
    Policy,
    Reason,
    SessionToken,
    merged,
)
from rocket.errors import Unavailable
from rocket.routing.answer import Answer, Route
from rocket.routing.attempts import Attempts
from rocket.routing.failures import REFUSED, NotAsObserved
from rocket.routing.floors import SubjectLocks
from rocket.routing.limits import Limits
from rocket.routing.nodes import Nodes
from rocket.routing.observation import Observation
from rocket.routing.observer import Observer
from rocket.routing.reads import Reads
from rocket.routing.rules import Routing
from rocket.routing.session import Session
from rocket.routing.tables import check_floor_table
from rocket.routing.unfloored import UnflooredWrites
from rocket.routing.unguarded import UncheckedReads
from rocket.routing.writes import FloorTaken, Writes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rocket.routing.catchup import Waiting
    from rocket.routing.connection import Work
    from rocket.routing.floors import FloorStore
    from rocket.routing.observer import MayBePrimary
    from rocket.routing.options import Options
    from rocket.routing.pool import NodePool

ResultT = TypeVar("ResultT")
SubjectT = TypeVar("SubjectT")

_IS_PRIMARY = "SELECT pg_current_wal_flush_lsn()"
"""Fails on a server that is not the primary."""

Tokens: TypeAlias = "SessionToken | Iterable[SessionToken] | None"
"""What a session brings: its token, or several where it has concurrent requests."""

_log = logging.getLogger("rocket.router")


class Router(Generic[SubjectT]):
    """Sends work to the primary or to a replica, so that no read is stale.

    Work is a coroutine function that is given an asyncpg connection. It may be run more than once, so it must
    keep its effects inside the database. `session` is the way to it; `read` and `write` are the same without
    somebody who keeps the token.

    A router belongs to the event loop on which it was opened. Close it with `aclose`, or use it as an asynchronous
    context manager.
    """

    def __init__(
        self,
        nodes: Nodes,
        floors: FloorStore[SubjectT],
        board: Board,
        *,
        policy: Policy,
        waiting: Waiting | None,
        limits: Limits,
        routing: Routing,
    ) -> None:
        self.board = board
        self._routing = routing
        self._nodes = nodes
        self._observation: Observation | None = None
        self._limits = limits
        self._attempts = Attempts(nodes, limits)
        self._guarded = Reads(nodes, self._attempts, board, floors, policy, waiting, limits)
        self._unguarded = UncheckedReads(nodes, self._attempts, board, self._guarded.look_up)
        self._writer = Writes(nodes, floors, limits)
        self._floor_taken = routing.floor_taken
        self._unfloored = UnflooredWrites(self._attempts, limits)
        self._switching = asyncio.Lock()
        self._closed = False
        nodes.reset_always(routing.as_asyncpg_comes)

    @overload
    @classmethod
    async def open(cls, nodes: Mapping[str, str], **options: Unpack[Options]) -> Router[str | None]: ...

    @overload
    @classmethod
    async def open(
        cls,
        nodes: Mapping[str, str],
        floors: FloorStore[SubjectT],
        board: Board | None = None,
        **options: Unpack[Options],
    ) -> Self: ...

    @classmethod
    async def open(
        cls,
        nodes: Mapping[str, str],
        floors: FloorStore[SubjectT] | None = None,
        board: Board | None = None,
        *,
        policy: Policy | None = None,
        waiting: Waiting | None = None,
        limits: Limits | None = None,
        routing: Routing = Routing.NEVER_STALE,
        observe: bool = True,
        observer_interval_s: float = 0.5,
        may_be_primary: MayBePrimary | None = None,
        init: Work[None] | None = None,
    ) -> Self | Router[str | None]:
        """Make a router for nodes by name, each given as a DSN, whatever their roles are.

        It observes them, every `observer_interval_s` seconds and once before this returns; with `observe` false it
        only finds out which one is the primary, where then every read goes. Nodes may be down, all of them even.
        `may_be_primary` may veto that a node becomes the primary; with it, `nodes` may be empty. `floors` is what
        reads without a token go by: `SubjectLocks` unless another store is given. `init` is called with each
        new connection that work is given, for what asyncpg keeps with it: type codecs, say.

        With a `board`, which an `Observer` of somebody else's keeps, it does not observe. `waiting` is that
        observer's, without which no read waits for a replica.

        Raise `ValueError` for a name that a token cannot hold, for an address that cannot be one (it is never
        repeated) and where there is no node to observe, `TablesUnusable`, and `NodesUnusable` if no primary is
        found and what each node failed of will last: a wrong password or database, say.
        """
        if not nodes and board is None and may_be_primary is None:
            raise ValueError("there must be a node, at the least")
        policy, limits = policy or Policy(), limits or Limits()
        observation = None
        if board is None:
            observer = Observer(nodes, board := Board(), interval_s=observer_interval_s, roles_only=not observe)
            observer.may_be_primary = may_be_primary
            observation, waiting = Observation(observer), observer.waiting
        router = cls(
            await Nodes.open(nodes, board, policy, limits, init),
            cast("FloorStore[SubjectT]", SubjectLocks()) if floors is None else floors,
            board,
            policy=policy,
            waiting=waiting,
            limits=limits,
            routing=routing,
        )
        router._observation = observation
        try:
            if observation is not None:
                router._nodes.failures = lambda: observation.observer.failures
                await observation.begin()
                await check_floor_table(floors, router._nodes, limits.attempt_s)
        except BaseException:
            await router.aclose()
            raise
        return router

    async def add(self, name: str, dsn: str, *, takes_reads: bool = True) -> None:
        """Have one more node, or another address for one that is there; no read fails because of it.

        One that takes no reads is there to become the primary. Raise `ValueError` as `open` does. An address that
        leads nowhere is logged, as a node is that is down.
        """
        await self._nodes.add(name, dsn)
        if self._observation is not None:
            self._observation.observer.add(name, dsn, takes_reads=takes_reads)

    async def remove(self, name: str) -> None:
        """Have a node no more; raise `KeyError` if there is none of that name.

        Reads under way there come to their end, later ones go elsewhere. Without the primary nothing is written.
        """
        if self._observation is not None:
            self._observation.observer.remove(name)
        await self._nodes.remove(name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the observer, and close every connection; what is asked for later is a `RuntimeError`.

        More than once is harmless.
        """
        if not self._closed:
            self._closed = True
            if self._observation is not None:
                await self._observation.end()
            await self._nodes.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the router is closed")

    async def observing(self) -> None:
        """Wait until the router is closed; raise what its observer died of, if it does so before.

        Without an observer nothing is read or written any more, once `Policy`'s leases are over. It does not die
        of nodes, whatever they do. That it died is logged, too.
        """
        if self._observation is not None:
            await self._observation.lasts()

    def session(
        self,
        subject: SubjectT | None = None,
        token: str | SessionToken | Iterable[str | SessionToken] | None = None,
        *,
        lenient: bool = False,
    ) -> Session[SubjectT]:
        """Go on with the session of whoever brings `token`, as `Session.token` gave it out, or begin one.

        It may bring several, also in one text with commas between them: they are merged. `subject` names whom the
        writes belong to; see the `FloorStore` in use for what that does, and for what its absence does. Raise
        `InvalidToken` for what no router gave out. `lenient` has it dropped instead, now or once the primary tells
        that it is none of its own: for cookies, of which a browser cannot rid itself.
        """
        return Session(self, subject, token, lenient=lenient)

    @property
    def policy(self) -> Policy:
        """How old and how far behind a replica may be and still serve."""
        return self._guarded.policy

    @property
    def routing(self) -> Routing:
        """The rule in force for reads."""
        return self._routing

    @property
    def pools(self) -> list[NodePool]:
        """The connections to each node."""
        return self._nodes.pools

    @property
    def primary_reads_waiting(self) -> int:
        """How many reads wait until the primary may take them (see `Limits.primary_reads`)."""
        return self._attempts.waiting_for_primary

    async def primary_answers(self) -> bool:
        """Tell whether the primary takes statements now."""
        try:
            async with asyncio.timeout(self._limits.attempt_s), self._nodes.primary() as (connection, _):
                await connection.execute(_IS_PRIMARY)
        except (Unavailable, NotAsObserved, *REFUSED):
            return False
        return True

    async def write(self, work: Work[ResultT], *, subject: SubjectT, token: Tokens = None) -> Answer[ResultT]:
        """Run `work` in a transaction on the primary, on behalf of `subject`, whose next reads will see it.

        Serialization failures and deadlocks are tried again. Raise `Unavailable` when nothing was written,
        `OutcomeUnknown` when that cannot be told, or when another primary may have been promoted meanwhile, and
        `InvalidToken`; what `work` raises rolls back and is raised
        as it is.
        """
        self._check_open()
        floor_taken = self._floor_taken
        if floor_taken is FloorTaken.AFTER_COMMIT:
            return await self._writer.write(work, subject, _in_order(token), floor_taken)
        with self._unfloored.under_way:
            return await self._writer.write(work, subject, _in_order(token), floor_taken)

    async def switch(self, routing: Routing) -> Routing:
        """Route by another rule from now on; return the one that was in force until then.

        Once this has returned with never-stale, the guarantee holds for all that was acknowledged, also for what
        was written under another rule. Raise `Unavailable`, with the reads' rule left as it was, if the primary
        cannot be asked what that is.
        """
        async with self._switching:
            before, taken_before = self._routing, self._floor_taken
            self._floor_taken = routing.floor_taken
            if routing is Routing.NEVER_STALE is not before:
                try:
                    self._guarded.since = await self._unfloored.all_covered()
                except BaseException:
                    self._floor_taken = taken_before
                    raise
            self._routing = routing
            if before.as_asyncpg_comes and not routing.as_asyncpg_comes:
                await self._nodes.expire()  # a reset takes away what makes them read-only
            self._nodes.reset_always(routing.as_asyncpg_comes)
            return before

    async def read(self, work: Work[ResultT], *, subject: SubjectT, token: Tokens = None) -> Answer[ResultT]:
        """Run `work` on a node that shows every acknowledged write, and all that earlier reads have shown.

        With the session's token that is what the session wrote and read; without one it is what `subject` wrote,
        for which the primary has to be asked. `work` must not write: on a replica it cannot, and on the primary
        nothing would cover it (a session's `read` refuses it in both places).

        Raise `Unavailable` if no such node answers in time, and `InvalidToken`; what `work` raises is raised as it
        is.
        """
        self._check_open()
        route = Route(time.monotonic() + self._limits.read_s, _in_order(token))
        try:
            match self._routing:
                case Routing.NEVER_STALE:
                    return await self._guarded.read(work, subject, route)
                case Routing.ARTICLE:
                    return await self._unguarded.as_published(work, subject, route)
                case Routing.RANDOM:
                    return await self._unguarded.on_any_replica(work, route)
                case Routing.PRIMARY:
                    return await self._unguarded.on_primary(work, Reason.ASKED, route)
        except Unavailable as error:
            error.route = route
            raise


def _in_order(tokens: Tokens) -> Sequence[SessionToken]:
    """Return a session's tokens, those of the latest reign merged to the first one."""
    if tokens is None:
        return ()
    if isinstance(tokens, SessionToken):
        return (tokens,)
    given = tuple(tokens)
    return given if len(given) < 2 else merged(given)  # noqa: PLR2004 - nothing to merge
