"""Writes: a transaction on the primary, and after its COMMIT the floor that covers it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from rocket.consistency import Lsn, Reason, SessionToken, merged
from rocket.errors import OutcomeUnknown, TransactionEnded, Unavailable, describe
from rocket.routing.answer import Answer, Role, WriteOptions, check_options
from rocket.routing.bound import LOOK_S, apply_settings, ask_bound, begun, is_own
from rocket.routing.connection import discard, is_lost, unwrap
from rocket.routing.epochs import TAKES_NO_WRITES, PossibleLoss, check_epoch, resolve_tokens
from rocket.routing.failures import (
    REFUSED,
    UNREACHABLE,
    NotAsObserved,
    OwnError,
    StatementsOutdated,
    Unanswered,
    leaves_commit_in_doubt,
    speaks_against_node,
)
from rocket.routing.limits import commit_waits
from rocket.routing.nodes import in_epoch
from rocket.routing.primary_reads import MOST_OUTDATED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from asyncpg.transaction import Transaction

    from rocket.consistency import Epoch, PrimaryStatus, Tokens
    from rocket.routing.answer import OnError
    from rocket.routing.commits import Commits
    from rocket.routing.connection import Connection, Isolation, NodeConnection, Work
    from rocket.routing.epochs import Resolved
    from rocket.routing.limits import Limits
    from rocket.routing.nodes import Nodes

ResultT = TypeVar("ResultT")

_LONGEST_BACKOFF_S = 0.1
_MOST_UNANSWERED = 2
"""On how many dead connections one may try to begin."""
_OWN_REPEATED = 3
"""How many times work is run again that raises a serialization failure by itself."""
_REPEATED = (StatementsOutdated, Unanswered, asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
"""After these a write may be run again."""
_RAISED_BY_WORK = (None, "exec_stmt_raise")
"""Where a serialization failure of its own comes from: from Python, or from RAISE in PL/pgSQL."""
_READ_ONLY = "the primary takes no writes: default_transaction_read_only is on there"
_ASKS = f"SELECT {TAKES_NO_WRITES}"
_ENDED = "work has ended the transaction of its write by itself"
_WRITE_NOTHING = "SELECT pg_logical_emit_message(true, 'rocket', '')"

_log = logging.getLogger("rocket.router")


class Writes:
    """Writes on the primary."""

    def __init__(self, nodes: Nodes, commits: Commits, limits: Limits) -> None:
        self._nodes = nodes
        self._commits = commits
        self._limits = limits
        self._commit_waits = commit_waits(limits.connections, limits.queue)

    @property
    def waiting_for_primary(self) -> int:
        """How many writes may not wait for commits yet."""
        return self._commit_waits.waiting

    async def write(
        self,
        work: Work[ResultT],
        subject: str | None,
        tokens: Tokens,
        on_error: OnError | None = None,
        options: WriteOptions | None = None,
    ) -> Answer[ResultT]:
        """Run `work` in a transaction on the primary, on behalf of `subject`, whose next reads will see it.

        Serialization failures and deadlocks are tried again. Raise as `Router.write` does.
        """
        given, options = merged(tokens), options or {}
        check_options(options, WriteOptions)
        deadline = time.monotonic() + options.get("timeout", self._limits.write_s)
        attempt = _Attempt(deadline, options.get("isolation"))
        work = _with_settings(work, options.get("settings"))
        in_pieces = not options.get("transaction", True)
        if in_pieces and {"isolation", "settings"} & options.keys():
            raise ValueError("there is neither an isolation level nor a setting without a transaction")
        write = self._write_in_pieces if in_pieces else self._write_in_one
        try:
            return await write(work, subject, given, attempt)
        except OwnError as own:
            if on_error is not None:
                on_error(attempt.left_by(own.error, own.shown))
            raise own.error from own.error.__cause__
        except BaseException as error:
            if on_error is not None and attempt.on is not None and not isinstance(error, Exception):
                on_error(attempt.left_by(error, None))  # it was cancelled, and must not wait for an answer
            raise

    async def _write_in_one(
        self, work: Work[ResultT], subject: str | None, tokens: Sequence[SessionToken], attempt: _Attempt
    ) -> Answer[ResultT]:
        """Run work in a transaction, again where that may help."""
        while True:
            try:
                return await self._write_once(work, subject, tokens, attempt)
            except OwnError as own:
                if not attempt.is_repeated_after(own.error):
                    raise
                error = own.error
            except (StatementsOutdated, Unanswered) as of_connection:
                attempt.count(of_connection)
                continue
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError) as of_router:
                error = of_router
            await attempt.back_off(error)

    async def _write_once(
        self,
        work: Work[ResultT],
        subject: str | None,
        tokens: Sequence[SessionToken],
        attempt: _Attempt,
    ) -> Answer[ResultT]:
        commit_sent = False
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(attempt.left_s):
                        async with self._wait_for_commits(tokens):
                            connection, primary = await stack.enter_async_context(
                                self._nodes.primary_for_write(attempt.left_s)
                            )
                            if primary.read_only:
                                raise Unavailable(_READ_ONLY)
                            epoch = primary.epoch
                            resolved = await self._resolve(connection, epoch, subject, tokens)
                        transaction = connection.transaction(isolation=attempt.isolation)
                        await self._nodes.answered_first(connection, transaction.start())
                        attempt.on, attempt.lost = primary, resolved.lost
                        value = await self._up_to_commit(connection, transaction, epoch, work)
                    commit_sent = unwrap(connection).commits = True
                    unwrap(connection).due_after(2 * self._limits.commit_s)
                    async with asyncio.timeout(self._limits.commit_s):
                        await _commit(unwrap(connection), self._commits.statements(subject))
                except OwnError as own:
                    await self._roll_back(own, connection, transaction, epoch, attempt)
                    raise
                floor = await self._floor(connection, epoch)
                if floor != Lsn.PENDING:
                    self._nodes.board.note_flush(epoch, floor, time.monotonic())
                self._nodes.check_still_current(epoch)
                lost = resolved.lost
                if resolved.token is not None and resolved.token.is_beyond(floor):
                    self._nodes.board.note_claim(resolved.token)
                    lost = PossibleLoss(epoch, None, writes=bool(resolved.token.write_floor))
                token = _next_token(resolved.token, epoch, floor)
                return Answer(value, primary.name, Role.PRIMARY, Reason.WRITE, token, lost)
        except (OwnError, *_REPEATED):
            raise
        except Exception as error:
            if commit_sent and leaves_commit_in_doubt(error):
                raise OutcomeUnknown(f"it is unknown whether it was committed: {describe(error)}") from error
            if speaks_against_node(error):
                raise Unavailable(f"the primary did not take the write: {describe(error)}") from error
            raise

    async def _write_in_pieces(
        self, work: Work[ResultT], subject: str | None, tokens: Sequence[SessionToken], attempt: _Attempt
    ) -> Answer[ResultT]:
        """Run work once, whose statements commit by themselves.

        A commit of our own follows, with which all that was committed before is flushed: its floor covers them.
        """
        try:
            async with asyncio.timeout(attempt.left_s):
                value = await self._run_in_pieces(work, subject, tokens, attempt)
            written = await self._written_so_far(subject, tokens, attempt.epoch)
        except (OwnError, StatementsOutdated) as failed:
            own = OwnError(failed.error)
            with contextlib.suppress(OutcomeUnknown, Unavailable):
                written = await self._written_so_far(subject, tokens, attempt.epoch)
                own.shown = None if written.token is None else written.token.highest_floor
            raise own from failed.error
        except Exception as error:
            if attempt.in_pieces and leaves_commit_in_doubt(error):
                raise OutcomeUnknown(f"it is unknown how much of it was committed: {describe(error)}") from error
            if speaks_against_node(error):
                raise Unavailable(f"the primary did not take the write: {describe(error)}") from error
            raise
        return written._replace(value=value)

    async def _run_in_pieces(
        self, work: Work[ResultT], subject: str | None, tokens: Sequence[SessionToken], attempt: _Attempt
    ) -> ResultT:
        """Run work outside of a transaction; raise `OwnError` for what is not the failure of the server."""
        async with contextlib.AsyncExitStack() as stack:
            async with self._wait_for_commits(tokens):
                lease = self._nodes.primary_for_write(attempt.left_s)
                connection, primary = await stack.enter_async_context(lease)
                if primary.read_only:
                    raise Unavailable(_READ_ONLY)
                if not unwrap(connection).direct:
                    raise ValueError("behind a pooler there is no write without a transaction")
                resolved = await self._resolve(connection, primary.epoch, subject, tokens)
            attempt.on, attempt.lost, attempt.in_pieces = primary, resolved.lost, True
            try:
                return await begun(work, connection)
            except Exception as error:
                if is_own(error, unwrap(connection)):
                    raise OwnError(error) from error
                raise

    async def _written_so_far(
        self, subject: str | None, tokens: Sequence[SessionToken], epoch: Epoch
    ) -> Answer[Any]:
        """Commit nothing, and return an answer that covers what was committed before in an epoch.

        Raise `OutcomeUnknown` if that is over, or if it does not work.
        """
        try:
            answer = await self.write(lambda primary: primary.execute(_WRITE_NOTHING), subject, tokens)
        except Unavailable as error:
            raise OutcomeUnknown(f"what was committed has no known position: {describe(error)}") from error
        if answer.token is None or answer.token.epoch != epoch:
            raise OutcomeUnknown("another primary was promoted meanwhile")
        return answer

    def _wait_for_commits(self, tokens: Sequence[SessionToken]) -> AbstractAsyncContextManager[None]:
        """Limit how many connections are held by what waits for commits, which others could use meanwhile."""
        return self._commit_waits.unless_nested() if _has_seen_replica(tokens) else contextlib.nullcontext()

    async def _resolve(
        self, connection: Connection, epoch: Epoch, subject: str | None, tokens: Sequence[SessionToken]
    ) -> Resolved:
        """Resolve the session's tokens; wait for writes that a replica may have shown it (design fact F13)."""
        async with in_epoch(connection, epoch):
            resolved = await resolve_tokens(tokens, connection, epoch, is_last=self._nodes.knows_no_later_epoch())
            if _has_seen_replica(tokens):
                await self._commits.wait(connection, subject)
            return resolved

    async def _up_to_commit(
        self, connection: Connection, transaction: Transaction, epoch: Epoch, work: Work[ResultT]
    ) -> ResultT:
        """Do all of a write but its COMMIT; return what work does.

        Raise `OwnError`, with the transaction still open, for what is not the failure of the server.
        """
        inner = unwrap(connection)
        try:
            if not inner.direct:
                await check_epoch(connection, epoch)
            value = await begun(work, connection)
            if not inner.is_in_transaction():
                raise TransactionEnded(f"{_ENDED}: what it committed stays")  # noqa: TRY301 - as if by work
        except Exception as error:
            if is_own(error, inner):
                if not (isinstance(error, TransactionEnded) or is_lost(inner) or inner.is_in_transaction()):
                    ended = TransactionEnded(f"{_ENDED}, and raised {error!r}: what it committed stays")
                    ended.__cause__ = error
                    raise OwnError(ended) from error
                raise OwnError(error) from error
            if not isinstance(error, UNREACHABLE):  # else no server would answer, and the connection is discarded
                with contextlib.suppress(*REFUSED):
                    await transaction.rollback()
            raise
        return value

    async def _roll_back(
        self, own: OwnError, connection: Connection, transaction: Transaction, epoch: Epoch, attempt: _Attempt
    ) -> None:
        """Roll back after an error of work; note what the primary had shown by then.

        Raise `NotAsObserved` if another primary may know better: nothing was changed on this one.
        """
        is_certain = not isinstance(own.error, TransactionEnded)
        try:
            async with asyncio.timeout(LOOK_S):
                unwrap(connection).commits = False
                await transaction.rollback()
                if isinstance(own.error, asyncpg.ReadOnlySQLTransactionError) and await connection.fetchval(_ASKS):
                    raise Unavailable(_READ_ONLY) from own.error
                if not attempt.is_repeated_after(own.error):
                    async with in_epoch(connection, epoch):
                        own.shown = (await ask_bound(connection)).on_primary(epoch)
            if is_certain:
                self._nodes.check_still_current(epoch)
        except NotAsObserved:
            if is_certain:
                raise
        except (AttributeError, *REFUSED):  # no bound is known then
            discard(connection)

    async def _floor(self, connection: Connection, epoch: Epoch) -> Lsn:
        """Return the floor of a write that has been committed; not to know it is slow, not wrong."""
        try:
            async with asyncio.timeout(self._limits.commit_s), in_epoch(connection, epoch):
                return await self._commits.floor(connection)
        except REFUSED as error:
            _log.warning("a write was committed, but its floor is not known: %s", describe(error))
            discard(connection)
            return Lsn.PENDING


