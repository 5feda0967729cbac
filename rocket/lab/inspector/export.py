"""Exports the event log as a history that `rocket check` judges.

The checker identifies a ride by its distance, of which no two are equal in a torture run. Here clients write any
distance, so a ride's id takes its place, plus a tenth for each other distance that the ride was shown with. A ride
that is shown, but whose write was not recorded, gets a write of unknown outcome before everything else. The
history leaves out requests that were invalid, pages after the first one, and a write that was recognised
(`Idempotency-Key`) as an earlier one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from rocket.cluster.faults import NODE_COMMANDS
from rocket.consistency import PrimaryStatus
from rocket.errors import describe
from rocket.lab.api.parameters import BIGINT_MAX
from rocket.lab.api.recorder import Asked, RequestRecord
from rocket.lab.checker.history import End, Fault, Healed, Op, Outcome, Request, Role, Run, line_of
from rocket.lab.inspector.event_log import (
    CommandDone,
    SessionTracker,
    StatusGone,
    StatusSeen,
    TrackedSession,
    outcome_of,
    page_of,
    ride_of,
    status_of,
)
from rocket.lab.inspector.events import tokens_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rocket.cluster.cluster import CarriedOut
    from rocket.lab.comparison import Routing
    from rocket.lab.inspector.event_log import EventLog, LogEntry

_INVALID = {HTTPStatus.BAD_REQUEST, HTTPStatus.CONFLICT}
"""Statuses of requests that were invalid in themselves."""

Numbered = tuple[int, RequestRecord, TrackedSession]


def history_lines(event_log: EventLog, last: int, routing: Routing, nodes: Sequence[str]) -> Iterator[str]:
    """Return the lines of a history of at most the `last` requests in the log.

    The log is read now; the lines are made as they are asked for, in any thread.
    """
    return _lines(event_log, event_log.since(event_log.begin), last, routing, nodes)


def _lines(
    event_log: EventLog,
    entries: Iterator[tuple[int, LogEntry]],
    last: int,
    routing: Routing,
    nodes: Sequence[str],
) -> Iterator[str]:
    sessions, intervals = SessionTracker(), FaultIntervals()
    numbered: deque[Numbered] = deque(maxlen=last)
    for number, entry in entries:
        if isinstance(entry, RequestRecord):
            numbered.append((number, entry, sessions.session_of(entry, number)))
        else:
            intervals.take(entry)
    zero = min((record.at for _, record, _ in numbered), default=event_log.zero)
    end = max((record.done for _, record, _ in numbered), default=zero)
    ops = _Operations(zero).of(sorted(numbered, key=lambda one: one[1].at))
    yield line_of(
        Run(
            seed=0,
            duration_s=round(end - zero, 6),
            routing=routing,
            sessions=len({op.session for op in ops}),
            faults=(),
            nodes=tuple(nodes),
            started_at=datetime.fromtimestamp(event_log.zero_wall + zero - event_log.zero, UTC).isoformat(),
        )
    )
    yield from map(line_of, ops)
    faults = intervals.faults(zero, end)
    yield from map(line_of, faults)
    if not intervals.lasting:
        yield line_of(Healed(at=max((fault.until for fault in faults), default=0.0)))
    yield line_of(End(at=round(end - zero, 6)))


# --- operations ---


class _Operations:
    """Turns recorded requests into the operations of a history."""

    def __init__(self, zero: float) -> None:
        self._zero = zero
        self._labels: dict[int, dict[float, float]] = defaultdict(dict)
        """By ride and distance: the distance in the history."""
        self._written: set[float] = set()
        """Distances in the history whose write is part of it."""
        self._unknown: defaultdict[tuple[str, float], list[int]] = defaultdict(list)
        """By user and distance: the indices of writes of unknown outcome."""
        self._free_at: dict[str, float] = {}
        """When a session of a user without tokens has completed its last request."""

    def of(self, numbered: Sequence[Numbered]) -> list[Op]:
        """Return the operations, in the order in which they began."""
        # Acknowledged writes are labelled first, since a ride may be shown before its write is done.
        known: set[int] = set()
        chosen = []
        for one in numbered:
            record, ride = one[1], ride_of(one[1])
            if not self._is_part_of_history(record):
                continue
            if record.request is Asked.WRITE and ride is not None:
                if ride[0] in known:
                    continue
                known.add(ride[0])
                self._written.add(self._label(*ride))
            chosen.append(one)
        ops = [self._op(index, *one) for index, one in enumerate(chosen)]
        return [*self._earlier_writes(ops), *ops]

    @staticmethod
    def _is_part_of_history(record: RequestRecord) -> bool:
        first_page = record.request is not Asked.LIST or record.detail[1] == BIGINT_MAX
        return first_page and status_of(record) not in _INVALID

    def _label(self, ride: int, distance: float) -> float:
        """Return the distance that stands for a ride in the history."""
        labels = self._labels[ride]
        return labels.setdefault(distance, round(ride + 0.1 * len(labels), 1))

    def _op(self, index: int, number: int, record: RequestRecord, session: TrackedSession) -> Op:
        answer, page, ride = record.answer, page_of(record), ride_of(record)
        outcome = outcome_of(record)
        requested = record.detail if record.request is Asked.READ else None
        label = None if ride is None else self._label(*ride)
        if record.request is Asked.WRITE and ride is None:
            label = -float(number + 1)
            if outcome is Outcome.UNKNOWN:
                self._unknown[record.subject, round(record.detail, 1)].append(index)
        rides = None
        if page is not None:
            pairs = zip(page.rides, page.distances, strict=True)
            rides = tuple((each, self._label(each, round(distance, 1))) for each, distance in pairs)
        return Op(
            session=session.name if session.by_token else self._sequential_session(session.name, record),
            user=record.subject,
            tokens=session.by_token,
            request=Request(record.request),
            at=self._s(record.at),
            done=self._s(record.done),
            outcome=outcome,
            status=int(status_of(record)),
            node=None if answer is None else answer.node,
            role=None if answer is None else Role(answer.role),
            reason=None if answer is None else str(answer.reason),
            sent=tokens_text(record.sent),
            got=None if answer is None or answer.token is None else str(answer.token),
            ride=requested if ride is None else ride[0],
            distance=label,
            rides=rides,
            complete=None if page is None else page.complete,
            lost=None if answer is None or answer.lost is None else str(answer.lost),
            error=None if record.error is None else describe(record.error),
        )

    def _earlier_writes(self, ops: list[Op]) -> list[Op]:
        """Return writes of unknown outcome for rides that are shown, but written by no operation."""
        earlier: dict[float, Op] = {}
        distances = {label: distance for labels in self._labels.values() for distance, label in labels.items()}
        for op in ops:
            for label in op.shown or ():
                if label in self._written or label in earlier:
                    continue
                unknown = self._unknown[op.user, distances[label]]
                if unknown and ops[unknown[0]].at < op.done:
                    index = unknown.pop(0)
                    ops[index] = replace(ops[index], distance=label)
                    self._written.add(label)
                else:
                    earlier[label] = self._earlier_write(op.user, label)
        return list(earlier.values())

    @staticmethod
    def _earlier_write(user: str, label: float) -> Op:
        return Op(
            session=f"before {user}",
            user=user,
            tokens=True,
            request=Request.WRITE,
            at=0.0,
            done=0.0,
            outcome=Outcome.UNKNOWN,
            distance=label,
            error="not recorded: the ride is shown below, so it was written before",
        )

    def _sequential_session(self, name: str, record: RequestRecord) -> str:
        """Return a session for a user without tokens, whose concurrent requests belong to different sessions."""
        number = 1
        while True:
            session = name if number == 1 else f"{name} ({number})"
            if self._free_at.get(session, self._zero) <= record.at:
                self._free_at[session] = record.done
                return session
            number += 1

    def _s(self, moment: float) -> float:
        return round(moment - self._zero, 6)


# --- faults ---

_UNDOES = {each.undone_by: each.name for each in NODE_COMMANDS.values() if each.undone_by is not None}
_LASTING = frozenset(_UNDOES.values())
_PASSING = NODE_COMMANDS.keys() - _UNDOES.keys() - _LASTING
"""Faults that last until the node's next status."""


