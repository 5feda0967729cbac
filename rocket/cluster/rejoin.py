"""Makes a node fit to follow the primary when it may hold WAL that the primary's history lacks.

Postgres does not notice every case by itself: a replica that has received more of the old timeline than the new
primary had can replay it behind the fork and then seem to stream (design fact F11). So a suspect node is never
started before it has rejoined.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from enum import Enum
from typing import TYPE_CHECKING

from rocket.cluster.errors import CommandFailed, NotThePrimary, ServerFailedToStart
from rocket.cluster.node import START_TIMEOUT_S, NodeState
from rocket.cluster.server import LOST
from rocket.cluster.timelines import ControlFile, Lineage
from rocket.errors import describe

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

_CHECKPOINT_TIMEOUT_S = 60.0  # it writes all dirty buffers to a disk that may be busy

_log = logging.getLogger("rocket.cluster")


class Remedy(Enum):
    """What makes a directory fit; its value is the node's state meanwhile."""

    TRIM = NodeState.TRIMMING
    REWIND = NodeState.REWINDING
    CLONE = NodeState.CLONING


async def rejoin(cluster: LocalCluster, node: Node) -> None:
    """Stop a suspect node, make its directory that of a replica of the present primary, and leave it down.

    Nothing happens to a node that is not suspect; one that is unfit is cloned, whatever it holds. Raise
    `CommandFailed` if the primary does not allow it now; the node is then as suspect as before.
    """
    async with node.held():
        if not node.suspect:
            return
        source = cluster.primary
        began = time.monotonic()
        await node.go_down()
        if node.pid is not None:
            raise CommandFailed(f"{node.name} does not end")
        lineage = await _lineage(source)
        control = await _control(node)
        remedy = Remedy.CLONE if node.unfit or control is None else remedy_for(control, lineage, node.is_replica)
        node.enter(remedy.value)
        if remedy is Remedy.TRIM and control is not None:
            done = await _trimmed(node, lineage, control)
        else:
            done = remedy is Remedy.REWIND and await _rewound(node, source)
        if not done:
            if remedy is not Remedy.CLONE:
                remedy = Remedy.CLONE
                node.enter(remedy.value)
            _log.info("%s is cloned anew from %s", node.name, source.name)
            await node.directory.back_up(source.port)
        if cluster.primary is not source or cluster.promotion_lock.locked():
            raise CommandFailed(f"the primary changed while {node.name} rejoined")
        node.trust(rejoined_on=lineage.timeline)
        _log.info(
            "%s fits the history of %s again after %.1f s (%s)",
            node.name, source.name, time.monotonic() - began, remedy.value,
        )  # fmt: skip


async def bring_up(cluster: LocalCluster, node: Node) -> None:
    """Start a node, after it has rejoined if it is suspect; a replica that does not start is cloned anew.

    It may be recovering then instead of up. Two failed starts are enough for a clone, or one after it has
    rejoined. Raise `CommandFailed` or `ServerFailedToStart`.
    """
    last_try = node.suspect
    await rejoin(cluster, node)
    while True:
        try:
            await node.start(cluster.upstream_port(node))
        except ServerFailedToStart as error:
            killed = node.process is not None and node.process.kill_asked
            if node is cluster.primary or (killed and not node.suspect):
                raise
            _log.warning("%s", error)
            if last_try or node.suspect:
                break
            last_try = True
        else:
            return
    if not killed:
        _log.warning("%s does not start: it is cloned anew from %s", node.name, cluster.primary.name)
    node.distrust(unfit=not killed)
    if cluster.primary.wanted:  # it may be starting, too
        with contextlib.suppress(TimeoutError):  # then the copy fails, and says why
            async with asyncio.timeout(START_TIMEOUT_S):
                await cluster.primary.up.wait()
    await rejoin(cluster, node)
    await node.start(cluster.upstream_port(node))


def remedy_for(control: ControlFile, lineage: Lineage, is_replica: bool) -> Remedy:
    """Return the cheapest remedy that certainly leaves no WAL of another history behind."""
    clean = control.state in {"shut down", "shut down in recovery"}
    if clean or (is_replica and control.state == "in archive recovery"):
        # No page is written before pg_control accounts for the WAL up to its last change. A checkpoint's record
        # begins at the position given, and is whole if the fork lies behind that.
        ancestral = (
            control.timeline in {lineage.timeline, *lineage.forks}
            and lineage.holds(control.checkpoint_timeline, control.checkpoint + 1)
            and (not control.minimum_recovery or _holds_minimum_recovery(control, lineage))
        )
        # Two that both promoted themselves may have given their timelines the same number.
        if ancestral and (is_replica or control.timeline != lineage.timeline):
            return Remedy.TRIM
    # Of a replica that crashed, pg_rewind cannot bring about the clean state that it needs; and it takes equal
    # timelines for equal histories.
    if control.timeline != lineage.timeline and (clean or not is_replica):
        return Remedy.REWIND
    return Remedy.CLONE


def _holds_minimum_recovery(control: ControlFile, lineage: Lineage) -> bool:
    return lineage.holds(control.minimum_recovery_timeline, control.minimum_recovery)


async def _lineage(source: Node) -> Lineage:
    """Return the primary's lineage, after a checkpoint: pg_rewind takes the timeline from its pg_control."""
    try:
        connection = await source.connect()
        try:
            await connection.execute("CHECKPOINT", timeout=_CHECKPOINT_TIMEOUT_S)
        finally:
            connection.terminate()
        return await source.lineage()
    except (*LOST, NotThePrimary) as error:
        raise CommandFailed(f"{source.name} does not answer as the primary: {describe(error)}") from None


async def _control(node: Node) -> ControlFile | None:
    """Return what a directory says of itself; None if that cannot be trusted."""
    if node.directory.half_rewound.exists() or (node.data_dir / "backup_label").exists():
        return None
    try:
        return await ControlFile.read(node.data_dir, node.installation)
    except CommandFailed:
        return None


async def _trimmed(node: Node, lineage: Lineage, control: ControlFile) -> bool:
    try:
        await asyncio.to_thread(node.directory.trim, lineage, control)
        node.directory.become_standby()
    except OSError as error:
        _log.warning("%s cannot be trimmed: %s", node.name, error)
        return False
    return True


async def _rewound(node: Node, source: Node) -> bool:
    _log.info("%s holds WAL that %s has not: rewinding it", node.name, source.name)
    try:
        await node.directory.rewind(source.port)
    except CommandFailed as error:
        _log.warning("%s cannot be rewound: %s", node.name, error)
        return False
    return True
