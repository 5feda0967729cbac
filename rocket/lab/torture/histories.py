"""Faults after which a server has another history than its address stands for.

It is of another cluster, it is set back to a snapshot, or it became the primary without a new timeline. Each is a
context that begins with the fault and ends when the cluster is healed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg

from rocket.cluster.cluster import prepare_database
from rocket.cluster.directories import remove_with_shared_memory
from rocket.cluster.errors import NodeNotRunning, NotAReplica
from rocket.cluster.node import Node
from rocket.cluster.process import run_command
from rocket.cluster.rejoin import bring_up
from rocket.errors import RocketError, describe
from rocket.lab.checker.history import TAKEN_BY_ANOTHER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster

CRASH = ((signal.SIGQUIT, 2.0), (signal.SIGKILL, 5.0))
"""Stops a server at once; a fast shutdown would wait for replicas."""
HEAL_S = 30.0
POLL_S = 0.05
FAILURES = (RocketError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""Errors that a fault, or healing one, can run into while other faults are on."""

_KEPT_S = 0.8
"""How long writes go on that are lost: those after a snapshot."""
_COPY_S = 60.0
_FOREIGN = "foreign"
_FOREIGN_WAL = "000003E7000000FF00000000"
"""Where a foreign server goes on, as the name of a file: timeline 999, beyond all that ours has written."""
_ROWS = "SELECT (SELECT count(*) FROM users) + (SELECT count(*) FROM rides)"

_log = logging.getLogger("rocket.torture")


async def healed(act: Callable[[], Awaitable[object]], node: Node) -> None:
    """Undo a fault, retrying until that succeeds; a node that has become the primary no longer has it."""
    deadline = time.monotonic() + HEAL_S
    while True:
        try:
            await act()
        except NotAReplica:
            return
        except FAILURES as error:
            if time.monotonic() > deadline:
                raise NodeNotRunning(f"{node.name} cannot be healed: {describe(error)}") from error
            await asyncio.sleep(POLL_S)
        else:
            return


async def all_back(cluster: LocalCluster) -> None:
    """Wait until the nodes that had to be rejoined are up again."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HEAL_S):
            nodes = cluster.nodes.values()
            while not all(node.up.is_set() or not node.wanted for node in nodes):  # noqa: ASYNC110 - of all nodes
                await asyncio.sleep(POLL_S)


async def _cloned_anew(cluster: LocalCluster) -> None:
    """Have the replicas cloned anew by the supervisor that run with another history than their primary's."""
    for node in cluster.replicas:
        node.distrust(unfit=True)
    await asyncio.gather(*(node.fence() for node in cluster.replicas))
    await all_back(cluster)


# --- a server of another cluster ---


@contextlib.asynccontextmanager
async def foreign_cluster(cluster: LocalCluster, node: Node) -> AsyncIterator[dict[str, Any]]:
    """Have a primary of another cluster, of a later timeline, answer at a replica's address."""
    foreign = Node(_FOREIGN, cluster.data_dir / _FOREIGN, node.port, node.installation)
    await _make(foreign, cluster)
    await node.stop(CRASH)
    detail: dict[str, Any] = {}
    try:
        await foreign.start(foreign.port)
        await prepare_database(foreign, cluster.settings.database, cluster.settings.schema)
        yield detail
        connection = await foreign.connect(cluster.settings.database)
        try:
            detail[TAKEN_BY_ANOTHER] = await connection.fetchval(_ROWS)
        finally:
            connection.terminate()
    finally:
        await foreign.stop(CRASH)
        await asyncio.to_thread(remove_with_shared_memory, foreign.home)
        await healed(partial(bring_up, cluster, node), node)


async def _make(foreign: Node, cluster: LocalCluster) -> None:
    """Make its directory by initdb, and have it go on at a position and timeline beyond ours."""
    if foreign.home.exists():  # of one that could not be started
        await asyncio.to_thread(remove_with_shared_memory, foreign.home)
    installation = foreign.installation
    password_file = cluster.data_dir / "password.foreign"
    password_file.touch(mode=0o600)
    password_file.write_text(cluster.password())
    installation.own(password_file)
    try:
        await foreign.directory.init(password_file, cluster.settings.wal_segment_mib)
    finally:
        password_file.unlink()
    await run_command(
        installation.binaries.program("pg_resetwal"), f"--next-wal-file={_FOREIGN_WAL}", foreign.data_dir,
        account=installation.account, timeout_s=_COPY_S,
    )  # fmt: skip


