"""A bound on how many do something at the same time, and on how many wait for it."""

from __future__ import annotations

import asyncio


class TooManyWaiting(ConnectionError):
    """So many wait already that one more would only make it worse."""


class CapacityLimiter:
    """Lets `width` through at a time; `queue` more may wait, and whoever comes on top is turned away.

    An asynchronous context manager that many use at once: it waits for a place, keeps it for the body, and raises
    `TooManyWaiting` at once if the queue is full.
    """

    __slots__ = ("_places", "_queue", "_what", "inside", "waiting", "width")

    def __init__(self, what: str, *, width: int, queue: int) -> None:
        self._what = what
        self._queue = queue
        self._places = asyncio.Semaphore(width)
        self.width = width
        self.waiting = 0
        """How many wait for a place."""
        self.inside = 0
        """How many have one."""

    async def __aenter__(self) -> None:
        if self._places.locked() and self.waiting >= self._queue:
            raise TooManyWaiting(f"{self.waiting} wait already for {self._what}")
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.inside += 1

    async def __aexit__(self, *_: object) -> None:
        self.inside -= 1
        self._places.release()
