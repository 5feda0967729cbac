"""The verdict on a run, and what convicts it."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rocket.lab.checker.figures import Figures
    from rocket.lab.checker.history import Fault, Op

_KEPT = 20
"""Violations of one rule that are kept whole, to pick the shortest of them; the rest are only counted."""
_SHOWN = 5


class Judgement(enum.StrEnum):
    """What a run says about the guarantee."""

    HELD = "held"
    VIOLATED = "violated"
    VOID = "void"
    """Nothing: too little happened in it, or its history is not whole."""

    @property
    def exit_code(self) -> int:
        """What the commands end with."""
        return {Judgement.HELD: 0, Judgement.VIOLATED: 2, Judgement.VOID: 3}[self]


class Rule(enum.StrEnum):
    """What must hold; the most telling first."""

    READ_YOUR_WRITES = "read-your-writes"
    """A read shows every write that was acknowledged to its session (without tokens: to its user) before."""
    MONOTONIC_READS = "monotonic-reads"
    """What a session with tokens has seen once it sees again."""
    ACKNOWLEDGED_WRITE_LOST = "acknowledged-write-lost"
    """Without a promotion no acknowledged write disappears for good."""
    LOSS_NOT_REPORTED = "loss-not-reported"
    """What a promotion lost is reported to the sessions with tokens that had been told of it."""
    LOSS_INVENTED = "loss-invented"
    """No loss is reported before there has been a promotion."""
    FOREIGN_OR_INVENTED = "foreign-or-invented"
    """A ride that is shown was written before, by the same user, with that id."""
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
    """With several processes, whichever dies, a read with a token is answered, unless the primary is away."""
    NOT_TAKEN_OVER = "not-taken-over"
    """If the process that writes the table of statuses dies or falls silent, another one soon does."""
    LEAKED = "leaked"
    """The run leaves nothing behind."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One breach of a rule, with the part of the history that shows it."""

    rule: Rule
    sentence: str
    """What is wrong, in words."""
    ops: tuple[Op, ...] = ()
    """In the order in which they began."""
    faults: tuple[Fault, ...] = ()
    """Those that were on meanwhile."""
    about: float | None = None
    """The distance of the ride that it is about."""

    @property
    def length(self) -> tuple[int, float]:
        """How much there is to follow: operations, and the seconds from the first to the last."""
        span = max(op.done for op in self.ops) - self.ops[0].at if self.ops else 0.0
        return len(self.ops), span


class Findings:
    """Collects violations."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.counts: Counter[Rule] = Counter()
        self._faults = faults
        self._kept: dict[Rule, list[Violation]] = {}

    def wants_more(self, rule: Rule) -> bool:
        """Tell whether it is worth the trouble to gather the operations that show another violation."""
        return self.counts[rule] < _KEPT

    def add(
        self,
        rule: Rule,
        sentence: str,
        *ops: Op,
        about: float | None = None,
        faults: Sequence[Fault] = (),
    ) -> None:
        """Take note of a violation; `faults` belong to it even if they overlap none of its operations."""
        if self.wants_more(rule):
            meanwhile = tuple(
                fault
                for fault in self._faults
                if fault in faults or any(fault.at <= op.done and op.at <= fault.until for op in ops)
            )
            in_order = tuple(sorted(ops, key=lambda op: (op.at, op.done)))
            self._kept.setdefault(rule, []).append(Violation(rule, sentence, in_order, meanwhile, about))
        self.counts[rule] += 1

    def excerpts(self) -> tuple[Violation, ...]:
        """Return a handful of violations: the shortest of each rule, then what is next in length."""
        ranked = [sorted(kept, key=lambda violation: violation.length) for kept in self._kept.values()]
        places = {rule: place for place, rule in enumerate(Rule)}
        best = sorted((rank, places[one.rule], one) for kept in ranked for rank, one in enumerate(kept[:2]))
        return tuple(one for _, _, one in best[:_SHOWN])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checker says about a history."""

    judgement: Judgement
    violations: tuple[Violation, ...] = ()
    """A handful, each as short as there is one."""
    counts: Mapping[Rule, int] | None = None
    """All violations, by rule."""
    reasons: tuple[str, ...] = ()
    """Why the run alone would prove nothing, even where no rule was broken."""
    figures: Figures | None = None
    """None for a history that could not be followed."""
