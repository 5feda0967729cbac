"""What happened, in the order in which it became known: kept in memory, and written on the hot path.

What is noted stays as it came. All that costs something (names, words, JSON) is made of it later, for those who
look.
"""

from __future__ import annotations

import heapq
import itertools
import time
from array import array
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from rocket.lab.api.recorder import Asked, RequestRecord, RequestRecorder
from rocket.lab.inspector.told import Failure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rocket import Answer, Board, Routing
    from rocket.cluster.cluster import CarriedOut
    from rocket.consistency import PrimaryStatus, ReplicaStatus

_MOST = 8192
"""How many requests are kept, and how many other happenings."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The observer saw a node."""

    at: float
    status: ReplicaStatus | PrimaryStatus


@dataclass(frozen=True, slots=True)
class Gone:
    """A node's status was taken away."""

    at: float
    name: str


@dataclass(frozen=True, slots=True)
class Faulted:
    """Something was done to the cluster."""

    at: float
    done: CarriedOut


@dataclass(frozen=True, slots=True)
class Switched:
    """Another routing is in force."""

    at: float
    routing: Routing
    before: Routing


@dataclass(frozen=True, slots=True)
class Paced:
    """The simulator was given another speed."""

    at: float
    rate: float | None


@dataclass(frozen=True, slots=True)
class Staged:
    """A scenario went on."""

    at: float
    name: str
    phase: str
    text: str


KeptT = TypeVar("KeptT")
Happening: TypeAlias = RequestRecord | Seen | Gone | Faulted | Switched | Paced | Staged


class Page(NamedTuple):
    """The rides that a list showed, in little room."""

    rides: array[int]
    distances: array[float]
    complete: bool
    """Whether no older ones are left."""


class Place(NamedTuple):
    """Where in the journal somebody is: how many of either kind there had been."""

    requests: int
    others: int


class EventLog:
    """The last happenings; the clock is the monotonic one. Requests are numbered from 0 on."""

    def __init__(self) -> None:
        self.zero = time.monotonic()
        """The moment that times count from, for whoever looks."""
        self.zero_wall = time.time()
        """The same moment by the clock on the wall."""
        self.audience = RequestRecorder()
        """What the API has to tell; of its requests, nothing is noted before `listen`."""
        self._requests: deque[RequestRecord] = deque(maxlen=_MOST)
        self._others: deque[Seen | Gone | Faulted | Switched | Paced | Staged] = deque(maxlen=_MOST)
        self._end = [0, 0]

    def listen(self) -> None:
        """Note every request from now on. That is felt by every read, so it is done for those who look alone."""
        self.audience.witness = self._witness

    def do_not_listen(self) -> None:
        """Note no more requests, and forget those that were noted."""
        self.audience.witness = None
        self._requests.clear()

    def add(self, happening: Seen | Gone | Faulted | Switched | Paced | Staged) -> None:
        """Note something that is no request."""
        self._others.append(happening)
        self._end[1] += 1

    def _witness(self, told: RequestRecord) -> None:
        if told.error is not None:
            told = told._replace(error=Failure(told.error, told.request))
        elif told.request is Asked.LIST and told.answer is not None:
            told = _with_little_room(told, told.answer)
        self._requests.append(told)
        self._end[0] += 1

    def watch(self, board: Board) -> None:
        """Note from now on what the observer puts on a board."""
        board.on_status.append(lambda status: self.add(Seen(time.monotonic(), status)))
        board.on_gone.append(lambda name: self.add(Gone(time.monotonic(), name)))

    @property
    def end(self) -> Place:
        """The place behind all that has been noted."""
        return Place(*self._end)

    @property
    def begin(self) -> Place:
        """The place before all that is still there."""
        return Place(self._end[0] - len(self._requests), self._end[1] - len(self._others))

    def since(self, place: Place) -> Iterator[tuple[int, Happening]]:
        """Yield what was noted behind a place, as far as it is still there, in order.

        Requests come with their numbers. What is noted meanwhile is not among them.
        """
        first = max(place.requests, self.begin.requests)
        requests = enumerate(_last(self._requests, self._end[0] - first), first)
        others = ((-1, other) for other in _last(self._others, self._end[1] - place.others))
        return heapq.merge(requests, others, key=_noted_at)

    def ms(self, moment: float) -> float:
        """Return a monotonic moment in milliseconds since zero."""
        return round((moment - self.zero) * 1000, 3)


def _last(kept: deque[KeptT], count: int) -> list[KeptT]:
    last = list(itertools.islice(reversed(kept), count))
    last.reverse()
    return last


def _noted_at(numbered: tuple[int, Happening]) -> float:
    happening = numbered[1]
    return happening.done if isinstance(happening, RequestRecord) else happening.at


def _with_little_room(told: RequestRecord, answer: Answer[Any]) -> RequestRecord:
    """Keep of a page's rows what they say."""
    limit, _ = told.detail
    rows: Sequence[Any] = [row for row in answer.value if row["id"] is not None]
    page = Page(
        array("q", (row["id"] for row in rows[:limit])),
        array("d", (row["distance"] for row in rows[:limit])),
        complete=len(rows) <= limit,
    )
    return told._replace(answer=answer._replace(value=page))
