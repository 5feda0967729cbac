"""Reads that wait for a replica to catch up, and the observer that asks it more often meanwhile.

Postgres 19's `WAIT FOR LSN` could take the place of `CatchUp.until`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

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
