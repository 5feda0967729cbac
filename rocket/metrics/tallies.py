"""Durations, counted in plain numbers: Prometheus' own histogram costs a read five times as much."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING

from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BOUNDS_S = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the buckets; the last bucket has none."""

_NAMES = (*map(floatToGoString, BOUNDS_S), "+Inf")


class Tally:
    """How many things took how long. One thread adds to it; others may look."""

    __slots__ = ("buckets", "total_s")

    def __init__(self) -> None:
        self.buckets = [0] * len(_NAMES)
        """How many fell into each bucket, and into no lower one."""
        self.total_s = 0.0

    def add(self, took_s: float) -> None:
        """Count one more."""
        self.total_s += took_s
        self.buckets[bisect_left(BOUNDS_S, took_s)] += 1

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.buckets)


def as_histogram(tallies: Iterable[Tally]) -> tuple[Sequence[tuple[str, float]], float]:
    """Return what several tallies hold together: the cumulative buckets by name, and the sum in seconds."""
    tallies = list(tallies)
    together = (sum(counts) for counts in zip(*(tally.buckets for tally in tallies), strict=True))
    buckets = list(zip(_NAMES, itertools.accumulate(together), strict=True))
    return buckets, sum(tally.total_s for tally in tallies)
