"""Reads that are never stale: by the session's floors to a replica, after a wait perhaps, or to the primary."""

from __future__ import annotations

import functools
import logging
import random
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from rocket.consistency import Choice, Lsn, Reason, SessionToken, choose, worth_waiting_for
from rocket.errors import InvalidToken, Unavailable
from rocket.routing import bound as bounds
from rocket.routing import checks
from rocket.routing.answer import Answer, Role
from rocket.routing.attempts import NodeFailed
from rocket.routing.connection import unwrap
from rocket.routing.epochs import resolve_tokens

if TYPE_CHECKING:
    from rocket.consistency import Board, Epoch, Policy, PrimaryStatus, ReplicaStatus
    from rocket.routing.answer import Route
    from rocket.routing.attempts import Attempts
    from rocket.routing.catchup import Waiting
    from rocket.routing.connection import Connection, Work
    from rocket.routing.floors import FloorStore
    from rocket.routing.limits import Limits
    from rocket.routing.nodes import Nodes

ResultT = TypeVar("ResultT")
SubjectT = TypeVar("SubjectT")

_log = logging.getLogger("rocket.router")


class Reads(Generic[SubjectT]):
    """The routing `never-stale`."""

    def __init__(  # noqa: PLR0917 - a router's parts
        self,
        nodes: Nodes,
        attempts: Attempts,
        board: Board,
        floors: FloorStore[SubjectT],
        policy: Policy,
        waiting: Waiting | None,
        limits: Limits,
    ) -> None:
        self.since: SessionToken | None = None
        """Covers whatever was written while the routing did not guarantee anything; None if it always did."""
        self._nodes = nodes
        self._attempts = attempts
        self._board = board
        self._floors = floors
        self.policy = policy
        self._waiting = waiting
        self._limits = limits

    async def read(self, work: Work[ResultT], subject: SubjectT, route: Route) -> Answer[ResultT]:
        """Read where the session's floors are respected, or those of `subject` where it brings none."""
        if not route.tokens:
            floor, epoch = await self.look_up(subject, route)
            if floor is None or floor == Lsn.PENDING:
                reason = Reason.NO_FLOOR if floor is None else Reason.WRITE_IN_PROGRESS
                return await self._read_on_primary(work, subject, reason, route)
            route.tokens = (SessionToken(epoch, floor),)
            route.floor_looked_up = True
        if (since := self.since) is not None:
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
        route.statuses = self._board.replicas
        return choose(
            route.tokens[0],
            self._board,
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
            route.tokens[0], self._board, self.policy, now=route.decided_at, start=random.getrandbits(16)
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
            checks.read_on_replica, work, name=name, token=token, board=self._board, policy=self.policy
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
            standing = await resolve_tokens(
                route.tokens, primary, epoch, is_last=self._nodes.knows_no_later_epoch()
            )
            if any(token.node is not None for token in route.tokens):
                await self._wait_for_writes(primary, subject)
            value, route.said = await bounds.with_what_was_said(work, primary)
            flush_lsn = bounds.shown_by_primary(route.said, epoch)
            token = standing.token or SessionToken(epoch, Lsn(0))
            if token.is_beyond(flush_lsn):
                if not route.floor_looked_up:
                    raise InvalidToken("the token lies beyond all that the primary has written", token)
                token = SessionToken(epoch, flush_lsn)  # what was recorded came from another cluster, in a dump
            token = token.after_primary_read(flush_lsn)
            return Answer(value, status.name, Role.PRIMARY, reason, token, standing.lost, route)

        return await self._attempts.on_primary(bounded, route)

    async def _wait_for_writes(self, primary: Connection, subject: SubjectT) -> None:
        """Wait for writes that a replica may have shown, and hold none up: no lock outlives the wait."""
        if not primary.is_in_transaction():
            await self._floors.wait_for_writes(primary, subject)
            return
        savepoint = primary.transaction()  # behind a pooler the lock would last as long as the read
        await savepoint.start()
        await self._floors.wait_for_writes(primary, subject)
        await savepoint.rollback()

    async def look_up(self, subject: SubjectT, route: Route) -> tuple[Lsn | None, Epoch]:
        """Ask the primary for the floor of a subject, None where none is recorded, and for its epoch."""

        async def look_up(primary: Connection, status: PrimaryStatus) -> tuple[Lsn | None, Epoch]:
            floor = await self._floors.look_up(primary, subject)
            unwrap(primary).left_clean = True
            return floor, status.epoch

        return await self._attempts.on_primary(look_up, route)
