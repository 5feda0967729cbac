"""Makes a node fit to follow the primary when it may hold WAL that the primary's history lacks.

Postgres does not notice all of that by itself: a replica that has received more of the old timeline than the new
primary had can replay it behind the fork and then seem to stream (design fact F11). So it is never started in
doubt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from enum import Enum
from typing import TYPE_CHECKING

import asyncpg

from rocket.cluster import datadir
from rocket.cluster.control_file import ControlFile
from rocket.cluster.errors import CommandFailed, NotThePrimary, ServerFailedToStart
from rocket.cluster.timelines import Lineage
from rocket.errors import describe

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

_CHECKPOINT_TIMEOUT_S = 60.0

_log = logging.getLogger("rocket.cluster")


class Remedy(Enum):
    """What makes a directory fit."""

    TRIM = "trimming"
    REWIND = "rewinding"
    CLONE = "cloning"


async def mend(cluster: LocalCluster, node: Node) -> None:
    """Take a suspect node down, make its directory one of a replica of the present primary, and leave it down.

    Nothing happens to one that is not suspect; one that is unfit is cloned, whatever it holds. Raise
    `CommandFailed` if the primary does not allow it now; the node is suspect then as before.
    """
    async with node.held():
        if not node.suspect:
            return
        source = cluster.primary
        node.mending = "stopping"
        began = time.monotonic()
        try:
            await node.go_down()
            lineage = await _lineage(source)
            control = await _control(node)
            remedy = Remedy.CLONE if node.unfit or control is None else remedy_for(node, control, lineage)
            node.mending = remedy.value
            if remedy is Remedy.TRIM and control is not None:
                done = await _trimmed(node, lineage, control)
            else:
                done = remedy is Remedy.REWIND and await _rewound(node, source)
            if not done:
                remedy = Remedy.CLONE
                node.mending = remedy.value
                _log.info("%s is cloned anew from %s", node.name, source.name)
                await datadir.back_up(node, source)
        finally:
            node.mending = None
        if cluster.primary is not source or cluster.promotion.locked():
            raise CommandFailed(f"the primary changed while {node.name} was made to follow it")
        node.suspect = node.unfit = False
        node.mended_on = lineage.timeline
        _log.info(
            "%s fits the history of %s again after %.1f s (%s)",
            node.name, source.name, time.monotonic() - began, remedy.value,
        )  # fmt: skip


async def bring_up(cluster: LocalCluster, node: Node) -> None:
    """Start a node, after mending it if it is suspect; make a replica anew that does not start.

    Two failed starts are enough for that, or one after mending. Raise `CommandFailed` or `ServerFailedToStart`.
    """
    dubious = node.suspect
    await mend(cluster, node)
    while True:
        try:
            await node.start(cluster.upstream_port(node))
        except ServerFailedToStart as error:
            killed = node.process is not None and node.process.kill_asked
            if node is cluster.primary or (killed and not node.suspect):
                raise
            _log.warning("%s", error)
            if dubious or node.suspect:
                break
            dubious = True
        else:
            return
    if not killed:
        _log.warning("%s does not start: it is made anew from %s", node.name, cluster.primary.name)
    node.distrust(anew=not killed)
    if cluster.primary.wanted:  # it may be starting, too
        await cluster.primary.up.wait()
    await mend(cluster, node)
    await node.start(cluster.upstream_port(node))


def remedy_for(node: Node, control: ControlFile, lineage: Lineage) -> Remedy:
    """Choose the cheapest remedy that certainly leaves nothing foreign behind."""
    clean = control.state in {"shut down", "shut down in recovery"}
    if clean or (node.is_replica and control.state == "in archive recovery"):
        # No page is written before WAL up to its last change is accounted for in pg_control. A checkpoint's
        # record begins where it is said to be, and is whole if the fork lies behind that.
        ancestral = (
            control.timeline in {lineage.timeline, *lineage.forks}
            and lineage.holds(control.checkpoint_timeline, control.checkpoint + 1)
            and (not control.minimum_recovery or _holds_minimum_recovery(control, lineage))
        )
        # Two that both promoted themselves may have given their timelines the same number.
        if ancestral and (node.is_replica or control.timeline != lineage.timeline):
            return Remedy.TRIM
    # Of a replica that crashed, pg_rewind cannot bring about the clean state that it needs; and it takes equal
    # timelines for equal histories.
    if control.timeline != lineage.timeline and (clean or not node.is_replica):
        return Remedy.REWIND
    return Remedy.CLONE


def _holds_minimum_recovery(control: ControlFile, lineage: Lineage) -> bool:
    return lineage.holds(control.minimum_recovery_timeline, control.minimum_recovery)


async def _lineage(source: Node) -> Lineage:
    """Ask the primary for its lineage, and let its own pg_control name it, which pg_rewind goes by."""
    try:
        connection = await source.connect()
        try:
            await connection.execute("CHECKPOINT", timeout=_CHECKPOINT_TIMEOUT_S)
        finally:
            connection.terminate()
        return await Lineage.of(source)
    except (
        OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, NotThePrimary,
    ) as error:  # fmt: skip
        raise CommandFailed(f"{source.name} does not answer as the primary: {describe(error)}") from None


async def _control(node: Node) -> ControlFile | None:
    """Read what a directory says of itself; None if it cannot be trusted."""
    if node.half_mended.exists() or (node.data_dir / "backup_label").exists():
        return None
    try:
        return await ControlFile.read(node.data_dir, node.installation)
    except CommandFailed:
        return None


async def _trimmed(node: Node, lineage: Lineage, control: ControlFile) -> bool:
    try:
        await asyncio.to_thread(datadir.trim, node, lineage, control)
        datadir.become_standby(node)
    except OSError as error:
        _log.warning("%s cannot be trimmed: %s", node.name, error)
        return False
    return True


async def _rewound(node: Node, source: Node) -> bool:
    _log.info("%s holds WAL that %s has not: rewinding it", node.name, source.name)
    try:
        await datadir.rewind(node, source)
    except CommandFailed as error:
        _log.warning("%s cannot be rewound: %s", node.name, error)
        return False
    return True
