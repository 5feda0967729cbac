"""Following through a history what each reader is owed, and finding the answers that do not show it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from rocket.lab.checker.history import Outcome, Request, Role
from rocket.lab.checker.owed import ExpectedRide, Owed
from rocket.lab.checker.promotions import SETTLED_S, Promotions
from rocket.lab.checker.verdict import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rocket.lab.checker.history import History, Op
    from rocket.lab.checker.verdict import Findings


class Debts:
    """Read-your-writes, monotonic reads, and what a promotion excuses."""

    def __init__(self, history: History, findings: Findings) -> None:
        self.reported: set[float] = set()
        """Rides missing for a session that had been told so."""
        self.lost_without_token: set[float] = set()
        """Rides missing, after a promotion, for users whose sessions send no tokens."""
        self._findings = findings
        self._promotions = Promotions(history.faults)
        self._writes = {op.distance: op for op in history.ops if op.request is Request.WRITE}
        self._ops = history.ops

    @cached_property
    def _last_shown(self) -> dict[float, float]:
        """When the last answer began that shows a ride, by distance."""
        last: dict[float, float] = {}
        for op in self._ops:
            last.update(dict.fromkeys(op.shown or (), op.at))
        return last

    def look_at(self, sessions: Mapping[str, Sequence[Op]]) -> None:
        """Look at every reader: each session with tokens by itself, the others by their users."""
        users: dict[str, list[Op]] = {}
        without_tokens = {ops[0].user for ops in sessions.values() if not ops[0].tokens}
        for ops in sessions.values():
            if ops[0].tokens:
                self._look_at_session(ops)
            if ops[0].user in without_tokens:
                users.setdefault(ops[0].user, []).extend(ops)
        for ops in users.values():
            self._look_at_user(ops)

    # --- with tokens ---

    def _look_at_session(self, ops: Sequence[Op]) -> None:
        """Every acknowledged write of the session, and all that it saw, is owed to it from then on."""
        owed, notices = Owed(), 0
        for place, op in enumerate(ops):
            notices += op.lost is not None
            if _acknowledged(op):
                owed.add(_debt_of(op, notices))
            shown = op.shown
            if shown is None:
                continue
            for debt in owed.missing_from(op, shown):
                promoted = bool(self._promotions.between(debt.since, op.done))
                if promoted and notices > debt.notice:
                    owed.forgive(debt)
                    self.reported.add(debt.distance)
                else:
                    self._convict(debt, ops[:place], op, promoted=promoted)
            if notices:
                # What is shown by the answer that tells of a loss, or after it, is not what was lost.
                for debt in owed.among(shown):
                    if debt.notice < notices:
                        debt.since, debt.notice = op.at, notices
            for distance in owed.unheard_of(shown):
                owed.add(ExpectedRide(shown[distance], distance, write=None, since=op.at, notice=notices))

    # --- without ---

    def _look_at_user(self, ops: Sequence[Op]) -> None:
        """Every write that any session of the user was acknowledged is owed to reads that begin later."""
        owed = Owed()
        writes = sorted((op for op in ops if _acknowledged(op)), key=lambda op: op.done, reverse=True)
        for op in sorted((op for op in ops if not op.tokens), key=lambda op: op.at):
            while writes and writes[-1].done < op.at:
                owed.add(_debt_of(writes.pop()))
            shown = op.shown
            if shown is None:
                continue
            for debt in owed.missing_from(op, shown):
                if self._promotions.between(debt.since, op.done):
                    owed.forgive(debt)
                    self.lost_without_token.add(debt.distance)
                else:
                    self._convict(debt, (), op, promoted=False)
            if self._promotions:
                self._renew(owed, op, shown)

    @staticmethod
    def _renew(owed: Owed, op: Op, shown: dict[float, int]) -> None:
        """Take what is shown some time after a promotion to have come through it."""
        settled_before = op.at - SETTLED_S
        for distance in owed.forgiven.keys() & shown.keys():
            owed.add(owed.forgiven[distance])
        for debt in owed.among(shown):
            debt.since = max(debt.since, settled_before)

    # --- both ---

    def _convict(self, debt: ExpectedRide, earlier: Sequence[Op], op: Op, *, promoted: bool) -> None:
        """Take note of a ride that an answer should have shown."""
        gone = self._last_shown.get(debt.distance, -1.0) <= op.at
        write = self._writes.get(debt.distance)
        acknowledged = write is not None and _acknowledged(write)
        if promoted and gone:
            rule = Rule.LOSS_NOT_REPORTED
        elif gone and acknowledged and op.role is Role.PRIMARY:
            rule = Rule.ACKNOWLEDGED_WRITE_LOST
        else:
            rule = Rule.MONOTONIC_READS if debt.write is None else Rule.READ_YOUR_WRITES
        if not self._findings.wants_more(rule):
            self._findings.counts[rule] += 1
            return
        showing = next((one for one in reversed(earlier) if debt.distance in (one.shown or ())), None)
        ops = [one for one in (write, showing if debt.write is None else None, op) if one is not None]
        self._findings.add(
            rule,
            _in_words(rule, debt, showing, op),
            *ops,
            about=debt.distance,
            faults=self._promotions.between(debt.since, op.done),
        )


def _acknowledged(op: Op) -> bool:
    return op.request is Request.WRITE and op.outcome is Outcome.OK


def _debt_of(write: Op, notices: int = 0) -> ExpectedRide:
    return ExpectedRide(write.ride or 0, write.distance or 0.0, write=write, since=write.at, notice=notices)


def _in_words(rule: Rule, debt: ExpectedRide, showing: Op | None, op: Op) -> str:
    who = f"session {op.session}" if op.tokens else f"user {op.user}"
    ride = f"ride {debt.ride} (distance {debt.distance:.1f})"
    if debt.write is not None:
        known = f"The write of {ride} was acknowledged to {who} at {debt.write.done:.3f} s"
    else:
        known = f"{ride.capitalize()} was shown to {who}"
        known += f" at {showing.done:.3f} s" if showing else ""
    missing = f"the read that began at {op.at:.3f} s on {op.node or 'an unnamed node'} does not show it"
    why = {
        Rule.LOSS_NOT_REPORTED: "no later answer does, and the session was not told that a promotion had lost it",
        Rule.ACKNOWLEDGED_WRITE_LOST: "nor does any later answer, and no promotion excuses that",
    }.get(rule)
    return f"{known}, yet {missing}" + (f"; {why}." if why else ".")
