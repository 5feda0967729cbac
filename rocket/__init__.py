"""Reads from Postgres replicas that are guaranteed never stale."""

from rocket.config import nodes_from_environment
from rocket.consistency import Board, Lsn, Policy, Reason, SessionToken
from rocket.errors import (
    InvalidToken,
    NodesUnusable,
    OutcomeUnknown,
    RocketError,
    RoutingError,
    TablesUnusable,
    Unavailable,
    WriteInRead,
)
from rocket.routing.answer import Answer, Role, Route
from rocket.routing.bounds import SHOWN, saw
from rocket.routing.connections import Connection, Work
from rocket.routing.explanation import explain
from rocket.routing.floors import FloorStore, FloorTable, SubjectLocks
from rocket.routing.limits import Limits
from rocket.routing.observer import Observer
from rocket.routing.router import Router
from rocket.routing.rules import Routing
from rocket.routing.session import Session, tokens_from
from rocket.routing.writer import FLUSHED

__all__ = [
    "FLUSHED",
    "SHOWN",
    "Answer",
    "Board",
    "Connection",
    "FloorStore",
    "FloorTable",
    "InvalidToken",
    "Limits",
    "Lsn",
    "NodesUnusable",
    "Observer",
    "OutcomeUnknown",
    "Policy",
    "Reason",
    "RocketError",
    "Role",
    "Route",
    "Router",
    "Routing",
    "RoutingError",
    "Session",
    "SessionToken",
    "SubjectLocks",
    "TablesUnusable",
    "Unavailable",
    "Work",
    "WriteInRead",
    "explain",
    "nodes_from_environment",
    "saw",
    "tokens_from",
]

__version__ = "0.1.0"
