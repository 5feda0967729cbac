"""Which errors speak against a node, and which against the work that was asked of it."""

from __future__ import annotations

import asyncpg


class NotAsObserved(Exception):
    """A node is not, or not any more, what the observer saw."""


class NodeChanged(NotAsObserved):
    """The server has taken another role or followed another reign since its connection was opened."""


class OwnError(Exception):
    """Carries what work has raised by itself, where the same from a node would have been that node's failure."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


UNREACHABLE = (OSError, TimeoutError, asyncpg.PostgresConnectionError)
"""Errors that speak of a server that is not there, or no longer.

A pool's lease turns what asyncpg raises on a lost connection (`InterfaceError`, `InternalClientError`) into a
`ConnectionError`, so that an `InterfaceError` elsewhere is what it says: a misuse of the connection.
"""

REFUSED = (*UNREACHABLE, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""All that can go wrong in opening a connection, and in talking over one that is ours alone."""

ENDED = (
    asyncpg.PostgresConnectionError,
    asyncpg.IdleSessionTimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    ConnectionError,
)
"""What is raised, in the middle of things or before, on a connection that the server has ended."""

_NODE_CLASSES = (
    "08",  # connection exceptions
    "40",  # cancelled by a recovery conflict, deadlock with replay
    "53",  # out of connections, memory or disk
    "57P",  # shutting down, starting up; not 57014, since whoever set a statement_timeout means it
    "58",  # the system under it failed
    "XX",  # internal error, corrupted data
)

_COMMIT_IN_DOUBT = ("08", "57P")
"""Error codes after which a COMMIT that had been sent may have happened."""


def speaks_against_node(error: BaseException) -> bool:
    """Tell whether the same read may well succeed on another node."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(_NODE_CLASSES)
    return isinstance(error, (NotAsObserved, *UNREACHABLE))


def leaves_commit_in_doubt(error: BaseException) -> bool:
    """Tell whether a COMMIT that ended in this error may have happened all the same."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(_COMMIT_IN_DOUBT)
    return isinstance(error, (NotAsObserved, *UNREACHABLE))
