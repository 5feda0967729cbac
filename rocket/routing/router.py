"""The router: each write to the primary, each read to a replica that has replayed what it must see."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from typing import TYPE_CHECKING, Generic, Self, TypeAlias, TypeVar

from rocket.consistency import (
    Board,
    Choice,
    Lsn,
    Policy,
    Reason,
    SessionToken,
    choose,
    merged,
    worth_waiting_for,
)
from rocket.errors import InvalidToken, Unavailable
from rocket.routing import bounds, checks
from rocket.routing.answer import Answer, Role, Route
from rocket.routing.attempts import Attempts, NodeFailed
from rocket.routing.connections import behind
from rocket.routing.crowd import Crowd
from rocket.routing.epochs import standing_of
from rocket.routing.failures import REFUSED, NotAsObserved
from rocket.routing.limits import Limits
from rocket.routing.nodes import Nodes
from rocket.routing.rules import Routing
from rocket.routing.unguarded import UnguardedReads
from rocket.routing.writer import HAVE_IT_FLUSHED, FloorTaken, Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rocket.consistency import Epoch, PrimaryStatus, ReplicaStatus
    from rocket.routing.connections import Connection, NodePool, Work
    from rocket.routing.floors import FloorStore
    from rocket.routing.observer import Observer
    from rocket.routing.waiting import Waiting

ResultT = TypeVar("ResultT")
SubjectT = TypeVar("SubjectT")

_IS_PRIMARY = "SELECT pg_current_wal_flush_lsn()"
"""Fails on a server that is not the primary."""
_WRITE_SOMETHING = "SELECT pg_logical_emit_message(true, 'rocket', '')"

Tokens: TypeAlias = "SessionToken | Iterable[SessionToken] | None"
"""What a session brings: its token, or several where it has concurrent requests."""

_log = logging.getLogger("rocket.router")


class Router(Generic[SubjectT]):
    """Sends work to the primary or to a replica, so that no read is stale.

    Work is a coroutine function that is given an asyncpg connection. It may be run more than once, so it must
    keep its effects inside the database. Reads run on connections in which every transaction is read-only.

    Statuses come from `board`, which an `Observer` keeps. It says which node is the primary; without statuses of
    replicas every read goes there.
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
        observer: Observer | None = None,
    ) -> None:
        self.board = board
        self._observer = observer
        self.policy = policy
        self._routing = routing
        self._nodes = nodes
        self._floors = floors
        self._waiting = waiting
        self._limits = limits
        self._attempts = Attempts(nodes, limits)
        self._unguarded = UnguardedReads(nodes, self._attempts, board, self._look_up)
        self._writer = Writer(nodes, floors, limits)
        self._floor_taken = routing.floor_taken
        self._without_floor = Crowd()
        """Writes under way whose floor, if any, does not hold."""
        self._since: SessionToken | None = None
        """Covers whatever was written while the routing did not guarantee anything; None if it always did."""
        self._switching = asyncio.Lock()
        nodes.reset_always(routing.as_asyncpg_comes)

    @classmethod
    async def open(
        cls,
        nodes: Mapping[str, str],
        floors: FloorStore[SubjectT],
        board: Board,
        *,
        policy: Policy | None = None,
        waiting: Waiting | None = None,
        limits: Limits | None = None,
        routing: Routing = Routing.NEVER_STALE,
        observer: Observer | None = None,
    ) -> Self:
        """Make a router for nodes by name, each given as a DSN, whatever their roles are.

        `waiting` is that of the observer which keeps the board; without it no read waits for a replica. `observer`
        is that one itself: it then gets to know what `add` and `remove` are told.
        Connections are opened when they are needed: nodes may be down. Close it with `aclose`, or use it as
        an asynchronous context manager. Raise `ValueError` for a name that a token cannot hold.
        """
        policy, limits = policy or Policy(), limits or Limits()
        return cls(
            await Nodes.open(nodes, board, policy, limits),
            floors,
            board,
            policy=policy,
            waiting=waiting,
            limits=limits,
            routing=routing,
            observer=observer,
        )

    async def add(self, name: str, dsn: str, *, takes_reads: bool = True) -> None:
        """Have one more node, or another address for one that is there; no read fails because of it.

        One that takes no reads is there to become the primary.
        Raise `ValueError` for a name that a token cannot hold, and for an address that cannot be one.
        """
        await self._nodes.add(name, dsn)
        if self._observer is not None:
            self._observer.add(name, dsn, takes_reads=takes_reads)

    async def remove(self, name: str) -> None:
        """Have a node no more; raise `KeyError` if there is none of that name.

        Reads under way there come to their end, later ones go elsewhere. Without the primary nothing is written.
        """
        if self._observer is not None:
            self._observer.remove(name)
        await self._nodes.remove(name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await self._nodes.close()

    @property
    def routing(self) -> Routing:
        """The rule in force for reads."""
        return self._routing

    @property
    def pools(self) -> list[NodePool]:
        """The connections to each node."""
        return self._nodes.pools

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
        floor_taken = self._floor_taken
        if floor_taken is FloorTaken.AFTER_COMMIT:
            return await self._writer.write(work, subject, _in_order(token), floor_taken)
        with self._without_floor:
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
                    self._since = await self._all_written()
                except BaseException:
                    self._floor_taken = taken_before
                    raise
            self._routing = routing
            if before.as_asyncpg_comes and not routing.as_asyncpg_comes:
                await self._nodes.expire()  # a reset takes away what makes them read-only
            self._nodes.reset_always(routing.as_asyncpg_comes)
            return before

    async def _all_written(self) -> SessionToken:
        """Return a token that covers all writes that took no floor which holds, those under way included."""
        route = Route(time.monotonic() + self._limits.write_s, ())
        try:
            async with asyncio.timeout(self._limits.write_s):
                await self._without_floor.gone()
        except TimeoutError:
            raise Unavailable("writes under way did not end in time") from None

        async def flushed(primary: Connection, status: PrimaryStatus) -> SessionToken:
            if not behind(primary).direct:
                raise NotAsObserved("behind a pooler, what was flushed cannot be told")  # it is in a transaction
            # What was committed without being flushed (`synchronous_commit = off`) is so with a later commit.
            async with primary.transaction():
                await primary.execute(HAVE_IT_FLUSHED)
                await primary.execute(_WRITE_SOMETHING)
            return SessionToken(status.epoch, Lsn.from_wire(await primary.fetchval(_IS_PRIMARY)))

        return await self._attempts.on_primary(flushed, route)

    async def read(self, work: Work[ResultT], *, subject: SubjectT, token: Tokens = None) -> Answer[ResultT]:
        """Run `work` on a node that shows every acknowledged write, and all that earlier reads have shown.

        With the session's token that is what the session wrote and read; without one it is what `subject` wrote,
        for which the primary has to be asked. Raise `Unavailable` if no such node answers in time, and
        `InvalidToken`; what `work` raises is raised as it is.
        """
        route = Route(time.monotonic() + self._limits.read_s, _in_order(token))
        try:
            match self._routing:
                case Routing.NEVER_STALE:
                    return await self._read_never_stale(work, subject, route)
                case Routing.ARTICLE:
                    return await self._unguarded.as_published(work, subject, route)
                case Routing.RANDOM:
                    return await self._unguarded.on_any_replica(work, route)
                case Routing.PRIMARY:
                    return await self._unguarded.on_primary(work, Reason.ASKED, route)
        except Unavailable as error:
            error.route = route
            raise

    async def _read_never_stale(self, work: Work[ResultT], subject: SubjectT, route: Route) -> Answer[ResultT]:
        if not route.tokens:
            floor, epoch = await self._look_up(subject, route)
            if floor is None or floor == Lsn.UNKNOWN:
                reason = Reason.NO_FLOOR if floor is None else Reason.WRITE_IN_PROGRESS
                return await self._read_on_primary(work, subject, reason, route)
            route.tokens = (SessionToken(epoch, floor),)
        if (since := self._since) is not None:
            route.tokens = tuple(
                token.merged_with(since) if token.epoch == since.epoch else token for token in route.tokens
            )
        if len(route.tokens) > 1:  # only a primary can tell what has become of the earlier ones
            return await self._read_on_primary(work, subject, Reason.OTHER_EPOCH, route)
        while len(route.failed) < self._limits.replicas_tried:
            choice = self._choice(route)
            if choice.reason is Reason.NOT_CAUGHT_UP and not route.failed:
                choice = await self._after_waiting(choice, route)
            status = choice.status
            if status is None:
                return await self._read_on_primary(work, subject, choice.reason, route)
            try:
                value, next_token = await self._read_on_replica(status, work, route)
            except NodeFailed as failure:
                _log.info("%s failed a read, trying elsewhere: %s", status.name, failure)
                route.failed = {**route.failed, status.name: str(failure)}
            else:
                return Answer(value, status.name, Role.REPLICA, choice.reason, next_token, None, route)
        return await self._read_on_primary(work, subject, Reason.REPLICAS_FAILED, route)

    def _choice(self, route: Route) -> Choice:
        route.decided_at = now = time.monotonic()
        route.statuses = self.board.replicas
        return choose(
            route.tokens[0],
            self.board,
            self.policy,
            now=now,
            start=random.getrandbits(16),
            load=self._nodes.in_use,
            without=route.failed,
        )

    async def _after_waiting(self, choice: Choice, route: Route) -> Choice:
        """Wait a little where none is caught up, but some may be in no time; choose again."""
        if self._waiting is None or not self.policy.max_wait_s:
            return choice
        names = worth_waiting_for(
            route.tokens[0], self.board, self.policy, now=route.decided_at, start=random.getrandbits(16)
        )
        if not names:
            return choice

        def caught_up() -> ReplicaStatus | None:
            return self._choice(route).status

        began = route.decided_at
        status = await self._waiting.until(names, caught_up, min(self.policy.max_wait_s, route.deadline - began))
        route.waited_s = time.monotonic() - began
        return choice if status is None else Choice(status, Reason.WAITED)

    async def _read_on_replica(
        self, status: ReplicaStatus, work: Work[ResultT], route: Route
    ) -> tuple[ResultT, SessionToken]:
        """Run work on a connection that `status` vouches for; return the session's next token with the result."""
        token = route.tokens[0]
        if status.incarnation is None:
            return await self._read_on_checked_replica(status.name, work, route)
        bounded = functools.partial(bounds.read_on_replica, work, token.epoch)
        value, route.said, bound = await self._attempts.on_replica(status.name, status, bounded, route)
        return value, token.after_replica_read(status.name, status.incarnation, bound)

    async def _read_on_checked_replica(
        self, name: str, work: Work[ResultT], route: Route
    ) -> tuple[ResultT, SessionToken]:
        """Do the same where no status can vouch for a connection; the token then names no life."""
        token = route.tokens[0]
        checked = functools.partial(
            checks.read_on_replica, work, name=name, token=token, board=self.board, policy=self.policy
        )
        value, route.said, bound = await self._attempts.on_replica(name, None, checked, route)
        if bound is None:
            try:
                bound = await self._attempts.on_primary(functools.partial(checks.shown_at_most, token), route)
            except Unavailable as error:
                raise NodeFailed(f"what it may have shown cannot be told: {error}") from error
        return value, token.after_replica_read(name, None, bound)

    async def _read_on_primary(
        self, work: Work[ResultT], subject: SubjectT, reason: Reason, route: Route
    ) -> Answer[ResultT]:
        async def bounded(primary: Connection, status: PrimaryStatus) -> Answer[ResultT]:
            epoch = status.epoch
            standing = await standing_of(route.tokens, primary, epoch)
            if any(token.node is not None for token in route.tokens):
                await self._floors.wait_for_writes(primary, subject)
            value, route.said = await bounds.with_what_was_said(work, primary)
            flush_lsn = bounds.shown_by_primary(route.said, epoch)
            token = standing.token or SessionToken(epoch, Lsn(0))
            if token.is_beyond(flush_lsn):
                raise InvalidToken("the token lies beyond all that the primary has written")
            token = token.after_primary_read(flush_lsn)
            return Answer(value, status.name, Role.PRIMARY, reason, token, standing.lost, route)

        return await self._attempts.on_primary(bounded, route)

    async def _look_up(self, subject: SubjectT, route: Route) -> tuple[Lsn | None, Epoch]:
        async def look_up(primary: Connection, status: PrimaryStatus) -> tuple[Lsn | None, Epoch]:
            floor = await self._floors.look_up(primary, subject)
            behind(primary).left_clean = True
            return floor, status.epoch

        return await self._attempts.on_primary(look_up, route)


def _in_order(tokens: Tokens) -> Sequence[SessionToken]:
    """Return a session's tokens, those of the latest reign merged to the first one; raise `InvalidToken`."""
    if tokens is None:
        return ()
    given = (tokens,) if isinstance(tokens, SessionToken) else tuple(tokens)
    if len(given) < 2:  # noqa: PLR2004 - nothing to merge
        return given
    try:
        latest, earlier = merged(given)
    except ValueError as error:
        raise InvalidToken(str(error)) from None
    return () if latest is None else (latest, *earlier)
