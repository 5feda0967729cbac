"""The servers' own logs, line by line into the program's log."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rocket.cluster.tail import Tail

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster

_INTERVAL_S = 0.2

_log = logging.getLogger("rocket.servers")


async def forward(cluster: LocalCluster) -> None:
    """Log each new line of each node's `server.log`, with the node's name in front, until cancelled."""
    tails = {name: Tail(node.log_path, node.log_start) for name, node in cluster.nodes.items()}
    while True:
        for name, tail in tails.items():
            for line in tail.new_lines():
                _log.info("%s: %s", name, line)
        await asyncio.sleep(_INTERVAL_S)
