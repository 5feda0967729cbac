"""Reads from Postgres replicas that are guaranteed never stale."""

from rocket.consistency import Board, Lsn, Policy, Reason, SessionToken
from rocket.errors import InvalidToken, OutcomeUnknown, RocketError, RoutingError, Unavailable
from rocket.routing.answer import Answer, Role, Route
from rocket.routing.bounds import SHOWN, saw
from rocket.routing.connections import Connection, Work
from rocket.routing.floors import FloorStore
from rocket.routing.limits import Limits
from rocket.routing.observer import Observer
from rocket.routing.router import Router
from rocket.routing.rules import Routing
from rocket.routing.writer import FLUSHED

__all__ = [
    "FLUSHED",
    "SHOWN",
    "Answer",
    "Board",
    "Connection",
    "FloorStore",
    "InvalidToken",
    "Limits",
    "Lsn",
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
    "SessionToken",
    "Unavailable",
    "Work",
    "saw",
]

__version__ = "0.1.0"
