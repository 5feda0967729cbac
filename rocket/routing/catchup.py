"""What reads wait for: a replica that catches up, asked more often meanwhile, and the primary's flush LSN.

Postgres 19's `WAIT FOR LSN` could take the place of `CatchUp.until`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from contextvars import Context
from typing import TYPE_CHECKING, TypeVar

from rocket.routing.limits import Timeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence

    from rocket.consistency import SessionToken

FoundT = TypeVar("FoundT")

_POLL_S = 0.001
"""Between two status queries to a replica that reads wait for; there is never more than one under way."""
_LONGEST_PAUSE_S = 0.002
"""Between two questions to the primary: less than a read may gain by going to a replica that is there."""


class CatchUp:
    """Where reads that wait for new statuses meet the observer that brings them, on one event loop."""

    def __init__(self) -> None:
        self._wanted: Counter[str] = Counter()
        self._calls: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._waiters: dict[asyncio.Future[None], Callable[[], bool] | None] = {}
        self.waiting = 0
        """How many reads wait."""

    async def until(
        self,
        names: Collection[str],
        find: Callable[[], FoundT | None],
        timeout_s: float,
        may_find: Callable[[], bool] | None = None,
    ) -> FoundT | None:
        """Have these replicas polled until `find` finds something; return it, or None after `timeout_s`.

        `may_find` says at less cost, now and for each new status, whether it is worth the attempt.
        """
        with self._wanting(names):
            try:
                with Timeout(timeout_s):
                    while True:
                        if (may_find is None or may_find()) and (found := find()) is not None:
                            return found
                        await self._new_status(may_find)
            except TimeoutError:
                return None

    async def _new_status(self, may_find: Callable[[], bool] | None) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = may_find
        try:
            await waiter
        finally:
            self._waiters.pop(waiter, None)

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
        """Wake the waiting reads that a new status may be enough for."""
        for waiter, may_find in self._waiters.items():
            if not waiter.done() and (may_find is None or may_find()):
                waiter.set_result(None)

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
    most one is under way, and who comes meanwhile gets the answer of the next. Where some have come meanwhile, the
    next begins after a pause as long as the last one took, and serves those who come in the pause as well: a lone
    read never waits for that, and many at a time ask half as often.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[SessionToken]], longest_pause_s: float = _LONGEST_PAUSE_S
    ) -> None:
        self._ask = ask
        self._longest_pause_s = longest_pause_s
        self._asking: asyncio.Task[None] | None = None
        self._waiting: list[asyncio.Future[SessionToken]] = []
        self.asked = 0
        """How many questions there were."""

    async def answer(self) -> SessionToken:
        """Return a token with the flush LSN for its read floor, from a question that begins after this call.

        Raise what asking raises. A caller that is cancelled takes the answer from no other.
        """
        waiter: asyncio.Future[SessionToken] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        if self._asking is None:
            # In a context of its own: it holds no place of the read that comes first.
            asking = self._ask_while_wanted()
            self._asking = asyncio.create_task(asking, name="ask for the flush LSN", context=Context())
        return await waiter

    async def _ask_while_wanted(self) -> None:
        answered: list[asyncio.Future[SessionToken]] = []
        try:
            while self._waiting:
                answered, self._waiting = self._waiting, []
                self.asked += 1
                began = time.monotonic()
                await self._answer(answered)
                if self._waiting:
                    await asyncio.sleep(min(time.monotonic() - began, self._longest_pause_s))
        finally:
            self._asking = None
            for unanswered in (*answered, *self._waiting):
                unanswered.cancel()
            self._waiting = []

    async def _answer(self, waiters: Sequence[asyncio.Future[SessionToken]]) -> None:
        try:
            token = await self._ask()
        except Exception as error:  # noqa: BLE001 - those who have asked raise it
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error)
        else:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(token)

    async def close(self) -> None:
        """End the question that is under way: those who wait for it are cancelled."""
        if (asking := self._asking) is not None:
            asking.cancel()
            await asyncio.wait({asking})