# --- a primary that is set back ---


@contextlib.asynccontextmanager
async def restored_snapshot(cluster: LocalCluster, primary: Node) -> AsyncIterator[dict[str, Any]]:
    """Set the primary back to what its directory was a moment before; its replicas go on as they are."""
    snapshot = primary.home / "snapshot"
    await _take_snapshot(primary, snapshot)
    try:
        await asyncio.sleep(_KEPT_S)
        async with cluster.promotion_lock:  # no node rejoins meanwhile by what it has read before
            for node in cluster.replicas:
                if not node.up.is_set():
                    node.distrust(unfit=True)
            await primary.stop(CRASH)
            await _set_back(primary, snapshot)
            await healed(partial(bring_up, cluster, primary), primary)
        yield {"primary": primary.name}
    finally:
        await asyncio.to_thread(remove_with_shared_memory, snapshot, ignore_errors=True)
        if primary.pid is None:
            await healed(partial(bring_up, cluster, primary), primary)
        await _cloned_anew(cluster)


async def _take_snapshot(node: Node, snapshot: Path) -> None:
    """Copy a server's directory while all its processes are halted, as a file system's snapshot would."""
    await asyncio.to_thread(remove_with_shared_memory, snapshot, ignore_errors=True)
    node.freeze()
    try:
        await run_command(
            "cp", "-a", node.data_dir, snapshot, account=node.installation.account, timeout_s=_COPY_S
        )
    finally:
        node.thaw()
    (snapshot / "postmaster.pid").unlink(missing_ok=True)


async def _set_back(node: Node, snapshot: Path) -> None:
    """Put a snapshot in the place of a stopped server's directory."""
    await node.directory.clear_after_kill()
    lost = node.home / "lost"
    node.data_dir.rename(lost)
    snapshot.rename(node.data_dir)  # noqa: ASYNC240 - a rename
    await asyncio.to_thread(remove_with_shared_memory, lost)


# --- a primary without a timeline of its own ---


@contextlib.asynccontextmanager
async def signal_removed(cluster: LocalCluster, node: Node) -> AsyncIterator[dict[str, Any]]:
    """Restart a replica as the primary by removing its standby.signal, with the old primary stopped.

    The old primary comes back at once, as its replica and a fresh copy; then the new one is followed. The other
    replicas go on as they are until the fault is over.
    """
    old = cluster.primary
    epochs = await _count_epochs(cluster)
    async with cluster.promotion_lock:
        await node.stop(CRASH)
        try:
            await asyncio.sleep(_KEPT_S)  # acknowledged writes that it has not received
            await old.stop(CRASH)
            (node.data_dir / "standby.signal").unlink()
            for other in cluster.replicas:
                if other is not node and not other.up.is_set():
                    other.distrust(unfit=True)
            cluster.set_primary(node, cluster.timeline)
            old.distrust(unfit=True)
        finally:
            for each in (cluster.primary, node):
                if each.pid is None:
                    await healed(partial(bring_up, cluster, each), each)
    try:
        await healed(partial(bring_up, cluster, old), old)
        await healed(partial(_check_epoch_has_begun, cluster, epochs), node)
        await asyncio.sleep(_KEPT_S)  # until all routers have seen it
        yield {"old": old.name}
    finally:
        await _cloned_anew(cluster)


async def _count_epochs(cluster: LocalCluster) -> int:
    connection = await cluster.primary.connect(cluster.settings.database)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM epochs"))
    finally:
        connection.terminate()


async def _check_epoch_has_begun(cluster: LocalCluster, before: int) -> None:
    """Raise `NodeNotRunning` unless the primary has the name of one more epoch."""
    if await _count_epochs(cluster) <= before:
        raise NodeNotRunning(f"{cluster.primary.name} is not followed")
