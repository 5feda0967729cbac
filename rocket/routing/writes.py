"""Writes: a transaction on the primary, and after its COMMIT the floor that covers it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import time
from typing import TYPE_CHECKING, Generic, TypeVar

import asyncpg

from rocket.consistency import Lsn, Reason, SessionToken
from rocket.errors import OutcomeUnknown, Unavailable, describe
from rocket.routing.answer import Answer, Role
from rocket.routing.connection import MAYBE_OWN, answers, discard, unwrap
from rocket.routing.epochs import check_epoch, resolve_tokens
from rocket.routing.failures import REFUSED, UNREACHABLE, OwnError, leaves_commit_in_doubt, speaks_against_node
from rocket.routing.nodes import in_epoch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncpg.transaction import Transaction

    from rocket.consistency import Epoch
    from rocket.routing.connection import Connection, Work
    from rocket.routing.floors import FloorStore
    from rocket.routing.limits import Limits
    from rocket.routing.nodes import Nodes

ResultT = TypeVar("ResultT")
SubjectT = TypeVar("SubjectT")

_LSN_INSIDE_THE_TRANSACTION = "SELECT pg_current_wal_lsn()"
"""Lies before the commit record (design fact F1)."""

FORCE_FLUSH = """(
    CASE current_setting('synchronous_commit')
         WHEN 'off' THEN set_config('synchronous_commit', 'local', true)
         ELSE current_setting('synchronous_commit')
    END
    || left(set_config('idle_in_transaction_session_timeout', '5s', true), 0)
)"""
"""Has the transaction's COMMIT flushed before it returns: the floor is a flush LSN (design fact F2).

From here to COMMIT the subject's lock is held: should this program be halted in between, the server does not wait.
"""

FORCE_FLUSH_STATEMENT = f"SELECT {FORCE_FLUSH}"

_LONGEST_BACKOFF_S = 0.1


class FloorTaken(enum.Enum):
    """When the floor of a write is taken, which its subject's next reads go by. Only the first way is right."""

    AFTER_COMMIT = enum.auto()
    INSIDE = enum.auto()
    """As published, inside the transaction: there to be shown."""
    NEVER = enum.auto()
    """For reads that go by no floor: a write as it would be without rocket."""


_log = logging.getLogger("rocket.router")


class Writes(Generic[SubjectT]):
    """Writes on the primary."""

    def __init__(self, nodes: Nodes, floors: FloorStore[SubjectT], limits: Limits) -> None:
        self._nodes = nodes
        self._floors = floors
        self._limits = limits

    async def write(
        self,
        work: Work[ResultT],
        subject: SubjectT,
        tokens: Sequence[SessionToken],
        floor_taken: FloorTaken = FloorTaken.AFTER_COMMIT,
    ) -> Answer[ResultT]:
        """Run `work` in a transaction on the primary, on behalf of `subject`, whose next reads will see it.

        Serialization failures and deadlocks are tried again. Raise `Unavailable` when nothing was written and
        `OutcomeUnknown` when that cannot be told, or when another primary may have been promoted meanwhile; what
        `work` raises rolls back and is raised as it is.
        """
        deadline = time.monotonic() + self._limits.write_s
        attempt = 0
        while True:
            try:
                return await self._write_once(work, subject, tokens, deadline, floor_taken)
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError) as error:
                attempt += 1
                backoff_s = random.uniform(0, min(_LONGEST_BACKOFF_S, 0.001 * 2**attempt))  # noqa: S311
                if time.monotonic() + backoff_s > deadline:
                    raise Unavailable(f"the write was refused {attempt} times: {error}") from error
                await asyncio.sleep(backoff_s)

    async def _write_once(
        self,
        work: Work[ResultT],
        subject: SubjectT,
        tokens: Sequence[SessionToken],
        deadline: float,
        floor_taken: FloorTaken,
    ) -> Answer[ResultT]:
        commit_sent = False
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(deadline - time.monotonic()):
                    connection, primary = await stack.enter_async_context(self._nodes.primary_for_write())
                    epoch = primary.epoch
                    async with in_epoch(connection, epoch):
                        standing = await resolve_tokens(
                            tokens, connection, epoch, is_last=self._nodes.knows_no_later_epoch()
                        )
                        if any(token.node is not None for token in tokens):
                            await self._floors.wait_for_writes(connection, subject)
                    transaction = connection.transaction()
                    value = await self._up_to_commit(
                        connection, transaction, epoch, work, subject, floor_taken=floor_taken
                    )
                commit_sent = unwrap(connection).commits = True
                async with asyncio.timeout(self._limits.commit_s):
                    await transaction.commit()
                token = None
                if floor_taken is FloorTaken.AFTER_COMMIT:
                    token = _next_token(standing.token, epoch, await self._settle(connection, epoch, subject))
                self._nodes.check_still_current(epoch)
                return Answer(value, primary.name, Role.PRIMARY, Reason.WRITE, token, standing.lost)
        except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError):
            raise  # not committed, and worth another try
        except OwnError as own:
            raise own.error from own.error.__cause__
        except Exception as error:
            if commit_sent and leaves_commit_in_doubt(error):
                raise OutcomeUnknown(f"nobody knows whether it was committed: {describe(error)}") from error
            if speaks_against_node(error):  # a COMMIT that is answered by such an error was rolled back
                raise Unavailable(f"the primary did not take the write: {describe(error)}") from error
            raise

    async def _up_to_commit(
        self,
        connection: Connection,
        transaction: Transaction,
        epoch: Epoch,
        work: Work[ResultT],
        subject: SubjectT,
        *,
        floor_taken: FloorTaken,
    ) -> ResultT:
        """Do all of a write but its COMMIT; what goes wrong is rolled back."""
        await transaction.start()
        try:
            if not unwrap(connection).direct:
                await check_epoch(connection, epoch)
            return await self._write_inside(connection, work, subject, floor_taken)
        except UNREACHABLE:
            raise  # there is nobody to roll it back with; the connection is thrown away
        except Exception:
            with contextlib.suppress(*REFUSED):
                await transaction.rollback()
            raise

    async def _write_inside(
        self,
        connection: Connection,
        work: Work[ResultT],
        subject: SubjectT,
        floor_taken: FloorTaken,
    ) -> ResultT:
        try:
            value = await work(connection)
        except MAYBE_OWN as error:
            if answers(unwrap(connection)):
                raise OwnError(error) from error
            raise
        if floor_taken is FloorTaken.NEVER:
            return value
        if floor_taken is FloorTaken.INSIDE:
            inside = Lsn.from_wire(await connection.fetchval(_LSN_INSIDE_THE_TRANSACTION))
            await self._floors.begin_write(connection, subject, inside)
            return value
        flushed = await self._floors.begin_write(connection, subject, Lsn.PENDING)
        if flushed is None:
            await connection.execute(FORCE_FLUSH_STATEMENT)
        return value

    async def _settle(self, connection: Connection, epoch: Epoch, subject: SubjectT) -> Lsn:
        """Record the floor of a write that has been committed; failing to is slow, not wrong."""
        try:
            async with asyncio.timeout(self._limits.commit_s), in_epoch(connection, epoch):
                return await self._floors.record_floor(connection, subject)
        except REFUSED as error:
            _log.warning("a write was committed, but its floor is not recorded: %s", describe(error))
            discard(connection)
            return Lsn.PENDING


def _next_token(token: SessionToken | None, epoch: Epoch, floor: Lsn) -> SessionToken:
    """Return the session's token after a write: of the present epoch, whichever it brought."""
    if token is None or token.is_beyond(floor):
        return SessionToken(epoch, floor)
    return token.after_write(floor)
