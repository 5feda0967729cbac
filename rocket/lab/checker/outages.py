"""What the death of a process may cost: nothing that a client with a token would notice, and two seconds.

Judged where the API has several processes. With one, whoever asks is turned away until it is back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.lab.checker.history import TAKEN_OVER, Outcome, Request
from rocket.lab.checker.verdict import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rocket.lab.checker.history import Fault, History, Op
    from rocket.lab.checker.verdict import Findings

TAKEN_OVER_WITHIN_S: Mapping[str, float] = {"writer-killed": 2.0, "writer-frozen": 4.0}
"""So soon somebody else has to write the table of statuses, by what happened to whoever did."""

_EXCUSES = frozenset(
    {
        "pool-exhaustion",  # more than the API lets in
        "primary-backend-killed",
        "primary-killed",
        "promotion",
        "promotion-lossy",
        "replica-restarted-without-primary",
    }
)
"""Faults that may leave no node to answer: then a 503 is what is promised."""
_SETTLED_S = 2.0
"""So long after such a fault some process may not have found the primary yet."""


@dataclass(frozen=True, slots=True)
class Outages:
    """What clients and the cluster noticed."""

    again: int
    """Reads with tokens that were sent again, since their connection was lost."""
    not_answered: int
    """Reads with tokens that were answered with neither 200 nor 404."""
    excused: int
    """Those of them while the primary was away, or more was asked than the API lets in."""
    taken_over_s: Mapping[str, tuple[float, ...]]
    """How long it took until another process wrote the table of statuses, by fault."""


def outages_of(history: History) -> Outages | None:
    """Count them; None where the API has a single process."""
    if history.run.processes == 1:
        return None
    failed = _not_answered(history)
    excuses = _excuses(history)
    taken_over_s: dict[str, list[float]] = {}
    for fault in history.faults:
        if isinstance(took_s := fault.detail.get(TAKEN_OVER), float):
            taken_over_s.setdefault(fault.name, []).append(took_s)
    return Outages(
        again=sum(op.again for op in history.ops if _with_token(op)),
        not_answered=len(failed),
        excused=sum(_is_excused(op, excuses) for op in failed),
        taken_over_s={name: tuple(sorted(took)) for name, took in sorted(taken_over_s.items())},
    )


def look_for_outages(history: History, findings: Findings) -> None:
    """Find reads that should have been answered, and writers of the table whom nobody succeeded in time."""
    if history.run.processes == 1:
        return
    excuses = _excuses(history)
    for op in _not_answered(history):
        if not _is_excused(op, excuses):
            findings.add(
                Rule.READ_NOT_ANSWERED,
                f"The read of session {op.session}, with its token, was not answered; the primary was there.",
                op,
            )
    for fault in history.faults:
        if fault.name in TAKEN_OVER_WITHIN_S:
            within_s, took_s = TAKEN_OVER_WITHIN_S[fault.name], fault.detail.get(TAKEN_OVER)
            if not isinstance(took_s, float) or took_s > within_s:
                after = "never" if took_s is None else f"only after {took_s} s"
                findings.add(
                    Rule.NOT_TAKEN_OVER,
                    f"{fault.name} at {fault.at:.3f} s: another process wrote the table of statuses {after}, "
                    f"and not within {within_s:g} s.",
                    faults=[fault],
                )


def _with_token(op: Op) -> bool:
    return op.request in {Request.READ, Request.LIST} and op.sent is not None


def _not_answered(history: History) -> list[Op]:
    """Return the reads with tokens that failed; what a client did not wait for is unknown, and none of them."""
    return [op for op in history.ops if _with_token(op) and op.outcome is Outcome.FAIL]


def _excuses(history: History) -> list[Fault]:
    return [fault for fault in history.faults if fault.name in _EXCUSES]


def _is_excused(op: Op, excuses: list[Fault]) -> bool:
    return any(fault.at <= op.done and op.at <= fault.until + _SETTLED_S for fault in excuses)
