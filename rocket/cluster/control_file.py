"""What a stopped server's `pg_control` says of its pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rocket.cluster.errors import CommandFailed
from rocket.cluster.process import run_command
from rocket.cluster.timelines import position

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.installation import Installation

_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class ControlFile:
    """The few entries that tell whether a directory fits a history."""

    state: str
    """In Postgres' words: `in production`, `shut down`, `in archive recovery`, `shut down in recovery`, ..."""
    checkpoint: int
    """Where the last checkpoint's record begins."""
    checkpoint_timeline: int
    minimum_recovery: int
    """Where WAL ends that pages of a replica may hold; 0 on a primary."""
    minimum_recovery_timeline: int
    segment_bytes: int

    @classmethod
    async def read(cls, data_dir: Path, installation: Installation) -> Self:
        """Read it by `pg_controldata`; raise `CommandFailed`."""
        said = await run_command(
            installation.binaries.program("pg_controldata"),
            data_dir,
            account=installation.account,
            timeout_s=_TIMEOUT_S,
        )
        entries = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
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
            raise CommandFailed(
                f"pg_controldata says something else than expected of {data_dir}: {error}"
            ) from None

    @property
    def timeline(self) -> int:
        """The newest timeline that its pages know of."""
        return max(self.checkpoint_timeline, self.minimum_recovery_timeline)
