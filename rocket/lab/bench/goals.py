"""What rocket wants to reach, as relations within one run, and whether it did. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.lab.bench.contenders import ARTICLE, IDLE, NEVER_STALE, PRIMARY, RANDOM, TOKENLESS, UNSEEN
from rocket.lab.bench.figures import Spread, difference, ratio
from rocket.lab.bench.measures import (
    INSPECTOR,
    MAX_WAIT_MS,
    PAUSED,
    QUERIES,
    READ_AFTER_WRITE,
    READS,
    READS_WHILE_WRITING,
    WRITES,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rocket.lab.bench.figures import Figures

SCALE, SOAK = "scale", "soak"
"""What is measured by itself, beside the measures of contenders."""

_AT_LEAST, _AT_MOST, _JUST = "≥", "≤", "="


@dataclass(frozen=True, slots=True)
class Finding:
    """A figure that has a goal."""

    what: str
    spread: Spread
    """Over the rounds; the median is what counts."""
    relation: str
    goal: float
    decimals: int
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure, as precisely as it is shown, reaches the goal."""
        value = round(self.spread.median, self.decimals)
        met = {_AT_LEAST: value >= self.goal, _AT_MOST: value <= self.goal, _JUST: value == self.goal}
        return met[self.relation]


def replicas(count: int) -> str:
    """Return what stands for a contender where it is the number of replicas that makes the difference."""
    return f"{count} replicas"


def findings(figures: Figures) -> Iterator[Finding]:
    """Yield whatever the figures say about a goal."""
    for finding in (
        *_of_reads(figures),
        *_of_reads_after_writes(figures),
        *_of_the_rest(figures),
        *_of_size(figures),
    ):
        if finding is not None:
            yield finding


def stale_reads(figures: Figures) -> int:
    """Return how many reads broke the guarantee."""
    return int(
        sum(
            figures.total(measure, contender.name, "stale_reads")
            for measure in figures.measures()
            for contender in (NEVER_STALE, TOKENLESS)
        )
    )


def _of_reads(figures: Figures) -> Iterator[Finding | None]:
    for what, other, figure, relation, goal in (
        ("reads/s, never-stale ÷ random", RANDOM, "reads_per_s", _AT_LEAST, 0.95),
        ("p99 of a read, never-stale ÷ random", RANDOM, "p99_ms", _AT_MOST, 1.2),
        ("reads/s, never-stale ÷ article", ARTICLE, "reads_per_s", _AT_LEAST, 2.0),
    ):
        spread = figures.compared((READS.name, NEVER_STALE.name, figure), (READS.name, other.name, figure), ratio)
        yield _finding(what, spread, relation, goal)
    spread = figures.compared(
        (READS_WHILE_WRITING.name, NEVER_STALE.name, "reads_per_s"),
        (READS_WHILE_WRITING.name, RANDOM.name, "reads_per_s"),
        ratio,
    )
    yield _finding("reads/s while others write, never-stale ÷ random", spread, _AT_LEAST, 0.9)
    spread = figures.compared(
        (INSPECTOR.name, NEVER_STALE.name, "reads_per_s"), (INSPECTOR.name, UNSEEN.name, "reads_per_s"), ratio
    )
    yield _finding("reads/s, with an inspector at which nobody looks ÷ without", spread, _AT_LEAST, 0.98)
    for what, contender, relation, goal in (
        ("primary queries per read, never-stale with tokens", NEVER_STALE, _AT_MOST, 0.0),
        ("primary queries per read, never-stale without", TOKENLESS, _AT_MOST, 1.0),
        ("primary queries per read, article", ARTICLE, _AT_LEAST, 2.0),
    ):
        spread = figures.spread(QUERIES.name, contender.name, "primary_queries_per_read")
        yield _finding(what, spread, relation, goal, decimals=2)


def _of_reads_after_writes(figures: Figures) -> Iterator[Finding | None]:
    ours = NEVER_STALE.name
    share = figures.spread(READ_AFTER_WRITE.name, ours, "replica_share_percent")
    yield _finding("reads right after the write, by replicas", share, _AT_LEAST, 95.0, decimals=1, unit=" %")
    for what, one, other, goal in (
        (
            "p50 of a read right after the write, minus a plain one's",
            (READ_AFTER_WRITE.name, ours, "p50_ms"),
            (READ_AFTER_WRITE.name, ours, "plain_p50_ms"),
            3.0,
        ),
        (
            "p50 of such a read with replay paused, minus the primary's",
            (PAUSED.name, ours, "p50_ms"),
            (PAUSED.name, PRIMARY.name, "p50_ms"),
            MAX_WAIT_MS + 2.0,
        ),
        (
            "p99 of such a read with replay paused, minus the primary's",
            (PAUSED.name, ours, "p99_ms"),
            (PAUSED.name, PRIMARY.name, "p99_ms"),
            MAX_WAIT_MS + 2.0,
        ),
    ):
        yield _finding(what, figures.compared(one, other, difference), _AT_MOST, goal, decimals=1, unit=" ms")


def _of_the_rest(figures: Figures) -> Iterator[Finding | None]:
    writes = figures.compared(
        (WRITES.name, NEVER_STALE.name, "p50_ms"), (WRITES.name, PRIMARY.name, "p50_ms"), ratio
    )
    yield _finding("p50 of a write, never-stale ÷ primary", writes, _AT_MOST, 1.5)
    idle = figures.spread(QUERIES.name, IDLE.name, "cpu_percent")
    yield _finding("one core, taken by an idle API and its observer", idle, _AT_MOST, 2.0, decimals=1, unit=" %")
    if any(figures.values(measure, NEVER_STALE.name, "stale_reads") for measure in figures.measures()):
        stale = Spread.of([stale_reads(figures)])
        yield _finding("stale reads of never-stale, in all", stale, _JUST, 0.0, decimals=0)


def _of_size(figures: Figures) -> Iterator[Finding | None]:
    growth = figures.compared((SCALE, replicas(5000), "choose_us"), (SCALE, replicas(5), "choose_us"), ratio)
    yield _finding("choose(), 5000 replicas ÷ 5", growth, _AT_MOST, 3.0)
    cost = figures.spread(SCALE, replicas(500), "choose_us")
    yield _finding("choose(), 500 replicas", cost, _AT_MOST, 10.0, decimals=2, unit=" µs")
    sizes = list(figures.values(SOAK, NEVER_STALE.name, "resident_mib").values())
    if len(sizes) > 1:
        growth = Spread.of([sizes[-1] / sizes[0]])
        yield _finding("resident size, at the end ÷ after the first tenth", growth, _AT_MOST, 1.05)


def _finding(
    what: str, spread: Spread | None, relation: str, goal: float, *, decimals: int = 3, unit: str = ""
) -> Finding | None:
    return None if spread is None else Finding(what, spread, relation, goal, decimals, unit)
