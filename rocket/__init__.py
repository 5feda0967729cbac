"""Reads from Postgres replicas that are guaranteed never stale."""

from rocket.consistency import Board, Epoch, Incarnation, Lsn, Policy, Reason, SessionToken
from rocket.dsn import nodes_from_environment
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
from rocket.routing.bound import READ_BOUND, report_read_bound
from rocket.routing.catchup import Waiting
from rocket.routing.connection import Connection, Work
from rocket.routing.epochs import PossibleLoss
from rocket.routing.explain import explain
from rocket.routing.floors import FloorStore, FloorTable, SubjectLocks
from rocket.routing.limits import Limits
from rocket.routing.observer import MayBePrimary, Observer
from rocket.routing.router import Router
from rocket.routing.rules import Routing
from rocket.routing.session import Session, tokens_from
from rocket.routing.writes import FORCE_FLUSH

__all__ = [
    "FORCE_FLUSH",
    "READ_BOUND",
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
    "Lsn",
    "MayBePrimary",
    "NodesUnusable",
    "Observer",
    "OutcomeUnknown",
    "Policy",
    "PossibleLoss",
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
    "report_read_bound",
    "tokens_from",
]

__version__ = "0.1.0"
