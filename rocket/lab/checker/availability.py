"""How soon nodes and processes were back, and which reads were not answered: rules, and targets of failovers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rocket.consistency import Lsn, SessionToken
from rocket.lab.checker.findings import Rule
from rocket.lab.checker.history import READS, SETTLED_S, TAKEN_OVER, Outcome, Role

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rocket.lab.checker.findings import Findings
    from rocket.lab.checker.history import Fault, History, Op

RESUME_WITHIN_S = 10.0
"""So soon after the last fault every replica has to serve reads again."""

TAKEN_OVER_WITHIN_S: Mapping[str, float] = {"writer-killed": 2.0, "writer-frozen": 4.0}
"""So soon another process has to write the table of statuses, by the fault of the one that did."""

_EXCUSES = frozenset(
    {
        "pool-exhaustion",  # more requests than the API admits
        "primary-backend-killed",
        "primary-killed",
        "promotion",
        "promotion-lossy",
        "replica-restarted-without-primary",
        "restored-snapshot",
        "signal-removed",
    }
)
"""Faults that may leave no node to answer: then a 503 is what is promised."""


# --- replicas, once the faults are over ---


def check_resumption(history: History, findings: Findings) -> list[str]:
    """Find whether replica reads resumed after the faults; return why that is unknown, if it is."""
    if not history.run.asks_replicas:
        return []
    if history.healed is None:
        return ["the history does not say that the faults were over"]
    healed = history.healed.at
    first: dict[str, Op] = {}
    for op in sorted(history.answered_reads(), key=lambda op: op.done):
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


# --- several processes of the API ---


@dataclass(frozen=True, slots=True)
class Outages:
    """What clients and the cluster noticed of processes that died or were frozen."""

    again: int
    """Reads with tokens that were sent again, since their connection was lost."""
    not_answered: int
    """Reads with tokens that were answered with neither 200 nor 404."""
    excused: int
    """Those of them while the primary was away, or more was asked than the API admits."""
    taken_over_s: Mapping[str, tuple[float, ...]]
    """How long it took until another process wrote the table of statuses, by fault."""


def outages_of(history: History) -> Outages | None:
    """Count them; None where the API has a single process: without it, no request is answered at all."""
    if history.run.processes == 1:
        return None
    failed = _not_answered(history)
    taken_over_s: dict[str, list[float]] = {}
    for fault in history.faults:
        if isinstance(took_s := fault.detail.get(TAKEN_OVER), float):
            taken_over_s.setdefault(fault.name, []).append(took_s)
    return Outages(
        again=sum(op.again for op in history.ops if _is_read_with_token(op)),
        not_answered=len(failed),
        excused=sum(_is_excused(op, history) for op in failed),
        taken_over_s={name: tuple(sorted(took)) for name, took in sorted(taken_over_s.items())},
    )


def check_outages(history: History, findings: Findings) -> None:
    """Find reads that should have been answered, and table writers that were not replaced in time."""
    if history.run.processes == 1:
        return
    for op in _not_answered(history):
        if not _is_excused(op, history):
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


def _is_read_with_token(op: Op) -> bool:
    return op.request in READS and op.sent is not None


def _not_answered(history: History) -> list[Op]:
    """Return the reads with tokens that failed; one whose client hung up is unknown, and none of them."""
    return [op for op in history.ops if _is_read_with_token(op) and op.outcome is Outcome.FAIL]


def _is_excused(op: Op, history: History) -> bool:
    return any(fault.name in _EXCUSES and fault.overlaps(op.at - SETTLED_S, op.done) for fault in history.faults)


# --- a cluster that Patroni runs ---

_WRITES_BACK_WITHIN_S = 1.0
"""So soon after Patroni's own promotion a write should be acknowledged."""
_ANSWERED = 0.999
"""The share of the reads with tokens that should be answered, where a replica may."""
_CLIENT_GONE = ("hung up", "cut off")
"""How the error of a request begins whose client did not wait for the answer."""
_OLD_LEADER = {"thawed": "thawed", "succeeded": "cut-off"}
"""What an old leader is called, by the moment from which it must not answer as the primary."""


