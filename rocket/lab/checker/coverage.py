"""Whether a run tried enough to prove anything, and whether the replicas came back after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket.lab.checker.figures import answered_reads
from rocket.lab.checker.history import Outcome, Request, Role
from rocket.lab.checker.verdict import Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rocket.lab.checker.figures import Figures
    from rocket.lab.checker.history import History, Op
    from rocket.lab.checker.verdict import Findings

RESUME_WITHIN_S = 10.0
"""So soon after the last fault every replica has to serve reads again."""

NEVER_STALE = "never-stale"
PRIMARY_ONLY = "primary"
"""The routing that asks no replica at all."""


def shortcomings(history: History, figures: Figures) -> Iterator[str]:
    """Yield every reason why a run in which no rule was broken would still prove nothing."""
    if history.end is None:
        yield "the history has no end: the run was cut off"
    if not figures.requests.get((Request.WRITE, Outcome.OK)):
        yield "no write was acknowledged"
    if not figures.reads:
        yield "no read was answered"
    if history.run.routing != PRIMARY_ONLY:
        yield from (f"{node} never served a read as a replica" for node in _idle_replicas(history, figures))
    if history.run.routing == NEVER_STALE:
        if not figures.fallbacks:
            yield "no read fell back to the primary"
        if not figures.waits:
            yield "no read waited for a replica to catch up"
    yield from _untried_faults(history, figures)


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


def look_for_resumption(history: History, findings: Findings) -> list[str]:
    """Find whether replica reads resumed after the faults; return why that cannot be told, if it cannot."""
    if history.run.routing == PRIMARY_ONLY:
        return []
    if history.healed is None:
        return ["the history does not say that the faults were over"]
    healed = history.healed.at
    first: dict[str, Op] = {}
    for op in sorted(answered_reads(history), key=lambda op: op.done):
        if op.role is Role.REPLICA and op.node is not None and op.done >= healed:
            first.setdefault(op.node, op)
    late = {node: op for node, op in first.items() if op.done > healed + RESUME_WITHIN_S}
    needed = len(history.run.nodes) - 1
    if not late and len(first) >= needed:
        return []
    went_on_s = max((op.done for op in history.ops), default=healed) - healed
    resumed = sorted(first.keys() - late.keys())
    what = (
        f"{len(resumed)} of {needed} replicas ({', '.join(resumed) or 'none'}) served reads "
        f"within {RESUME_WITHIN_S:g} s after the faults were over at {healed:.3f} s"
    )
    if went_on_s < RESUME_WITHIN_S:
        return [f"only {what}, but there was traffic for {went_on_s:.1f} s only"]
    later = f"; {', '.join(sorted(late))} only later" if late else ""
    findings.add(Rule.NOT_RESUMED, f"Only {what}{later}.", *late.values())
    return []
