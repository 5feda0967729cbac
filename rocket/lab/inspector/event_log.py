"""Keeps the latest requests, statuses and commands in memory, in the order in which they became known.

Recording runs on the hot path, so an entry is kept as it came. Everything that costs more (session names,
sentences, JSON) is made from it later, and only for viewers. This module also says what a recorded request means
in terms of HTTP and rides, and to which session it belongs.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from rocket import InvalidToken, Lsn, OutcomeUnknown, Unavailable
from rocket.errors import describe
from rocket.lab.api.problems import Problem
from rocket.lab.api.recorder import Asked, RequestRecord, RequestRecorder
from rocket.lab.checker.history import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rocket import Answer
    from rocket.cluster.cluster import CarriedOut
    from rocket.consistency import Board, PrimaryStatus, ReplicaStatus
    from rocket.lab.comparison import Routing

_CAPACITY = 8192
"""Requests that are kept, and likewise other entries."""

# --- entries ---


@dataclass(frozen=True, slots=True)
class StatusSeen:
    """The observer published the status of a node."""

    at: float
    status: ReplicaStatus | PrimaryStatus


@dataclass(frozen=True, slots=True)
class StatusGone:
    """The observer withdrew the status of a node."""

    at: float
    name: str


@dataclass(frozen=True, slots=True)
class CommandDone:
    """The cluster carried out a command, or failed to."""

    at: float
    done: CarriedOut


@dataclass(frozen=True, slots=True)
class RoutingChanged:
    """Reads are routed by another rule from this moment on."""

    at: float
    routing: Routing
    before: Routing


@dataclass(frozen=True, slots=True)
class RateChanged:
    """The simulator was given another rate."""

    at: float
    rate: float | None


@dataclass(frozen=True, slots=True)
class ScenarioStep:
    """A scenario reported a step."""

    at: float
    name: str
    phase: str
    text: str


OtherEntry: TypeAlias = StatusSeen | StatusGone | CommandDone | RoutingChanged | RateChanged | ScenarioStep
LogEntry: TypeAlias = RequestRecord | OtherEntry
KeptT = TypeVar("KeptT")


class Position(NamedTuple):
    """A position in the log: how many entries of either kind were added before it."""

    requests: int
    others: int


class EventLog:
    """The latest entries. Times are monotonic seconds; requests are numbered from 0."""

    def __init__(self) -> None:
        self.zero = time.monotonic()
        """The moment from which viewers count time."""
        self.zero_wall = time.time()
        """The same moment by the wall clock."""
        self.recorder = RequestRecorder()
        """Hand this to the API. It records requests only after `start_recording`."""
        self._requests: deque[RequestRecord] = deque(maxlen=_CAPACITY)
        self._others: deque[OtherEntry] = deque(maxlen=_CAPACITY)
        self._end = [0, 0]

    def start_recording(self) -> None:
        """Record every request from now on. Each read pays for it, so do so only while there are viewers."""
        self.recorder.record = self.record

    def stop_recording(self) -> None:
        """Record no further requests, and forget those recorded."""
        self.recorder.record = None
        self._requests.clear()

    @property
    def is_recording(self) -> bool:
        """Whether requests are recorded."""
        return self.recorder.record is not None

    def record(self, record: RequestRecord) -> None:
        """Add a request, reduced to what viewers need."""
        if record.error is not None:
            record = record._replace(error=RecordedError(record.error, record.request))
        elif record.request is Asked.LIST and record.answer is not None:
            record = _with_compact_page(record, record.answer)
        self._requests.append(record)
        self._end[0] += 1

    def add(self, entry: OtherEntry) -> None:
        """Add an entry that is not a request."""
        self._others.append(entry)
        self._end[1] += 1

    def follow(self, board: Board) -> None:
        """Add an entry for every change of a board from now on."""
        board.on_status.append(lambda status: self.add(StatusSeen(time.monotonic(), status)))
        board.on_gone.append(lambda name: self.add(StatusGone(time.monotonic(), name)))

    @property
    def end(self) -> Position:
        """The position after the last entry."""
        return Position(*self._end)

    @property
    def begin(self) -> Position:
        """The position before the oldest entries that are still kept."""
        return Position(self._end[0] - len(self._requests), self._end[1] - len(self._others))

    def since(self, position: Position) -> Iterator[tuple[int, LogEntry]]:
        """Return the entries after a position that are still kept, in order of time; requests with their numbers.

        It is a snapshot: entries that are added while it is iterated are not part of it.
        """
        first = max(position.requests, self.begin.requests)
        requests = enumerate(_last(self._requests, self._end[0] - first), first)
        others = ((-1, other) for other in _last(self._others, self._end[1] - position.others))
        return heapq.merge(requests, others, key=_time_of)

    def ms(self, moment: float) -> float:
        """Return a monotonic moment as milliseconds since `zero`."""
        return round((moment - self.zero) * 1000, 3)


def _last(kept: deque[KeptT], count: int) -> list[KeptT]:
    last = list(itertools.islice(reversed(kept), count))
    last.reverse()
    return last


def _time_of(numbered: tuple[int, LogEntry]) -> float:
    entry = numbered[1]
    return entry.done if isinstance(entry, RequestRecord) else entry.at


# --- what a recorded request means ---

_STATUSES = {
    InvalidToken: HTTPStatus.BAD_REQUEST,
    OutcomeUnknown: HTTPStatus.GATEWAY_TIMEOUT,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}
_WRITES = {Asked.JOIN, Asked.WRITE}


class RecordedError(Exception):
    """A request's error without its traceback, whose frames would keep alive everything they refer to."""

    def __init__(self, error: BaseException, asked: Asked) -> None:
        super().__init__(describe(error))
        known = isinstance(error, Unavailable | InvalidToken | Problem) or asked not in _WRITES
        self.outcome = Outcome.FAIL if known else Outcome.UNKNOWN
        self.status = _status_of_error(error, asked)
        self.route = getattr(error, "route", None)


