"""What is wrong with a run: the rules, and the violations found."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket.lab.checker.history import Fault, Op

_KEPT = 20
"""Violations of one rule that are kept whole, to pick the shortest of them; the rest are only counted."""
_SHOWN = 5


class Rule(enum.StrEnum):
    """What must hold; the most telling first."""

    READ_YOUR_WRITES = "read-your-writes"
    """A read shows every write that was acknowledged to its session (without tokens: to its user) before."""
    GLOBAL_READS = "global-reads"
    """A read that asks for all that is committed shows every write that was acknowledged to any session before."""
    TOO_OLD = "too-old"
    """A read within some seconds shows every write that was acknowledged to any session longer ago than that."""
    MONOTONIC_READS = "monotonic-reads"
    """A session with tokens is shown again what it was shown before."""
    ACKNOWLEDGED_WRITE_LOST = "acknowledged-write-lost"
    """Without a promotion no acknowledged write disappears for good."""
    LOSS_NOT_REPORTED = "loss-not-reported"
    """A session with tokens is told that a promotion lost what it had been shown."""
    LOSS_INVENTED = "loss-invented"
    """No loss is reported before there has been a promotion."""
    FOREIGN_OR_INVENTED = "foreign-or-invented"
    """A ride that is shown was written before, by the same user, with that id."""
    STATE_LEFT_OVER = "state-left-over"
    """Work finds nothing in its session of earlier work: no role, no setting, and no other tenant's rows."""
    TAKEN_BY_ANOTHER_CLUSTER = "taken-by-another-cluster"
    """A server of another cluster at an address of ours is given nothing to write."""
    FAILED_YET_THERE = "failed-yet-there"
    """A write that was reported as failed never shows."""
    FLOORS_GO_BACK = "floors-go-back"
    """Within an epoch a token's floors never fall; along a session its timeline never does."""
    MALFORMED_TOKEN = "malformed-token"  # noqa: S105 - the name of a rule
    """What is handed out as a session token is one."""
    UNEXPECTED_ANSWER = "unexpected-answer"
    """The API answers with what it documents, and knows its users."""
    NOT_RESUMED = "not-resumed"
    """Once the faults are over, all replicas soon serve reads again."""
    READ_NOT_ANSWERED = "read-not-answered"
    """With several processes, of which any may die, reads with tokens are answered unless the primary is away."""
    NOT_TAKEN_OVER = "not-taken-over"
    """If the process that writes the table of statuses dies or is frozen, another one soon writes it."""
    LEAKED = "leaked"
    """The run leaves nothing behind."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One breach of a rule, with the part of the history that shows it."""

    rule: Rule
    sentence: str
    """What is wrong."""
    ops: tuple[Op, ...] = ()
    """In the order in which they began."""
    faults: tuple[Fault, ...] = ()
    """Those that were on meanwhile."""
    about: float | None = None
    """The distance of the ride that it is about."""

    @property
    def length(self) -> tuple[int, float]:
        """How much there is to read: operations, and the seconds from the first to the last."""
        span = max(op.done for op in self.ops) - self.ops[0].at if self.ops else 0.0
        return len(self.ops), span


class Findings:
    """Collects violations."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.counts: Counter[Rule] = Counter()
        self._faults = faults
        self._kept: dict[Rule, list[Violation]] = {}

    def wants_more(self, rule: Rule) -> bool:
        """Return whether another violation of a rule would be kept, with the operations that show it."""
        return self.counts[rule] < _KEPT

    def add(
        self,
        rule: Rule,
        sentence: str,
        *ops: Op,
        about: float | None = None,
        faults: Sequence[Fault] = (),
    ) -> None:
        """Record a violation; `faults` belong to it even if they overlap none of its operations."""
        if self.wants_more(rule):
            meanwhile = tuple(
                fault
                for fault in self._faults
                if fault in faults or any(fault.overlaps(op.at, op.done) for op in ops)
            )
            in_order = tuple(sorted(ops, key=lambda op: (op.at, op.done)))
            self._kept.setdefault(rule, []).append(Violation(rule, sentence, in_order, meanwhile, about))
        self.counts[rule] += 1

    def excerpts(self) -> tuple[Violation, ...]:
        """Return up to five violations: the shortest of each rule, then the next in length."""
        ranked = [sorted(kept, key=lambda violation: violation.length) for kept in self._kept.values()]
        places = {rule: place for place, rule in enumerate(Rule)}
        best = sorted((rank, places[one.rule], one) for kept in ranked for rank, one in enumerate(kept[:2]))
        return tuple(one for _, _, one in best[:_SHOWN])
