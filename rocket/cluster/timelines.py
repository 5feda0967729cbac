"""The timelines that a primary's data descends from, and how much of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rocket.cluster.errors import NotThePrimary

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.node import Node

FIRST_TIMELINE = 1
_IN_RECOVERY = "SELECT pg_is_in_recovery()"
_TIMELINE = "SELECT substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8)"
"""`pg_control_checkpoint()` names the old timeline until the first checkpoint after a promotion."""
_HISTORY = "SELECT pg_read_file($1)"
_HISTORY_FILE = re.compile(r"([0-9A-F]{8})\.history")
_FORK = re.compile(r"^\s*(\d+)\s+([0-9A-F]+/[0-9A-F]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Lineage:
    """A primary's timeline, and the position at which each of its ancestors was left."""

    timeline: int
    forks: dict[int, int]
    """By ancestor, the first byte that is no longer of it."""

    @classmethod
    async def of(cls, node: Node) -> Self:
        """Ask a node; raise `NotThePrimary` if it is in recovery, and asyncpg's errors if it does not answer."""
        connection = await node.connect()
        try:
            if await connection.fetchval(_IN_RECOVERY):
                raise NotThePrimary(f"{node.name} is in recovery")
            timeline = int(await connection.fetchval(_TIMELINE), 16)
            if timeline == FIRST_TIMELINE:
                return cls(timeline, {})
            history = await connection.fetchval(_HISTORY, f"pg_wal/{timeline:08X}.history")
        finally:
            connection.terminate()
        return cls(timeline, forks(history))

    def holds(self, timeline: int, end: int) -> bool:
        """Tell whether WAL of a timeline up to a position belongs to this history."""
        return timeline == self.timeline or end <= self.forks.get(timeline, -1)


def forks(history: str) -> dict[int, int]:
    """Read a timeline history file: of each ancestor, where it was left."""
    return {int(timeline): position(lsn) for timeline, lsn in _FORK.findall(history)}


def position(lsn: str) -> int:
    """Return a position in the WAL, as Postgres writes it, as a number of bytes."""
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def newest_history(data_dir: Path) -> int:
    """Return the highest timeline that a data directory has a history file of; the first one has none."""
    numbers = [
        int(match[1], 16)
        for path in (data_dir / "pg_wal").iterdir()
        if (match := _HISTORY_FILE.fullmatch(path.name))
    ]
    return max(numbers, default=FIRST_TIMELINE)
