"""Which errors speak against a node, and which against the work that was asked of it."""

from __future__ import annotations

import asyncpg

UNREACHABLE = (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)
"""Errors that asyncpg raises when there is no server to talk to, or no longer."""

_NODE_CLASSES = (
    "08",  # connection exceptions
    "40",  # cancelled by a recovery conflict, deadlock with replay
    "53",  # out of connections, memory or disk
    "57",  # shutting down, starting up, cancelled
    "58",  # the system under it failed
    "XX",  # internal error, corrupted data
)

_COMMIT_IN_DOUBT = ("08", "57P")
"""Error codes after which a COMMIT that had been sent may have happened."""


def speaks_against_node(error: BaseException) -> bool:
    """Tell whether the same read may well succeed on another node."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(_NODE_CLASSES)
    return isinstance(error, UNREACHABLE)


def leaves_commit_in_doubt(error: BaseException) -> bool:
    """Tell whether a COMMIT that ended in this error may have happened all the same."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(_COMMIT_IN_DOUBT)
    return isinstance(error, UNREACHABLE)
