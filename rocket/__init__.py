"""Reads from Postgres replicas that are guaranteed never stale."""

from rocket.consistency import Lsn, Policy, Reason
from rocket.dsn import nodes_from_environment
from rocket.errors import InvalidToken, OutcomeUnknown, RocketError, Unavailable, WriteInRead
from rocket.routing.answer import Answer, Role
from rocket.routing.bound import READ_BOUND, report_read_bound
from rocket.routing.connection import Connection, Work
from rocket.routing.epochs import PossibleLoss
from rocket.routing.explain import explain
from rocket.routing.floors import FORCE_FLUSH, FloorStore, FloorTable, SubjectLocks
from rocket.routing.pool import Limits
from rocket.routing.router import Router
from rocket.routing.session import Session

__all__ = [
    "FORCE_FLUSH",
    "READ_BOUND",
    "Answer",
    "Connection",
    "FloorStore",
    "FloorTable",
    "InvalidToken",
    "Limits",
    "Lsn",
    "OutcomeUnknown",
    "Policy",
    "PossibleLoss",
    "Reason",
    "RocketError",
    "Role",
    "Router",
    "Session",
    "SubjectLocks",
    "Unavailable",
    "Work",
    "WriteInRead",
    "explain",
    "nodes_from_environment",
    "report_read_bound",
]

__version__ = "0.1.0"
