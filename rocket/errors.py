"""What can go wrong, one class for each fact that a caller can act on."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def describe(error: BaseException) -> str:
    """Return what an error says, or its kind where it says nothing (a `TimeoutError`, mostly)."""
    return str(error) or type(error).__name__


@contextlib.contextmanager
def unwrapping_group() -> Iterator[None]:
    """Raise the first failure out of a task group as itself, so that callers catch what it is.

    Not `except*`: what is raised there is wrapped anew by some versions of Python.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        failure: BaseException = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        raise failure from None


class RocketError(Exception):
    """The root of every error that rocket raises on purpose."""


# --- what the user asked for cannot be had: the commands end with one line and exit code 2 ---


class SetupError(RocketError):
    """The settings, the machine or a directory do not allow what was asked for."""


class InvalidSetting(SetupError):
    """A flag, an environment variable or a line of `.env` has a wrong value."""


class NodesUnusable(SetupError):
    """No node accepts rocket's connections until an address, role, password or database is corrected."""


class TablesUnusable(SetupError):
    """The database lacks rocket's own tables, or does not let rocket's role use them; says what to run."""


# --- routing ---


class RoutingError(RocketError):
    """A read or a write could not be carried out; nothing stale was answered."""


class Unavailable(RoutingError):
    """No node that may answer did so in time. Nothing was changed; asking again later is safe."""

    route: Any = None
    """The `rocket.routing.answer.Route` of a read that no node answered."""


class InvalidToken(RoutingError):
    """A session token that no router of this cluster has given out."""

    def __init__(self, message: str, token: Any = None) -> None:
        super().__init__(message)
        self.token = token
        """The `rocket.consistency.SessionToken` in question; None if the text is no token at all."""


class OutcomeUnknown(RoutingError):
    """The write may have happened, or not: its connection was lost during COMMIT, or its primary was replaced."""


class TransactionEnded(OutcomeUnknown):
    """Work of a write has ended its transaction by itself, by a COMMIT or ROLLBACK of its own.

    What it committed stays, whatever became of the rest; its session covers that. Nor does a read behind a pooler
    outlive this. Let work neither commit nor roll back: `write` does.
    """


class WriteInRead(RoutingError):
    """Work that writes was given to a session's `read`. Nothing was changed; `write` is the place for it."""


class TaskDied(RocketError):
    """A task that should run for as long as the program does came to an end by itself."""
