"""What reads wait for: a replica that catches up, asked more often meanwhile, and the primary's flush LSN.

Postgres 19's `WAIT FOR LSN` could take the place of `CatchUp.until`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from contextvars import Context
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator

    from rocket.consistency import SessionToken

FoundT = TypeVar("FoundT")

_POLL_S = 0.001
"""Between two status queries to a replica that reads wait for; there is never more than one under way."""


class CatchUp:
    """Where reads that wait for new statuses meet the observer that brings them, on one event loop."""

    def __init__(self) -> None:
        self._wanted: Counter[str] = Counter()
        self._calls: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._news = asyncio.Event()
        self.waiting = 0
        """How many reads wait."""

    async def until(
        self, names: Collection[str], find: Callable[[], FoundT | None], timeout_s: float
    ) -> FoundT | None:
        """Have these replicas polled until `find` finds something; return it, or None after `timeout_s`."""
        with self._wanting(names):
            try:
                async with asyncio.timeout(timeout_s):
                    while (found := find()) is None:
                        await self._news.wait()
                    return found
            except TimeoutError:
                return None

    @contextlib.contextmanager
    def _wanting(self, names: Collection[str]) -> Iterator[None]:
        self.waiting += 1
        for name in names:
            self._wanted[name] += 1
            self._calls[name].set()
        try:
            yield
        finally:
            self.waiting -= 1
            for name in names:
                self._wanted[name] -= 1
                if not self._wanted[name]:
                    self._calls[name].clear()

    # --- the observer's side ---

    def announce(self) -> None:
        """Wake all waiting reads: there is a new status."""
        self._news.set()
        self._news = asyncio.Event()

    async def pause(self, name: str, interval_s: float) -> None:
        """Sleep until the next status query to a replica is due: an interval, or hardly any time if reads wait."""
        if self._wanted[name]:
            await asyncio.sleep(_POLL_S)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await self._calls[name].wait()


class FlushQuestion:
    """Asks the primary for its flush LSN on behalf of all reads that have to see everybody's commits.

    What it has flushed, asked after a read began, covers all that anybody was told is committed by then, and one
    answer serves all reads that began before the question: Raft's ReadIndex (Ongaro's thesis, section 6.4). So at
    most one is under way, and who comes meanwhile gets the answer of the next.
    """

    def __init__(self, ask: Callable[[], Awaitable[SessionToken]]) -> None:
        self._ask = ask
        self._asking: asyncio.Task[None] | None = None
        self._next: asyncio.Future[SessionToken] | None = None
        self.asked = 0
        """How many questions there were."""

    async def answer(self) -> SessionToken:
        """Return a token with the flush LSN for its read floor, from a question that begins after this call.

        Raise what asking raises. A caller that is cancelled takes the answer from no other.
        """
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        if self._asking is None:
            # In a context of its own: it holds no place of the read that comes first.
            asking = self._ask_while_wanted()
            self._asking = asyncio.create_task(asking, name="ask for the flush LSN", context=Context())
        return await asyncio.shield(self._next)

    async def _ask_while_wanted(self) -> None:
        answered: asyncio.Future[SessionToken] | None = None
        try:
            while (answered := self._next) is not None:
                self._next = None
                self.asked += 1
                try:
                    answered.set_result(await self._ask())
                except Exception as error:  # noqa: BLE001 - those who have asked raise it
                    answered.set_exception(error)
                    answered.exception()  # if none is left, it need not be reported as never retrieved
        finally:
            self._asking = None
            for unanswered in (answered, self._next):
                if unanswered is not None:
                    unanswered.cancel()

    async def close(self) -> None:
        """End the question that is under way: those who wait for it are cancelled."""
        if (asking := self._asking) is not None:
            asking.cancel()
            await asyncio.wait({asking})
