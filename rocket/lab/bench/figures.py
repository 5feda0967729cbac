"""Figures and what follows from them: percentiles, medians over rounds, ratios within a round. Pure."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest sample that at least `percent` % of all do not exceed; raise `ValueError` for none.

    The samples are in ascending order; nothing is interpolated.
    """
    if not ordered:
        raise ValueError("no samples")
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True, slots=True)
class Row:
    """What one contender showed in one measure of one round."""

    round: int
    measure: str
    contender: str
    figures: Mapping[str, float]
    """By name; each name ends with its unit, or is that of a count."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return the spread of some values; None if there are none."""
        every = sorted(values)
        return cls(statistics.median(every), every[0], every[-1]) if every else None


class Figures:
    """All that was measured, by round, measure and contender."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = list(rows)

    def add(self, row: Row) -> None:
        """Take in what was measured."""
        self.rows.append(row)

    def measures(self) -> list[str]:
        """Name the measures, in the order in which they were first made."""
        return list(dict.fromkeys(row.measure for row in self.rows))

    def contenders(self, measure: str) -> list[str]:
        """Name those who took part in a measure."""
        return list(dict.fromkeys(row.contender for row in self.rows if row.measure == measure))

    def values(self, measure: str, contender: str, figure: str) -> dict[int, float]:
        """Return a figure by round."""
        return {
            row.round: row.figures[figure]
            for row in self.rows
            if (row.measure, row.contender) == (measure, contender) and figure in row.figures
        }

    def spread(self, measure: str, contender: str, figure: str) -> Spread | None:
        """Return a figure's median and extremes; None where it was not measured."""
        return Spread.of(self.values(measure, contender, figure).values())

    def total(self, measure: str, contender: str, figure: str) -> float:
        """Return the sum of a figure over the rounds."""
        return sum(self.values(measure, contender, figure).values())

    def compared(self, one: Key, other: Key, how: Callable[[float, float], float | None]) -> Spread | None:
        """Compare two figures round by round, so that what drifts hits both; None without a common round."""
        ours, theirs = self.values(*one), self.values(*other)
        each = (how(ours[number], theirs[number]) for number in sorted(ours.keys() & theirs.keys()))
        return Spread.of(value for value in each if value is not None)

    def summary(self) -> Iterator[tuple[Key, Spread]]:
        """Yield every figure's spread."""
        keys = dict.fromkeys((row.measure, row.contender, name) for row in self.rows for name in row.figures)
        for key in keys:
            if (spread := self.spread(*key)) is not None:
                yield key, spread


Key = tuple[str, str, str]
"""Measure, contender, figure."""


def ratio(one: float, other: float) -> float | None:
    """Return how many times the other one fits; None if that is nothing."""
    return one / other if other else None


def difference(one: float, other: float) -> float:
    """Return how much one is more than the other."""
    return one - other
