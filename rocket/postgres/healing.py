"""Everything back to normal: whatever `faults` has done to a cluster is undone."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rocket.errors import NodeNotRunning, NotAReplica, RocketError, failing_plainly, in_words
from rocket.postgres import faults

if TYPE_CHECKING:
    from rocket.postgres.cluster import LocalCluster
    from rocket.postgres.node import Node

_UP_TIMEOUT_S = 60.0


class NotHealed(RocketError):
    """A node is not back to normal; says which, and why."""


async def heal(cluster: LocalCluster) -> str:
    """Thaw, start, mend and resume every node, and end its delay; say so once all are up.

    Raise `NotHealed` if one does not come.
    """
    for node in cluster.nodes.values():
        # Whatever becomes of it: its next start is a normal one.
        node.apply_delay_ms, node.cut = 0, False
        if node.frozen or node.halted:
            node.thaw()
    with failing_plainly():
        async with asyncio.TaskGroup() as group:
            for node in cluster.nodes.values():
                group.create_task(_heal(cluster, node), name=f"heal {node.name}")
    return "all nodes are up, and nothing holds them back"


async def _heal(cluster: LocalCluster, node: Node) -> None:
    try:
        async with asyncio.timeout(_UP_TIMEOUT_S):
            if not node.wanted:
                await cluster.bring_up(node)
            await node.up.wait()  # whoever is restarting, or mended, comes by itself
        node.reconfigure(cluster.upstream_port(node))
        with contextlib.suppress(NotAReplica):
            await faults.resume(node)
    except NodeNotRunning:
        return  # it has died since, and comes back unpaused
    except (RocketError, OSError, TimeoutError) as error:
        raise NotHealed(f"{node.name} is not back: {in_words(error)}") from error
