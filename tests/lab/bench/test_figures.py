"""Percentiles, medians and ratios: what every claim of the benchmark goes through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rocket.lab.bench.figures import Figures, Row, Spread, difference, percentile, ratio
from rocket.lab.bench.measures import with_queries_per_read

SAMPLES = st.lists(st.integers(0, 1000), min_size=1).map(sorted)


def rows(variant: str, *values: float, figure: str = "reads_per_s") -> list[Row]:
    """Return a row for each round."""
    return [Row(number, "reads", variant, {figure: value}) for number, value in enumerate(values, start=1)]


@given(SAMPLES, st.integers(1, 100))
def test_a_percentile_is_the_least_sample_that_enough_do_not_exceed(samples: list[int], percent: int) -> None:
    """By definition, without interpolation."""
    value = percentile(samples, percent)

    def not_above(bound: int) -> float:
        return sum(sample <= bound for sample in samples) * 100

    assert value in samples
    assert not_above(int(value)) >= percent * len(samples)
    assert all(not_above(sample) < percent * len(samples) for sample in samples if sample < value)


def test_percentiles_of_a_hundred() -> None:
    """The expected ones; no samples have no percentile."""
    hundred = list(range(1, 101))

    assert (50, 99, 100) == tuple(percentile(hundred, percent) for percent in (50, 99, 100))
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that slows down between rounds changes nothing; it would change the ratio of the medians."""
    figures = Figures([*rows("one", 100, 10, 1000), *rows("other", 200, 20, 1000)])
    one, other = (("reads", name, "reads_per_s") for name in ("one", "other"))

    assert Spread(0.5, 0.5, 1.0) == figures.compared(one, other, ratio)
    assert Spread(-10, -100, 0) == figures.compared(one, other, difference)


def test_rounds_that_one_variant_lacks_are_left_out() -> None:
    """As in a run that was interrupted; and nothing is divided by zero."""
    figures = Figures([*rows("one", 10, 20, 30), *rows("other", 5, 0)])

    assert Spread(2, 2, 2) == figures.compared(
        ("reads", "one", "reads_per_s"), ("reads", "other", "reads_per_s"), ratio
    )
    assert figures.compared(("reads", "one", "reads_per_s"), ("reads", "none", "reads_per_s"), ratio) is None
    assert figures.spread("reads", "none", "reads_per_s") is None


def test_the_transactions_of_an_idle_api_are_subtracted() -> None:
    """They are not the reads'."""
    counted = [
        Row(1, "reads", "never-stale", {"primary_transactions": 31, "reads": 1000}),
        Row(1, "reads", "article", {"primary_transactions": 4030, "reads": 1000}),
        Row(1, "reads", "bare", {"primary_transactions": 0, "reads": 1000}),
        Row(1, "reads", "idle", {"primary_transactions": 30}),
    ]

    found = {row.variant: row.figures.get("primary_queries_per_read") for row in with_queries_per_read(counted)}

    assert {"never-stale": 0.001, "article": 4.0, "bare": None, "idle": None} == found
    assert counted[:1] == list(with_queries_per_read(counted[:1]))
