"""Follows through a history which rides each reader must be shown, and finds the answers that lack one."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rocket.consistency import Reason
from rocket.lab.checker.findings import Rule
from rocket.lab.checker.history import GLOBAL, PROMOTIONS, SETTLED_S, Request, Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rocket.lab.checker.findings import Findings
    from rocket.lab.checker.history import History, Op


@dataclass(slots=True)
class ExpectedRide:
    """A ride that every answer that covers its id has to show."""

    ride: int
    distance: float
    """Identifies the ride: ids may be used again after a promotion that lost some."""
    write: Op | None
    """The acknowledged write of the ride; None if the reader has only been shown it."""
    since: float
    """A promotion from this moment on may have lost the ride, as far as is known."""
    notice: int = 0
    """How many notices of a loss the session had been given by then."""
    seen: bool = False
    """Whether a read has shown it; one that may be old may miss what the session wrote, or saw in a write."""

    @classmethod
    def of(cls, write: Op, notices: int = 0) -> ExpectedRide:
        """Return the ride that an acknowledged write stands for."""
        return cls(write.ride or 0, write.distance or 0.0, write=write, since=write.at, notice=notices)


class ExpectedRides:
    """The rides expected by one reader, found by what an answer covers."""

    def __init__(self) -> None:
        self.excused: dict[float, ExpectedRide] = {}
        """Rides that a promotion has lost, by distance: an answer may show them, and need not."""
        self._rides: dict[float, ExpectedRide] = {}
        self._order: list[tuple[int, float]] = []

    def add(self, expected: ExpectedRide) -> None:
        """Expect a ride from now on, also one that had been excused."""
        if expected.distance not in self._rides:
            self.excused.pop(expected.distance, None)
            self._rides[expected.distance] = expected
            insort(self._order, (expected.ride, expected.distance))

    def excuse(self, expected: ExpectedRide) -> None:
        """Expect a ride no longer."""
        self.excused[expected.distance] = self._rides.pop(expected.distance)
        del self._order[bisect_left(self._order, (expected.ride, expected.distance))]

    def unexpected(self, shown: dict[float, int]) -> Iterable[float]:
        """Return the distances shown that were not expected."""
        return [distance for distance in shown if distance not in self._rides]  # a difference of sets walks both

    def among(self, shown: dict[float, int]) -> Iterable[ExpectedRide]:
        """Return the expected rides that an answer shows."""
        return [self._rides[distance] for distance in shown.keys() & self._rides.keys()]

    def missing_from(self, op: Op, shown: dict[float, int], *, all_of_them: bool = False) -> list[ExpectedRide]:
        """Return the expected rides that an answer covers and does not show.

        A ride that is asked for covers its id. A page covers the ids from its smallest on, or, if it is complete,
        all of them. Unless `all_of_them` count, an answer that may be older may miss what its session wrote.
        """
        first, end = 0, len(self._order)
        if op.request is Request.READ:
            ride = op.ride or 0
            first, end = bisect_left(self._order, (ride,)), bisect_left(self._order, (ride + 1,))
        elif not op.complete:
            first = bisect_left(self._order, (min(shown.values()),)) if shown else end
        order = self._order if (first, end) == (0, len(self._order)) else self._order[first:end]
        missing = [self._rides[distance] for _, distance in order if distance not in shown]
        if all_of_them or op.freshness in {None, GLOBAL}:
            return missing
        return [ride for ride in missing if ride.seen]


class Expectations:
    """Read-your-writes and monotonic reads of a whole history, and what a promotion excuses."""

    def __init__(self, history: History, findings: Findings) -> None:
        self.reported: set[float] = set()
        """Rides missing for a session that had been told so."""
        self.lost_without_token: set[float] = set()
        """Rides missing, after a promotion, for users whose sessions send no tokens."""
        self._history = history
        self._findings = findings
        self._writes = {op.distance: op for op in history.ops if op.request is Request.WRITE}
        self._any_promotion = any(fault.name in PROMOTIONS for fault in history.faults)

    @cached_property
    def _last_shown(self) -> dict[float, float]:
        """When the last answer began that shows a ride, by distance."""
        last: dict[float, float] = {}
        for op in self._history.ops:
            last.update(dict.fromkeys(op.shown or (), op.at))
        return last

    def check(self, sessions: Mapping[str, Sequence[Op]]) -> None:
        """Check every reader: each session with tokens by itself, and by their users what others have written.

        That concerns sessions without tokens, global reads, and reads within some seconds.
        """
        users: dict[str, list[Op]] = {}
        asking = {op.user for op in self._history.ops if op.asks_for_all or op.max_age_s is not None}
        for ops in sessions.values():
            if ops[0].tokens:
                self._check_session(ops)
            if ops[0].user in asking:
                users.setdefault(ops[0].user, []).extend(ops)
        for ops in users.values():
            self._check_user(ops, [(op.at, op) for op in ops if op.asks_for_all])
            aged = [(op.at - op.max_age_s, op) for op in ops if op.max_age_s is not None]
            self._check_user(ops, aged, Rule.TOO_OLD)
            self._check_order([op for op in ops if op.freshness == GLOBAL and op.role is Role.REPLICA])

    # --- with tokens ---

    def _check_session(self, ops: Sequence[Op]) -> None:
        """Expect every acknowledged write of the session, and all that it was shown, from then on."""
        rides, notices = ExpectedRides(), 0
        has_aged = any(op.max_age_s is not None for op in ops)
        for place, op in enumerate(ops):
            notices += op.lost is not None
            if op.acknowledged_write:
                rides.add(ExpectedRide.of(op, notices))
            shown = op.shown
            if shown is None or op.asks_for_nothing:
                continue
            for missing in rides.missing_from(op, shown):
                promoted = bool(self._history.promotions(missing.since, op.done))
                if promoted and notices > missing.notice:
                    rides.excuse(missing)
                    self.reported.add(missing.distance)
                else:
                    self._convict(missing, ops[:place], op, promoted=promoted)
            if notices or has_aged:
                # What is shown by the answer that tells of a loss, or after it, is not what was lost.
                for present in rides.among(shown):
                    present.seen = present.seen or op.reason != Reason.WRITE
                    if present.notice < notices:
                        present.since, present.notice = op.at, notices
            for distance in rides.unexpected(shown):
                seen = op.reason != Reason.WRITE
                rides.add(ExpectedRide(shown[distance], distance, None, since=op.at, notice=notices, seen=seen))

    # --- what others have written ---

    def _check_user(self, ops: Sequence[Op], reads: Sequence[tuple[float, Op]], rule: Rule | None = None) -> None:
        """Expect every write that was acknowledged to any session of the user until the moment of each read."""
        rides = ExpectedRides()
        writes = sorted((op for op in ops if op.acknowledged_write), key=lambda op: op.done, reverse=True)
        for moment, op in sorted(reads, key=lambda read: read[0]):
            while writes and writes[-1].done < moment:
                rides.add(ExpectedRide.of(writes.pop()))
            shown = op.shown
            if shown is None:
                continue
            for missing in rides.missing_from(op, shown, all_of_them=True):
                if self._history.promotions(missing.since, op.done):
                    rides.excuse(missing)
                    self.lost_without_token.add(missing.distance)
                else:
                    self._convict(missing, (), op, promoted=False, rule=rule)
            if self._any_promotion:
                self._renew(rides, op, shown)

    def _check_order(self, ops: Sequence[Op]) -> None:
        """Expect what global reads have shown on replicas in those that begin later, of all sessions."""
        rides = ExpectedRides()
        later = sorted((op for op in ops if op.shown), key=lambda op: op.done, reverse=True)
        before: list[Op] = []
        for op in sorted(ops, key=lambda op: op.at):
            while later and later[-1].done < op.at:
                before.append(later.pop())
                for distance, ride in (before[-1].shown or {}).items():
                    rides.add(ExpectedRide(ride, distance, write=None, since=before[-1].at))
            for missing in rides.missing_from(op, op.shown) if op.shown is not None else ():
                if self._history.promotions(missing.since, op.done):
                    rides.excuse(missing)
                else:
                    self._convict(missing, before, op, promoted=False, rule=Rule.GLOBAL_READS)

    @staticmethod
    def _renew(rides: ExpectedRides, op: Op, shown: dict[float, int]) -> None:
        """Take a ride that is shown some time after a promotion to have survived it."""
        settled_before = op.at - SETTLED_S
        for distance in rides.excused.keys() & shown.keys():
            rides.add(rides.excused[distance])
        for present in rides.among(shown):
            present.since = max(present.since, settled_before)

    # --- both ---

    def _convict(
        self,
        missing: ExpectedRide,
        earlier: Sequence[Op],
        op: Op,
        *,
        promoted: bool,
        rule: Rule | None = None,
    ) -> None:
        """Record a ride that an answer should have shown."""
        gone = self._last_shown.get(missing.distance, -1.0) <= op.at
        write = self._writes.get(missing.distance)
        acknowledged = write is not None and write.acknowledged_write
        if rule is not None:
            pass
        elif promoted and gone:
            rule = Rule.LOSS_NOT_REPORTED
        elif gone and acknowledged and op.role is Role.PRIMARY:
            rule = Rule.ACKNOWLEDGED_WRITE_LOST
        elif missing.write is None:
            rule = Rule.MONOTONIC_READS
        else:
            is_own = missing.write.session == op.session or not op.tokens
            rule = Rule.READ_YOUR_WRITES if is_own else Rule.GLOBAL_READS
        if not self._findings.wants_more(rule):
            self._findings.counts[rule] += 1
            return
        showing = next((one for one in reversed(earlier) if missing.distance in (one.shown or ())), None)
        ops = [one for one in (write, showing if missing.write is None else None, op) if one is not None]
        self._findings.add(
            rule,
            _sentence(rule, missing, showing, op),
            *ops,
            about=missing.distance,
            faults=self._history.promotions(missing.since, op.done),
        )


def _sentence(rule: Rule, missing: ExpectedRide, showing: Op | None, op: Op) -> str:
    of_user = not op.tokens or rule in {Rule.GLOBAL_READS, Rule.TOO_OLD}
    reader = f"user {op.user}" if of_user else f"session {op.session}"
    ride = f"ride {missing.ride} (distance {missing.distance:.1f})"
    if missing.write is not None:
        known = f"The write of {ride} was acknowledged to {reader} at {missing.write.done:.3f} s"
    else:
        known = f"{ride.capitalize()} was shown to {reader}"
        known += f" at {showing.done:.3f} s" if showing else ""
    lack = f"the read that began at {op.at:.3f} s on {op.node or 'an unnamed node'} does not show it"
    why = {
        Rule.LOSS_NOT_REPORTED: "no later answer does, and the session was not told that a promotion had lost it",
        Rule.ACKNOWLEDGED_WRITE_LOST: "nor does any later answer, and no promotion excuses that",
        Rule.TOO_OLD: f"it asked for nothing older than {op.max_age_s} s",
    }.get(rule)
    return f"{known}, yet {lack}" + (f"; {why}." if why else ".")
