"""Which nodes a cluster that is already there has: at the start, and whenever the file that says it changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import asyncpg

from rocket.dsn import parse_file
from rocket.errors import InvalidSetting, describe
from rocket.routing.failures import AddressUnusable, connecting

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rocket import Router

_POLL_S = 1.0
"""Between two looks at the file."""
_LARGEST_FILE = 2**20
_ANSWER_S = 5.0
"""How long a node may take at the start to show that it would take us."""

_LACKING = """
    SELECT coalesce(string_agg(privilege || ' on ' || name, ', '), '') AS privileges,
           coalesce(string_agg(DISTINCT name, ', ') FILTER (WHERE to_regclass(name) IS NULL), '') AS tables
      FROM (VALUES ('users', 'SELECT'), ('users', 'INSERT'), ('users', 'UPDATE'), ('rides', 'SELECT'),
                   ('rides', 'INSERT'), ('epochs', 'SELECT'), ('epochs', 'INSERT'), ('epoch_marker', 'TRUNCATE'),
                   ('replica_statuses', 'SELECT'), ('replica_statuses', 'INSERT'),
                   ('replica_statuses', 'UPDATE'), ('replica_statuses', 'DELETE')
           ) AS needed (name, privilege)
     WHERE NOT coalesce(has_table_privilege(to_regclass(name), privilege), false)
"""

_log = logging.getLogger("rocket.run")


def read_nodes(file: Path) -> dict[str, str]:
    """Return the nodes that a file names; raise `InvalidSetting`, which never repeats an address."""
    try:
        with file.open(encoding="utf-8") as opened:
            return dict(parse_file(opened.read(_LARGEST_FILE)))
    except OSError as error:
        raise InvalidSetting(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        words = "it is no text" if isinstance(error, UnicodeError) else str(error)
        raise InvalidSetting(f"{file}: {words}") from None


# --- at the start ---


async def check_usable(nodes: Mapping[str, str]) -> None:
    """Raise `InvalidSetting` for nodes that will never do: what is merely down may come up.

    That is, for an address that asyncpg does not understand, a node that does not let us in, tables or rights that
    are missing, and where no node can be reached at all.
    """
    found = await asyncio.gather(*(_trouble_with(name, dsn) for name, dsn in nodes.items()))
    lasting = [trouble for trouble, lasts in found if lasts]
    if lasting:
        raise InvalidSetting(lasting[0])
    if all(trouble for trouble, _ in found):
        raise InvalidSetting(f"no node can be reached: {found[0][0]}")


async def _trouble_with(name: str, dsn: str) -> tuple[str, bool]:
    """Return what is wrong with a node, and whether it will be as long as nobody changes something."""
    try:
        with connecting():
            connection = await asyncpg.connect(dsn, timeout=_ANSWER_S, statement_cache_size=0)
        try:
            row = await connection.fetchrow(_LACKING, timeout=_ANSWER_S)
        finally:
            connection.terminate()
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
        return f"{name}: {describe(error)}", True
    except (asyncpg.PostgresError, asyncpg.InternalClientError, OSError) as error:
        return f"{name}: {describe(error)}", False
    except (AddressUnusable, asyncpg.InterfaceError) as error:
        return f"{name}: {describe(error)}", True
    assert row is not None  # noqa: S101 - an aggregate
    if row["tables"]:
        return (
            f"{name} has no table {row['tables']}: run `python -m rocket schema --demo` for what makes them",
            True,
        )
    if row["privileges"]:
        return (
            f"{name}: the role lacks {row['privileges']} (see `python -m rocket schema --demo --role NAME`)",
            True,
        )
    return "", False


# --- while it runs ---


async def follow(
    file: Path, nodes: Mapping[str, str], router: Router, at_once: asyncio.Event | None = None
) -> None:
    """Have the router go along with what a file says, for ever; `nodes` is what it knows.

    It is looked at every second, and when `at_once` is set, which is then taken back.
    A file that cannot be used changes nothing, and neither does one without the node that is the primary.
    """
    present = dict(nodes)
    complaint = ""
    at_once = at_once or asyncio.Event()
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await at_once.wait()
        at_once.clear()
        try:
            wanted = await asyncio.to_thread(read_nodes, file)
            if wanted != present:
                await _change(present, wanted, router)
        except InvalidSetting as error:
            if complaint != str(error):
                complaint = str(error)
                _log.error("the nodes stay as they are: %s", complaint)
            continue
        present, complaint = wanted, ""


async def _change(present: Mapping[str, str], wanted: Mapping[str, str], router: Router) -> None:
    """Take in what is new, then let go of what is gone; raise `InvalidSetting` if that will not do."""
    added = {name: dsn for name, dsn in wanted.items() if present.get(name) != dsn}
    gone = [name for name in present if name not in wanted]
    if router.board.primary is not None and router.board.primary.name in gone:
        raise InvalidSetting(f"{router.board.primary.name} is the primary, and has to be among them")
    if added:
        await check_usable(added)
    changes = [*(f"+{name}" for name in added), *(f"-{name}" for name in gone)]
    _log.info("the nodes change: %s", ", ".join(changes))
    async with asyncio.TaskGroup() as group:
        for name, dsn in added.items():
            group.create_task(router.add(name, dsn), name=f"add {name}")
        for name in gone:
            group.create_task(router.remove(name), name=f"remove {name}")