class RidePage(NamedTuple):
    """The rides that a list returned, in compact form."""

    rides: array[int]
    distances: array[float]
    complete: bool
    """Whether there are no older rides."""


def _with_compact_page(record: RequestRecord, answer: Answer[Any]) -> RequestRecord:
    """Return a list's record with its rows reduced to a `RidePage`."""
    limit, _ = record.detail
    rows: Sequence[Any] = [row for row in answer.value if row["id"] is not None]
    page = RidePage(
        array("q", (row["id"] for row in rows[:limit])),
        array("d", (row["distance"] for row in rows[:limit])),
        complete=len(rows) <= limit,
    )
    return record._replace(answer=answer._replace(value=page))


def outcome_of(record: RequestRecord) -> Outcome:
    """Return what the client knows after its request."""
    error = _error_of(record)
    return Outcome.OK if error is None else error.outcome


def status_of(record: RequestRecord) -> int:
    """Return the HTTP status with which the API answers a request."""
    error = _error_of(record)
    return _status_of_success(record) if error is None else error.status


def _error_of(record: RequestRecord) -> RecordedError | None:
    assert record.error is None or isinstance(record.error, RecordedError)  # noqa: S101 - `record` saw to it
    return record.error


def _status_of_error(error: BaseException, asked: Asked) -> int:
    if isinstance(error, Problem):
        return error.status
    if isinstance(error, asyncio.CancelledError):  # by the API's time limit for requests
        return HTTPStatus.GATEWAY_TIMEOUT if asked in _WRITES else HTTPStatus.SERVICE_UNAVAILABLE
    return next(
        (status for kind, status in _STATUSES.items() if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR
    )


def _status_of_success(record: RequestRecord) -> int:
    assert record.answer is not None  # noqa: S101 - there was no error
    match record.request:
        case Asked.WRITE:
            return HTTPStatus.CREATED
        case Asked.JOIN:
            status: int = record.answer.value[1]
            return status
        case Asked.READ if ride_of(record) is None:
            return HTTPStatus.NOT_FOUND
    return HTTPStatus.OK


def ride_of(record: RequestRecord) -> tuple[int, float] | None:
    """Return id and distance of the ride that was written, or that a read found."""
    if record.answer is None or record.error is not None or record.request not in {Asked.WRITE, Asked.READ}:
        return None
    row = record.answer.value
    return None if row["id"] is None else (row["id"], round(row["distance"], 1))


def page_of(record: RequestRecord) -> RidePage | None:
    """Return the rides that a list returned."""
    if record.answer is None or record.error is not None or record.request is not Asked.LIST:
        return None
    page: RidePage = record.answer.value
    return page


def is_of_unknown_user(record: RequestRecord) -> bool:
    """Return whether the node that answered a read did not know the user."""
    return record.answer is not None and record.error is not None and status_of(record) == HTTPStatus.UNAUTHORIZED


def replayed_lsn(record: RequestRecord) -> Lsn | None:
    """Return the replay LSN that a replica reported in the same statement as its answer."""
    route = None if record.answer is None else record.answer.route
    if route is None or route.bound is None or not route.bound.is_replica:
        return None
    return route.bound.lsn


# --- sessions ---

_MOST_TOKENS = 20_000
"""Tokens that are remembered until a client sends them back."""


class TrackedSession(NamedTuple):
    """The session to which a request belongs."""

    name: str
    by_token: bool
    """Whether it is a chain of tokens, in contrast to a user who sends none."""


class SessionTracker:
    """Assigns requests to sessions by their tokens alone, in the order in which they were completed.

    A session is a chain: a token in an answer belongs to the session of the token in the request, and is used up
    once a client has sent it back. A token that is sent a second time, or is unknown, begins another session: what
    that must see follows from its token, which covers no more than what its own chain has seen.
    Two sessions may receive equal tokens, since a token holds nothing but floors. Either then stands for both.
    """

    def __init__(self) -> None:
        self._chains: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()
        """By subject and token: the session that received it last, and when."""

    def session_of(self, record: RequestRecord, number: int) -> TrackedSession:
        """Return the session of a request; `number` names a session that begins with it."""
        token = None if record.answer is None else record.answer.token
        received = None if token is None else str(token)
        name = self._use_up(record)
        if name is None:
            # A read without a token must see what its user wrote. It continues no chain, but may begin one.
            if not record.sent and (received is None or record.request in {Asked.READ, Asked.LIST}):
                if received is not None:
                    self._remember(record, received, f"s{number}")
                return TrackedSession(f"user {record.subject}", by_token=False)
            name = f"s{number}"
        if received is not None:
            self._remember(record, received, name)
        elif len(record.sent) == 1:  # the client keeps its token; of several it may go on with any
            self._remember(record, record.sent[0], name)
        return TrackedSession(name, by_token=True)

    def _use_up(self, record: RequestRecord) -> str | None:
        """Use up the tokens that a request sent; return the session of the first known one."""
        name: str | None = None
        for token in record.sent:
            known = self._chains.pop((record.subject, token), None)
            # A token received only after this request began is an equal one, of another session.
            if name is None and known is not None and known[1] <= record.at:
                name = known[0]
        return name

    def _remember(self, record: RequestRecord, token: str, name: str) -> None:
        key = (record.subject, token)
        self._chains.pop(key, None)
        self._chains[key] = name, record.done
        if len(self._chains) > _MOST_TOKENS:
            self._chains.popitem(last=False)
