"""The live checker: finds stale reads among requests as they are completed, without false alarms.

Rides are never changed or deleted, so a session must be shown every ride whose write was acknowledged to it, and
every ride that it was shown before. A read without a token must be shown the rides whose writes were acknowledged
to its user before it began. What was acknowledged or shown under one epoch is no longer expected under the next,
which may have lost it: torture checks whether losses are reported. `rocket check` finds more in a history.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket import Role
from rocket.lab.api.recorder import Asked
from rocket.lab.inspector.event_log import is_of_unknown_user, page_of, ride_of
from rocket.routing.explain import replica_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from rocket.consistency import Epoch
    from rocket.lab.api.recorder import RequestRecord
    from rocket.lab.inspector.event_log import TrackedSession

_MOST_READERS = 2000
_MOST_RIDES = 100
"""Rides expected by one reader; the oldest are forgotten first."""


@dataclass(frozen=True, slots=True)
class ExpectedRide:
    """A ride that a reader must be shown."""

    ride: int
    since: float
    """Monotonic seconds: when its write was acknowledged, or when it was shown."""
    epoch: Epoch | None
    written: bool
    """Whether the reader or its user wrote it, in contrast to having been shown it."""


@dataclass(frozen=True, slots=True)
class StaleRead:
    """A read that did not show a ride that it should have shown."""

    expected: ExpectedRide
    text: str


class Checker:
    """The rides that each reader must be shown, updated by each request in the order of completion."""

    def __init__(self, since: float = 0.0) -> None:
        self.checked = 0
        self._since = since
        """A read that began before this moment may have been routed by an earlier rule."""
        self._expected: OrderedDict[str, OrderedDict[int, ExpectedRide]] = OrderedDict()
        """By reader (the name of a session, or of its user), and by ride."""

    def check(self, record: RequestRecord, session: TrackedSession, epoch: Epoch | None) -> StaleRead | None:
        """Check one request, given the epoch known by now; return the verdict if it is a stale read."""
        if record.answer is None or record.request is Asked.JOIN:
            return None
        if record.answer.token is not None:
            epoch = record.answer.token.epoch
        if record.request is Asked.WRITE:
            self._take_write(record, session, epoch)
            return None
        if record.error is not None and not is_of_unknown_user(record):
            return None
        self.checked += 1
        if record.answer.lost is not None:
            self._expected.pop(session.name, None)
        reader = session.name if session.by_token else _user(record)
        missing = next((ride for ride in self._missing(reader, record) if ride.epoch == epoch), None)
        if session.by_token and record.at >= self._since:
            known: Mapping[int, ExpectedRide] = self._expected.get(reader, {})
            for shown in _shown(record):
                if shown not in known or known[shown].epoch != epoch:
                    self._expect(reader, ExpectedRide(shown, record.done, epoch, written=False))
        if missing is None:
            return None
        return StaleRead(missing, _describe(missing, record, session))

    def _take_write(self, record: RequestRecord, session: TrackedSession, epoch: Epoch | None) -> None:
        ride = ride_of(record)
        if ride is not None:
            expected = ExpectedRide(ride[0], record.done, epoch, written=True)
            self._expect(_user(record), expected)
            if session.by_token:
                self._expect(session.name, expected)

    def forget_shown(self, at: float) -> None:
        """Forget what was shown by reads that began before a moment, at which the routing changed.

        Under a routing for comparison, a token does not cover what was shown.
        """
        self._since = at
        for rides in self._expected.values():
            for ride in [ride for ride, expected in rides.items() if not expected.written]:
                del rides[ride]

    def _expect(self, reader: str, expected: ExpectedRide) -> None:
        rides = self._expected.setdefault(reader, OrderedDict())
        self._expected.move_to_end(reader)
        rides[expected.ride] = expected
        if len(rides) > _MOST_RIDES:
            rides.popitem(last=False)
        if len(self._expected) > _MOST_READERS:
            self._expected.popitem(last=False)

    def _missing(self, reader: str, record: RequestRecord) -> Iterator[ExpectedRide]:
        """Yield the rides that an answer should have shown and did not."""
        shown = set(_shown(record))
        for ride in _covered(record, self._expected.get(reader, {})):
            expected = self._expected[reader][ride]
            if ride not in shown and expected.since < record.at:
                yield expected


def _user(record: RequestRecord) -> str:
    return f"user {record.subject}"


def _shown(record: RequestRecord) -> Iterable[int]:
    """Return the rides that an answer shows."""
    page = page_of(record)
    if page is not None:
        return page.rides
    ride = ride_of(record)
    return () if ride is None else (ride[0],)


def _covered(record: RequestRecord, expected: Mapping[int, ExpectedRide]) -> Iterable[int]:
    """Return the expected rides that an answer would have to show."""
    page = page_of(record)
    if record.error is not None:
        return list(expected)  # the node knew no such user, and so none of its rides
    if page is None:
        return (record.detail,) if record.detail in expected else ()
    _, before = record.detail
    oldest = 0 if page.complete else min(page.rides, default=before)
    return [ride for ride in expected if oldest <= ride < before]


def _describe(expected: ExpectedRide, record: RequestRecord, session: TrackedSession) -> str:
    ms = (record.at - expected.since) * 1000
    reader = session.name if session.by_token else record.subject
    event = "its write was acknowledged to" if expected.written else "it was shown to"
    node = "no node"
    if record.answer is not None:
        answer = record.answer
        node = replica_named(answer.node) if answer.role is Role.REPLICA else answer.node
    when = f"{event} {reader} {ms:.1f} ms before this read"
    return f"Ride {expected.ride} is missing: {when}, and {node} did not show it."
