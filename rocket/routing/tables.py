"""What to say where rocket's own tables are missing, or closed to its role."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg

from rocket.errors import TablesUnusable, Unavailable
from rocket.routing.failures import REFUSED, NotAsObserved
from rocket.routing.floors import FloorTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rocket.routing.nodes import Nodes

_COMMAND = "python -m rocket schema"


_ANOTHER_TABLE = (asyncpg.SyntaxOrAccessError, asyncpg.NotNullViolationError, asyncpg.CheckViolationError)
"""What rocket's statements fail of on a table with other columns, types or constraints."""

_TRY_FLOORS = """
    EXPLAIN INSERT INTO rocket_floors AS known (subject, min_lsn)
            VALUES ('', '0/0')
            ON CONFLICT (subject) DO UPDATE SET min_lsn = excluded.min_lsn
            RETURNING known.min_lsn
"""
"""Takes the rights that a write takes, and writes nothing."""


def check_usable(failures: Mapping[str, Exception]) -> None:
    """Raise `TablesUnusable` if that is what a node failed of; says what to run."""
    for name, failure in failures.items():
        if isinstance(failure, asyncpg.UndefinedTableError):
            raise TablesUnusable(
                f"the database on {name} lacks rocket's tables ({failure}): "
                f"make them on the primary by what `{_COMMAND}` prints"
            )
        if isinstance(failure, asyncpg.InsufficientPrivilegeError):
            raise TablesUnusable(
                f"rocket's role on {name} lacks privileges ({failure}): "
                f"`{_COMMAND} --role ROLE` prints the grants that it needs"
            )
        if isinstance(failure, _ANOTHER_TABLE):
            raise TablesUnusable(
                f"a table on {name} has the name of one of rocket's, and is another ({failure}): "
                f"`{_COMMAND}` prints what rocket's are; in a schema of their own they meet no others"
            )


async def check_floor_table(floors: object, nodes: Nodes, timeout_s: float) -> None:
    """Raise `TablesUnusable` if floors are kept in a `FloorTable`, and the primary does not let us use it.

    A primary that is away, or does not answer in time, is not waited for.
    """
    if type(floors) is not FloorTable:
        return
    name = ""
    try:
        async with asyncio.timeout(timeout_s), nodes.primary() as (connection, primary):
            name = primary.name
            await connection.execute(_TRY_FLOORS)
    except asyncpg.SyntaxOrAccessError as error:
        check_usable({name: error})
    except (Unavailable, NotAsObserved, *REFUSED):
        pass
