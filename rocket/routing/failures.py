"""Which errors speak against a node and which against the work, and why a node cannot be connected to or used."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import asyncpg

from rocket.errors import NodesUnusable, TablesUnusable, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rocket.consistency import Lsn


class NotAsObserved(Exception):
    """A node is not, or not any more, what the observer saw."""


class Unanswered(NotAsObserved):
    """The first statement on a connection was not answered: it is dead, as far as its next use is concerned."""


class NodeChanged(NotAsObserved):
    """The server has taken another role or followed another primary since its connection was opened."""


class UnfitPooler(ConnectionError):
    """What answers at a node's address is no pooler through which reads and writes can prove where they run."""


class StatementsOutdated(NotAsObserved):
    """Statements that were prepared earlier do not fit the schema any more; by now they are forgotten."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"prepared statements are outdated: {describe(error)}")
        self.error = error
        """What work has raised, in case it does so again with fresh statements."""


class OwnError(Exception):
    """Carries what work has raised by itself, which is not the failure of its node."""

    def __init__(self, error: Exception, shown: Lsn | None = None) -> None:
        super().__init__(error)
        self.error = error
        self.shown = shown
        """Covers what the node had shown to work by then; None if no bound is known."""


UNREACHABLE = (OSError, TimeoutError, asyncpg.PostgresConnectionError)
"""Errors of a server that is not there, or no longer.

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
"""Errors on a connection that the server has ended, before or during a statement."""

_NODE_CLASSES = (
    "08",  # connection exceptions
    "40",  # cancelled by a recovery conflict, deadlock with replay
    "53",  # out of connections, memory or disk
    "57P",  # shutting down, starting up; not 57014, since a statement_timeout that was set is meant
    "58",  # the system under it failed
    "XX",  # internal error, corrupted data
)

_OUTDATED = (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError)
_MAYBE_OUTDATED = (
    asyncpg.UndefinedFunctionError,  # an operator for the types that the parameters had
    asyncpg.DatatypeMismatchError,
    asyncpg.IndeterminateDatatypeError,
    asyncpg.InvalidBinaryRepresentationError,
    asyncpg.InternalServerError,  # a type that was dropped: "cache lookup failed"
)
"""What else may be said of a statement that fitted when it was prepared."""


def may_be_outdated(error: Exception, is_kept: Callable[[str | None], bool]) -> bool:
    """Return whether work may not fail again with fresh statements.

    `is_kept` answers for one statement, or for any: was it prepared before that work ran?
    """
    if isinstance(error, asyncpg.InvalidSQLStatementNameError):
        return "__asyncpg_" in str(error)
    if isinstance(error, _OUTDATED):
        return True
    if isinstance(error, asyncpg.InternalServerError) and "cache lookup failed" not in str(error):
        return False
    if type(error) is asyncpg.DataError and error.severity is None:
        return is_kept(None)  # from asyncpg itself: a value that the parameter's type does not take
    return isinstance(error, _MAYBE_OUTDATED) and is_kept(getattr(error, "query", None))


_COMMIT_IN_DOUBT = ("08", "57P")
"""Error codes after which a COMMIT that had been sent may have happened."""


def speaks_against_node(error: BaseException) -> bool:
    """Return whether the same read may succeed on another node."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(_NODE_CLASSES)
    return isinstance(error, (NotAsObserved, *UNREACHABLE))


_TRANSIENT = "40"
"""Cancelled by a recovery conflict, serialization failures, deadlocks."""

_OF_A_REPLICA = (
    "08",  # another server that this one cannot reach
    "0A",  # unlogged tables and the isolation level serializable, which there are on primaries only
    "22P02",  # a label that was added to an enum
    "25006",  # LISTEN, LOCK TABLE: refused on replicas, though they write nothing
    "3F", "42",  # a schema, column, table, function or grant that it has not replayed
    "53",  # out of memory or disk
    "55000",  # "recovery is in progress"
    "58",  # the system under it failed
    "XX",  # corrupted data
)  # fmt: skip


def may_pass(error: Exception) -> bool:
    """Return whether work that raised this may do better if it is run again at once."""
    return isinstance(error, asyncpg.PostgresError) and str(error.sqlstate).startswith(_TRANSIENT)


def asks_primary(error: Exception) -> bool:
    """Return whether an error that work got from a replica may come from its being one, or late."""
    return isinstance(error, asyncpg.PostgresError) and str(error.sqlstate).startswith(_OF_A_REPLICA)


def leaves_commit_in_doubt(error: BaseException) -> bool:
    """Return whether a COMMIT that ended in this error may have happened all the same."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(_COMMIT_IN_DOUBT)
    return isinstance(error, (NotAsObserved, *UNREACHABLE))


# --- connecting, without a password in any message ---


class AddressUnusable(Exception):
    """A node's DSN cannot be understood."""


_NO_SETTING = (
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidParameterValueError,
    asyncpg.CantChangeRuntimeParamError,
    asyncpg.InsufficientPrivilegeError,
)
"""What a server says, when a connection is opened, of a parameter in the DSN that is none of its settings."""

_LASTING = (
    AddressUnusable,
    UnfitPooler,
    asyncpg.ClientConfigurationError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
"""A wrong address, a pooler that is refused, a role or password that is, a database that is not there."""


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """Raise `AddressUnusable` in place of a `ValueError`, whose message may contain a piece of the password.

    The messages of a `ClientConfigurationError` are asyncpg's own; a certificate's error, too, is a `ValueError`.
    """
    try:
        yield
    except (asyncpg.ClientConfigurationError, OSError):
        raise
    except ValueError:
        raise AddressUnusable("its address cannot be used") from None
    except _NO_SETTING as error:
        raise AddressUnusable(f"its address has a parameter that the server refuses: {error}") from None


def describe_failures(failures: Mapping[str, Exception]) -> str:
    """Return what keeps nodes from being reached, each by its name."""
    return "; ".join(f"{name}: {describe(error)}" for name, error in failures.items())


def check_reachable(failures: Mapping[str, Exception]) -> None:
    """Raise `NodesUnusable` if there are failures and each is one that lasts until it is mended by hand."""
    if failures and all(isinstance(error, _LASTING) for error in failures.values()):
        why = describe_failures(failures)
        raise NodesUnusable(f"no primary is found, nor will be until something is changed: {why}")


_SCHEMA_COMMAND = "python -m rocket schema"
_ANOTHER_TABLE = (asyncpg.SyntaxOrAccessError, asyncpg.NotNullViolationError, asyncpg.CheckViolationError)
"""How rocket's statements fail on a table with other columns, types or constraints."""


def check_tables(failures: Mapping[str, Exception]) -> None:
    """Raise `TablesUnusable` if a node failed because rocket's tables are missing or closed; says what to run."""
    for name, failure in failures.items():
        if isinstance(failure, asyncpg.UndefinedTableError):
            raise TablesUnusable(
                f"the database on {name} lacks rocket's tables ({failure}): "
                f"make them on the primary by what `{_SCHEMA_COMMAND}` prints"
            )
        if isinstance(failure, asyncpg.InsufficientPrivilegeError):
            raise TablesUnusable(
                f"rocket's role on {name} lacks privileges ({failure}): "
                f"`{_SCHEMA_COMMAND} --role ROLE` prints the grants that it needs"
            )
        if isinstance(failure, _ANOTHER_TABLE):
            raise TablesUnusable(
                f"a table on {name} has the name of one of rocket's, and is another or of an earlier version "
                f"({failure}): what `{_SCHEMA_COMMAND}` prints updates rocket's; in a schema of their own they "
                "meet no others"
            )
