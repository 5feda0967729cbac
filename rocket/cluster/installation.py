"""What all nodes of a cluster share on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.account import Account
    from rocket.cluster.binaries import Binaries

SUPERUSER = "postgres"


@dataclass(frozen=True, slots=True)
class Installation:
    """The programs, who runs them, and where their sockets are."""

    binaries: Binaries
    account: Account | None
    """Owns the directories and runs the servers; None: we do ourselves."""
    socket_dir: Path

    def own(self, path: Path) -> None:
        """Make the servers' account the owner of a file or directory."""
        if self.account is not None:
            self.account.own(path)
