"""The metrics of one router: counters of what it has done, and gauges of what it knows of its nodes."""

from __future__ import annotations

import contextlib
import itertools
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from rocket.consistency import Reason
from rocket.errors import OutcomeUnknown, Unavailable
from rocket.metrics.nodes import NodeGauges
from rocket.routing.answer import Role
from rocket.routing.limits import TooManyWaiting

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Iterator, Sequence

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from rocket.routing.answer import Answer, Route
    from rocket.routing.router import Router

ResultT = TypeVar("ResultT")

_STRAIGHT = {
    Reason.CAUGHT_UP: Role.REPLICA,
    Reason.UNCHECKED: Role.REPLICA,
    Reason.ASKED: Role.PRIMARY,
}
"""Reasons of reads that neither waited nor failed on a node, each with its only role: those of most reads."""
_OUTCOMES = ("committed", "failed", "unknown", "unavailable")
_WHY_UNAVAILABLE = ("no-node", "overloaded")
_ENDS_OF_WAITS = ("caught-up", "in-vain")
BOUNDS_S = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the buckets; the last bucket has none."""

_NAMES = (*map(floatToGoString, BOUNDS_S), "+Inf")


class Tally:
    """How many things took how long, in plain numbers: Prometheus' own histogram costs a read five times as much.

    One thread adds to it; others may look.
    """

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


class RouterMetrics(Collector):
    """Counts what a router does, and tells what it knows of its nodes.

    Callers of the router report the outcomes: by `await metrics.read(router.read(...))` and
    `with metrics.write(): ...`, or by `count_read` and `count_refused_read` where each microsecond counts. Nodes,
    lag and pools are looked at when the registry is asked, and cost nothing until then. No label names a user, a
    token or a position. A registry takes the metrics of one router; raise `ValueError` for a second one.
    """

    def __init__(self, router: Router, *, registry: CollectorRegistry = REGISTRY) -> None:
        self._straight_reads: dict[str, dict[str, Tally]] = {reason.value: {} for reason in _STRAIGHT}
        """By reason and node; the reasons as text, since members of enumerations are slow keys."""
        self._other_reads: defaultdict[tuple[str, Role, Reason], Tally] = defaultdict(Tally)
        self._writes: dict[str, Tally] = {outcome: Tally() for outcome in _OUTCOMES}
        self._waits: dict[str, Tally] = {end: Tally() for end in _ENDS_OF_WAITS}
        self._unavailable = Counter(dict.fromkeys(_WHY_UNAVAILABLE, 0))
        self._failures: Counter[str] = Counter()
        self._tokens_refused = 0
        self._nodes = NodeGauges(router)
        registry.register(self)

    # --- counting ---

    async def read(self, reading: Awaitable[Answer[ResultT]]) -> Answer[ResultT]:
        """Await a read, count it, and return its answer; what it raises is raised as it is."""
        began = time.monotonic()
        try:
            answer = await reading
        except Unavailable as error:
            self.count_refused_read(error)
            raise
        self.count_read(answer, began)
        return answer

    def count_read(self, answer: Answer[Any], began: float) -> None:
        """Count a read that was answered; `began` is in monotonic seconds."""
        took_s = time.monotonic() - began
        tallies = self._straight_reads.get(answer.reason._value_)
        if tallies is not None:
            try:
                tally = tallies[answer.node]
            except KeyError:
                tally = tallies[answer.node] = Tally()
            tally.total_s += took_s
            tally.buckets[bisect_left(BOUNDS_S, took_s)] += 1
            return
        self._other_reads[answer.node, answer.role, answer.reason].add(took_s)
        self._look_back(answer.route, "caught-up" if answer.role is Role.REPLICA else "in-vain")

    def count_refused_read(self, error: Unavailable) -> None:
        """Count a read that no node could answer, or that was rejected since too many waited already."""
        self._unavailable["overloaded" if isinstance(error.__cause__, TooManyWaiting) else "no-node"] += 1
        self._look_back(error.route, "in-vain")

    def count_refused_token(self) -> None:
        """Count a session token that this cluster has not given out, which raises `InvalidToken`."""
        self._tokens_refused += 1

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Count and time the write in the body."""
        began = time.monotonic()
        outcome = "failed"
        try:
            yield
            outcome = "committed"
        except OutcomeUnknown:
            outcome = "unknown"
            raise
        except Unavailable:
            outcome = "unavailable"
            raise
        finally:
            self._writes[outcome].add(time.monotonic() - began)

    def _look_back(self, route: Route | None, end_of_wait: str) -> None:
        if route is None:
            return
        if route.waited_s is not None:
            self._waits[end_of_wait].add(route.waited_s)
        self._failures.update(route.failed.keys())

    # --- reporting ---

    def reads(self) -> dict[tuple[str, Role, Reason], int]:
        """Return how many reads each node has answered, by its role and by why they went there."""
        return {key: tally.count for key, tally in self._reads().items()}

    def reads_unavailable(self) -> int:
        """Return how many reads no node has answered."""
        return self._unavailable.total()

    def writes(self) -> dict[str, int]:
        """Return how many writes have had which outcome; without those that none had."""
        return {outcome: tally.count for outcome, tally in self._writes.items() if tally.count}

    def _reads(self) -> dict[tuple[str, Role, Reason], Tally]:
        # Copies, each made at one go: a registry may be asked by another thread.
        reads = self._other_reads.copy()
        for reason, role in _STRAIGHT.items():
            for node, tally in self._straight_reads[reason.value].copy().items():
                reads[node, role, reason] = tally
        return reads

    def describe(self) -> Iterator[Metric]:
        """Yield the same as `collect`: a registry checks them for duplicates."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield from self._of_reads()
        yield from self._of_writes()
        yield from self._nodes.collect()

    def _of_reads(self) -> Iterator[Metric]:
        tallies = self._reads()
        reads = CounterMetricFamily(
            "rocket_reads",
            "Reads answered. Those by the primary are fallbacks.",
            labels=["node", "role", "reason"],
        )
        by_node: defaultdict[tuple[str, Role], list[Tally]] = defaultdict(list)
        for (node, role, reason), tally in tallies.items():
            reads.add_metric([node, role, reason], tally.count)
            by_node[node, role].append(tally)
        yield reads
        yield _histogram(
            "rocket_read_duration_seconds", "Time to route and answer a read.", ["node", "role"], by_node
        )
        unavailable = CounterMetricFamily(
            "rocket_reads_unavailable",
            "Reads that no node answered: none was available, or too many waited already.",
            labels=["reason"],
        )
        for why, count in self._unavailable.items():
            unavailable.add_metric([why], count)
        yield unavailable
        yield _histogram(
            "rocket_read_wait_duration_seconds",
            "Time that reads have waited for a replica to catch up.",
            ["outcome"],
            {(end,): [tally] for end, tally in self._waits.items()},
        )
        failures = CounterMetricFamily(
            "rocket_replica_failures",
            "Reads that a replica has failed, and that were tried elsewhere.",
            labels=["node"],
        )
        for node, count in self._failures.copy().items():
            failures.add_metric([node], count)
        yield failures
        yield CounterMetricFamily(
            "rocket_session_tokens_refused",
            "Session tokens that this cluster has not given out.",
            value=self._tokens_refused,
        )

    def _of_writes(self) -> Iterator[Metric]:
        writes = CounterMetricFamily("rocket_writes", "Writes by outcome.", labels=["outcome"])
        for outcome, tally in self._writes.items():
            writes.add_metric([outcome], tally.count)
        yield writes
        yield _histogram(
            "rocket_write_duration_seconds",
            "Time to commit a write and settle its floor.",
            [],
            {(): list(self._writes.values())},
        )


def _histogram(name: str, says: str, labels: list[str], tallies: dict[Any, list[Tally]]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, says, labels=labels)
    for values, several in tallies.items():
        buckets, total_s = as_histogram(several)
        family.add_metric(values, buckets, total_s)
    return family
