"""Figures and their statistics: percentiles, medians over rounds, ratios within a round. Pure."""

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
    """The figures of one variant in one measure and one round."""

    round: int
    measure: str
    variant: str
    figures: Mapping[str, float]
    """By name; a name ends with its unit, unless it is a count."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return the spread of the values; None if there are none."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1]) if ordered else None


Key = tuple[str, str, str]
"""Measure, variant, figure."""


class Figures:
    """All rows measured, queried by measure, variant and figure."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = list(rows)

    def add(self, row: Row) -> None:
        """Add a row."""
        self.rows.append(row)

    def measures(self) -> list[str]:
        """Return the measures, in the order in which they were first taken."""
        return list(dict.fromkeys(row.measure for row in self.rows))

    def variants(self, measure: str) -> list[str]:
        """Return the variants that took part in a measure."""
        return list(dict.fromkeys(row.variant for row in self.rows if row.measure == measure))

    def values(self, measure: str, variant: str, figure: str) -> dict[int, float]:
        """Return a figure by round."""
        return {
            row.round: row.figures[figure]
            for row in self.rows
            if (row.measure, row.variant) == (measure, variant) and figure in row.figures
        }

    def spread(self, measure: str, variant: str, figure: str) -> Spread | None:
        """Return a figure's median and extremes; None where it was not measured."""
        return Spread.of(self.values(measure, variant, figure).values())

    def total(self, measure: str, variant: str, figure: str) -> float:
        """Return the sum of a figure over the rounds."""
        return sum(self.values(measure, variant, figure).values())

    def compared(self, one: Key, other: Key, how: Callable[[float, float], float | None]) -> Spread | None:
        """Compare two figures round by round, so that drift affects both; None without a common round."""
        ones, others = self.values(*one), self.values(*other)
        results = (how(ones[number], others[number]) for number in sorted(ones.keys() & others.keys()))
        return Spread.of(result for result in results if result is not None)

    def summary(self) -> Iterator[tuple[Key, Spread]]:
        """Yield the spread of every figure."""
        keys = dict.fromkeys((row.measure, row.variant, name) for row in self.rows for name in row.figures)
        for key in keys:
            if (spread := self.spread(*key)) is not None:
                yield key, spread


def ratio(one: float, other: float) -> float | None:
    """Return one divided by the other; None if the other is zero."""
    return one / other if other else None


def difference(one: float, other: float) -> float:
    """Return one minus the other."""
    return one - other
