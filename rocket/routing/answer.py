"""What a read may ask for, what comes back from a read or write, and the way that a read took."""

# Annotations are values here: the fields of a named tuple are read at runtime (for the docs, say).
import enum
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar, get_args

from rocket.consistency import Freshness, Lsn, Policy, PrimaryStatus, Reason, ReplicaStatus, SessionToken
from rocket.routing.bound import ReadBound
from rocket.routing.connection import Isolation
from rocket.routing.epochs import PossibleLoss

ResultT = TypeVar("ResultT")


class Role(enum.StrEnum):
    """What a node is at the moment; its name says nothing about that."""

    PRIMARY = "primary"
    REPLICA = "replica"


class WriteOptions(TypedDict, total=False):
    """What one write asks for, where it is not what the router does by default."""

    timeout: float
    """How many seconds it may take until its COMMIT is sent, in place of `Limits.write_s`."""
    isolation: Isolation
    """The isolation level of its transaction."""
    settings: Mapping[str, str]
    """Settings of the server for its transaction alone, by name: a tenant for row-level security, say."""
    transaction: bool
    """False where work cannot run in one (VACUUM, CREATE INDEX CONCURRENTLY, procedures that commit).

    Then each of its statements commits by itself. It runs once, and behind a pooler not at all.
    """


class ReadOptions(TypedDict, total=False):
    """What one read asks for, where it is not what the router does by default."""

    freshness: Freshness
    """What it has to see; if nothing is said what its session has, or everybody's commits if that has nothing."""
    timeout: float
    """How many seconds it may take, in place of `Limits.read_s`.

    A replica may have all of them but `Limits.attempt_s`, which is kept for another node, or half of them.
    """
    isolation: Isolation
    """Runs it in a transaction of this isolation level; only the primary runs a serializable one."""
    settings: Mapping[str, str]
    """Runs it in a transaction with settings of the server that hold for it alone, by name: a tenant, say."""
    max_wait: float
    """How many seconds it waits for a replica to catch up, in place of `Policy.max_wait_s`; 0: not at all."""
    on: Literal["primary"]
    """Where it goes in any case."""


def check_options(options: ReadOptions | WriteOptions, of: type[ReadOptions | WriteOptions]) -> None:
    """Raise `TypeError` for an option that there is not, and `ValueError` for a value that makes no sense."""
    known = of.__annotations__
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"there is no option {name!r} here: there are {', '.join(known)}")
        if not _VALID[name](value):
            raise ValueError(f"it cannot have {name}={value!r}")


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


_VALID: dict[str, Callable[[Any], bool]] = {
    "freshness": lambda value: isinstance(value, Freshness),
    "timeout": lambda value: _is_time(value) and value > 0,
    "isolation": lambda value: value in get_args(Isolation),
    "settings": lambda value: (
        isinstance(value, Mapping) and all(isinstance(part, str) for item in value.items() for part in item)
    ),
    "max_wait": _is_time,
    "on": lambda value: value == "primary",
    "transaction": lambda value: isinstance(value, bool),
}


_NO_COVER = Lsn(0)


@dataclass(slots=True)
class Route:
    """The way of a read: the router fills it in as it goes, to be looked at afterwards.

    Times are monotonic seconds. `Unavailable` carries it as well.
    """

    deadline: float
    """When the read has to be over."""
    tokens: Sequence[SessionToken]
    """Whose floors it had to respect: the session's, and one for all that is committed if it was to see that."""
    policy: Policy
    """The router's, with the bounds that the read has itself."""
    freshness: Freshness = Freshness.SESSION
    """What it had to see: without a token, and if nothing else was asked for, what everybody has committed."""
    required: SessionToken | None = None
    """What a replica is chosen by; None if any will do."""
    statuses: Sequence[ReplicaStatus] = ()
    """What was known of the replicas at the decision; empty if none was needed."""
    covered_lsn: Lsn = _NO_COVER
    """What every read had to see at the decision: see `Router.cover`."""
    decided_at: float = 0.0
    """When the last decision among them was made; 0.0 if there was none."""
    waited_s: float | None = None
    """How long it waited for a replica to catch up; None if it did not."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """The replicas that failed it, and how."""
    left_alone: Mapping[str, str] = field(default_factory=dict)
    """The nodes to which no connection could be opened at the decision, and why."""
    attempts: int = 0
    """How many replicas failed it, and not at once, as those do whose connections are gone or refused."""
    attempt_s: float | None = None
    """How long an attempt on a replica may take at the most, where the read has a time of its own."""
    bound: ReadBound | None = None
    """What the node that served it said of itself then (see `rocket.READ_BOUND`)."""
    on: ReplicaStatus | PrimaryStatus | None = None
    """Where work was run last; None if it was not."""
    lost: PossibleLoss | None = None
    """What the session's tokens had come to on the primary, if work was run there."""


_SPAN_S = 10.0
"""How long reads are counted together."""


class RecentReads:
    """How many reads went to replicas lately, and how many to the primary, by the reason.

    Each is counted for ten seconds at least, and for thirty at most.
    """

    __slots__ = ("_before", "_began", "_to_primary", "by_replicas")

    def __init__(self) -> None:
        self.by_replicas = 0
        """Of those counted now: to be increased with each read that a replica has answered."""
        self._to_primary: Counter[Reason] = Counter()
        self._before: tuple[int, Counter[Reason]] = (0, Counter())
        self._began = 0.0

    def note_fallback(self, reason: Reason, now: float) -> None:
        """Count a read that goes to the primary; `now` is in monotonic seconds."""
        age_s = now - self._began
        if age_s >= _SPAN_S:
            is_recent = age_s < 2 * _SPAN_S
            self._before = (self.by_replicas, self._to_primary) if is_recent else (0, Counter())
            self.by_replicas, self._to_primary, self._began = 0, Counter(), now
        self._to_primary[reason] += 1

    def look(self, now: float) -> tuple[int, Counter[Reason]]:
        """Return how many reads replicas have answered, and how many went to the primary, by the reason.

        Another thread may ask.
        """
        age_s = now - self._began
        if age_s >= 2 * _SPAN_S:
            return 0, Counter()
        by_replicas, to_primary = self._before if age_s < _SPAN_S else (0, Counter())
        return by_replicas + self.by_replicas, to_primary + self._to_primary.copy()


class Answer(NamedTuple, Generic[ResultT]):
    """What a read or write returned, and how it got there."""

    value: ResultT
    """What the work returned."""
    node: str
    """The name of the node that answered."""
    role: Role
    """Its role then."""
    reason: Reason
    """Why it was that node."""
    token: SessionToken | None = None
    """What the session must bring with its next request; None from a routing that promises nothing."""
    lost: PossibleLoss | None = None
    """Set, once for a token, if a promotion may have cost the session what it was promised.

    What work has left by, in place of a value, sets it as well; the next value then sets it again.
    """
    route: Route | None = None
    """How a read came to its node; None for a write."""


OnError: TypeAlias = Callable[[Answer[BaseException]], None]
"""Called with what work has left by, in place of a value, before that is raised.

It is an error or a cancellation, and tells its caller something as a value does. So the token has to be brought
along from then on, beside those that the session has.
"""

OnEnd: TypeAlias = Callable[[Answer[Any] | BaseException, float], None]
"""Called when a read or write has ended: with its answer, or what it raises, and how many seconds it took."""
