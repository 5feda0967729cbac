"""Writes: a transaction on the primary, and after its COMMIT the floor that covers it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import TYPE_CHECKING, TypeVar

import asyncpg

from rocket.consistency import Lsn, Reason, SessionToken, merged
from rocket.errors import OutcomeUnknown, Unavailable, describe
from rocket.routing.answer import Answer, Role
from rocket.routing.connection import MAYBE_OWN, answers, discard, unwrap
from rocket.routing.epochs import check_epoch, resolve_tokens
from rocket.routing.failures import (
    REFUSED,
    UNREACHABLE,
    OwnError,
    StatementsOutdated,
    leaves_commit_in_doubt,
    speaks_against_node,
)
from rocket.routing.floors import FORCE_FLUSH_STATEMENT
from rocket.routing.nodes import in_epoch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncpg.transaction import Transaction

    from rocket.consistency import Epoch, Tokens
    from rocket.routing.connection import Connection, Work
    from rocket.routing.epochs import Resolved
    from rocket.routing.floors import FloorStore
    from rocket.routing.nodes import Nodes
    from rocket.routing.pool import Limits

ResultT = TypeVar("ResultT")

_LONGEST_BACKOFF_S = 0.1
_MOST_OUTDATED = 3
"""How often a write is run again with fresh statements."""

_log = logging.getLogger("rocket.router")


class Writes:
    """Writes on the primary."""

    def __init__(self, nodes: Nodes, floors: FloorStore, limits: Limits) -> None:
        self._nodes = nodes
        self._floors = floors
        self._limits = limits

    async def write(self, work: Work[ResultT], subject: str | None, tokens: Tokens) -> Answer[ResultT]:
        """Run `work` in a transaction on the primary, on behalf of `subject`, whose next reads will see it.

        Serialization failures and deadlocks are tried again. Raise as `Router.write` does.
        """
        given = merged(tokens)
        deadline = time.monotonic() + self._limits.write_s
        attempt = outdated = 0
        while True:
            try:
                return await self._write_once(work, subject, given, deadline)
            except StatementsOutdated as error:
                outdated += 1
                if outdated > _MOST_OUTDATED or time.monotonic() > deadline:
                    raise error.error from error.error.__cause__
            except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError) as error:
                attempt += 1
                backoff_s = random.uniform(0, min(_LONGEST_BACKOFF_S, 0.001 * 2**attempt))  # noqa: S311
                if time.monotonic() + backoff_s > deadline:
                    raise Unavailable(f"the write was refused {attempt} times: {error}") from error
                await asyncio.sleep(backoff_s)

    async def _write_once(
        self, work: Work[ResultT], subject: str | None, tokens: Sequence[SessionToken], deadline: float
    ) -> Answer[ResultT]:
        commit_sent = False
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(deadline - time.monotonic()):
                    connection, primary = await stack.enter_async_context(
                        self._nodes.primary_for_write(deadline - time.monotonic())
                    )
                    epoch = primary.epoch
                    resolved = await self._resolve(connection, epoch, subject, tokens)
                    transaction = connection.transaction()
                    value = await self._up_to_commit(connection, transaction, epoch, work, subject)
                commit_sent = unwrap(connection).commits = True
                unwrap(connection).due_after(2 * self._limits.commit_s)
                async with asyncio.timeout(self._limits.commit_s):
                    await transaction.commit()
                floor = await self._record_floor(connection, epoch, subject)
                self._nodes.check_still_current(epoch)
                token = _next_token(resolved.token, epoch, floor)
                return Answer(value, primary.name, Role.PRIMARY, Reason.WRITE, token, resolved.lost)
        except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError, StatementsOutdated):
            raise  # not committed, and worth another try
        except OwnError as own:
            raise own.error from own.error.__cause__
        except Exception as error:
            if commit_sent and leaves_commit_in_doubt(error):
                raise OutcomeUnknown(f"it is unknown whether it was committed: {describe(error)}") from error
            if speaks_against_node(error):  # a COMMIT that is answered by one of these was rolled back
                raise Unavailable(f"the primary did not take the write: {describe(error)}") from error
            raise

    async def _resolve(
        self, connection: Connection, epoch: Epoch, subject: str | None, tokens: Sequence[SessionToken]
    ) -> Resolved:
        """Resolve the session's tokens; wait for writes that a replica may have shown it (design fact F13)."""
        async with in_epoch(connection, epoch):
            resolved = await resolve_tokens(tokens, connection, epoch, is_last=self._nodes.knows_no_later_epoch())
            if any(token.node is not None for token in tokens):
                await self._floors.wait_for_writes(connection, subject)
            return resolved

    async def _up_to_commit(
        self,
        connection: Connection,
        transaction: Transaction,
        epoch: Epoch,
        work: Work[ResultT],
        subject: str | None,
    ) -> ResultT:
        """Do all of a write but its COMMIT; roll back if that fails."""
        await transaction.start()
        try:
            if not unwrap(connection).direct:
                await check_epoch(connection, epoch)
            value = await _run(work, connection)
            if await self._floors.begin_write(connection, subject, Lsn.PENDING) is None:
                await connection.execute(FORCE_FLUSH_STATEMENT)
        except UNREACHABLE:
            raise  # no server would answer a ROLLBACK; the connection is discarded
        except Exception:
            with contextlib.suppress(*REFUSED):
                await transaction.rollback()
            raise
        return value

    async def _record_floor(self, connection: Connection, epoch: Epoch, subject: str | None) -> Lsn:
        """Record the floor of a write that has been committed; failing to is slow, not wrong."""
        try:
            async with asyncio.timeout(self._limits.commit_s), in_epoch(connection, epoch):
                return await self._floors.record_floor(connection, subject)
        except REFUSED as error:
            _log.warning("a write was committed, but its floor is not recorded: %s", describe(error))
            discard(connection)
            return Lsn.PENDING


async def _run(work: Work[ResultT], connection: Connection) -> ResultT:
    """Run work; raise `OwnError` for an error of its own that would otherwise be taken for the node's."""
    try:
        return await work(connection)
    except MAYBE_OWN as error:
        if answers(unwrap(connection)):
            raise OwnError(error) from error
        raise


def _next_token(token: SessionToken | None, epoch: Epoch, floor: Lsn) -> SessionToken:
    """Return the session's token after a write: of the current epoch, whatever it brought."""
    if token is None or token.is_beyond(floor):
        return SessionToken(epoch, floor)
    return token.after_write(floor)
