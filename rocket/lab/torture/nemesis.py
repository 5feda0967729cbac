"""The nemesis: injects the planned faults, heals them, and records both."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from rocket.cluster.cluster import CarriedOut
from rocket.cluster.errors import NodeNotRunning
from rocket.errors import describe, unwrapping_group
from rocket.lab.checker.history import Fault
from rocket.lab.torture.faults import FAULTS, PRIMARY, PROCESS, REPLICA
from rocket.lab.torture.histories import FAILURES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rocket.cluster.node import Node
    from rocket.lab.checker.history import HistoryWriter
    from rocket.lab.torture.faults import Target
    from rocket.lab.torture.schedule import PlannedFault
    from rocket.lab.workers import Worker

_FIND_S = 5.0
"""How long a fault may wait for a node that it can hit."""
_POLL_S = 0.02
_TOO_LATE_S = 1.5
"""A fault that is later than this, because healing the one before took long, is omitted if it happened before."""
_PAUSE_S = {PRIMARY: 1.5}
"""Seconds without a fault, at the least, between two faults of a lane: a primary has to be found again first."""
_ATTEMPTS = 12
_RETRY_S = 0.25

_log = logging.getLogger("rocket.torture")


class Nemesis:
    """Carries out a schedule, one lane of faults beside the other."""

    def __init__(self, target: Target, schedule: Sequence[PlannedFault], history: HistoryWriter) -> None:
        self.under_way: list[str] = []
        """The faults that are on, each with the node that it hits."""
        self._happened: defaultdict[str, int] = defaultdict(int)
        """How often each fault was injected."""
        self._target = target
        self._schedule = schedule
        self._history = history
        self._zero = target.zero
        self._omitted = 0
        """How many were not injected a second time, since healing those before them took long."""
        self._began = 0.0
        self._taken: set[str] = set()
        """The nodes that have a fault: no other fault hits them."""

    async def run(self) -> str:
        """Inject each fault at its time, counted from now, and return when all are healed: a phrase for the log.

        That may take longer than planned: each fault happens once, however late the one before it was healed.
        """
        if not self._schedule:
            return "there are no faults"
        self._began = time.monotonic()
        lanes: defaultdict[str, list[PlannedFault]] = defaultdict(list)
        for fault in self._schedule:
            lanes[fault.lane].append(fault)
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for lane, faults in lanes.items():
                    pause_s = _PAUSE_S.get(lane, 0.0)
                    group.create_task(self._lane(faults, pause_s), name=f"faults of {lane}")
        omitted = f"; {self._omitted} that came too late were left out" if self._omitted else ""
        return f"the last fault is healed{omitted}"

    async def _lane(self, faults: Sequence[PlannedFault], pause_s: float) -> None:
        for fault in faults:
            late_s = time.monotonic() - self._began - fault.at
            if late_s > _TOO_LATE_S and self._happened[fault.name]:
                self._omitted += 1
                continue
            await asyncio.sleep(-late_s)
            for attempt in range(_ATTEMPTS):
                try:
                    await self._inject(fault)
                    break
                except FAILURES as error:
                    _log.warning("%s could not be injected: %s", fault.name, describe(error))
                    if attempt + 1 < _ATTEMPTS:
                        await asyncio.sleep(_RETRY_S)
            await asyncio.sleep(pause_s)

    async def _inject(self, fault: PlannedFault) -> None:
        async with self._node_for(fault) as node:
            at = time.monotonic() - self._zero
            what = fault.name if node is None else f"{fault.name} {node.name}"
            late_s = at + self._zero - self._began - fault.at
            late = f", {late_s:.1f} s late: those before it took long" if late_s > _TOO_LATE_S else ""
            _log.info("%6.1f s  %s%s", at, what, late)
            async with FAULTS[fault.name].inject(self._target, node, fault.length_s) as detail:
                self._publish(fault, node, f"is on for {fault.length_s:.1f} s")
                self.under_way.append(what)
                try:
                    await asyncio.sleep(at + fault.length_s - (time.monotonic() - self._zero))
                finally:
                    self.under_way.remove(what)
            until = time.monotonic() - self._zero
            self._publish(fault, node, "is over")
        self._happened[fault.name] += 1
        self._history.add(
            Fault(
                name=fault.name,
                node=None if node is None else node.name,
                at=round(at, 6),
                until=round(until, 6),
                detail=dict(detail),
            )
        )

    def _publish(self, fault: PlannedFault, node: Node | Worker | None, text: str) -> None:
        """Report it to the cluster's listeners, as a command."""
        name = None if node is None else node.name
        done = CarriedOut(fault.name, name, time.monotonic(), text, ok=True)
        for listener in self._target.cluster.on_command:
            listener(done)

    @contextlib.asynccontextmanager
    async def _node_for(self, fault: PlannedFault) -> AsyncIterator[Node | Worker | None]:
        """Reserve a node or process for a fault, by its role now; None for a fault that needs none."""
        free = {
            REPLICA: self._free_replicas,
            PRIMARY: self._free_primary,
            PROCESS: self._free_processes,
        }.get(FAULTS[fault.name].hits)
        if free is None:
            yield None
            return
        try:
            async with asyncio.timeout(_FIND_S):
                while not (nodes := free()):  # noqa: ASYNC110 - many things set them free
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NodeNotRunning("there is no node that it could hit") from None
        node = nodes[int(fault.choice * len(nodes))]
        self._taken.add(node.name)
        try:
            yield node
        finally:
            self._taken.discard(node.name)

    def _free_replicas(self) -> Sequence[Node | Worker]:
        return [node for node in self._target.cluster.replicas if self._is_free(node)]

    def _free_processes(self) -> Sequence[Node | Worker]:
        return [each for each in self._target.processes if each.serves and each.up and not each.frozen]

    def _free_primary(self) -> Sequence[Node | Worker]:
        primary = self._target.cluster.primary
        return [primary] if self._is_free(primary) else []

    def _is_free(self, node: Node) -> bool:
        return node.name not in self._taken and node.up.is_set() and node.pid is not None and not node.frozen
