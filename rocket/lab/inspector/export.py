"""The journal as a history that `rocket check` judges.

The checker knows a ride by its distance, which in a torture run no two share. Here anybody may write any distance,
so its id stands there, with a tenth added for each other distance that the ride was shown with. A ride that is
shown, and whose write is not among what is told, is led back to a write of unknown outcome before it. Left out are
requests that were wrong in themselves, pages that are not the first one, and a write that was recognised
(`Idempotency-Key`) as one that is there already.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from rocket.errors import describe
from rocket.lab.api.parameters import BIGINT_MAX
from rocket.lab.api.recorder import Asked, RequestRecord
from rocket.lab.checker.history import End, Healed, Op, Outcome, Request, Role, Run, line_of
from rocket.lab.inspector.events import tokens_text
from rocket.lab.inspector.incidents import Incidents
from rocket.lab.inspector.sessions import Session, Sessions
from rocket.lab.inspector.told import outcome_of, page_of, ride_of, status_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rocket.lab.comparison import Routing
    from rocket.lab.inspector.event_log import EventLog, Happening

_WRONG = {HTTPStatus.BAD_REQUEST, HTTPStatus.CONFLICT}
"""Answers to requests that were wrong in themselves."""

Named = tuple[int, RequestRecord, Session]


def history_lines(journal: EventLog, last: int, routing: Routing, nodes: Sequence[str]) -> Iterator[str]:
    """Return the lines of a history of the last so many requests that the journal holds by now.

    They are made one by one as they are asked for, in any thread.
    """
    return _lines(journal, journal.since(journal.begin), last, routing, nodes)


def _lines(
    journal: EventLog,
    happenings: Iterator[tuple[int, Happening]],
    last: int,
    routing: Routing,
    nodes: Sequence[str],
) -> Iterator[str]:
    sessions, incidents = Sessions(), Incidents()
    named: deque[Named] = deque(maxlen=last)
    for number, happening in happenings:
        if isinstance(happening, RequestRecord):
            named.append((number, happening, sessions.of(happening, number)))
        else:
            incidents.take(happening)
    zero = min((told.at for _, told, _ in named), default=journal.zero)
    end = max((told.done for _, told, _ in named), default=zero)
    telling = _Telling(zero)
    ops = telling.ops(sorted(named, key=lambda one: one[1].at))
    yield line_of(
        Run(
            seed=0,
            duration_s=round(end - zero, 6),
            routing=routing,
            sessions=len({op.session for op in ops}),
            faults=(),
            nodes=tuple(nodes),
            started_at=datetime.fromtimestamp(journal.zero_wall + zero - journal.zero, UTC).isoformat(),
        )
    )
    yield from map(line_of, ops)
    faults = incidents.faults(zero, end)
    yield from map(line_of, faults)
    if not incidents.outstanding:
        yield line_of(Healed(at=max((fault.until for fault in faults), default=0.0)))
    yield line_of(End(at=round(end - zero, 6)))


class _Telling:
    """Makes operations of requests."""

    def __init__(self, zero: float) -> None:
        self._zero = zero
        self._labels: dict[int, dict[float, float]] = defaultdict(dict)
        """By ride and distance: what stands for it."""
        self._written: set[float] = set()
        """What stands for rides whose writes are told of."""
        self._doubtful: defaultdict[tuple[str, float], list[int]] = defaultdict(list)
        """By user and distance: the places of writes of unknown outcome."""
        self._free_at: dict[str, float] = {}
        """When a session of a user without tokens has ended its last request."""

    def ops(self, named: Sequence[Named]) -> list[Op]:
        """Return the operations, in the order in which they began."""
        # What was written for certain comes first, since it may be shown before its write is done.
        known: set[int] = set()
        fit = []
        for one in named:
            told, ride = one[1], ride_of(one[1])
            if not self._is_told(told):
                continue
            if told.request is Asked.WRITE and ride is not None:
                if ride[0] in known:
                    continue
                known.add(ride[0])
                self._written.add(self._label(*ride))
            fit.append(one)
        ops = [self._op(place, *one) for place, one in enumerate(fit)]
        return [*self._earlier(ops), *ops]

    @staticmethod
    def _is_told(told: RequestRecord) -> bool:
        first_page = told.request is not Asked.LIST or told.detail[1] == BIGINT_MAX
        return first_page and status_of(told) not in _WRONG

    def _label(self, ride: int, distance: float) -> float:
        labels = self._labels[ride]
        return labels.setdefault(distance, round(ride + 0.1 * len(labels), 1))

    def _op(self, place: int, number: int, told: RequestRecord, session: Session) -> Op:
        answer, page, ride = told.answer, page_of(told), ride_of(told)
        outcome = outcome_of(told)
        told_id = told.detail if told.request is Asked.READ else None
        label = None if ride is None else self._label(*ride)
        if told.request is Asked.WRITE and ride is None:
            label = -float(number + 1)
            if outcome is Outcome.UNKNOWN:
                self._doubtful[told.subject, round(told.detail, 1)].append(place)
        pairs = None
        if page is not None:
            both = zip(page.rides, page.distances, strict=True)
            pairs = tuple((each, self._label(each, round(distance, 1))) for each, distance in both)
        return Op(
            session=session.name if session.by_token else self._lane(session.name, told),
            user=told.subject,
            tokens=session.by_token,
            request=Request(told.request),
            at=self._s(told.at),
            done=self._s(told.done),
            outcome=outcome,
            status=int(status_of(told)),
            node=None if answer is None else answer.node,
            role=None if answer is None else Role(answer.role),
            reason=None if answer is None else str(answer.reason),
            sent=tokens_text(told.sent),
            got=None if answer is None or answer.token is None else str(answer.token),
            ride=told_id if ride is None else ride[0],
            distance=label,
            rides=pairs,
            complete=None if page is None else page.complete,
            lost=None if answer is None or answer.lost is None else str(answer.lost),
            error=None if told.error is None else describe(told.error),
        )

    def _earlier(self, ops: list[Op]) -> list[Op]:
        """Return writes of unknown outcome that account for what is shown, and was not written since."""
        earlier: dict[float, Op] = {}
        distances = {label: distance for labels in self._labels.values() for distance, label in labels.items()}
        for op in ops:
            for label in op.shown or ():
                if label in self._written or label in earlier:
                    continue
                doubtful = self._doubtful[op.user, distances[label]]
                if doubtful and ops[doubtful[0]].at < op.done:
                    place = doubtful.pop(0)
                    ops[place] = replace(ops[place], distance=label)
                    self._written.add(label)
                else:
                    earlier[label] = self._before(op.user, label)
        return list(earlier.values())

    @staticmethod
    def _before(user: str, label: float) -> Op:
        return Op(
            session=f"before {user}",
            user=user,
            tokens=True,
            request=Request.WRITE,
            at=0.0,
            done=0.0,
            outcome=Outcome.UNKNOWN,
            distance=label,
            error="not told of: it is shown below, and was written before",
        )

    def _lane(self, name: str, told: RequestRecord) -> str:
        """Return a session for a user without tokens: its concurrent requests are of different ones."""
        number = 1
        while True:
            lane = name if number == 1 else f"{name} ({number})"
            if self._free_at.get(lane, self._zero) <= told.at:
                self._free_at[lane] = told.done
                return lane
            number += 1

    def _s(self, moment: float) -> float:
        return round(moment - self._zero, 6)
