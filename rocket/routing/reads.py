"""Reads: to a replica that has what the session must see, after a wait perhaps, or to the primary."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import asyncpg

from rocket.consistency import (
    Choice,
    Freshness,
    Lsn,
    Policy,
    PrimaryStatus,
    Reason,
    SessionToken,
    choose,
    merged,
    obstacle,
    worth_waiting_for,
)
from rocket.errors import Unavailable, WriteInRead, describe
from rocket.routing.answer import Answer, ReadOptions, RecentReads, Role, Route, check_options
from rocket.routing.bound import NoLongerReplica, ReadBound, in_transaction, run_bounded, run_unbounded
from rocket.routing.catchup import FlushQuestion
from rocket.routing.connection import in_one_piece
from rocket.routing.failures import (
    NotAsObserved,
    OwnError,
    asks_primary,
    may_pass,
    speaks_against_node,
)
from rocket.routing.limits import HELD, Timeout, TooManyWaiting
from rocket.routing.primary_reads import PrimaryReads
from rocket.routing.watch import STATUS_QUERY, replica_status_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket.consistency import Epoch, ReplicaStatus, Tokens
    from rocket.routing.answer import OnError
    from rocket.routing.catchup import CatchUp
    from rocket.routing.commits import Commits
    from rocket.routing.connection import Connection, Work
    from rocket.routing.limits import Limits
    from rocket.routing.nodes import Nodes
    from rocket.routing.pool import Lease

ResultT = TypeVar("ResultT")

_log = logging.getLogger("rocket.router")


class NodeFailed(Exception):
    """A replica could not serve a read that another node may."""

    def __init__(self, why: str, *, counts: bool = True) -> None:
        super().__init__(why)
        self.counts = counts
        """Whether that has cost the read some time."""


def _tell(error: BaseException, route: Route, reason: Reason, on_error: OnError | None) -> None:
    """Tell a read's caller what work has left by, if that is how it ends; raise an error of work as it is."""
    if isinstance(error, OwnError):
        if on_error is not None:
            on_error(_left(route, error.error, error.shown, reason))
        if isinstance(error.error, asyncpg.ReadOnlySQLTransactionError):
            raise WriteInRead(
                f"this work writes, so it has to go through the session's write: {error.error}"
            ) from error.error
        raise error.error from error.error.__cause__
    if isinstance(error, Unavailable):
        error.route = route
    elif on_error is not None and route.on is not None and not isinstance(error, Exception):
        on_error(_left(route, error, None, reason))  # it is cancelled, and must not wait for an answer


def _left(route: Route, error: BaseException, shown: Lsn | None, reason: Reason) -> Answer[BaseException]:
    """Return what work has left by in place of a value, with a token for what that may tell."""
    on = route.on
    assert on is not None  # noqa: S101 - work has run there
    promises = route.freshness is not Freshness.ANY
    if isinstance(on, PrimaryStatus):
        token = SessionToken(on.epoch, Lsn(0), shown) if promises else None
        reason = Reason.REPLICAS_FAILED if route.failed else reason
        return Answer(error, on.name, Role.PRIMARY, reason, token, route.lost, route)
    if not promises:
        return Answer(error, on.name, Role.REPLICA, reason, None, None, route)
    # A read that is cancelled may have failed elsewhere before, and have shown something there.
    incarnation = None if shown is None and route.failed else on.incarnation
    token = route.tokens[0].after_replica_read(on.name, incarnation, shown)
    return Answer(error, on.name, Role.REPLICA, reason, token, None, route)


_AT_ONCE_S = 0.1
"""A replica that has failed a read sooner is none of those that `Limits.replicas_tried` counts."""
_ROUND_TRIPS = 8
"""How many a read may take whose statements are not prepared yet, and which asks for its bound."""


@functools.lru_cache(maxsize=64)
def _policy_for(policy: Policy, freshness: Freshness, max_wait_s: float | None) -> Policy:
    """Return the policy that holds for a read that asks for something by itself."""
    if max_wait_s is None:
        max_wait_s = policy.max_global_wait_s if freshness is Freshness.GLOBAL else policy.max_wait_s
    ages_s = (policy.max_age_s, freshness.max_age_s)
    max_age_s = min((age_s for age_s in ages_s if age_s is not None), default=None)
    return replace(policy, max_wait_s=max_wait_s, max_age_s=max_age_s)


