"""Keeps the servers of a cluster alive: what dies is started again, what cannot follow is cloned anew."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from rocket.errors import CommandFailed, ServerFailedToStart, ServerKeepsDying, failing_plainly
from rocket.postgres.node import ending
from rocket.postgres.restarts import RestartPolicy
from rocket.postgres.tail import Tail

if TYPE_CHECKING:
    from rocket.postgres.cluster import LocalCluster
    from rocket.postgres.node import Node

_FOLLOWING_CHECK_S = 1.0
_WAL_IS_GONE = "has already been removed"
"""What a replica logs, again and again, when its primary has recycled the WAL that it asks for."""

_log = logging.getLogger("rocket.cluster")


async def supervise(cluster: LocalCluster) -> None:
    """Start again whatever dies without having been stopped; never returns.

    Raise `ServerKeepsDying` when there is no point any more.
    """
    with failing_plainly():
        async with asyncio.TaskGroup() as group:
            for node in cluster.nodes.values():
                group.create_task(_keep(cluster, node), name=f"keep {node.name}")
                group.create_task(_keep_following(cluster, node), name=f"keep {node.name} following")


async def _keep(cluster: LocalCluster, node: Node) -> None:
    policy = RestartPolicy()
    while True:
        dead = await node.died()
        how = ending(dead.exit_code)
        pause_s = policy.after_death(time.monotonic(), asked=dead.kill_asked)
        while not await _start_again(cluster, node, how, pause_s):
            how = "while starting"
            asked = node.process is not None and node.process.kill_asked
            pause_s = policy.after_failed_start(asked=asked)
        policy.started()


async def _keep_following(cluster: LocalCluster, node: Node) -> None:
    """Clone a replica anew when the primary no longer has the WAL that it needs next."""
    tail = Tail(node.log_path, node.log_start)
    while True:
        await asyncio.sleep(_FOLLOWING_CHECK_S)
        if any(_WAL_IS_GONE in line for line in tail.new_lines()) and node.up.is_set() and node.is_replica:
            _log.warning("%s needs WAL that the primary no longer has: cloning it anew", node.name)
            began = time.monotonic()
            try:
                await node.stop()
                await node.back_up(cluster.primary)
            except CommandFailed as error:
                _log.warning("%s could not be cloned: %s", node.name, error)
            await node.start(cluster.primary.port)
            _log.info("%s is back after %.1f s", node.name, time.monotonic() - began)


async def _start_again(cluster: LocalCluster, node: Node, how: str, pause_s: float | None) -> bool:
    """Start a server that died; return whether that is done, or no longer wanted."""
    if pause_s is None:
        raise ServerKeepsDying(f"{node.name} keeps dying ({how}): see {node.log_path}")
    _log.warning("%s died (%s): starting it again in %.1f s", node.name, how, pause_s)
    await asyncio.sleep(pause_s)
    began = time.monotonic()
    try:
        if await node.start_again(cluster.primary.port):
            _log.info("%s is back after %.1f s", node.name, time.monotonic() - began)
    except ServerFailedToStart as error:
        _log.warning("%s", error)
        return False
    return True
