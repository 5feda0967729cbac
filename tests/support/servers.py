"""What tests need of the cluster: directories, roles, addresses, paused replicas, and the table of statuses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rocket.cluster import faults
from rocket.cluster.binaries import SUPERUSER
from rocket.lab.app import DATABASE
from rocket.schema import tables

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    import asyncpg

    from rocket.cluster.cluster import LocalCluster
    from rocket.routing.observer import Observer

REPLICAS = 2


ROLES = {"monitor": "rocket_monitor", "plain": "rocket_plain"}
"""Of no more than `pg_monitor`, and of less, by the words that `--role` takes."""


_MAKE_ROLES = """
    CREATE ROLE rocket_monitor LOGIN;
    CREATE ROLE rocket_plain LOGIN;
"""


_TAKE_BACK = "REVOKE pg_monitor FROM rocket_plain;"


MEMORY = Path("/dev/shm")  # noqa: S108 - private directories are made in it


ROOM_BYTES = 4 * 2**30
"""Clusters are made in memory if there is that much room: a disk takes its time over a thousand files each."""


if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_BYTES:
    tempfile.tempdir = str(MEMORY)
TEMPORARY = tempfile.gettempdir()

_chosen_role: str | None = None


@contextlib.contextmanager
def fresh_dir() -> Iterator[Path]:
    """Make a place for directories that the servers' account can enter, with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="rocket-test-", dir=TEMPORARY))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def schema() -> str:
    """Return what makes the tables, and roles with the rights that `rocket schema` gives them, or less."""
    granted = (tables(role, demonstration=True) for role in ("rocket_monitor", "rocket_plain"))
    return "".join((_MAKE_ROLES, *granted, _TAKE_BACK))


def choose_role(option: str | None) -> None:
    """Set the role of `role`, by the word that `--role` takes."""
    global _chosen_role  # noqa: PLW0603 - one for the whole run
    _chosen_role = None if option is None else ROLES[option]


def role() -> str:
    """Return the database role that the router connects as."""
    return _chosen_role or SUPERUSER


def dsns(cluster: LocalCluster, *names: str, who: str | None = None) -> dict[str, str]:
    """Return the addresses of a cluster's nodes (all, if none is named), for `who`, else for `role`."""
    who = f"//{who or role()}@"
    return {
        name: cluster.node(name).dsn(DATABASE).replace(f"//{SUPERUSER}@", who) for name in names or cluster.nodes
    }


def write_nodes(file: Path, nodes: Mapping[str, str]) -> None:
    """Replace a file of nodes by another one, as a whole."""
    draft = file.with_suffix(".new")
    draft.write_text("# NAME DSN\n\n" + "".join(f"{name} {dsn}\n" for name, dsn in nodes.items()))
    draft.rename(file)


@contextlib.asynccontextmanager
async def paused(cluster: LocalCluster, *names: str) -> AsyncIterator[None]:
    """Keep replicas (all, if none is named) from replaying."""
    nodes = [cluster.node(name) for name in names] or cluster.replicas
    for node in nodes:
        await faults.pause(node)
    try:
        yield
    finally:
        for node in nodes:
            await faults.resume(node)


@contextlib.asynccontextmanager
async def commits_wait(cluster: LocalCluster) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Have commits wait, soon, for a replica that is not there; give a connection to look with."""
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'none_at_all'")
    await admin.execute("SELECT pg_reload_conf()")
    try:
        yield admin
    finally:
        await admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await admin.execute("SELECT pg_reload_conf()")
        await admin.close()


async def table(cluster: LocalCluster) -> dict[str, int]:
    """Return what `replica_statuses` holds."""
    connection = await cluster.primary.connect(DATABASE)
    rows = await connection.fetch("SELECT name, last_lsn FROM replica_statuses")
    await connection.close()
    return {row["name"]: row["last_lsn"] for row in rows}


async def recorded(observer: Observer, cluster: LocalCluster, names: set[str]) -> None:
    """Look until the table holds just these replicas.

    An observer of an earlier test may hold the right to write it for a moment longer.
    """
    async with asyncio.timeout(5):
        await observer.run_once()
        while names != set(await table(cluster)):
            await observer.run_once()


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait for something that other tasks bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