class Reads:
    """Reads that are never stale."""

    def __init__(self, nodes: Nodes, commits: Commits, limits: Limits, catch_up: CatchUp | None = None) -> None:
        self._nodes = nodes
        self._board = nodes.board
        self._limits = limits
        self._catch_up = catch_up
        self._primary = PrimaryReads(nodes, commits, limits)
        self._flush_lsn = FlushQuestion(self._primary.all_committed)
        self.recent = RecentReads()
        """Who answered lately."""

    async def close(self) -> None:
        """End what is under way for several reads."""
        await self._flush_lsn.close()

    @property
    def flush_questions(self) -> int:
        """How often the primary was asked for what is committed, on behalf of all reads that waited for that."""
        return self._flush_lsn.asked

    @property
    def waiting_for_primary(self) -> int:
        """How many reads wait until the primary may take them."""
        return self._primary.waiting

    async def read(  # noqa: C901 - the way of every read, in one piece
        self,
        work: Work[ResultT],
        subject: str | None,
        tokens: Tokens,
        on_error: OnError | None = None,
        options: ReadOptions | None = None,
    ) -> Answer[ResultT]:
        """Read where the session's floors are respected, or everybody's where it brings none.

        An error of work is an outcome like a value: it counts only where a value would.
        """
        route = self._route(merged(tokens), options)
        if options:
            work = in_transaction(work, options.get("isolation"), options.get("settings"))
        reason = Reason.OTHER_EPOCH  # where there are several tokens, only a primary knows what they mean
        try:
            if options or not route.tokens:
                primary_only = await self._require(route, options)
                if primary_only is not None:
                    return await self._read_on_primary(work, subject, primary_only, route)
            else:
                route.required = route.tokens[0]
            while len(route.tokens) < 2 and route.attempts < self._limits.replicas_tried:  # noqa: PLR2004
                choice = self._choice(route)
                if choice.reason in {Reason.NOT_CAUGHT_UP, Reason.REPLICAS_FAILED}:
                    choice = await self._after_waiting(choice, route)
                status, reason = choice.status, choice.reason
                if status is None:
                    break
                lease = self._lease(status, route)
                if lease.has_to_queue and not await self._has_queued(lease, status, route):
                    continue
                try:
                    value, next_token = await self._read_on_replica(status, lease, work, route)
                except NodeFailed as failure:
                    _log.info("%s failed a read, trying elsewhere: %s", status.name, failure)
                    route.failed = {**route.failed, status.name: str(failure)}
                    route.attempts += failure.counts
                    reason = Reason.REPLICAS_FAILED
                except OwnError as own:
                    return await self._second_opinion(own, status, work, subject, route)
                else:
                    self.recent.by_replicas += 1
                    return Answer(value, status.name, Role.REPLICA, reason, next_token, None, route)
            return await self._read_on_primary(work, subject, reason, route)
        except BaseException as error:
            _tell(error, route, reason, on_error)
            raise

    def _route(self, tokens: Sequence[SessionToken], options: ReadOptions | None) -> Route:
        """Return the beginning of a read's way; raise `TypeError` or `ValueError` for options that are none."""
        now, policy = time.monotonic(), self._nodes.policy
        if tokens and not options:
            return Route(now + self._limits.read_s, tokens, policy)
        options = options or {}
        check_options(options, ReadOptions)
        freshness, within_s = options.get("freshness", Freshness.SESSION), options.get("timeout")
        if freshness is Freshness.SESSION and not tokens:
            freshness = Freshness.GLOBAL
        policy = _policy_for(policy, freshness, options.get("max_wait"))
        route = Route(now + (within_s or self._limits.read_s), tokens, policy, freshness)
        if within_s is not None:
            route.attempt_s = max(within_s / 2, within_s - self._limits.attempt_s)
        return route

    async def _require(self, route: Route, options: ReadOptions | None) -> Reason | None:
        """Note what a replica must show; return why only the primary will do, if that is so."""
        freshness = route.freshness
        if options and ("on" in options or self._needs_primary(options)):
            return Reason.ASKED
        if freshness is Freshness.ANY:
            route.tokens = ()
            return None
        if freshness is Freshness.GLOBAL:
            route.tokens = merged((*route.tokens, await self._all_committed(route)))
        elif not route.tokens:
            if self._board.epoch is None:
                return Reason.OTHER_EPOCH
            route.tokens = (SessionToken(self._board.epoch, Lsn(0)),)
        route.required = route.tokens[0]
        if freshness.max_age_s is not None:
            route.required = replace(route.required, write_floor=Lsn(0))
        return None

    def _needs_primary(self, options: ReadOptions) -> bool:
        """Return whether a read asks for one snapshot where each read on a replica has to check by itself.

        It checks in the same transaction, whose snapshot would be older than what is found then.
        """
        isolation = options.get("isolation", "read_committed")
        return isolation != "read_committed" and any(each.incarnation is None for each in self._board.replicas)

    async def _all_committed(self, route: Route) -> SessionToken:
        """Return what covers all that anybody was told is committed; raise `Unavailable` without a primary."""
        # Work that reads by another session must find out if it would wait for its own connection.
        ask = self._primary.all_committed if HELD.get() else self._flush_lsn.answer
        try:
            with Timeout(route.deadline - time.monotonic()):
                return await ask()
        except TimeoutError:
            raise Unavailable("the primary did not say in time what is committed") from None
        except Unavailable as error:
            raise Unavailable(str(error)) from error  # each read one of its own

    # --- the choice ---

    def _choice(self, route: Route) -> Choice:
        route.decided_at = now = time.monotonic()
        route.statuses, route.covered_lsn = self._board.replicas, self._board.covered_lsn
        route.left_alone = self._nodes.left_alone()
        return choose(
            route.required,
            self._board,
            route.policy,
            now=now,
            start=random.getrandbits(30),
            load=self._nodes.load,
            without=route.failed,
            unreachable=route.left_alone,
            leaning=self._nodes.preferences.leaning(route.policy.zone),
        )

    async def _after_waiting(self, choice: Choice, route: Route) -> Choice:
        """Wait a little where no replica has caught up but some may soon; choose again.

        Those that have may all have failed the read.
        """
        policy, required = route.policy, route.required
        if self._catch_up is None or not policy.max_wait_s or required is None:
            return choice
        names = worth_waiting_for(
            required,
            self._board,
            policy,
            now=route.decided_at,
            start=random.getrandbits(16),
            unreachable={*route.left_alone, *route.failed},
        )
        if not names:
            return choice

        def caught_up() -> ReplicaStatus | None:
            return self._choice(route).status

        least = required.write_floor if required.incarnation is not None else required.highest_floor

        def may_be_caught_up() -> bool:
            return any(status.vouched_lsn >= least for status in self._board.replicas)

        began = route.decided_at
        max_wait_s = min(policy.max_wait_s, route.deadline - began)
        status = await self._catch_up.until(names, caught_up, max_wait_s, may_be_caught_up)
        route.waited_s = (route.waited_s or 0.0) + time.monotonic() - began
        return choice if status is None else Choice(status, Reason.RETRIED if route.failed else Reason.WAITED)

    # --- on a replica ---

    def _lease(self, status: ReplicaStatus, route: Route) -> Lease:
        """Return the use of a connection that `status` vouches for.

        It takes no more than half of the time that is left, so that there is some for another node. What the
        network takes by itself does not count.
        """
        attempt_s = route.attempt_s
        if attempt_s is None:
            attempt_s = self._limits.attempt_s + _ROUND_TRIPS * self._nodes.round_trip_s(status.name)
            attempt_s = min(attempt_s, (route.deadline - time.monotonic()) / 2)
        return self._nodes.replica(status.name, None if status.incarnation is None else status, attempt_s)

    async def _has_queued(self, lease: Lease, status: ReplicaStatus, route: Route) -> bool:
        """Wait for a connection to a replica that is busy, which is no failure, and no reason to ask the primary.

        Return whether it is still fit then. Raise `Unavailable` where too many wait, or for too long.
        """
        try:
            with Timeout(route.deadline - time.monotonic()):
                await lease.queue()
        except TimeoutError:
            busy = TooManyWaiting(f"no connection to {status.name} was free within {self._limits.read_s:g} s")
            raise Unavailable(f"too many reads: {busy}") from busy
        except TooManyWaiting as busy:
            raise Unavailable(f"too many reads: {busy}") from busy
        newest = self._board.replica(status.name)
        is_fit = (
            newest is not None
            and newest.incarnation == status.incarnation
            and obstacle(newest, route.required, self._board, route.policy, time.monotonic()) is None
        )
        if not is_fit:
            lease.leave()
        return is_fit

    async def _read_on_replica(
        self, status: ReplicaStatus, lease: Lease, work: Work[ResultT], route: Route
    ) -> tuple[ResultT, SessionToken | None]:
        """Run work on a connection that `status` vouches for; return the result and the session's next token.

        Raise `NodeFailed` if what happens speaks against the replica.
        """
        required = route.required
        name, incarnation = status.name, status.incarnation
        began = time.monotonic()
        try:
            with Timeout(lease.patience_s) as timer:
                async with lease as connection:
                    if not lease.was_idle:
                        timer.restart(lease.within_s)
                    route.on = status
                    if required is None:
                        return await run_unbounded(work, connection), None
                    if incarnation is None:
                        value, route.bound, shown = await self._read_checked(name, work, route, connection)
                    else:
                        value, route.bound, shown = await run_bounded(
                            work, connection, ReadBound.on_replica, required.epoch
                        )
        except OwnError as own:
            if may_pass(own.error):
                raise NodeFailed(describe(own.error)) from own.error
            raise
        except Exception as error:
            if speaks_against_node(error):
                # One that is gone is found out at once, and the next may be well.
                is_slow = time.monotonic() - began > _AT_ONCE_S
                raise NodeFailed(describe(error), counts=lease.is_lent and is_slow) from error
            raise
        if incarnation is None and shown is None:
            shown = await self._shown_by_any_replica(required.epoch, route)
        return value, route.tokens[0].after_replica_read(name, incarnation, shown)

    async def _read_checked(
        self, name: str, work: Work[ResultT], route: Route, replica: Connection
    ) -> tuple[ResultT, ReadBound, Lsn | None]:
        """Run work where no status can vouch for the connection: once the server itself has shown that it is fit.

        So it is for a role that may not see the startup process, behind a connection pooler, and behind an address
        that several servers share. The read runs in a transaction, and so on one backend, which a crash of its
        server would have ended: what its first statement finds holds for all later ones (design facts F3, F5).
        """
        async with in_one_piece(replica):
            asked_at = time.monotonic()
            row = await replica.fetchrow(STATUS_QUERY)
            assert row is not None  # noqa: S101 - it has no WHERE
            if not row["in_recovery"]:
                raise NoLongerReplica("the server is no replica")
            status = self._board.as_it_counts(replica_status_from(name, row, None, asked_at))
            found = obstacle(status, route.required, self._board, route.policy, time.monotonic())
            if found is not None:
                raise NotAsObserved(f"where it was asked, it was not fit: {found}")
            return await run_bounded(work, replica, ReadBound.on_replica, route.tokens[0].epoch)

    async def _second_opinion(
        self, own: OwnError, status: ReplicaStatus, work: Work[ResultT], subject: str | None, route: Route
    ) -> Answer[ResultT]:
        """Ask the primary where an error may come from the server being a replica, and a late one; else raise it.

        Then what the primary says is what counts: so what reads may do does not depend on where they go.
        """
        if asks_primary(own.error):
            route.failed = {**route.failed, status.name: describe(own.error)}
            try:
                return await self._read_on_primary(work, subject, Reason.REPLICAS_FAILED, route)
            except Unavailable:
                if not isinstance(own.error, asyncpg.ReadOnlySQLTransactionError):
                    raise  # it may be a late replica's
                route.on = status
        if status.incarnation is None and own.shown is None and route.tokens:
            with contextlib.suppress(NodeFailed):
                own.shown = await self._shown_by_any_replica(route.tokens[0].epoch, route)
        raise own

    async def _shown_by_any_replica(self, epoch: Epoch, route: Route) -> Lsn:
        """Return an LSN that covers all that a replica of an epoch can have shown until now."""
        try:
            return await self._primary.flushed(epoch, route)
        except Unavailable as error:
            raise NodeFailed(f"what it may have shown is unknown: {error}") from error

    async def _read_on_primary(
        self, work: Work[ResultT], subject: str | None, reason: Reason, route: Route
    ) -> Answer[ResultT]:
        if reason is not Reason.ASKED:
            self.recent.note_fallback(reason, time.monotonic())
        return await self._primary.read(work, subject, reason, route)
