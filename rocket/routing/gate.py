"""A bound on how many do something at the same time, and on how many wait for it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Overloaded(ConnectionError):
    """So many wait already that one more would only make it worse."""


class Gate:
    """Lets `width` through at a time; `queue` more may wait, and whoever comes on top is turned away."""

    def __init__(self, what: str, *, width: int, queue: int) -> None:
        self._what = what
        self._queue = queue
        self._places = asyncio.Semaphore(width)
        self._waiting = 0

    @contextlib.asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """Wait for a place, keep it for the body; raise `Overloaded` at once if the queue is full."""
        if self._places.locked() and self._waiting >= self._queue:
            raise Overloaded(f"{self._waiting} wait already for {self._what}")
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()
