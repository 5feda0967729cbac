"""Reads on the primary, and what reads on replicas have to ask it."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, TypeVar

from rocket.consistency import Freshness, Lsn, SessionToken
from rocket.errors import InvalidToken, Unavailable, describe
from rocket.routing.answer import Answer, Role, Route
from rocket.routing.bound import ReadBound, ask_bound, run_bounded
from rocket.routing.connection import unwrap
from rocket.routing.epochs import PossibleLoss, resolve_tokens
from rocket.routing.failures import (
    NotAsObserved,
    OwnError,
    StatementsOutdated,
    may_pass,
    speaks_against_node,
)
from rocket.routing.limits import CapacityLimiter, Timeout, TooManyWaiting, commit_waits
from rocket.routing.nodes import in_epoch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rocket.consistency import Epoch, PrimaryStatus, Reason
    from rocket.routing.commits import Commits
    from rocket.routing.connection import Connection, Work
    from rocket.routing.limits import Limits
    from rocket.routing.nodes import Nodes

ResultT = TypeVar("ResultT")

MOST_OUTDATED = 3
"""How often work is run again on the primary with fresh statements."""
_READ_ONLY_NOW = "SET TRANSACTION READ ONLY"
"""Behind a pooler, where each read is in a transaction."""


class PrimaryReads:
    """Reads and questions that only the primary answers, some at a time."""

    def __init__(self, nodes: Nodes, commits: Commits, limits: Limits) -> None:
        self._nodes = nodes
        self._board = nodes.board
        self._commits = commits
        self._limits = limits
        self._places = CapacityLimiter("a read on the primary", width=limits.primary_reads, queue=limits.queue)
        self._commit_waits = commit_waits(limits.primary_reads, limits.queue)

    @property
    def waiting(self) -> int:
        """How many wait until the primary may take them."""
        return self._places.waiting + self._commit_waits.waiting

    async def read(
        self, work: Work[ResultT], subject: str | None, reason: Reason, route: Route
    ) -> Answer[ResultT]:
        """Run work on the primary, after the commits that a replica may have shown the session."""
        first = None
        if any(token.node is not None for token in route.tokens):
            first = functools.partial(self._wait_for_writes, subject=subject)

        async def read(primary: Connection, status: PrimaryStatus) -> Answer[ResultT]:
            epoch = status.epoch
            resolved = await resolve_tokens(
                route.tokens, primary, epoch, is_last=self._nodes.knows_no_later_epoch()
            )
            if unwrap(primary).direct:
                await unwrap(primary).set_read_only(True)
            else:
                await primary.execute(_READ_ONLY_NOW)
            route.on, route.lost = status, resolved.lost
            try:
                value, route.bound, flush_lsn = await run_bounded(work, primary, ReadBound.on_primary, epoch)
            except OwnError:
                self._nodes.check_still_current(epoch)  # another one may know better
                raise
            token, lost = resolved.token or SessionToken(epoch, Lsn(0)), resolved.lost
            if token.is_beyond(flush_lsn):
                if not self._board.note_claim(token):
                    raise InvalidToken("the token lies beyond all that the primary has written", token)
                lost = PossibleLoss(epoch, None, writes=bool(token.write_floor))
                token = SessionToken(epoch, flush_lsn)
            next_token = token.after_primary_read(flush_lsn) if route.freshness is not Freshness.ANY else None
            return Answer(value, status.name, Role.PRIMARY, reason, next_token, lost, route)

        return await self._ask(read, route, read_only=first is None, first=first)

    async def _wait_for_writes(self, primary: Connection, subject: str | None) -> None:
        """Wait for writes that a replica may have shown; no lock outlives the wait, so none is held up."""
        if not primary.is_in_transaction():
            await self._commits.wait(primary, subject)
            return
        savepoint = primary.transaction()  # behind a pooler the lock would last as long as the read
        await savepoint.start()
        await self._commits.wait(primary, subject)
        await savepoint.rollback()

    async def flushed(self, epoch: Epoch, route: Route) -> Lsn:
        """Ask the primary for an LSN that covers all that a replica of its epoch can have shown until now.

        Nothing gets to a replica before its primary has flushed it. And as long as that answers, no other one has
        been promoted: the replica has applied WAL of this epoch, which some roles may not see on the replica.
        """

        async def ask(primary: Connection, status: PrimaryStatus) -> Lsn:
            if status.epoch != epoch:
                raise NotAsObserved(f"epoch {epoch} was over when its primary was asked")
            return (await ask_bound(primary)).on_primary(epoch)

        return await self._ask(ask, route)

    async def all_committed(self) -> SessionToken:
        """Return a token that covers all that anybody was told is committed by now."""

        async def once() -> SessionToken:
            async with (
                self._nodes.primary_for_write(self._limits.read_s, read_only=None) as (primary, status),
                in_epoch(primary, status.epoch),
            ):
                bound = await ask_bound(primary)
                unwrap(primary).left_clean = True
                token = SessionToken(status.epoch, Lsn(0), bound.on_primary(status.epoch))
            self._nodes.check_still_current(status.epoch)
            return token

        return await self._in_time(once, self._limits.read_s)

    async def _ask(
        self,
        ask: Callable[[Connection, PrimaryStatus], Awaitable[ResultT]],
        route: Route,
        *,
        read_only: bool = False,
        first: Callable[[Connection], Awaitable[None]] | None = None,
    ) -> ResultT:
        """Ask the primary something; raise `Unavailable` if it does not answer by the read's deadline.

        `first` waits for commits, on the same connection; not many do that at a time.
        """
        once = functools.partial(self._ask_once, ask, route, read_only, first)
        return await self._in_time(once, route.deadline - time.monotonic())

    async def _in_time(self, once: Callable[[], Awaitable[ResultT]], within_s: float) -> ResultT:
        """Ask the primary something by `once`, and again where that may help; raise `Unavailable`."""
        try:
            with Timeout(within_s):
                return await self._until_answered(once)
        except TimeoutError:
            raise Unavailable(f"no node answered within {self._limits.read_s:g} s") from None

    async def _until_answered(self, once: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Try twice, since a connection that a restart has ended shows that only in use.

        And a few times with fresh statements: while a schema is migrated, they may be outdated again at once.
        """
        failed = outdated = 0
        while True:
            try:
                return await once()
            except OwnError as own:
                if failed or not may_pass(own.error):
                    raise
                failed += 1
            except StatementsOutdated as error:
                outdated += 1
                if outdated > MOST_OUTDATED:
                    raise error.error from error.error.__cause__
            except Exception as error:
                if not speaks_against_node(error):
                    raise
                if failed or isinstance(error, TimeoutError | TooManyWaiting):
                    raise Unavailable(f"the primary does not answer: {describe(error)}") from error
                failed += 1

    async def _ask_once(
        self,
        ask: Callable[[Connection, PrimaryStatus], Awaitable[ResultT]],
        route: Route,
        read_only: bool,
        first: Callable[[Connection], Awaitable[None]] | None,
    ) -> ResultT:
        self._nodes.current_primary()  # before anything is waited for
        lease = self._nodes.primary(route.deadline - time.monotonic(), read_only=read_only)
        wait = contextlib.nullcontext() if first is None else self._commit_waits.unless_nested()
        async with contextlib.AsyncExitStack() as stack:
            async with wait:
                await stack.enter_async_context(self._places)
                connection, status = await stack.enter_async_context(lease)
                if first is not None:
                    await first(connection)
            result = await ask(connection, status)
        self._nodes.check_still_current(status.epoch)
        return result
