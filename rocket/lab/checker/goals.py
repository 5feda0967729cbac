"""What is expected of a cluster that Patroni runs beyond the checker's rules, as a history shows it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from rocket.consistency import Lsn, SessionToken
from rocket.lab.checker.figures import READS
from rocket.lab.checker.history import Outcome, Request, Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rocket.lab.checker.history import Fault, History, Op

_BACK_WITHIN_S = 1.0
"""So soon after Patroni's own promotion a write has to be acknowledged."""
_ANSWERED = 0.999
"""The share of the reads with tokens that has to be answered, where a replica may."""

_GIVEN_UP = ("hung up", "cut off")
"""How the error of a request begins whose client did not want to wait."""


class Finding(NamedTuple):
    """One line about a run, and whether it is as it should be."""

    words: str
    good: bool
    promised: bool = False
    """Whether the guarantee has it so; the others are goals, which a slow machine misses."""


def closing_words(found: Sequence[Finding]) -> list[str]:
    """Return what is said last where goals were missed, lest a run that held be taken for one that is well."""
    missed = [one.words for one in found if not (one.good or one.promised)]
    if not missed:
        return []
    goals = sum(not one.promised for one in found)
    first = f"GOALS MISSED: {len(missed)} of {goals}. They are no part of the guarantee, and change no exit code:"
    return [first, *(f"  ! {words}" for words in missed)]


def findings(history: History) -> Iterator[Finding]:
    """Yield for each failover when writes were back, and what the old leader did; then the share of reads."""
    writes = [op for op in history.ops if op.request is Request.WRITE and op.outcome is Outcome.OK]
    for fault in history.faults:
        for promoted in fault.detail.get("promoted", ()):
            back = min((op.done for op in writes if op.at >= promoted["at"] - 1 and op.node == promoted["leader"]
                        and op.done >= promoted["at"]), default=None)  # fmt: skip
            after_s = None if back is None else back - promoted["at"]
            words = "never" if after_s is None else f"{after_s:.2f} s after"
            yield Finding(
                f"{fault.name} of {fault.node}: writes back {words} Patroni's promotion of {promoted['leader']}",
                after_s is not None and after_s <= _BACK_WITHIN_S,
            )
        for moment, which in _OLD.items():
            if (since := fault.detail.get(moment)) is not None:
                old = [op for op in _answered_by(fault.node, Role.PRIMARY, history) if since <= op.done
                       and op.at <= fault.until]  # fmt: skip
                yield Finding(
                    f"{which} old leader {fault.node}: answered {len(old)} as the primary", not old, True
                )
        if (cloned := fault.detail.get("cloned")) is not None:
            back = min((op.done for op in _answered_by(fault.node, Role.REPLICA, history) if op.at >= cloned),
                       default=None)  # fmt: skip
            words = "never" if back is None else f"{back - fault.at:.2f} s after that was asked for"
            yield Finding(f"{fault.name} of {fault.node}: read from again {words}", back is not None)
    reads = [op for op in history.ops if op.request in READS and _counts(op, history.faults)]
    share = sum(op.outcome is Outcome.OK for op in reads) / max(1, len(reads))
    yield Finding(
        f"reads answered, with tokens that a replica may answer: {share:.3%} of {len(reads)}", share >= _ANSWERED
    )


_OLD = {"thawed": "thawed", "succeeded": "cut-off"}
"""What an old leader is called, by the moment from which on it has to hold its tongue."""


def _answered_by(node: str | None, role: Role, history: History) -> Iterator[Op]:
    return (op for op in history.ops if op.node == node and op.role is role and op.outcome is Outcome.OK)


def _counts(op: Op, faults: Iterable[Fault]) -> bool:
    """Tell whether a read brought a token that a replica may answer, and its client waited for the answer.

    With a floor that is not known, or beyond what the member had that was promoted then, only a primary may.
    """
    given_up = op.outcome is Outcome.UNKNOWN and op.status is None and (op.error or "").startswith(_GIVEN_UP)
    if not op.tokens or given_up or str(Lsn.PENDING) in (op.sent or ""):
        return False
    forks = [
        Lsn.parse(promoted["fork"])
        for fault in faults
        for promoted in fault.detail.get("promoted", ())
        if promoted.get("fork") and fault.at <= op.done and op.at <= promoted["at"] + _BACK_WITHIN_S
    ]
    return not forks or _least_floor(op.sent) <= min(forks)


def _least_floor(sent: str | None) -> Lsn:
    """Return what any replica at all must have replayed to answer whoever brings these tokens."""
    floors = [Lsn(0)]
    for text in (sent or "").split(", "):
        with contextlib.suppress(ValueError):
            token = SessionToken.parse(text)
            floors.append(token.write_floor if token.node else token.highest_floor)
    return max(floors)
