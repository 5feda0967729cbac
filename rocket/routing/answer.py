"""What comes back from a read or write, and the way that a read went."""

# Annotations are values here: nobody finds out later what the fields of a named tuple were (for the docs, say).
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from rocket.consistency import Reason, ReplicaStatus, SessionToken
from rocket.routing.epochs import PossibleLoss

ResultT = TypeVar("ResultT")


class Role(enum.StrEnum):
    """What a node is at the moment; its name says nothing about that."""

    PRIMARY = "primary"
    REPLICA = "replica"


@dataclass(slots=True)
class Route:
    """The way of a read: the router fills it in as it goes, for whoever wants to know afterwards.

    Times are monotonic seconds. `Unavailable` brings it as well.
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
    said: str | None = None
    """What the node that served it said of itself then (see `rocket.READ_BOUND`)."""


class Answer(NamedTuple, Generic[ResultT]):
    """What a read or write brought, and how it got there."""

    value: ResultT
    """What the work returned."""
    node: str
    """The name of the node that answered."""
    role: Role
    """As what it answered."""
    reason: Reason
    """Why it was that node."""
    token: SessionToken | None = None
    """What the session shall bring with its next request; None under a routing that guarantees nothing."""
    lost: PossibleLoss | None = None
    """Set, once for a token, if a promotion may have cost the session what it was promised."""
    route: Route | None = None
    """How a read came to its node; None for a write."""
