"""The checker: judges a run by its history alone."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rocket.lab.checker.answers import look_at_answers
from rocket.lab.checker.coverage import look_for_resumption, shortcomings
from rocket.lab.checker.expectations import Debts
from rocket.lab.checker.figures import figures_of
from rocket.lab.checker.history import Request
from rocket.lab.checker.outages import look_for_outages
from rocket.lab.checker.rides import look_at_rides
from rocket.lab.checker.tokens import look_at_tokens
from rocket.lab.checker.verdict import Findings, Judgement, Rule, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rocket.lab.checker.history import History, Op

_CONTRADICTIONS_NAMED = 5


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
        look_at_tokens(session, findings)
    look_at_rides(history, findings)
    look_at_answers(history, findings)
    look_for_outages(history, findings)
    debts = Debts(history, findings)
    debts.look_at(sessions)
    reasons = look_for_resumption(history, findings)
    for leaked in history.end.leaked if history.end else ():
        findings.add(Rule.LEAKED, f"The run left behind: {leaked}.")

    figures = figures_of(
        history, lost_and_reported=len(debts.reported), lost_without_token=len(debts.lost_without_token)
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
