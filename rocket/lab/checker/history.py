"""The history of a torture run: requests with their answers, and faults, each as a line of JSON."""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import msgspec

from rocket.consistency import Freshness
from rocket.errors import RocketError, SetupError, describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

MIXED = "mixed"
"""What the reads of a run ask for whose reads ask for all that there is."""
_MIXED = (*(Freshness.SESSION,) * 12, *(Freshness.GLOBAL,) * 5, *(Freshness.within(2.0),) * 2, Freshness.ANY)

VERSION = 2
"""Of the format."""

PROMOTIONS = frozenset(
    {
        "promotion",
        "promotion-lossy",
        "restored-snapshot",
        "signal-removed",
        # Patroni makes another member the leader.
        "leader-killed",
        "leader-frozen",
        "leader-hung",
        "switchover",
        "store-down",
        "partition",
    }
)
"""The faults that may lose acknowledged writes."""
SETTLED_S = 2.0
"""For so long after a fault of the primary a process may not know: it refuses, or answers from the old epoch."""

TAKEN_OVER = "taken_over_s"
"""A detail of a fault of the process that writes the table of statuses: seconds until another process wrote it.

None: no other process did.
"""

TAKEN_BY_ANOTHER = "taken_by_another"
"""A detail of a server of another cluster: how many users and rides it was given, of which there must be none."""

TENANT = "tenant"
"""The kind of work that takes the role of a tenant, to which row-level security shows its own rows alone."""


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


READS = frozenset({Request.READ, Request.LIST})


class Outcome(enum.StrEnum):
    """What the client knows afterwards."""

    OK = "ok"
    """It was answered; that a ride was not found is an answer."""
    FAIL = "fail"
    """It was definitely not done: 503, connection refused."""
    UNKNOWN = "unknown"
    """It may have been done: 504, connection lost, client hung up, time-out."""


class Role(enum.StrEnum):
    """The role of the node that answered, at that time."""

    PRIMARY = "primary"
    REPLICA = "replica"


class _Line(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag=str.lower
):
    """A line of the history; `kind` says which."""


class Run(_Line, frozen=True, kw_only=True):
    """What was meant to happen; the first line. Times of all other lines count from here."""

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
    library: bool = False
    """Whether some of the sessions use the library itself."""
    freshness: str = str(Freshness.SESSION)
    """What its reads ask for: each the same, or `MIXED`."""
    version: int = VERSION

    @property
    def asks_replicas(self) -> bool:
        """Whether its routing sends reads to replicas at all."""
        return self.routing != "primary"


_ANY = str(Freshness.ANY)
GLOBAL = str(Freshness.GLOBAL)


def asked_by(freshness: str) -> Sequence[Freshness]:
    """Return what the reads of a run ask for, by `Run.freshness`: each as often as it should be."""
    return _MIXED if freshness == MIXED else (Freshness.parse(freshness),)


class Op(_Line, frozen=True, kw_only=True, gc=False):
    """One request of a session and its result. The requests of one session never overlap.

    A session that uses the library itself records the status that a service would answer with.
    """

    session: str
    user: str
    """E-mail address; a session has one user."""
    tokens: bool
    """Whether the session sends its tokens back."""
    request: Request
    at: float
    """Monotonic seconds since the run's zero: the moment before it was sent."""
    done: float
    """When the answer or the failure had arrived."""
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
    freshness: str | None = None
    """What a read asked to be shown, as `str(Freshness)` has it; None: what its session has written and seen."""
    ride: int | None = None
    """The id that was asked for, or that the written ride was given."""
    distance: float | None = None
    """One decimal: the distance read, or to be written, however that ended (no two writes of a run share it)."""
    rides: tuple[tuple[int, float], ...] | None = None
    """Id and distance of each ride on the page."""
    complete: bool | None = None
    """Whether the page reaches the user's oldest ride."""
    lost: str | None = None
    """The API's notice that a promotion may have lost what this session had been told."""
    error: str | None = None
    again: bool = False
    """Whether it was sent again, on a new connection, since the first one was lost before the answer came."""
    work: str | None = None
    """The kind of work that the library was given; None for a request to the API."""
    raised: str | None = None
    """How work ended, if by an error or cancelled: what it had seen by then counts as an answer does."""

    left: str | None = None
    """What work has found in its session that it had not brought itself; None if that is nothing."""

    @property
    def asks_for_all(self) -> bool:
        """Whether it is a read that has to show what was acknowledged to anybody, or brings no token."""
        return self.freshness == GLOBAL or (not self.tokens and self.freshness is None)

    @property
    def asks_for_nothing(self) -> bool:
        """Whether it is a read that any node may serve."""
        return self.freshness == _ANY

    @property
    def max_age_s(self) -> float | None:
        """How old it may be what it shows, if it is a read that asks for that; in seconds."""
        return None if self.freshness is None else Freshness.parse(self.freshness).max_age_s

    @property
    def acknowledged_write(self) -> bool:
        """Whether it is a write that the API confirmed."""
        return self.request is Request.WRITE and self.outcome is Outcome.OK

    @property
    def shown(self) -> dict[float, int] | None:
        """The ids of the rides that the answer shows, by distance; None if it is not an answer to a read."""
        if self.outcome is not Outcome.OK:
            return None
        if self.request is Request.LIST:
            return {distance: ride for ride, distance in self.rides or ()}
        if self.request is Request.READ:
            return {} if self.distance is None or self.ride is None else {self.distance: self.ride}
        return None


