"""An observer at work, in a task of its own, for as long as its router is open."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rocket.errors import TaskDied, unwrapping_group
from rocket.routing.admittance import check_reachable
from rocket.routing.tables import check_usable

if TYPE_CHECKING:
    from rocket.routing.observer import Observer

_log = logging.getLogger("rocket.observer")


class Observation:
    """Runs an observer until it is ended; that it dies before is logged, and told to whoever waits for it."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Observe every node once, whether it is up or not, and go on with that in the background.

        Raise `TablesUnusable` or `NodesUnusable` if that is what keeps a primary from being found.
        """
        await self.observer.run_once()
        if self.observer.board.primary is None:
            check_usable(self.observer.failures)
            check_reachable(self.observer.failures)
        # Not a task group's: who opens a router and who closes it may be different tasks.
        self._task = asyncio.create_task(self._run(), name="rocket observer")

    async def _run(self) -> None:
        try:
            with unwrapping_group():
                await self.observer.run()
        except Exception:
            _log.exception("the observer died: once the leases are over, nothing will be read or written any more")
            raise
        raise TaskDied("the observer came to an end by itself")

    async def lasts(self) -> None:
        """Wait until it is ended; raise what it died of, if it does so before."""
        if self._task is not None:
            await asyncio.wait({self._task})
            if not self._task.cancelled():
                self._task.result()

    async def end(self) -> None:
        """End it, and drop its connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            if not self._task.cancelled():
                self._task.exception()  # it was logged, and is not to be called forgotten
        self.observer.close()
