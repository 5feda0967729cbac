"""Everything back to normal: whatever `faults` has done to a cluster is undone."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rocket.cluster import faults
from rocket.cluster.errors import NodeNotRunning, NotAReplica
from rocket.errors import RocketError, describe

if TYPE_CHECKING:
    from collections.abc import Collection

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

_UP_TIMEOUT_S = 60.0
_UNDER_WAY_TIMEOUT_S = 20.0  # more than any fault takes: to connect, to ask, to see a receiver end


class NotHealed(RocketError):
    """A node is not back to normal; says which, and why."""


async def heal(cluster: LocalCluster, under_way: Collection[asyncio.Task[None]] = ()) -> str:
    """Thaw, start, mend and resume every node, and end its delay; say so once all are up.

    Faults that are being done to it are waited for: they would come after what undoes them. Raise `NotHealed` if a
    node does not come; the others are healed all the same.
    """
    nodes = list(cluster.nodes.values())
    for node in nodes:
        if node.frozen or node.halted:
            node.thaw()
    if under_way:
        await asyncio.wait(under_way, timeout=_UNDER_WAY_TIMEOUT_S)
    for node in nodes:
        # Whatever becomes of it: its next start is a normal one.
        node.apply_delay_ms, node.cut = 0, False
    for outcome in await asyncio.gather(*(_heal(cluster, node) for node in nodes), return_exceptions=True):
        if outcome is not None:
            raise outcome
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
        raise NotHealed(f"{node.name} is not back: {describe(error)}") from error
