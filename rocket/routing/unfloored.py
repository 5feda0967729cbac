"""Writes under a routing that takes no floor which holds, and what covers them once there is a guarantee again."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from rocket.consistency import Lsn, SessionToken
from rocket.errors import Unavailable
from rocket.routing.answer import Route
from rocket.routing.connection import unwrap
from rocket.routing.crowd import InFlight
from rocket.routing.failures import NotAsObserved
from rocket.routing.writes import FORCE_FLUSH_STATEMENT

if TYPE_CHECKING:
    from rocket.consistency import PrimaryStatus
    from rocket.routing.attempts import Attempts
    from rocket.routing.connection import Connection
    from rocket.routing.limits import Limits

_WRITE_SOMETHING = "SELECT pg_logical_emit_message(true, 'rocket', '')"
_FLUSH_LSN = "SELECT pg_current_wal_flush_lsn()"


class UnflooredWrites:
    """Those that are under way, and all that were."""

    def __init__(self, attempts: Attempts, limits: Limits) -> None:
        self.under_way = InFlight()
        """Whoever writes without a floor is in it."""
        self._attempts = attempts
        self._limits = limits

    async def all_covered(self) -> SessionToken:
        """Return a token that covers all of them, those under way included; raise `Unavailable`."""
        route = Route(time.monotonic() + self._limits.write_s, ())
        try:
            async with asyncio.timeout(self._limits.write_s):
                await self.under_way.gone()
        except TimeoutError:
            raise Unavailable("writes under way did not end in time") from None

        async def flushed(primary: Connection, status: PrimaryStatus) -> SessionToken:
            if not unwrap(primary).direct:
                raise NotAsObserved("behind a pooler, what was flushed cannot be told")  # it is in a transaction
            # What was committed without being flushed (`synchronous_commit = off`) is so with a later commit.
            async with primary.transaction():
                await primary.execute(FORCE_FLUSH_STATEMENT)
                await primary.execute(_WRITE_SOMETHING)
            return SessionToken(status.epoch, Lsn.from_wire(await primary.fetchval(_FLUSH_LSN)))

        return await self._attempts.on_primary(flushed, route)
