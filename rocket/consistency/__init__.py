"""The pure core: positions, statuses and the decision. No asyncio, no asyncpg, no clock of its own."""

from rocket.consistency.board import Board
from rocket.consistency.choice import (
    Choice,
    Leaning,
    Policy,
    Preferences,
    Reason,
    choose,
    obstacle,
    worth_waiting_for,
)
from rocket.consistency.freshness import Freshness
from rocket.consistency.lsn import Lsn, switch_point
from rocket.consistency.status import Epoch, Incarnation, PrimaryStatus, ReplicaStatus, rank_of, timeline_of
from rocket.consistency.token import NODE_NAME, SessionToken, Tokens, merged

__all__ = [
    "NODE_NAME",
    "Board",
    "Choice",
    "Epoch",
    "Freshness",
    "Incarnation",
    "Leaning",
    "Lsn",
    "Policy",
    "Preferences",
    "PrimaryStatus",
    "Reason",
    "ReplicaStatus",
    "SessionToken",
    "Tokens",
    "choose",
    "merged",
    "obstacle",
    "rank_of",
    "switch_point",
    "timeline_of",
    "worth_waiting_for",
]
