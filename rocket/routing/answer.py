"""What comes back from a read or write, with its way."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from rocket.consistency import Reason, SessionToken
    from rocket.routing.epochs import LostTail

ResultT = TypeVar("ResultT")


class Role(enum.StrEnum):
    """What a node is at the moment; its name says nothing about that."""

    PRIMARY = "primary"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class Answer(Generic[ResultT]):
    """What a read or write brought, and how it got there."""

    value: ResultT
    node: str
    """The name of the node that answered."""
    role: Role
    """As what it answered."""
    reason: Reason
    token: SessionToken | None = None
    """What the session shall bring with its next request; None under a routing that guarantees nothing."""
    lost: LostTail | None = None
    """Set, once for a token, if a promotion may have cost the session what it was promised."""
