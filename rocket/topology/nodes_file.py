"""A router's nodes as a file lists them: checked at the start, and followed while the router is open."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from rocket.dsn import Node, as_listed, parse_file
from rocket.errors import InvalidSetting, describe
from rocket.routing.failures import AddressUnusable, connecting
from rocket.routing.opening import connect_to

if TYPE_CHECKING:
    from pathlib import Path

    from rocket import Router

ROCKET_TABLES: Mapping[str, Sequence[str]] = {
    "epochs": ("SELECT", "INSERT"),
    "covers": ("SELECT", "INSERT"),
}
"""The tables that every router uses, and the privileges that its role needs on each."""

Check: TypeAlias = Callable[[Mapping[str, str | Node]], Awaitable[None]]
"""Raises `InvalidSetting` for nodes, given by name, that cannot be used."""

_LARGEST_FILE_BYTES = 2**20
_ANSWER_TIMEOUT_S = 5.0
"""For a node to be connected to, and again for its answer."""

_MISSING = """
    SELECT coalesce(string_agg(privilege || ' on ' || name, ', ' ORDER BY name, privilege), '') AS privileges,
           coalesce(string_agg(DISTINCT name, ', ') FILTER (WHERE to_regclass(name) IS NULL), '') AS tables
      FROM unnest($1::text[], $2::text[]) AS needed (name, privilege)
     WHERE NOT coalesce(has_table_privilege(to_regclass(name), privilege), false)
"""

_log = logging.getLogger("rocket.topology")


def read_nodes(file: Path) -> dict[str, str]:
    """Return the DSNs of a file by node name; raise `InvalidSetting`, which never quotes an address."""
    try:
        with file.open(encoding="utf-8") as opened:
            return dict(parse_file(opened.read(_LARGEST_FILE_BYTES)))
    except OSError as error:
        raise InvalidSetting(f"cannot read {file}: {error.strerror}") from None
    except UnicodeError:
        raise InvalidSetting(f"{file}: it is not text in UTF-8") from None
    except ValueError as error:
        raise InvalidSetting(f"{file}: {error}") from None


# --- at the start ---


async def check_usable(
    nodes: Mapping[str, str | Node],
    *,
    tables: Mapping[str, Sequence[str]] = ROCKET_TABLES,
    command: str = "python -m rocket schema",
) -> None:
    """Raise `InvalidSetting` for a node that cannot be used until its settings change, or if all are down.

    That is: asyncpg does not understand an address, a node rejects the role, or a table or privilege is missing. A
    node that is down may come up later. `tables` names the privileges needed on each table, `command` what prints
    the SQL that makes them.
    """
    found = await asyncio.gather(
        *(_problem_of(name, Node.of(node), tables, command) for name, node in nodes.items())
    )
    lasting = [problem for problem, lasts in found if lasts]
    if lasting:
        raise InvalidSetting(lasting[0])
    if all(problem for problem, _ in found):
        raise InvalidSetting(f"no node can be reached: {found[0][0]}")


async def _problem_of(
    name: str, node: Node, tables: Mapping[str, Sequence[str]], command: str
) -> tuple[str, bool]:
    """Return what is wrong with a node ("" if nothing is), and whether only a change of settings can end it."""
    needed = [(table, privilege) for table, privileges in tables.items() for privilege in privileges]
    try:
        with connecting():
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                connection = await connect_to(node, "rocket", asyncpg.Connection)
        try:
            row = await connection.fetchrow(
                _MISSING, [table for table, _ in needed], [privilege for _, privilege in needed],
                timeout=_ANSWER_TIMEOUT_S,
            )  # fmt: skip
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
        return f"{name} has no table {row['tables']}: `{command}` prints the SQL that makes them", True
    if row["privileges"]:
        return f"{name}: the role lacks {row['privileges']} (`{command} --role NAME` prints the grants)", True
    return "", False


# --- while the router is open ---


async def follow(
    file: Path,
    nodes: Mapping[str, str | Node],
    router: Router,
    reread: asyncio.Event | None = None,
    *,
    options: Callable[[str, Node], Node] = as_listed,
    check: Check = check_usable,
    poll_s: float = 1.0,
) -> None:
    """Have a router follow a file, until cancelled; `nodes` is what the router was opened with.

    The file is read every `poll_s` seconds, and at once when `reread` is set, which is then cleared. New nodes are
    checked before they are added. A file that is unusable is logged and changes nothing; so is one that lacks the
    primary, unless that does not answer, or one that is left says that it is the primary itself.

    `options` is called with the name and the node of each line that is new, and returns the node that the router
    gets: with a password, a zone and so on. It may raise `InvalidSetting` as well.
    """
    current = {name: Node.of(node).dsn for name, node in nodes.items()}
    complaint = ""
    reread = reread or asyncio.Event()
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(poll_s):
                await reread.wait()
        reread.clear()
        try:
            wanted = await asyncio.to_thread(read_nodes, file)
            if wanted != current:
                await _change(router, current, wanted, check, options)
        except InvalidSetting as error:
            if complaint != str(error):  # once, not at every poll
                complaint = str(error)
                _log.error("the nodes stay as they are: %s", complaint)
            continue
        current, complaint = wanted, ""


async def _change(
    router: Router,
    current: Mapping[str, str],
    wanted: Mapping[str, str],
    check: Check,
    options: Callable[[str, Node], Node],
) -> None:
    """Add the nodes that are new, and remove those that are gone; raise `InvalidSetting` before any change."""
    added = {name: options(name, Node(dsn)) for name, dsn in wanted.items() if current.get(name) != dsn}
    removed = [name for name in current if name not in wanted]
    board = router.board
    if (
        board.primary is not None
        and board.primary.name in removed
        and not board.primary_is_lost
        and board.claimants.isdisjoint(wanted)
    ):
        raise InvalidSetting(f"{board.primary.name} is the primary, and has to be among them")
    if added:
        await check(added)
    changes = [*(f"+{name}" for name in added), *(f"-{name}" for name in removed)]
    _log.info("the nodes change: %s", ", ".join(changes))
    async with asyncio.TaskGroup() as group:
        for name, node in added.items():
            group.create_task(router.add(name, node), name=f"add {name}")
        for name in removed:
            group.create_task(router.remove(name), name=f"remove {name}")