class Fault(_Line, frozen=True, kw_only=True):
    """Something that was done to the cluster."""

    name: str
    at: float
    until: float
    """When it was over."""
    node: str | None = None
    """Or the process of the API that it was done to."""
    detail: dict[str, Any] = msgspec.field(default_factory=dict)

    def overlaps(self, since: float, until: float) -> bool:
        """Return whether it was on at some moment of a stretch of time."""
        return self.at <= until and since <= self.until


class Healed(_Line, frozen=True, kw_only=True):
    """From here on nothing is done to the cluster; traffic goes on."""

    at: float


class End(_Line, frozen=True, kw_only=True):
    """The run came to its end, and this is what it left behind."""

    at: float
    leaked: tuple[str, ...] = ()


Entry = Run | Op | Fault | Healed | End


class History(msgspec.Struct, frozen=True):
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
                raise GarbledHistory(f"there are two lines of the kind '{type(entry).__name__.lower()}'")
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

    def answered_reads(self) -> list[Op]:
        """Return the reads that were answered."""
        return [op for op in self.ops if op.request in READS and op.outcome is Outcome.OK]

    def promotions(self, since: float, until: float) -> list[Fault]:
        """Return the promotions that were under way at some moment of a stretch of time."""
        return [fault for fault in self.faults if fault.name in PROMOTIONS and fault.overlaps(since, until)]


# --- writing ---


def line_of(entry: Entry) -> str:
    """Return the line that stands for an entry, without its end."""
    return msgspec.json.encode(entry).decode()


class HistoryWriter:
    """Appends to a history; several processes may, each with a writer of its own.

    Each line goes to the file in one write at its end, so that lines of several processes never mix.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    @classmethod
    def create(cls, path: Path, run: Run) -> Self:
        """Start a new history in place of what the file held."""
        path.write_bytes(b"")
        writer = cls(path)
        writer.add(run)
        return writer

    def add(self, entry: Entry) -> None:
        """Append one line; raise `OSError` if it does not fit on the disk."""
        line = msgspec.json.encode(entry) + b"\n"
        if self._file.write(line) != len(line):
            raise OSError("the history could only be written in part: is the disk full?")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- reading ---

_SUCCESS = {
    Request.JOIN: {200, 201},
    Request.WRITE: {201},
    Request.READ: {200, 404},
    Request.LIST: {200},
}
_OF_ONE_RIDE = {Request.WRITE, Request.READ}
_NOT_FOUND = 404
_DECODER = msgspec.json.Decoder(Entry)


def read_history(path: Path) -> History:
    """Read a file; raise `HistoryNotFound` if it cannot be opened, `GarbledHistory` if it is no whole history."""
    entries = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    entries.append(parse_line(line))
                except GarbledHistory as error:
                    cut = "" if line.endswith(b"\n") else "cut off, or "
                    raise GarbledHistory(f"line {number} is {cut}garbled: {error}") from None
    except OSError as error:
        raise HistoryNotFound(f"cannot read the history '{path}': {error.strerror or describe(error)}") from None
    return History.of(entries)


def parse_line(line: str | bytes) -> Entry:
    """Read one line; raise `GarbledHistory` for one that `line_of` cannot have written."""
    try:
        entry: Entry = _DECODER.decode(line)
    except msgspec.ValidationError as error:
        raise GarbledHistory(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise GarbledHistory(f"not JSON: {error}") from None
    if contradiction := _contradiction(entry):
        raise GarbledHistory(contradiction)
    return _in_tenths(entry) if isinstance(entry, Op) else entry


def _contradiction(entry: Entry) -> str | None:
    if isinstance(entry, Run) and entry.version != VERSION:
        return f"version {entry.version} of the format is not known here, only {VERSION}"
    if isinstance(entry, Run) and not (entry.freshness == MIXED or _is_freshness(entry.freshness)):
        return f"no reads ask for '{entry.freshness}'"
    if isinstance(entry, Fault) and entry.until < entry.at:
        return "over before it began"
    return _contradiction_of_op(entry) if isinstance(entry, Op) else None


def _contradiction_of_op(op: Op) -> str | None:
    read, found_nothing = op.request is Request.READ, op.status == _NOT_FOUND
    ok = op.outcome is Outcome.OK
    contradictions = {
        "done before it began": op.done < op.at,
        "a write without its distance": op.request is Request.WRITE and op.distance is None,
        "a ride that was not found is an answer, so 'ok'": read and found_nothing and not ok,
        f"'ok' with status {op.status}": ok and op.status not in _SUCCESS[op.request],
        f"no read asks for '{op.freshness}'": not _is_freshness(op.freshness),
        "a ride without its id": ok and op.request in _OF_ONE_RIDE and op.ride is None,
        "a ride that was read has a distance, and one that was not found has none": (
            ok and read and (op.distance is None) != found_nothing
        ),
        "a page without its rides, or not saying whether it is complete": (
            ok and op.request is Request.LIST and (op.rides is None or op.complete is None)
        ),
    }
    return next((what for what, so in contradictions.items() if so), None)


@lru_cache(maxsize=64)
def _is_freshness(text: str | None) -> bool:
    try:
        return text is None or bool(Freshness.parse(text))
    except ValueError:
        return False


def _in_tenths(op: Op) -> Op:
    """Round its distances to the one decimal that the API shows; a ride that is on many pages is kept once."""
    if op.rides is not None:
        return msgspec.structs.replace(op, rides=tuple([_ride(*one) for one in op.rides]))
    if op.distance is not None and op.distance != (distance := round(op.distance, 1)):
        return msgspec.structs.replace(op, distance=distance)
    return op


@lru_cache(maxsize=1 << 18)
def _ride(ride: int, distance: float) -> tuple[int, float]:
    return ride, round(distance, 1)
