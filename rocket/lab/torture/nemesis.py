"""Brings the planned faults about, heals them, and records both."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import asyncpg

from rocket.cluster.cluster import CarriedOut
from rocket.cluster.errors import NodeNotRunning
from rocket.errors import RocketError, describe, unwrapping_group
from rocket.lab.checker.history import Fault
from rocket.lab.torture import faults
from rocket.lab.torture.schedule import OF_PROCESSES, PRIMARY, PROCESS, REPLICA

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from rocket.cluster.node import Node
    from rocket.lab.checker.history import HistoryWriter
    from rocket.lab.torture.faults import Target
    from rocket.lab.torture.schedule import PlannedFault
    from rocket.lab.workers.processes import Worker

_FIND_S = 5.0
"""How long a fault may wait for a node that it can hit."""
_POLL_S = 0.02
_TOO_LATE_S = 1.5
"""A fault that is so late, because healing the one before took long, is left out if it has happened before."""
_BREATH_S = {PRIMARY: 1.5}
"""How long at least all is well between two faults of a sequence: a primary has to be found again first."""
_ATTEMPTS = 12
_RETRY_S = 0.25
_FAILURES = (RocketError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

_log = logging.getLogger("rocket.torture")


class Nemesis:
    """Carries out a schedule, one sequence of faults beside the other."""

    def __init__(self, target: Target, history: HistoryWriter, zero: float) -> None:
        self.under_way: list[str] = []
        """The faults that are on, in words."""
        self.happened: defaultdict[str, int] = defaultdict(int)
        """How often each fault was brought about."""
        self._target = target
        self._history = history
        self._zero = zero
        self.left_out = 0
        """How many were not brought about a second time, since those before them took long."""
        self._began = zero
        self._taken: set[str] = set()
        """Nodes that a fault is at work on: another one keeps its hands off."""

    async def run(self, schedule: Sequence[PlannedFault], began: float) -> None:
        """Bring each fault about when its time has come, counted from `began`, and return when all is healed.

        That may take longer than planned: each happens once, however late the one before it was healed.
        """
        self._began = began
        lanes: defaultdict[str, list[PlannedFault]] = defaultdict(list)
        for fault in schedule:
            lanes[fault.lane].append(fault)
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for lane, faults in lanes.items():
                    breath_s = _BREATH_S.get(lane, 0.0)
                    group.create_task(self._lane(faults, breath_s), name=f"faults of {lane}")

    async def _lane(self, faults: Sequence[PlannedFault], breath_s: float) -> None:
        for fault in faults:
            late_s = time.monotonic() - self._began - fault.at
            if late_s > _TOO_LATE_S and self.happened[fault.name]:
                self.left_out += 1
                continue
            await asyncio.sleep(-late_s)
            for attempt in range(_ATTEMPTS):
                try:
                    await self._bring_about(fault)
                    break
                except _FAILURES as error:
                    _log.warning("%s could not be brought about: %s", fault.name, describe(error))
                    if attempt + 1 < _ATTEMPTS:
                        await asyncio.sleep(_RETRY_S)
            await asyncio.sleep(breath_s)

    async def _bring_about(self, fault: PlannedFault) -> None:
        async with self._node_for(fault) as node:
            at = time.monotonic() - self._zero
            words = fault.name if node is None else f"{fault.name} {node.name}"
            late_s = at + self._zero - self._began - fault.at
            late = f", {late_s:.1f} s late: those before it took long" if late_s > _TOO_LATE_S else ""
            _log.info("%6.1f s  %s%s", at, words, late)
            async with faults.INJECTIONS[fault.name](self._target, node, fault.length_s) as detail:
                self._tell(fault, node, f"is on for {fault.length_s:.1f} s")
                self.under_way.append(words)
                try:
                    await asyncio.sleep(at + fault.length_s - (time.monotonic() - self._zero))
                finally:
                    self.under_way.remove(words)
            until = time.monotonic() - self._zero
            self._tell(fault, node, "is over")
        self.happened[fault.name] += 1
        self._history.add(
            Fault(
                name=fault.name,
                node=None if node is None else node.name,
                at=round(at, 6),
                until=round(until, 6),
                detail=dict(detail),
            )
        )

    def _tell(self, fault: PlannedFault, node: Node | Worker | None, said: str) -> None:
        """Tell whoever watches the cluster."""
        name = None if node is None else node.name
        done = CarriedOut(fault.name, name, time.monotonic(), said, ok=True)
        for tell in self._target.cluster.on_command:
            tell(done)

    @contextlib.asynccontextmanager
    async def _node_for(self, fault: PlannedFault) -> AsyncIterator[Node | Worker | None]:
        """Choose what is to be hit, nodes by their roles now, and keep other faults off it; None: nothing yet."""
        wanted: Callable[[], Sequence[Node | Worker]]
        if fault.lane.startswith(REPLICA) or fault.name in faults.HIT_A_REPLICA:
            wanted = self._free_replicas
        elif fault.lane == PROCESS:
            wanted = self._free_processes
        elif fault.name in OF_PROCESSES:
            yield None
            return
        elif fault.lane == PRIMARY:
            wanted = self._free_primary
        else:
            yield None
            return
        try:
            async with asyncio.timeout(_FIND_S):
                while not (nodes := wanted()):  # noqa: ASYNC110 - whatever sets them free
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NodeNotRunning("there is no node that it could hit") from None
        node = nodes[int(fault.choice * len(nodes))]
        self._taken.add(node.name)
        try:
            yield node
        finally:
            self._taken.discard(node.name)

    def _free_replicas(self) -> list[Node]:
        return [node for node in self._target.cluster.replicas if self._is_free(node)]

    def _free_processes(self) -> list[Worker]:
        return [each for each in self._target.processes if each.serves and each.up and not each.frozen]

    def _free_primary(self) -> list[Node]:
        primary = self._target.cluster.primary
        return [primary] if self._is_free(primary) else []

    def _is_free(self, node: Node) -> bool:
        return node.name not in self._taken and node.up.is_set() and node.pid is not None and not node.frozen
