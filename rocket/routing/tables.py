"""What to say where rocket's own tables are missing, or closed to its role."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from rocket.errors import TablesUnusable

if TYPE_CHECKING:
    from collections.abc import Mapping

_COMMAND = "python -m rocket schema"


def must_be_usable(failures: Mapping[str, Exception]) -> None:
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
