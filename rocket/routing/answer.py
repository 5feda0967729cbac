"""What comes back from a read or write, and the way that a read took."""

# Annotations are values here: the fields of a named tuple are read at runtime (for the docs, say).
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from rocket.consistency import PrimaryStatus, Reason, ReplicaStatus, SessionToken
from rocket.routing.bound import ReadBound
from rocket.routing.epochs import PossibleLoss

ResultT = TypeVar("ResultT")


class Role(enum.StrEnum):
    """What a node is at the moment; its name says nothing about that."""

    PRIMARY = "primary"
    REPLICA = "replica"


@dataclass(slots=True)
class Route:
    """The way of a read: the router fills it in as it goes, to be looked at afterwards.

    Times are monotonic seconds. `Unavailable` carries it as well.
    """

    deadline: float
    """When the read has to be over."""
    tokens: Sequence[SessionToken]
    """Whose floors it had to respect: the session's, or one for what the primary knew of the subject."""
    floor_looked_up: bool = False
    """Whether the latter is the case."""
    statuses: Sequence[ReplicaStatus] = ()
    """What was known of the replicas at the decision; empty if none was needed."""
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
    bound: ReadBound | None = None
    """What the node that served it said of itself then (see `rocket.READ_BOUND`)."""
    on: ReplicaStatus | PrimaryStatus | None = None
    """Where work was run last; None if it was not."""
    lost: PossibleLoss | None = None
    """What the session's tokens had come to on the primary, if work was run there."""


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
