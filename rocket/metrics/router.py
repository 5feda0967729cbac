"""The metrics of one router: counters of what it has done, and gauges of what it knows of its nodes."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from rocket.consistency import Freshness, Reason
from rocket.errors import InvalidToken, OutcomeUnknown, Unavailable
from rocket.metrics.nodes import NodeGauges, of_process
from rocket.routing.answer import Answer, Role
from rocket.routing.limits import TooManyWaiting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from rocket.routing.answer import Route
    from rocket.routing.router import Router

_STRAIGHT = {
    Reason.CAUGHT_UP: Role.REPLICA,
    Reason.UNCHECKED: Role.REPLICA,
    Reason.ASKED: Role.PRIMARY,
}
"""Reasons of reads that neither waited nor failed on a node, each with its only role: those of most reads."""
_FRESHNESS = tuple(each.name for each in (Freshness.SESSION, Freshness.GLOBAL, Freshness.within(1), Freshness.ANY))
"""What reads may ask for: those within some seconds are one kind, however many."""
_NO_NODE = "none"
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


class RouterMetrics:
    """Counts every read and write of a router, and tells what it knows of its nodes.

    It registers itself with the router: reads and writes are counted however they come there, through sessions
    and middlewares as well. Nodes, lag and pools are looked at when the registry is asked, and cost nothing until
    then. No label names a user, a token or a position.

    Where one process has several routers, each needs a `name`, which becomes the label `router` of its metrics.
    Raise `ValueError` if it has none, or the name of another one in the same registry.
    """

    def __init__(self, router: Router, *, name: str | None = None, registry: CollectorRegistry = REGISTRY) -> None:
        self.name = name
        """The value of the label `router`; None: there is no such label."""
        self._straight_reads: dict[str, dict[str, Tally]] = {reason.value: {} for reason in _STRAIGHT}
        """By reason and node; the reasons as text, since members of enumerations are slow keys."""
        self._other_reads: defaultdict[tuple[str, Role, Reason], Tally] = defaultdict(Tally)
        self._asked = {role: dict.fromkeys(_FRESHNESS, 0) for role in (*(each.value for each in Role), _NO_NODE)}
        """Reads by the role of who answered, and by what they asked to be shown."""
        self._writes: dict[str, Tally] = {outcome: Tally() for outcome in _OUTCOMES}
        self._waits: dict[str, Tally] = {end: Tally() for end in _ENDS_OF_WAITS}
        self._unavailable = Counter(dict.fromkeys(_WHY_UNAVAILABLE, 0))
        self._failures: Counter[str] = Counter()
        self._reads_failed = 0
        self._tokens_refused = 0
        self._router = router
        self._nodes = NodeGauges(router)
        self._family = _Family.of(registry)
        try:
            self._family.add(self)
        except ValueError:
            self._nodes.close()
            raise
        router.on_read.append(self._count_read)
        router.on_write.append(self._count_write)
        router.on_invalid_token.append(self._count_invalid_token)

    def unregister(self) -> None:
        """Count no more, and leave the registry: for a router that is closed before its process ends."""
        self._family.remove(self)
        self._nodes.close()
        self._router.on_read.remove(self._count_read)
        self._router.on_write.remove(self._count_write)
        self._router.on_invalid_token.remove(self._count_invalid_token)

    # --- counting ---

    def _count_read(self, ended: Answer[Any] | BaseException, took_s: float) -> None:
        if not isinstance(ended, Answer):
            self._count_failed_read(ended)
            return
        if ended.route is not None:
            self._asked[ended.role._value_][ended.route.freshness.name] += 1
        tallies = self._straight_reads.get(ended.reason._value_)
        if tallies is not None:
            try:
                tally = tallies[ended.node]
            except KeyError:
                tally = tallies[ended.node] = Tally()
            tally.total_s += took_s
            tally.buckets[bisect_left(BOUNDS_S, took_s)] += 1
            return
        self._other_reads[ended.node, ended.role, ended.reason].add(took_s)
        self._look_back(ended.route, "caught-up" if ended.role is Role.REPLICA else "in-vain")

    def _count_failed_read(self, error: BaseException) -> None:
        if isinstance(error, Unavailable):
            self._unavailable["overloaded" if isinstance(error.__cause__, TooManyWaiting) else "no-node"] += 1
            self._look_back(error.route, "in-vain")
            if error.route is not None:
                self._asked[_NO_NODE][error.route.freshness.name] += 1
        elif isinstance(error, InvalidToken):
            self._tokens_refused += 1
        else:
            self._reads_failed += 1

    def _count_write(self, ended: Answer[Any] | BaseException, took_s: float) -> None:
        match ended:
            case InvalidToken():
                self._tokens_refused += 1
                return
            case Answer():
                outcome = "committed"
            case OutcomeUnknown():
                outcome = "unknown"
            case Unavailable():
                outcome = "unavailable"
            case _:
                outcome = "failed"
        self._writes[outcome].add(took_s)

    def _count_invalid_token(self, _error: InvalidToken) -> None:
        self._tokens_refused += 1

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

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, without the label `router`."""
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
        yield from self._of_freshness()
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
        yield CounterMetricFamily(
            "rocket_reads_failed",
            "Reads that raised an error of the work that was to be done, or were cancelled.",
            value=self._reads_failed,
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

    def _of_freshness(self) -> Iterator[Metric]:
        asked = CounterMetricFamily(
            "rocket_read_freshness",
            "Reads by what they asked to be shown, and by the role of the node that answered; none: no node did.",
            labels=["freshness", "role"],
        )
        for role, counts in self._asked.items():
            for freshness, count in counts.items():
                asked.add_metric([freshness, role], count)
        yield asked
        yield CounterMetricFamily(
            "rocket_flush_questions",
            "Questions to the primary for what is committed, each for all global reads that waited for it.",
            value=self._router.flush_questions,
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


class _Family(Collector):
    """The metrics of all routers in one registry: each metric once, with the samples of each router."""

    _all: ClassVar[WeakValueDictionary[int, _Family]] = WeakValueDictionary()
    """By the id of their registry, which lives as long as they do."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._members: list[RouterMetrics] = []

    @classmethod
    def of(cls, registry: CollectorRegistry) -> _Family:
        return cls._all.get(id(registry)) or cls(registry)

    def add(self, metrics: RouterMetrics) -> None:
        names = {member.name for member in self._members}
        if names and (metrics.name in names or None in {metrics.name, *names}):
            raise ValueError(
                "this registry has the metrics of another router already: give each a name of its own, as in "
                "RouterMetrics(router, name='notes')"
            )
        self._members = [*self._members, metrics]  # not the same list: another thread may collect
        if not names:
            try:
                self._registry.register(self)
            except ValueError:
                self._members = []
                raise
            self._all[id(self._registry)] = self

    def remove(self, metrics: RouterMetrics) -> None:
        self._members = [member for member in self._members if member is not metrics]
        if not self._members:
            self._registry.unregister(self)
            del self._all[id(self._registry)]

    def describe(self) -> Iterable[Metric]:
        return self.collect()  # a registry checks them for duplicates

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for member in self._members:
            for family in member.collect():
                if member.name is not None:
                    family.samples = [
                        sample._replace(labels={"router": member.name, **sample.labels})
                        for sample in family.samples
                    ]
                if (same := families.setdefault(family.name, family)) is not family:
                    same.samples += family.samples
        return [*families.values(), *of_process()]


def _histogram(name: str, says: str, labels: list[str], tallies: dict[Any, list[Tally]]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, says, labels=labels)
    for values, several in tallies.items():
        buckets, total_s = as_histogram(several)
        family.add_metric(values, buckets, total_s)
    return family