@dataclass(slots=True)
class _Interval:
    name: str
    node: str | None
    at: float
    until: float | None
    """None while it lasts."""
    detail: dict[str, Any]
    gone: bool = False
    """Whether the status of its node was withdrawn since."""


class FaultIntervals:
    """The intervals in which faults were in force, collected from log entries in their order."""

    def __init__(self) -> None:
        self._all: list[_Interval] = []
        self._lasting: dict[tuple[str, str | None], _Interval] = {}
        """Faults that are not undone yet, by name and node."""
        self._passing: list[_Interval] = []
        self._primary: tuple[float, PrimaryStatus] | None = None

    @property
    def lasting(self) -> bool:
        """Whether a fault is not undone yet."""
        return bool(self._lasting)

    def take(self, entry: LogEntry) -> None:
        """Take in an entry."""
        match entry:
            case CommandDone(at, done) if done.ok:
                self._take_command(at, done)
            case StatusGone(_, name):
                for interval in self._passing:
                    interval.gone = interval.gone or interval.node == name
            case StatusSeen(at, status):
                if isinstance(status, PrimaryStatus):
                    self._take_primary(at, status)
                for interval in self._passing:
                    if interval.node == status.name and interval.gone:
                        interval.until = at
                self._passing = [one for one in self._passing if not (one.node == status.name and one.gone)]

    def _take_command(self, at: float, done: CarriedOut) -> None:
        if done.command == "heal":
            for interval in self._lasting.values():
                interval.until = at
            self._lasting.clear()
            return
        undone = _UNDOES.get(done.command, done.command)
        before = self._lasting.pop((undone, done.node), None)
        if before is not None:
            before.until = at
        if done.command not in _LASTING | _PASSING or (done.command == "delay" and not done.delay_ms):
            return
        detail = {} if done.delay_ms is None else {"delay_ms": done.delay_ms}
        interval = _Interval(done.command, done.node, done.began, None, detail)
        self._all.append(interval)
        if done.command in _PASSING:
            interval.until = at
            self._passing.append(interval)
        else:
            self._lasting[done.command, done.node] = interval

    def _take_primary(self, at: float, status: PrimaryStatus) -> None:
        """Record a promotion when the epoch has changed, even if no command of ours caused it."""
        before, self._primary = self._primary, (at, status)
        if before is not None and before[1].epoch != status.epoch:
            self._all.append(_Interval("promotion", status.name, before[0], at, {"old": before[1].name}))

    def faults(self, zero: float, end: float) -> list[Fault]:
        """Return the faults between two moments; one that still lasts ends with the second moment."""
        return [
            Fault(
                name=one.name,
                at=round(max(zero, one.at) - zero, 6),
                until=round(min(end, end if one.until is None else one.until) - zero, 6),
                node=one.node,
                detail=one.detail,
            )
            for one in self._all
            if one.at <= end and (one.until is None or one.until >= zero)
        ]
