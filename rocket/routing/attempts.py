"""Attempts to do a part of a read on one node, each within its share of the time that the read has."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

from rocket.errors import Unavailable, describe
from rocket.routing.failures import OwnError, speaks_against_node
from rocket.routing.gate import CapacityLimiter, TooManyWaiting

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rocket.consistency import PrimaryStatus, ReplicaStatus
    from rocket.routing.answer import Route
    from rocket.routing.connection import Connection
    from rocket.routing.limits import Limits
    from rocket.routing.nodes import Nodes

ResultT = TypeVar("ResultT")


class NodeFailed(Exception):
    """A replica could not serve a read that another node may."""


class Attempts:
    """Runs what a read needs on the nodes."""

    def __init__(self, nodes: Nodes, limits: Limits) -> None:
        self._nodes = nodes
        self._limits = limits
        self._primary_reads = CapacityLimiter(
            "a read on the primary", width=limits.primary_reads, queue=limits.queue
        )

    @property
    def waiting_for_primary(self) -> int:
        """How many reads wait until the primary may take them."""
        return self._primary_reads.waiting

    async def on_replica(
        self,
        name: str,
        status: ReplicaStatus | None,
        work: Callable[[Connection], Awaitable[ResultT]],
        route: Route,
    ) -> ResultT:
        """Run work on a replica that `status` vouches for; raise `NodeFailed` if what happens speaks against it.

        Takes no more than half of the time that is left, so that there is some for another node.
        """
        try:
            attempt_s = min(self._limits.attempt_s, (route.deadline - time.monotonic()) / 2)
            async with asyncio.timeout(attempt_s), self._nodes.replica(name, status) as connection:
                return await work(connection)
        except OwnError as own:
            raise own.error from own.error.__cause__
        except Exception as error:
            if speaks_against_node(error):
                raise NodeFailed(describe(error)) from error
            raise

    async def on_primary(
        self, work: Callable[[Connection, PrimaryStatus], Awaitable[ResultT]], route: Route
    ) -> ResultT:
        """Read on the primary; raise `Unavailable` if it does not answer by the read's deadline."""
        try:
            async with asyncio.timeout(route.deadline - time.monotonic()):
                return await self._on_primary_in_time(work)
        except OwnError as own:
            raise own.error from own.error.__cause__
        except TimeoutError:
            raise Unavailable(f"no node answered within {self._limits.read_s:g} s") from None

    async def _on_primary_in_time(
        self, work: Callable[[Connection, PrimaryStatus], Awaitable[ResultT]]
    ) -> ResultT:
        """Try twice, since a connection that a restart has ended shows that only in use."""
        for last in (False, True):
            try:
                self._nodes.current_primary()  # before anything is waited for
                async with self._primary_reads, self._nodes.primary() as (connection, status):
                    result = await work(connection, status)
                self._nodes.check_still_current(status.epoch)
            except Exception as error:
                if not speaks_against_node(error):
                    raise
                if last or isinstance(error, TimeoutError | TooManyWaiting):
                    raise Unavailable(f"the primary does not answer: {describe(error)}") from error
            else:
                return result
        raise AssertionError("unreachable")
