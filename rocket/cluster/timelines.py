"""Timelines: the history that a server's data belongs to, read from a running primary or a stopped directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rocket.cluster.errors import CommandFailed, NotThePrimary
from rocket.cluster.process import run_command

if TYPE_CHECKING:
    from pathlib import Path

    import asyncpg

    from rocket.cluster.binaries import Installation

FIRST_TIMELINE = 1
_CONTROL_FILE_TIMEOUT_S = 20.0  # it only reads one block; a first start, from a cold disk
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
    """By ancestor, the first byte that no longer belongs to it."""

    @classmethod
    async def read(cls, primary: asyncpg.Connection[Any]) -> Self:
        """Read it from a server; raise `NotThePrimary` if that is in recovery."""
        if await primary.fetchval(_IN_RECOVERY):
            raise NotThePrimary("it is in recovery")
        timeline = int(await primary.fetchval(_TIMELINE), 16)
        if timeline == FIRST_TIMELINE:
            return cls(timeline, {})
        return cls(timeline, forks(await primary.fetchval(_HISTORY, f"pg_wal/{timeline:08X}.history")))

    def holds(self, timeline: int, end: int) -> bool:
        """Return whether WAL of a timeline up to a position belongs to this history."""
        return timeline == self.timeline or end <= self.forks.get(timeline, -1)


@dataclass(frozen=True, slots=True)
class ControlFile:
    """The entries of a stopped server's `pg_control` that decide whether its directory fits a history."""

    state: str
    """In Postgres' words: `in production`, `shut down`, `in archive recovery`, `shut down in recovery`, ..."""
    checkpoint: int
    """Where the last checkpoint's record begins."""
    checkpoint_timeline: int
    minimum_recovery: int
    """The end of the WAL that a replica's pages may hold; 0 on a primary."""
    minimum_recovery_timeline: int
    segment_bytes: int

    @classmethod
    async def read(cls, data_dir: Path, installation: Installation) -> Self:
        """Read it by `pg_controldata`; raise `CommandFailed`."""
        output = await run_command(
            installation.binaries.program("pg_controldata"),
            data_dir,
            account=installation.account,
            timeout_s=_CONTROL_FILE_TIMEOUT_S,
        )
        entries = dict(line.split(":", 1) for line in output.splitlines() if ":" in line)
        try:
            return cls(
                state=entries["Database cluster state"].strip(),
                checkpoint=position(entries["Latest checkpoint location"]),
                checkpoint_timeline=int(entries["Latest checkpoint's TimeLineID"]),
                minimum_recovery=position(entries["Minimum recovery ending location"]),
                minimum_recovery_timeline=int(entries["Min recovery ending loc's timeline"]),
                segment_bytes=int(entries["Bytes per WAL segment"]),
            )
        except (KeyError, ValueError) as error:
            raise CommandFailed(f"pg_controldata printed something unexpected of {data_dir}: {error}") from None

    @property
    def timeline(self) -> int:
        """The newest timeline that its pages know of."""
        return max(self.checkpoint_timeline, self.minimum_recovery_timeline)


def forks(history: str) -> dict[int, int]:
    """Return, of each ancestor in a timeline history file, the position where it was left."""
    return {int(timeline): position(lsn) for timeline, lsn in _FORK.findall(history)}


def position(lsn: str) -> int:
    """Return an LSN as Postgres writes it as a number of bytes."""
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def newest_timeline(data_dir: Path) -> int:
    """Return the highest timeline that a data directory has a history file of; the first one has none."""
    numbers = [
        int(match[1], 16)
        for path in (data_dir / "pg_wal").iterdir()
        if (match := _HISTORY_FILE.fullmatch(path.name))
    ]
    return max(numbers, default=FIRST_TIMELINE)
