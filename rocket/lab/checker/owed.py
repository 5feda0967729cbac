"""What a reader is owed: the rides that its next answers must show."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.lab.checker.history import Request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rocket.lab.checker.history import Op


@dataclass(slots=True)
class ExpectedRide:
    """A ride that has to be shown, by every answer that covers its id."""

    ride: int
    distance: float
    """Names the ride: ids may be used again after a promotion that lost some."""
    write: Op | None
    """The acknowledged write that founds the debt; None if the ride has only been seen."""
    since: float
    """A promotion from this moment on may have lost the ride, so far as is known."""
    notice: int = 0
    """How many notices of a loss the session had been given by then."""


class Owed:
    """All debts to one reader, found by what an answer covers."""

    def __init__(self) -> None:
        self._debts: dict[float, ExpectedRide] = {}
        self._order: list[tuple[int, float]] = []
        self.forgiven: dict[float, ExpectedRide] = {}
        """Rides that a promotion has lost: they need not be shown, and they may."""

    def __len__(self) -> int:
        return len(self._debts)

    def add(self, debt: ExpectedRide) -> None:
        """Owe a ride from now on, also one that had been forgiven."""
        if debt.distance not in self._debts:
            self.forgiven.pop(debt.distance, None)
            self._debts[debt.distance] = debt
            insort(self._order, (debt.ride, debt.distance))

    def forgive(self, debt: ExpectedRide) -> None:
        """Owe a ride no longer."""
        self.forgiven[debt.distance] = self._debts.pop(debt.distance)
        del self._order[bisect_left(self._order, (debt.ride, debt.distance))]

    def unheard_of(self, shown: dict[float, int]) -> Iterable[float]:
        """Return what is shown without being owed."""
        return [distance for distance in shown if distance not in self._debts]  # a difference of sets walks both

    def among(self, shown: dict[float, int]) -> Iterable[ExpectedRide]:
        """Return the debts that an answer pays."""
        return [self._debts[distance] for distance in shown.keys() & self._debts.keys()]

    def missing_from(self, op: Op, shown: dict[float, int]) -> list[ExpectedRide]:
        """Return the debts that an answer covers and does not pay.

        A ride that is asked for covers its id. A page covers the ids from its smallest on, or, if it is complete,
        all of them.
        """
        first, end = 0, len(self._order)
        if op.request is Request.READ:
            ride = op.ride or 0
            first, end = bisect_left(self._order, (ride,)), bisect_left(self._order, (ride + 1,))
        elif not op.complete:
            first = bisect_left(self._order, (min(shown.values()),)) if shown else end
        order = self._order if (first, end) == (0, len(self._order)) else self._order[first:end]
        return [self._debts[distance] for _, distance in order if distance not in shown]
