"""How much a run tried and how that was answered, and whether it is enough to prove anything."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from rocket.consistency import Freshness, Reason
from rocket.lab.checker.availability import outages_of
from rocket.lab.checker.history import TENANT, Outcome, Request, Role, asked_by

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rocket.lab.checker.availability import Outages
    from rocket.lab.checker.history import Fault, History, Op

NEVER_STALE = "never-stale"
_SESSION = str(Freshness.SESSION)
_CHOSEN = {Reason.ASKED, Reason.WRITE}
"""Why a read is on the primary although a replica may serve it: the client has asked for that."""


@dataclass(frozen=True, slots=True)
class FaultFigures:
    """How often one kind of fault happened, and how many requests met it."""

    times: int
    ops_overlapped: int
    """Requests that were under way during one of them; twice if during two."""
    in_vain: int
    """How often no request was under way meanwhile."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run's table shows."""

    ops: int
    span_s: float
    """From the first request to the end of the last."""
    requests: Mapping[tuple[Request, Outcome], int]
    reads: Mapping[tuple[str, Role], int]
    """Reads answered, by the node and its role then."""
    asked: Mapping[str, tuple[int, int]]
    """Reads by what they asked to be shown: how many replicas have answered, and how many any node has."""
    fallbacks: Mapping[str, int]
    """Reads that the primary answered since no replica could, by the reason given."""
    waits: int
    """Reads answered by a replica that caught up meanwhile."""
    lost_and_reported: int
    """Rides missing for a session that had been told that a promotion may have lost them."""
    lost_without_token: int
    """Rides that a promotion lost for users whose sessions send no token: no answer can report that."""
    faults: Mapping[str, FaultFigures]
    read_p50_ms: float | None
    read_p99_ms: float | None
    longest_without_read_s: float
    """The longest stretch in which no read was answered."""
    outages: Outages | None
    """None where the API has a single process."""
    library: Mapping[tuple[str, Outcome], int]
    """Reads and writes of sessions that use the library itself, by the kind of work."""
    raised: Mapping[str, int]
    """Answers that work gave by raising an error, or was cancelled with."""


def figures_of(history: History, *, lost_and_reported: int = 0, lost_without_token: int = 0) -> Figures:
    """Count what happened in a run."""
    reads = history.answered_reads()
    began = history.ops[0].at if history.ops else 0.0
    ended = max((op.done for op in history.ops), default=0.0)
    latencies = sorted(op.done - op.at for op in reads)
    moments = [began, *sorted(op.done for op in reads), ended]
    return Figures(
        ops=len(history.ops),
        span_s=ended - began,
        requests=dict(Counter((op.request, op.outcome) for op in history.ops)),
        reads=dict(Counter((op.node or "?", op.role) for op in reads if op.role is not None)),
        asked=_asked(reads),
        fallbacks=dict(
            Counter(op.reason or "?" for op in reads if op.role is Role.PRIMARY and op.reason not in _CHOSEN)
        ),
        waits=sum(op.reason == Reason.WAITED for op in reads),
        lost_and_reported=lost_and_reported,
        lost_without_token=lost_without_token,
        faults=_of_faults(history),
        read_p50_ms=_quantile_ms(latencies, 0.50),
        read_p99_ms=_quantile_ms(latencies, 0.99),
        longest_without_read_s=max(later - earlier for earlier, later in pairwise(moments)),
        outages=outages_of(history),
        library=dict(Counter((op.work, op.outcome) for op in history.ops if op.work is not None)),
        raised=dict(Counter(op.raised for op in reads if op.raised is not None)),
    )


def _asked(reads: Sequence[Op]) -> dict[str, tuple[int, int]]:
    answered = Counter(op.freshness or _SESSION for op in reads)
    by_replicas = Counter(op.freshness or _SESSION for op in reads if op.role is Role.REPLICA)
    return {asked: (by_replicas[asked], count) for asked, count in sorted(answered.items())}


def _of_faults(history: History) -> dict[str, FaultFigures]:
    began = [op.at for op in history.ops]
    ended = sorted(op.done for op in history.ops)

    def overlapped(fault: Fault) -> int:
        return bisect_right(began, fault.until) - bisect_left(ended, fault.at)

    by_name: dict[str, list[int]] = {}
    for fault in history.faults:
        by_name.setdefault(fault.name, []).append(overlapped(fault))
    return {
        name: FaultFigures(times=len(counts), ops_overlapped=sum(counts), in_vain=counts.count(0))
        for name, counts in sorted(by_name.items())
    }


def _quantile_ms(in_order: Sequence[float], share: float) -> float | None:
    """Return the value that this share of all values does not exceed."""
    if not in_order:
        return None
    return 1000 * in_order[min(len(in_order) - 1, int(share * len(in_order)))]


# --- whether that is enough ---


def shortcomings(history: History, figures: Figures) -> Iterator[str]:
    """Yield every reason why a run in which no rule was broken would still prove nothing."""
    if history.end is None:
        yield "the history has no end: the run was cut off"
    if not figures.requests.get((Request.WRITE, Outcome.OK)):
        yield "no write was acknowledged"
    if not figures.reads:
        yield "no read was answered"
    if history.run.asks_replicas:
        yield from (f"{node} never served a read as a replica" for node in _idle_replicas(history, figures))
    if history.run.routing == NEVER_STALE:
        yield from _untried_freshness(history, figures)
    if history.run.library and not figures.raised:
        yield "no error of work showed anything"
    if history.run.library and not figures.library.get((TENANT, Outcome.OK)):
        yield "no work was a tenant's"
    yield from _untried_faults(history, figures)


def _untried_freshness(history: History, figures: Figures) -> Iterator[str]:
    asked = set(asked_by(history.run.freshness))
    if asked & {Freshness.SESSION, Freshness.GLOBAL}:
        if not figures.fallbacks:
            yield "no read fell back to the primary"
        if not figures.waits:
            yield "no read waited for a replica to catch up"
    for each in sorted(map(str, asked - {Freshness.SESSION})):
        if not figures.asked.get(each, (0, 0))[0]:
            yield f"no read that asked for '{each}' was answered by a replica"


def _untried_faults(history: History, figures: Figures) -> Iterator[str]:
    for name in sorted(set(history.run.faults) - figures.faults.keys()):
        yield f"the fault '{name}' was meant to happen and never did"
    for name, fault in figures.faults.items():
        if fault.in_vain:
            yield f"{fault.in_vain} of {fault.times} times no request met the fault '{name}'"


def _idle_replicas(history: History, figures: Figures) -> list[str]:
    """Return the nodes that should have served as a replica and never did: of all nodes, one is the primary."""
    served = {node for node, role in figures.reads if role is Role.REPLICA}
    primaries = {op.node for op in history.ops if op.role is Role.PRIMARY} & set(history.run.nodes)
    idle = [node for node in history.run.nodes if node not in served]
    excused = [node for node in idle if node in primaries or not primaries][:1]
    return [node for node in idle if node not in excused]
