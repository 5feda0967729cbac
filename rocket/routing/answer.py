"""What comes back from a read or write, with its way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from rocket.consistency import Reason, SessionToken

ResultT = TypeVar("ResultT")

PRIMARY = "primary"
"""How answers name the primary."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[ResultT]):
    """What a read or write brought, and how it got there."""

    value: ResultT
    node: str
    """The node that answered: a replica's name, or `primary`."""
    reason: Reason
    token: SessionToken | None = None
    """What the session shall bring with its next request; None under a routing that guarantees nothing."""
