"""The promotions of a run: the only excuse for a write that is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket.lab.checker.history import PROMOTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rocket.lab.checker.history import Fault

SETTLED_S = 2.0
"""So long after a promotion some process may not have noticed it, and answer from the old reign."""


class Promotions:
    """When there was a promotion."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self._all = [fault for fault in faults if fault.name in PROMOTIONS]

    def __bool__(self) -> bool:
        return bool(self._all)

    def between(self, since: float, until: float) -> list[Fault]:
        """Return the promotions that were under way at some moment of a stretch of time."""
        return [fault for fault in self._all if fault.at <= until and since <= fault.until]