class Target(NamedTuple):
    """One line about a run, and whether it is as it should be."""

    text: str
    met: bool
    promised: bool = False
    """Whether the guarantee covers it; the others depend on the machine, and a slow one misses them."""


def failover_targets(history: History) -> Iterator[Target]:
    """Yield for each failover when writes were back, and what the old leader did; then the share of reads."""
    writes = [op for op in history.ops if op.acknowledged_write]
    for fault in history.faults:
        for promoted in fault.detail.get("promoted", ()):
            back = min((op.done for op in writes if op.at >= promoted["at"] - 1 and op.node == promoted["leader"]
                        and op.done >= promoted["at"]), default=None)  # fmt: skip
            after_s = None if back is None else back - promoted["at"]
            when = "never" if after_s is None else f"{after_s:.2f} s after"
            yield Target(
                f"{fault.name} of {fault.node}: writes back {when} Patroni's promotion of {promoted['leader']}",
                after_s is not None and after_s <= _WRITES_BACK_WITHIN_S,
            )
        for moment, which in _OLD_LEADER.items():
            if (since := fault.detail.get(moment)) is not None:
                old = [op for op in _answered_by(fault.node, Role.PRIMARY, history) if since <= op.done
                       and op.at <= fault.until]  # fmt: skip
                yield Target(f"{which} old leader {fault.node}: answered {len(old)} as the primary", not old, True)
        if (cloned := fault.detail.get("cloned")) is not None:
            back = min((op.done for op in _answered_by(fault.node, Role.REPLICA, history) if op.at >= cloned),
                       default=None)  # fmt: skip
            when = "never" if back is None else f"{back - fault.at:.2f} s after that was asked for"
            yield Target(f"{fault.name} of {fault.node}: read from again {when}", back is not None)
    reads = [op for op in history.ops if op.request in READS and _may_expect_an_answer(op, history.faults)]
    share = sum(op.outcome is Outcome.OK for op in reads) / max(1, len(reads))
    yield Target(
        f"reads answered, with tokens that a replica may answer: {share:.3%} of {len(reads)}", share >= _ANSWERED
    )


def missed_targets(targets: Sequence[Target]) -> list[str]:
    """Return the last lines of a run that held and yet missed targets; none if it met them all."""
    missed = [target.text for target in targets if not (target.met or target.promised)]
    if not missed:
        return []
    count = sum(not target.promised for target in targets)
    first = f"TARGETS MISSED: {len(missed)} of {count}. The guarantee does not cover them, nor does the exit code:"
    return [first, *(f"  ! {text}" for text in missed)]


def _answered_by(node: str | None, role: Role, history: History) -> Iterator[Op]:
    return (op for op in history.ops if op.node == node and op.role is role and op.outcome is Outcome.OK)


def _may_expect_an_answer(op: Op, faults: Sequence[Fault]) -> bool:
    """Return whether a read brought a token that a replica may answer, and its client waited for the answer.

    With a floor that is pending, or beyond what the member had that was promoted then, only a primary may; and
    only a primary can say what a global read has to show.
    """
    client_gone = op.outcome is Outcome.UNKNOWN and op.status is None and (op.error or "").startswith(_CLIENT_GONE)
    if not op.tokens or op.asks_for_all or client_gone or str(Lsn.PENDING) in (op.sent or ""):
        return False
    forks = [
        Lsn.parse(promoted["fork"])
        for fault in faults
        for promoted in fault.detail.get("promoted", ())
        if promoted.get("fork") and fault.at <= op.done and op.at <= promoted["at"] + _WRITES_BACK_WITHIN_S
    ]
    return not forks or _least_floor(op.sent) <= min(forks)


def _least_floor(sent: str | None) -> Lsn:
    """Return the LSN that a replica must have replayed at least to answer a request with these tokens."""
    floors = [Lsn(0)]
    for text in (sent or "").split(", "):
        with contextlib.suppress(ValueError):
            token = SessionToken.parse(text)
            floors.append(token.write_floor if token.node else token.highest_floor)
    return max(floors)
