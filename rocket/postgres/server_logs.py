"""The servers' own logs, line by line into the program's log."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.postgres.cluster import LocalCluster

_INTERVAL_S = 0.2
_LARGEST_PIECE = 256 * 1024

_log = logging.getLogger("rocket.servers")


async def forward(cluster: LocalCluster) -> None:
    """Log each new line of each node's `server.log`, with the node's name in front, until cancelled."""
    tails = {name: _Tail(node.log_path, node.log_start) for name, node in cluster.nodes.items()}
    while True:
        for name, tail in tails.items():
            for line in tail.new_lines():
                _log.info("%s: %s", name, line)
        await asyncio.sleep(_INTERVAL_S)


class _Tail:
    """Reads a growing file in whole lines."""

    def __init__(self, path: Path, position: int) -> None:
        self._path = path
        self._position = position

    def new_lines(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                piece = file.read(_LARGEST_PIECE)
        except FileNotFoundError:
            return []
        whole = len(piece) if len(piece) == _LARGEST_PIECE else piece.rfind(b"\n") + 1
        self._position += whole
        return piece[:whole].decode(errors="replace").splitlines()
