"""The pure core: positions, statuses and the decision. No asyncio, no asyncpg, no clock of its own."""

from rocket.consistency.board import Board
from rocket.consistency.choice import Choice, Policy, Reason, choose
from rocket.consistency.lsn import Lsn
from rocket.consistency.status import Incarnation, PrimaryStatus, ReplicaStatus

__all__ = [
    "Board",
    "Choice",
    "Incarnation",
    "Lsn",
    "Policy",
    "PrimaryStatus",
    "Reason",
    "ReplicaStatus",
    "choose",
]
