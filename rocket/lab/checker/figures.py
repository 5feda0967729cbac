"""The figures of a run: how much was tried, and how it was answered."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from rocket.consistency import Reason
from rocket.lab.checker.history import Op, Outcome, Request, Role
from rocket.lab.checker.outages import outages_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rocket.lab.checker.history import Fault, History
    from rocket.lab.checker.outages import Outages

READS = frozenset({Request.READ, Request.LIST})


@dataclass(frozen=True, slots=True)
class FaultFigures:
    """How often one kind of fault happened, and what it met."""

    times: int
    ops_overlapped: int
    """Requests that were under way during one of them; twice if during two."""
    in_vain: int
    """How many of the times no request was under way."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run's table shows."""

    ops: int
    span_s: float
    """From the first request to the end of the last."""
    requests: Mapping[tuple[Request, Outcome], int]
    reads: Mapping[tuple[str, Role], int]
    """Reads answered, by the node and its role then."""
    fallbacks: Mapping[str, int]
    """Reads answered by the primary though a replica was looked for, by the reason given."""
    waits: int
    """Reads answered by a replica that caught up meanwhile."""
    lost_and_reported: int
    """Rides missing for a session that had been told that a promotion may have lost them."""
    lost_without_token: int
    """Rides that a promotion lost for users whose sessions send no token, so that nobody can be told."""
    faults: Mapping[str, FaultFigures]
    read_p50_ms: float | None
    read_p99_ms: float | None
    longest_without_read_s: float
    """The longest stretch in which no read was answered."""
    outages: Outages | None
    """What came of the deaths of processes; None where there is one only."""


def answered_reads(history: History) -> list[Op]:
    """Return the reads that were answered."""
    return [op for op in history.ops if op.request in READS and op.outcome is Outcome.OK]


def figures_of(history: History, *, lost_and_reported: int = 0, lost_without_token: int = 0) -> Figures:
    """Count what happened in a run."""
    reads = answered_reads(history)
    began = history.ops[0].at if history.ops else 0.0
    ended = max((op.done for op in history.ops), default=0.0)
    latencies = sorted(op.done - op.at for op in reads)
    moments = [began, *sorted(op.done for op in reads), ended]
    return Figures(
        ops=len(history.ops),
        span_s=ended - began,
        requests=dict(Counter((op.request, op.outcome) for op in history.ops)),
        reads=dict(Counter((op.node or "?", op.role) for op in reads if op.role is not None)),
        fallbacks=dict(
            Counter(op.reason or "?" for op in reads if op.role is Role.PRIMARY and op.reason != Reason.ASKED)
        ),
        waits=sum(op.reason == Reason.WAITED for op in reads),
        lost_and_reported=lost_and_reported,
        lost_without_token=lost_without_token,
        faults=_of_faults(history),
        read_p50_ms=_quantile_ms(latencies, 0.50),
        read_p99_ms=_quantile_ms(latencies, 0.99),
        longest_without_read_s=max(later - earlier for earlier, later in pairwise(moments)),
        outages=outages_of(history),
    )


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
    """Return the value that so large a share of all does not exceed."""
    if not in_order:
        return None
    return 1000 * in_order[min(len(in_order) - 1, int(share * len(in_order)))]
