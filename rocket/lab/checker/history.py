"""The history of a torture run: what clients asked and saw, and what was done to the cluster; a JSON line each."""

from __future__ import annotations

import enum
import json
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rocket.errors import RocketError, SetupError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

VERSION = 2
"""Of the format."""

PARTITION, REINIT = "partition", "reinit"
FAILOVERS = ("leader-killed", "leader-frozen", "leader-hung", "switchover", "store-down", PARTITION)
"""The faults after which Patroni makes somebody the leader."""
OF_PATRONI = (*FAILOVERS, REINIT)
"""The faults of a cluster that Patroni runs."""
PROMOTIONS = frozenset({"promotion", "promotion-lossy", *FAILOVERS})
"""The faults that may lose acknowledged writes."""

TAKEN_OVER = "taken_over_s"
"""Among the details of a fault of whoever writes the table of statuses: the seconds until another process did.

None: it never did.
"""


class GarbledHistory(RocketError):
    """The history cannot be read, or contradicts itself: nothing follows from it."""


class HistoryNotFound(SetupError):
    """There is no file to read at the place named, or it may not be read."""


class Request(enum.StrEnum):
    """What a client asked for."""

    JOIN = "join"
    """`POST /users`"""
    WRITE = "write"
    """`POST /rides`"""
    READ = "read"
    """`GET /rides/{id}`"""
    LIST = "list"
    """`GET /rides`, the first page"""


class Outcome(enum.StrEnum):
    """What the client knows afterwards."""

    OK = "ok"
    """It was answered; that a ride was not found is an answer."""
    FAIL = "fail"
    """It was definitely not done: 503, connection refused."""
    UNKNOWN = "unknown"
    """It may have been done: 504, connection lost, client hung up, time-out."""


class Role(enum.StrEnum):
    """What the node that answered was at that time."""

    PRIMARY = "primary"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was meant to happen; the first line. Times of all other lines count from here."""

    KIND: ClassVar = "run"
    seed: int
    duration_s: float
    routing: str
    sessions: int
    faults: tuple[str, ...]
    """Names of the faults that are meant to happen."""
    nodes: tuple[str, ...]
    """The primary is one of them."""
    started_at: str
    """Wall clock, ISO 8601."""
    processes: int = 1
    """How many the API has."""
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One request of a session and what became of it. The requests of one session never overlap."""

    KIND: ClassVar = "op"
    session: str
    user: str
    """E-mail address; a session has one user."""
    tokens: bool
    """Whether the session sends its tokens back."""
    request: Request
    at: float
    """Monotonic seconds since the run's zero: the moment before it was sent."""
    done: float
    """When the answer or the failure had been seen."""
    outcome: Outcome
    status: int | None = None
    node: str | None = None
    role: Role | None = None
    reason: str | None = None
    """`Rocket-Route-Reason`"""
    sent: str | None = None
    """The session token that went with it."""
    got: str | None = None
    """The session token that came back."""
    ride: int | None = None
    """The id that was asked for, or that the written ride was given."""
    distance: float | None = None
    """One decimal: what was to be written, however it ended (no two writes of a run share it), or was read."""
    rides: tuple[tuple[int, float], ...] | None = None
    """Id and distance of each ride on the page."""
    complete: bool | None = None
    """Whether the page reaches the user's oldest ride."""
    lost: str | None = None
    """The API's notice that a promotion may have lost what this session had been told."""
    error: str | None = None
    again: bool = False
    """Whether it was sent again, on a new connection, since the first one was lost before the answer came."""

    @property
    def shown(self) -> dict[float, int] | None:
        """The ids of the rides that the answer shows, by distance; None if it tells nothing of rides read."""
        if self.outcome is not Outcome.OK:
            return None
        if self.request is Request.LIST:
            return {distance: ride for ride, distance in self.rides or ()}
        if self.request is Request.READ:
            return {} if self.distance is None or self.ride is None else {self.distance: self.ride}
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that was done to the cluster."""

    KIND: ClassVar = "fault"
    name: str
    at: float
    until: float
    """When it was over."""
    node: str | None = None
    """Or the process of the API that it was done to."""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Healed:
    """From here on nothing is done to the cluster; traffic goes on."""

    KIND: ClassVar = "healed"
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The run came to its end, and this is what it left behind."""

    KIND: ClassVar = "end"
    at: float
    leaked: tuple[str, ...] = ()


Entry = Run | Op | Fault | Healed | End


@dataclass(frozen=True, slots=True)
class History:
    """A whole run."""

    run: Run
    ops: tuple[Op, ...]
    """In the order in which they began."""
    faults: tuple[Fault, ...] = ()
    """In the order in which they began."""
    healed: Healed | None = None
    end: End | None = None

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        """Put entries in order; raise `GarbledHistory` unless they start with the run and name all else once."""
        rest = iter(entries)
        first = next(rest, None)
        if not isinstance(first, Run):
            raise GarbledHistory("the first line does not say what run this is")
        once: dict[type[Entry], Entry] = {}
        ops, faults = [], []
        for entry in rest:
            if isinstance(entry, Op):
                ops.append(entry)
            elif isinstance(entry, Fault):
                faults.append(entry)
            elif isinstance(entry, Run) or type(entry) in once:
                raise GarbledHistory(f"there are two lines of the kind '{entry.KIND}'")
            else:
                once[type(entry)] = entry
        healed, end = once.get(Healed), once.get(End)
        return cls(
            run=first,
            ops=tuple(sorted(ops, key=lambda op: (op.at, op.done))),
            faults=tuple(sorted(faults, key=lambda fault: fault.at)),
            healed=healed if isinstance(healed, Healed) else None,
            end=end if isinstance(end, End) else None,
        )


# --- writing ---


def line_of(entry: Entry) -> str:
    """Return the line that stands for an entry, without its end."""
    values = {one.name: getattr(entry, one.name) for one in fields(entry)}
    return json.dumps({"kind": entry.KIND, **values}, allow_nan=False)


class HistoryWriter:
    """Appends to a history; several processes may, each with a writer of its own.

    Each line goes to the file in one write at its end, so that lines of several processes never mix.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    @classmethod
    def create(cls, path: Path, run: Run) -> Self:
        """Start a new history in place of whatever the file held."""
        path.write_bytes(b"")
        writer = cls(path)
        writer.add(run)
        return writer

    def add(self, entry: Entry) -> None:
        """Append one line; raise `OSError` if it does not fit on the disk."""
        line = (line_of(entry) + "\n").encode()
        if os.write(self._file, line) != len(line):
            raise OSError("the history could only be written in part: is the disk full?")

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
