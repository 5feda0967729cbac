"""Reads that wait for a replica to catch up, and the observer that asks it more often meanwhile.

Postgres 19's `WAIT FOR LSN` could take the place of `Waiting.until`.
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
"""Between two looks at a replica that somebody waits for; there is never more than one look under way."""


class Waiting:
    """Where those who wait for news of a replica meet the one who brings it, on one event loop."""

    def __init__(self) -> None:
        self._wanted: Counter[str] = Counter()
        self._calls: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._news = asyncio.Event()

    async def until(
        self, names: Collection[str], find: Callable[[], FoundT | None], timeout_s: float
    ) -> FoundT | None:
        """Have these replicas looked at until `find` finds something; None when `timeout_s` is over."""
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
        for name in names:
            self._wanted[name] += 1
            self._calls[name].set()
        try:
            yield
        finally:
            for name in names:
                self._wanted[name] -= 1
                if not self._wanted[name]:
                    self._calls[name].clear()

    # --- the observer's side ---

    def bring_news(self) -> None:
        """Wake all who wait: there is a new status."""
        self._news.set()
        self._news = asyncio.Event()

    async def pause(self, name: str, interval_s: float) -> None:
        """Sleep until the next look at a replica is due: an interval, or no time if somebody waits for it."""
        if self._wanted[name]:
            await asyncio.sleep(_POLL_S)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await self._calls[name].wait()
