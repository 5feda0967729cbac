"""Reads that guarantee nothing, to compare with: as published, on any replica, on the primary alone."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from rocket.consistency import Reason, SessionToken
from rocket.routing import heartbeat
from rocket.routing.answer import Answer, Role
from rocket.routing.attempts import NodeFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rocket.consistency import Board, Epoch, Lsn, PrimaryStatus
    from rocket.routing.answer import Route
    from rocket.routing.attempts import Attempts
    from rocket.routing.connection import Connection, Work
    from rocket.routing.nodes import Nodes

ResultT = TypeVar("ResultT")
SubjectT = TypeVar("SubjectT")

_log = logging.getLogger("rocket.router")


class UncheckedReads(Generic[SubjectT]):
    """The routings beside never-stale."""

    def __init__(
        self,
        nodes: Nodes,
        attempts: Attempts,
        board: Board,
        look_up: Callable[[SubjectT, Route], Awaitable[tuple[Lsn | None, Epoch]]],
    ) -> None:
        self._nodes = nodes
        self._attempts = attempts
        self._board = board
        self._look_up = look_up

    async def as_published(self, work: Work[ResultT], subject: SubjectT, route: Route) -> Answer[ResultT]:
        """Read on a replica that had replayed the floor when the table of statuses was last written."""
        floor, epoch = await self._look_up(subject, route)
        names: list[str] = []
        if floor is not None:
            route.tokens = (SessionToken(epoch, floor),)
            names = await self._attempts.on_primary(
                lambda primary, _: heartbeat.names_caught_up(primary, floor), route
            )
        return await self._on_any_of(names, work, route)

    async def on_any_replica(self, work: Work[ResultT], route: Route) -> Answer[ResultT]:
        """Read on a replica, however far behind."""
        return await self._on_any_of(self._nodes.names_but_primary, work, route)

    async def on_primary(self, work: Work[ResultT], reason: Reason, route: Route) -> Answer[ResultT]:
        """Read on the primary."""

        async def unchecked(primary: Connection, status: PrimaryStatus) -> Answer[ResultT]:
            return Answer(await work(primary), status.name, Role.PRIMARY, reason, route=route)

        return await self._attempts.on_primary(unchecked, route)

    async def _on_any_of(self, names: list[str], work: Work[ResultT], route: Route) -> Answer[ResultT]:
        route.decided_at, route.statuses = time.monotonic(), self._board.replicas
        if not names:
            return await self.on_primary(work, Reason.NOT_CAUGHT_UP, route)
        name = random.choice(names)  # noqa: S311
        try:
            value = await self._attempts.on_replica(name, None, work, route)
        except NodeFailed as failure:
            _log.info("%s failed a read, trying elsewhere: %s", name, failure)
            route.failed = {name: str(failure)}
            return await self.on_primary(work, Reason.REPLICAS_FAILED, route)
        return Answer(value, name, Role.REPLICA, Reason.UNCHECKED, route=route)
