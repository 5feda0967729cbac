"""The observer: asks every node again and again what and where it is, and publishes the answers on the board."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rocket.dsn import Node
from rocket.errors import TaskDied, unwrapping_group
from rocket.routing.catchup import CatchUp
from rocket.routing.failures import check_reachable, check_tables
from rocket.routing.opening import connect
from rocket.routing.watch import NodeWatch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rocket.consistency import Board
    from rocket.routing.watch import Connect, MayBePrimary

_log = logging.getLogger("rocket.observer")

_FIRST_LOOK_S = 4.0
"""A node that takes longer to let us in and to answer is not waited for when a router is opened."""


class Observer:
    """Keeps a board up to date: one watch for each node, each with a beat of its own.

    `start` and `stop` run it in a task of its own; `run` runs it in the caller's.
    """

    def __init__(
        self,
        nodes: Mapping[str, str | Node],
        board: Board,
        *,
        interval_s: float,
        roles_only: bool = False,
        record_statuses: bool = False,
        may_be_primary: MayBePrimary | None = None,
        connect: Connect = connect,
    ) -> None:
        """Prepare to observe nodes, each given by name.

        With `roles_only` it finds out which node is the primary, and publishes nothing of replicas. With
        `record_statuses` it writes them into the table `replica_statuses` as well, whose dead rows conflict with
        long queries on replicas.
        `may_be_primary` is asked before a node becomes the primary, or becomes it again: a cluster manager's veto.
        `connect` opens the connections to observe with.
        """
        self.board = board
        self.catch_up = CatchUp()
        """Brings new statuses to the reads that wait for them."""
        self._interval_s = interval_s
        self._roles_only = roles_only
        self._record_statuses = record_statuses
        self._may_be_primary = may_be_primary
        self._connect = connect
        self._watches: dict[str, NodeWatch] = {}
        self._group: asyncio.TaskGroup | None = None
        """Where the watches run, while they do."""
        self._running: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        for name, node in nodes.items():
            self.add(name, node)

    @property
    def watches(self) -> Mapping[str, NodeWatch]:
        """The watch of each node, by name."""
        return self._watches

    def failures(self) -> Mapping[str, Exception]:
        """Return what kept nodes from being observed when they were last asked, by name."""
        return {name: watch.failure for name, watch in self._watches.items() if watch.failure is not None}

    def observe_anew(self, name: str, since: float) -> None:
        """Have a node be asked over a new connection, unless its own was opened after `since`, monotonic seconds.

        Its name has led to another server then, while the one that is observed lives on.
        """
        if (watch := self._watches.get(name)) is not None:
            watch.connect_anew(since)

    def add(self, name: str, node: str | Node) -> None:
        """Watch one more node, or one that is watched at another address from now on."""
        node = Node.of(node)
        if name in self._watches:
            self._discard(name)
            self.board.readdress(name)
        self._watches[name] = NodeWatch(
            name,
            node,
            self.board,
            self._interval_s,
            may_be_primary=self._may_be_primary,
            roles_only=self._roles_only,
            record_statuses=self._record_statuses,
            takes_reads=node.weight > 0,
            connect=self._connect,
        )
        if self._group is not None:
            self._begin_watching(self._group, self._watches[name])

    def remove(self, name: str) -> None:
        """Stop watching a node, and forget its status; raise `KeyError` if there is none of that name."""
        self._discard(name)
        self.board.remove(name)

    def _discard(self, name: str) -> None:
        watch = self._watches.pop(name)
        if (task := self._running.pop(name, None)) is not None:
            task.cancel()
        watch.close()

    # --- running ---

    async def start(self) -> None:
        """Observe every node once, whether it is up or not, and go on with that in the background.

        Raise `TablesUnusable` or `NodesUnusable` if that is what keeps a primary from being found.
        """
        await self.run_once()
        if self.board.primary is None:
            check_tables(self.failures())
            check_reachable(self.failures())
        # Not a task group's: the task that opens a router and the one that closes it may differ.
        self._task = asyncio.create_task(self._run_logged(), name="rocket observer")

    async def _run_logged(self) -> None:
        try:
            with unwrapping_group():
                await self.run()
        except Exception:
            _log.exception("the observer died: once the leases are over, nothing will be read or written any more")
            raise
        raise TaskDied("the observer came to an end by itself")

    async def wait_stopped(self) -> None:
        """Wait until it is stopped; raise the error that ended it, if that happens before."""
        if self._task is not None:
            await asyncio.wait({self._task})
            if not self._task.cancelled():
                self._task.result()

    async def stop(self) -> None:
        """Stop what `start` started, and drop all connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            if not self._task.cancelled():
                self._task.exception()  # it was logged; asyncio need not report it as never retrieved
        self.close()

    async def run(self) -> None:
        """Observe until cancelled. A node out of reach holds up no other, and never ends it."""
        try:
            async with asyncio.TaskGroup() as self._group:
                for watch in self._watches.values():
                    self._begin_watching(self._group, watch)
                await asyncio.Event().wait()  # even without any node: some may be added
        finally:
            self._group = None
            self._running.clear()
            self.close()

    def _begin_watching(self, group: asyncio.TaskGroup, watch: NodeWatch) -> None:
        self._running[watch.name] = group.create_task(self._keep_watching(watch), name=f"watch {watch.name}")

    async def _keep_watching(self, watch: NodeWatch) -> None:
        while True:
            if await watch.observe() or (watch.has_lost_connection and await watch.observe()):
                self.catch_up.announce()
                await self.catch_up.pause(watch.name, self._interval_s)
            else:
                await asyncio.sleep(self._interval_s)

    async def run_once(self) -> None:
        """Observe every node once, all at the same time, and then the primary again: it records the others."""
        if self.board.origins.system_id is None:
            found = await asyncio.gather(*(watch.find_system(_FIRST_LOOK_S) for watch in self._watches.values()))
            by_name = zip(self._watches, found, strict=True)
            self.board.origins.settle({name: its_id for name, its_id in by_name if its_id is not None})
        if self.board.primary is None:
            # Its epoch has a name before replicas are asked for it.
            await asyncio.gather(*(watch.observe(_FIRST_LOOK_S) for watch in self._watches.values()))
        await asyncio.gather(*(watch.observe(_FIRST_LOOK_S) for watch in self._watches.values()))
        primary = None if self.board.primary_is_lost else self.board.primary
        if primary is not None and primary.name in self._watches:
            await self._watches[primary.name].observe(_FIRST_LOOK_S)

    def close(self) -> None:
        """Drop every connection."""
        for watch in self._watches.values():
            watch.close()
