"""The checker: judges a run by its history alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from rocket.lab.checker.availability import check_outages, check_resumption
from rocket.lab.checker.coverage import figures_of, shortcomings
from rocket.lab.checker.expectations import Expectations
from rocket.lab.checker.findings import Findings, Rule
from rocket.lab.checker.history import Request
from rocket.lab.checker.rules import check_answers, check_other_clusters, check_rides, check_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rocket.lab.checker.coverage import Figures
    from rocket.lab.checker.findings import Violation
    from rocket.lab.checker.history import History, Op

_CONTRADICTIONS_NAMED = 5


class Judgement(enum.StrEnum):
    """What a run says about the guarantee."""

    HELD = "held"
    VIOLATED = "violated"
    VOID = "void"
    """Nothing: too little happened in it, or its history is not whole."""

    @property
    def exit_code(self) -> int:
        """The exit code of the commands that judge."""
        return {Judgement.HELD: 0, Judgement.VIOLATED: 2, Judgement.VOID: 3}[self]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of a history, and the reasons for it."""

    judgement: Judgement
    violations: tuple[Violation, ...] = ()
    """The shortest ones, up to five."""
    counts: Mapping[Rule, int] | None = None
    """All violations, by rule."""
    reasons: tuple[str, ...] = ()
    """Why the run alone would prove nothing, even where no rule was broken."""
    figures: Figures | None = None
    """None for a history that could not be followed."""


def check(history: History) -> Verdict:
    """Judge a run: violated if any rule was broken, void if it proves nothing, else held."""
    sessions: dict[str, list[Op]] = {}
    for op in history.ops:
        sessions.setdefault(op.session, []).append(op)
    contradictions = [*_contradictions(history, sessions)]
    if contradictions:
        return Verdict(Judgement.VOID, reasons=tuple(contradictions[:_CONTRADICTIONS_NAMED]))

    findings = Findings(history.faults)
    for session in sessions.values():
        check_tokens(session, findings)
    check_rides(history, findings)
    check_answers(history, findings)
    check_other_clusters(history, findings)
    check_outages(history, findings)
    expectations = Expectations(history, findings)
    expectations.check(sessions)
    reasons = check_resumption(history, findings)
    for leaked in history.end.leaked if history.end else ():
        findings.add(Rule.LEAKED, f"The run left behind: {leaked}.")

    figures = figures_of(
        history,
        lost_and_reported=len(expectations.reported),
        lost_without_token=len(expectations.lost_without_token),
    )
    reasons.extend(shortcomings(history, figures))
    judgement = Judgement.VIOLATED if findings.counts else Judgement.VOID if reasons else Judgement.HELD
    return Verdict(judgement, findings.excerpts(), findings.counts, tuple(reasons), figures)


def _contradictions(history: History, sessions: dict[str, list[Op]]) -> Iterator[str]:
    """Yield what no recorder of a real run can have written: then nothing follows from the history."""
    for name, ops in sessions.items():
        if len({(op.user, op.tokens) for op in ops}) > 1:
            yield f"the history is garbled: session {name} is of several users, or sends its tokens only at times"
        for earlier, later in pairwise(ops):
            if later.at < earlier.done:
                yield (
                    f"the history is garbled: session {name} asked at {later.at:.6f} s "
                    f"while its request of {earlier.at:.6f} s was under way until {earlier.done:.6f} s"
                )
                break
    written: set[float | None] = set()
    for op in history.ops:
        if op.request is Request.WRITE:
            if op.distance in written:
                yield f"the history is garbled: two writes of the distance {op.distance}"
            written.add(op.distance)
