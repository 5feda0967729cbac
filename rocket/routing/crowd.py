"""Those who are doing something now."""

from __future__ import annotations

import asyncio


class InFlight:
    """A context manager that many are in at once, and whose emptiness can be waited for."""

    __slots__ = ("_empty", "_inside")

    def __init__(self) -> None:
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def __enter__(self) -> None:
        self._inside += 1
        self._empty.clear()

    def __exit__(self, *_: object) -> None:
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    async def gone(self) -> None:
        """Wait until nobody is in."""
        await self._empty.wait()
