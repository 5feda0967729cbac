"""What happened, in the order in which it became known: a ring in memory, written on the hot path.

What is noted stays as it came. All that costs something (names, words, JSON) is made of it later, for those who
look.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from rocket.api.witness import Asked, Told

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rocket import Answer, Board, Routing
    from rocket.consistency import PrimaryStatus, ReplicaStatus
    from rocket.postgres.control import CarriedOut

_SIZE = 1 << 15
"""How much is kept: a read takes about a kilobyte."""


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


Happening: TypeAlias = Told | Seen | Gone | Faulted | Switched | Paced | Staged


class Page(NamedTuple):
    """The rides that a list showed, in little room."""

    rides: array[int]
    distances: array[float]
    complete: bool
    """Whether no older ones are left."""


class Journal:
    """The last happenings. Each has a number, from 0 on; the clock is the monotonic one."""

    def __init__(self, size: int = _SIZE) -> None:
        self.zero = time.monotonic()
        """The moment that times count from, for whoever looks."""
        self.zero_wall = time.time()
        """The same moment by the clock on the wall."""
        self.end = 0
        """The number that the next happening gets."""
        self._size = size
        self._ring: list[Any] = [None] * size

    def add(self, happening: Happening) -> None:
        """Note something."""
        self._ring[self.end % self._size] = happening
        self.end += 1

    def witness(self, told: Told) -> None:
        """Note a request of the API."""
        if told.request is Asked.LIST and told.answer is not None and told.error is None:
            told = _with_little_room(told, told.answer)
        self.add(told)

    def watch(self, board: Board) -> None:
        """Note from now on what the observer puts on a board."""
        board.on_status.append(lambda status: self.add(Seen(time.monotonic(), status)))
        board.on_gone.append(lambda name: self.add(Gone(time.monotonic(), name)))

    @property
    def begin(self) -> int:
        """The number of the oldest happening that is still there."""
        return max(0, self.end - self._size)

    def since(self, number: int) -> Iterator[Happening]:
        """Yield what has been noted from that number on, as far as it is still there."""
        for each in range(max(number, self.begin), self.end):
            yield self._ring[each % self._size]

    def ms(self, moment: float) -> float:
        """Return a monotonic moment in milliseconds since zero."""
        return round((moment - self.zero) * 1000, 3)


def _with_little_room(told: Told, answer: Answer[Any]) -> Told:
    """Keep of a page's rows what they say."""
    limit, _ = told.detail
    rows: Sequence[Any] = [row for row in answer.value if row["id"] is not None]
    page = Page(
        array("q", (row["id"] for row in rows[:limit])),
        array("d", (row["distance"] for row in rows[:limit])),
        complete=len(rows) <= limit,
    )
    return told._replace(answer=replace(answer, value=page))