def _with_settings(work: Work[ResultT], settings: Mapping[str, str] | None) -> Work[ResultT]:
    if not settings:
        return work

    async def inside(primary: Connection) -> ResultT:
        await apply_settings(primary, settings)
        return await begun(work, primary)

    return inside


class _Attempt:
    """What becomes of a write."""

    __slots__ = ("_deadline", "in_pieces", "isolation", "lost", "number", "on", "outdated", "unanswered")

    def __init__(self, deadline: float, isolation: Isolation | None) -> None:
        self._deadline = deadline
        self.isolation = isolation
        """The isolation level that was asked for."""
        self.number = 0
        """How many times it was refused."""
        self.outdated = 0
        """How many times it failed with prepared statements that are outdated."""
        self.unanswered = 0
        """On how many connections it could not begin, since they were dead."""
        self.on: PrimaryStatus | None = None
        """Where work was run last; None if it was not."""
        self.lost: PossibleLoss | None = None
        """What the session's tokens had come to there."""
        self.in_pieces = False
        """Whether work may have committed some of what it did."""

    @property
    def epoch(self) -> Epoch:
        """Of the primary where work was run last."""
        assert self.on is not None  # noqa: S101 - work has run there
        return self.on.epoch

    @property
    def left_s(self) -> float:
        """How much time is left, in seconds."""
        return self._deadline - time.monotonic()

    def is_repeated_after(self, error: Exception) -> bool:
        """Return whether work is run again: as long as there is time after what Postgres itself has raised."""
        if not isinstance(error, asyncpg.SerializationError | asyncpg.DeadlockDetectedError):
            return False
        return error.server_source_function not in _RAISED_BY_WORK or self.number < _OWN_REPEATED

    def count(self, error: StatementsOutdated | Unanswered) -> None:
        """Raise what has ended the write if other connections or fresh statements have not helped in time."""
        is_late = self.left_s < 0
        if isinstance(error, Unanswered):
            self.unanswered += 1
            if is_late or self.unanswered > _MOST_UNANSWERED:
                raise Unavailable(f"the primary did not take the write: {error}") from error
            return
        self.outdated += 1
        if is_late or self.outdated > MOST_OUTDATED:
            raise error.error from error.error.__cause__

    async def back_off(self, error: Exception) -> None:
        """Wait a little before the next time; raise `Unavailable` if that would be too late."""
        self.number += 1
        backoff_s = random.uniform(0, min(_LONGEST_BACKOFF_S, 0.001 * 2**self.number))  # noqa: S311
        if backoff_s > self.left_s:
            raise Unavailable(f"the write was refused {self.number} times: {error}") from error
        await asyncio.sleep(backoff_s)

    def left_by(self, error: BaseException, shown: Lsn | None) -> Answer[BaseException]:
        """Return what work has left by in place of a value, with a token for what that may tell."""
        assert self.on is not None  # noqa: S101 - work has run there
        written = Lsn(0)
        if self.in_pieces or isinstance(error, TransactionEnded):
            written = Lsn.PENDING if shown is None else shown
        token = SessionToken(self.epoch, written, shown)
        return Answer(error, self.on.name, Role.PRIMARY, Reason.WRITE, token, self.lost)


async def _commit(connection: NodeConnection, statements: str) -> None:
    """Commit; raise `OwnError` where it is certain that nothing was, and the server is not to blame."""
    try:
        tag = await connection.end_transaction(statements)
    except asyncpg.PostgresError as error:
        if is_own(error, connection) and (connection.is_in_transaction() or not leaves_commit_in_doubt(error)):
            raise OwnError(error) from error
        raise
    if tag != "COMMIT":
        raise OwnError(asyncpg.InFailedSQLTransactionError("work has swallowed an error: COMMIT rolled back"))


def _has_seen_replica(tokens: Sequence[SessionToken]) -> bool:
    return any(token.node is not None for token in tokens)


def _next_token(token: SessionToken | None, epoch: Epoch, floor: Lsn) -> SessionToken:
    """Return the session's token after a write: of the current epoch, whatever it brought."""
    if token is None or token.is_beyond(floor):
        return SessionToken(epoch, floor)
    return token.after_write(floor)
