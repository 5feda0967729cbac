"""The live checker: finds stale reads among requests as they are done, with no false alarm.

Rides are never changed or deleted, so a session must be shown what it was told it has written, and whatever it
was shown before. A read that brings no token must be shown what its user had written, and been told so, before it
began. What was told under one primary is owed no longer under the next, which may have lost it: whether that is
reported is for torture to find out. A history tells more (`rocket check`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket import Role
from rocket.lab.api.recorder import Asked
from rocket.lab.inspector.told import is_of_unknown_user, page_of, ride_of
from rocket.routing.explain import replica_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from rocket.consistency import Epoch
    from rocket.lab.api.recorder import RequestRecord
    from rocket.lab.inspector.sessions import Session

_MOST_READERS = 2000
_MOST_DEBTS = 100
"""Rides that one reader is owed; older ones are forgotten first."""


@dataclass(frozen=True, slots=True)
class ExpectedRide:
    """A ride that a reader must be shown."""

    ride: int
    since: float
    """Monotonic seconds: when it had been told that it was written, or was shown it."""
    epoch: Epoch | None
    written: bool
    """Whether it wrote it, or its user did, in contrast to having been shown it."""


@dataclass(frozen=True, slots=True)
class Stale:
    """A verdict: a read did not show what it should have."""

    debt: ExpectedRide
    text: str


class Checker:
    """What every reader is owed, followed from request to request in the order in which they were done."""

    def __init__(self, since: float = 0.0) -> None:
        self.checked = 0
        self._since = since
        """A read that began before this moment may have been routed by another rule than is in force."""
        self._owed: OrderedDict[str, OrderedDict[int, ExpectedRide]] = OrderedDict()
        """By reader (a session's name, or its user's), and by ride."""

    def look_at(self, told: RequestRecord, session: Session, epoch: Epoch | None) -> Stale | None:
        """Look at one request; `epoch` is the reign known by now. Return the verdict if it is a stale read."""
        if told.answer is None or told.request is Asked.JOIN:
            return None
        if told.answer.token is not None:
            epoch = told.answer.token.epoch
        if told.request is Asked.WRITE:
            self._look_at_write(told, session, epoch)
            return None
        if told.error is not None and not is_of_unknown_user(told):
            return None
        self.checked += 1
        if told.answer.lost is not None:
            self._owed.pop(session.name, None)
        reader = session.name if session.by_token else _user(told)
        missing = next((debt for debt in self._missing(reader, told) if debt.epoch == epoch), None)
        if session.by_token and told.at >= self._since:
            known: Mapping[int, ExpectedRide] = self._owed.get(reader, {})
            for shown in _shown(told):
                if shown not in known or known[shown].epoch != epoch:
                    self._owe(reader, ExpectedRide(shown, told.done, epoch, written=False))
        if missing is None:
            return None
        return Stale(missing, _in_words(missing, told, session))

    def _look_at_write(self, told: RequestRecord, session: Session, epoch: Epoch | None) -> None:
        ride = ride_of(told)
        if ride is not None:
            debt = ExpectedRide(ride[0], told.done, epoch, written=True)
            self._owe(_user(told), debt)
            if session.by_token:
                self._owe(session.name, debt)

    def forget_what_was_shown(self, at: float) -> None:
        """Owe only what was written, and what reads show that begin from then on: another rule is in force.

        Without a guarantee, what was shown is covered by no token.
        """
        self._since = at
        for owed in self._owed.values():
            for ride in [ride for ride, debt in owed.items() if not debt.written]:
                del owed[ride]

    def _owe(self, reader: str, debt: ExpectedRide) -> None:
        owed = self._owed.setdefault(reader, OrderedDict())
        self._owed.move_to_end(reader)
        owed[debt.ride] = debt
        if len(owed) > _MOST_DEBTS:
            owed.popitem(last=False)
        if len(self._owed) > _MOST_READERS:
            self._owed.popitem(last=False)

    def _missing(self, reader: str, told: RequestRecord) -> Iterator[ExpectedRide]:
        """Yield what the answer should have shown and did not."""
        shown = set(_shown(told))
        for ride in _covered(told, self._owed.get(reader, {})):
            debt = self._owed[reader][ride]
            if ride not in shown and debt.since < told.at:
                yield debt


def _user(told: RequestRecord) -> str:
    return f"user {told.subject}"


def _shown(told: RequestRecord) -> Iterable[int]:
    """Return the rides that an answer shows."""
    page = page_of(told)
    if page is not None:
        return page.rides
    ride = ride_of(told)
    return () if ride is None else (ride[0],)


def _covered(told: RequestRecord, owed: OrderedDict[int, ExpectedRide] | dict[int, ExpectedRide]) -> Iterable[int]:
    """Return the rides, of those owed, that the answer says something about."""
    page = page_of(told)
    if told.error is not None:
        return list(owed)  # it knows of no user, and so of no ride
    if page is None:
        return (told.detail,) if told.detail in owed else ()
    _, before = told.detail
    oldest = 0 if page.complete else min(page.rides, default=before)
    return [ride for ride in owed if oldest <= ride < before]


def _in_words(debt: ExpectedRide, told: RequestRecord, session: Session) -> str:
    ms = (told.at - debt.since) * 1000
    who = session.name if session.by_token else told.subject
    had = "had been told that it was written" if debt.written else "had been shown it"
    node = "nobody"
    if told.answer is not None:
        node = replica_named(told.answer.node) if told.answer.role is Role.REPLICA else told.answer.node
    return f"Ride {debt.ride} is missing: {who} {had} {ms:.1f} ms before it asked, and {node} did not show it."
