"""Reads from Postgres replicas that are guaranteed never stale."""

from rocket.config import nodes_from_environment
from rocket.consistency import Board, Epoch, Incarnation, Lsn, Policy, Reason, SessionToken
from rocket.errors import (
    InvalidSetting,
    InvalidToken,
    NodesUnusable,
    OutcomeUnknown,
    RocketError,
    RoutingError,
    SetupError,
    TablesUnusable,
    Unavailable,
    WriteInRead,
)
from rocket.routing.answer import Answer, Role, Route
from rocket.routing.bounds import SHOWN, saw
from rocket.routing.connections import Connection, Work
from rocket.routing.epochs import LostTail
from rocket.routing.explanation import explain
from rocket.routing.floors import FloorStore, FloorTable, SubjectLocks
from rocket.routing.limits import Limits
from rocket.routing.observer import MayLead, Observer
from rocket.routing.router import Router
from rocket.routing.rules import Routing
from rocket.routing.session import Session, tokens_from
from rocket.routing.waiting import Waiting
from rocket.routing.writer import FLUSHED

__all__ = [
    "FLUSHED",
    "SHOWN",
    "Answer",
    "Board",
    "Connection",
    "Epoch",
    "FloorStore",
    "FloorTable",
    "Incarnation",
    "InvalidSetting",
    "InvalidToken",
    "Limits",
    "LostTail",
    "Lsn",
    "MayLead",
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
    "SetupError",
    "SubjectLocks",
    "TablesUnusable",
    "Unavailable",
    "Waiting",
    "Work",
    "WriteInRead",
    "explain",
    "nodes_from_environment",
    "saw",
    "tokens_from",
]

__version__ = "0.1.0"
