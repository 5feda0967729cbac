"""What a program that serves the inspector puts within its reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.simulator import Simulator


@dataclass(frozen=True, slots=True)
class Targets:
    """The parts of the program that the inspector looks at, beside the API, and acts on."""

    url: str
    """The API's own address."""
    cluster: LocalCluster | None = None
    """None: the cluster is somebody else's, and nothing is done to it."""
    simulator: Simulator | None = None
    token: str | None = None
    """Whoever brings it may do everything, from anywhere; None: only clients on this machine may."""

    @property
    def run_dir(self) -> Path | None:
        """Where the cluster takes commands."""
        return None if self.cluster is None else self.cluster.run_dir
