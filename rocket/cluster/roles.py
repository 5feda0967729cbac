"""Which node of a kept directory is the primary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket.cluster.control_file import ControlFile
from rocket.cluster.errors import PrimaryLeftOut
from rocket.cluster.timelines import newest_history

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rocket.cluster.installation import Installation

FIRST_PRIMARY = "primary"
"""The name of the node that is the primary of a new cluster; it keeps it when it is a replica."""


async def find_primary(data_dir: Path, asked_for: Iterable[str], installation: Installation) -> str:
    """Return the name of the one node that follows no other.

    Several do not follow where a program died in the middle of a promotion: then it is the one with the newest
    timeline. One that was still recovering has not taken a single write, whatever its files say. Raise
    `PrimaryLeftOut` if there is none, or if it is not among those asked for.
    """
    homes = _homes(data_dir)
    if not homes:
        return FIRST_PRIMARY
    leading = [home for home in homes if not (home / "data" / "standby.signal").exists()]
    candidates = [home for home in leading if not (home / "half-mended").exists()]
    if not candidates:
        names = ", ".join(home.name for home in homes)
        raise PrimaryLeftOut(
            f"{data_dir} has no primary any more: all that is left of its nodes follows ({names})"
        )
    if len(candidates) > 1:
        states = {home: (await ControlFile.read(home / "data", installation)).state for home in candidates}
        candidates = [home for home in candidates if "recovery" not in _settled(states[home])] or candidates
    found = max(candidates, key=lambda home: newest_history(home / "data")).name
    asked = list(asked_for)
    if found not in asked:
        raise PrimaryLeftOut(
            f"the primary of {data_dir} is {found}, which is not among {', '.join(asked)}: give more --replicas"
        )
    return found


def has_history(data_dir: Path) -> bool:
    """Tell whether any node of a kept directory knows of more than the first timeline."""
    return any(path.suffix == ".history" for path in data_dir.glob("*/data/pg_wal/*.history"))


def _homes(data_dir: Path) -> list[Path]:
    return [path for path in sorted(data_dir.iterdir()) if (path / "data").is_dir()]


def _settled(state: str) -> str:
    """Return a state, leaving out that a primary which crashed was recovering when it crashed again."""
    return "" if state == "in crash recovery" else state
