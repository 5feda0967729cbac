"""Reads from Postgres replicas that are guaranteed never stale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rocket.consistency import Freshness, Lsn, Policy, Reason
    from rocket.dsn import Node, nodes_from_environment
    from rocket.errors import (
        InvalidToken,
        OutcomeUnknown,
        RocketError,
        TransactionEnded,
        Unavailable,
        WriteInRead,
    )
    from rocket.routing.answer import Answer, Role
    from rocket.routing.bound import READ_BOUND, report_read_bound
    from rocket.routing.connection import Connection, Work
    from rocket.routing.epochs import PossibleLoss
    from rocket.routing.explain import explain
    from rocket.routing.limits import Limits
    from rocket.routing.router import Router
    from rocket.routing.session import Session
else:  # a type checker that saw it would find any name

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used: `import rocket.consistency` imports no asyncpg."""
        if name in __all__:
            from pkgutil import resolve_name  # noqa: PLC0415 - only here

            for module in map(resolve_name, _MODULES):
                if hasattr(module, name):
                    value = globals()[name] = getattr(module, name)
                    return value
        raise AttributeError(f"module 'rocket' has no attribute {name!r}")


__all__ = [
    "READ_BOUND",
    "Answer",
    "Connection",
    "Freshness",
    "InvalidToken",
    "Limits",
    "Lsn",
    "Node",
    "OutcomeUnknown",
    "Policy",
    "PossibleLoss",
    "Reason",
    "RocketError",
    "Role",
    "Router",
    "Session",
    "TransactionEnded",
    "Unavailable",
    "Work",
    "WriteInRead",
    "explain",
    "nodes_from_environment",
    "report_read_bound",
]

__version__ = "0.1.0"

_MODULES = (
    "rocket.consistency",
    "rocket.dsn",
    "rocket.errors",
    "rocket.routing.answer",
    "rocket.routing.bound",
    "rocket.routing.connection",
    "rocket.routing.epochs",
    "rocket.routing.explain",
    "rocket.routing.limits",
    "rocket.routing.router",
    "rocket.routing.session",
)
"""Where the public names are, those that need no asyncpg first."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
