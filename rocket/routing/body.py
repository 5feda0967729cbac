"""The body of an `async with` as the work of one read or write."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Protocol

from rocket.errors import RocketError, Unavailable, describe
from rocket.routing.connection import is_lost
from rocket.routing.failures import speaks_against_node
from rocket.routing.limits import HELD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from rocket.routing.connection import Connection, Work
    from rocket.routing.limits import Place

_LATER_S = 1.0
"""How much longer than its body a read or write may take: the body is what is ended in time."""


class Run(Protocol):
    """Runs work: a session's `read` or `write`, with its options."""

    def __call__(self, work: Work[None], *, timeout: float) -> Awaitable[Any]:
        """Run it within so many seconds."""


class _RunsOnce(RocketError):
    """The router would run again what cannot be."""


class _Body:
    """Work that lends its connection to the task which has the body, until that is left."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[tuple[Connection, tuple[Place, ...]]] = loop.create_future()
        """The connection, and the places that come with it."""
        self.left: asyncio.Future[None] = loop.create_future()

    async def work(self, node: Connection) -> None:
        """Lend the connection, and end as the body does; raise `_RunsOnce` the second time."""
        if self.begun.done():
            raise _RunsOnce
        self.begun.set_result((node, HELD.get()))
        await asyncio.shield(self.left)  # it may be left later than the time for work is over


@contextlib.asynccontextmanager
async def run_body(run: Run, timeout_s: float) -> AsyncIterator[Connection]:
    """Lend the body the connection that `run` gives to work, and have that end as the body does.

    The body is cancelled after `timeout_s`. Raise what `run` raises, and `Unavailable` where that would run work
    again, and when the time is over.
    """
    body = _Body()
    running = asyncio.ensure_future(run(body.work, timeout=timeout_s + _LATER_S))
    running.add_done_callback(_note_retrieved)
    timer, node_failed = asyncio.timeout(timeout_s), False
    try:
        async with timer:
            await asyncio.wait({running, body.begun}, return_when=asyncio.FIRST_COMPLETED)
            if body.begun.done():
                connection, places = body.begun.result()
                outside = HELD.set(places)
                try:
                    yield connection
                finally:
                    HELD.reset(outside)
        body.left.set_result(None)
    except BaseException as error:
        if timer.expired() or not isinstance(error, Exception):
            running.cancel()
        else:
            node_failed = speaks_against_node(error) or (body.begun.done() and is_lost(body.begun.result()[0]))
            body.left.set_exception(error)
        await asyncio.wait({running})
        if timer.expired():
            raise Unavailable(f"it was not over within {timeout_s:g} s") from error
        if isinstance(error, Exception):
            _raise_instead_of(error, running, node_failed=node_failed)
        raise
    try:
        await running
    except _RunsOnce:
        raise Unavailable("it was refused at COMMIT, and cannot run again by itself") from None


def _raise_instead_of(error: Exception, running: asyncio.Future[Any], *, node_failed: bool) -> None:
    """Raise what became of a read or write whose body has raised, if that is not the body's own error."""
    outcome = None if running.cancelled() else running.exception()
    if isinstance(outcome, _RunsOnce):
        if node_failed:
            raise Unavailable(f"it failed, and cannot run again by itself: {describe(error)}") from error
    elif outcome is not None and outcome is not error:
        raise outcome from error


def _note_retrieved(running: asyncio.Future[Any]) -> None:
    if not running.cancelled():
        running.exception()
