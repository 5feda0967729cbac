"""Keeps the servers of a cluster alive and in step.

What dies is started again, what cannot follow is mended, and who was promoted by somebody else is followed. A
replica that does not come back with the directory that it has gets a fresh copy of the primary's; a primary that
does not come back ends the program, since nobody has more than it has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from rocket.cluster import promotion, rejoin
from rocket.cluster.errors import CommandFailed, ServerFailedToStart, ServerKeepsDying
from rocket.cluster.node import ending
from rocket.cluster.restarts import RestartPolicy
from rocket.cluster.tail import Tail
from rocket.errors import unwrapping_group

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

_CHECK_S = 0.2
_RETRY_S = 1.0
_ENOUGH = 5
_WAL_IS_GONE = "has already been removed"
"""What a replica logs, again and again, when its primary has recycled the WAL that it asks for."""
_CANNOT_FOLLOW = (
    _WAL_IS_GONE,
    "is not in this server's history",
    "is not a child of this server's history",
    "does not contain minimum recovery point",
    "forked off current database system timeline",
    "but previous recovered WAL file came from timeline",
)
"""The same when its history is not the primary's, too."""

_log = logging.getLogger("rocket.cluster")


async def supervise(cluster: LocalCluster) -> None:
    """Start again whatever dies without having been stopped, and mend what cannot follow; never returns.

    Raise `ServerKeepsDying` when there is no point any more.
    """
    with unwrapping_group():
        async with asyncio.TaskGroup() as group:
            group.create_task(_notice_promotions(cluster), name="notice promotions")
            for node in cluster.nodes.values():
                group.create_task(_keep(cluster, node), name=f"keep {node.name}")
                group.create_task(keep_following(cluster, node), name=f"keep {node.name} following")


async def _keep(cluster: LocalCluster, node: Node) -> None:
    policy = RestartPolicy()
    while True:
        dead = await node.died()
        how, asked = ending(dead.exit_code), dead.kill_asked
        pause_s = policy.after_death(time.monotonic(), asked=asked)
        while True:
            if pause_s is None:
                raise ServerKeepsDying(f"{node.name} keeps dying ({how}): see {node.log_path}")
            if not asked:
                _doubt(cluster, node, how, dubious=policy.dubious)
            # From then on it is a matter of mending.
            if node.suspect or await _start_again(cluster, node, how, pause_s):
                break
            how = "while starting"
            asked = _was_asked(node)
            pause_s = policy.after_failed_start(asked=asked)
        policy.started()


def _was_asked(node: Node) -> bool:
    """Tell whether a start failed because somebody wanted it to."""
    return node.suspect or (node.process is not None and node.process.kill_asked)


def _doubt(cluster: LocalCluster, node: Node, how: str, *, dubious: bool) -> None:
    """Have a replica mended that died by itself, if it has said why, or anew if it is `dubious`."""
    # One that was promoted by somebody else, and not noticed yet, may hold what nobody else has.
    if node is cluster.primary or node.suspect or (node.exists and not node.is_replica):
        return
    # It may have been up for too short a time to be heard meanwhile.
    complaint = _complaint(node.last_words())
    if dubious:
        _log.warning("%s died again (%s): it is made anew from %s", node.name, how, cluster.primary.name)
        node.distrust(anew=True)
    elif complaint:
        _log.warning("%s died (%s) and %s", node.name, how, complaint)
        _distrust(cluster, node, complaint)


def _distrust(cluster: LocalCluster, node: Node, complaint: str) -> None:
    """Have a replica mended for what it said: anew if nothing less would help, or has."""
    node.distrust(anew=_WAL_IS_GONE in complaint or node.mended_on == cluster.timeline)


async def _start_again(cluster: LocalCluster, node: Node, how: str, pause_s: float) -> bool:
    """Start a server that died; return whether that is done, or no longer wanted."""
    _log.warning("%s died (%s): starting it again in %.1f s", node.name, how, pause_s)
    await asyncio.sleep(pause_s)
    began = time.monotonic()
    try:
        if await node.start_again(cluster.upstream_port(node)):
            _log.info("%s is back after %.1f s", node.name, time.monotonic() - began)
    except ServerFailedToStart as error:
        _log.warning("%s", error)
        return False
    return True


async def _notice_promotions(cluster: LocalCluster) -> None:
    """Look for replicas whose directory no longer says that they are."""
    while True:
        await asyncio.sleep(_CHECK_S)
        for node in cluster.replicas:
            if node.up.is_set() and not node.frozen and not node.suspect and not node.is_replica:
                await promotion.adopt(cluster, node)


async def keep_following(cluster: LocalCluster, node: Node) -> None:
    """Mend a node that became suspect, or that says itself that it cannot follow; never returns."""
    tail = Tail(node.log_path, node.log_start)
    failures = 0
    while True:
        await asyncio.sleep(_CHECK_S)
        complaint = _complaint(tail.new_lines())
        if node is cluster.primary or cluster.promotion.locked():
            continue
        if complaint and node.pid is not None and node.is_replica and not node.suspect:
            _log.warning("%s %s", node.name, complaint)
            _distrust(cluster, node, complaint)
            if not node.up.is_set():  # nor would it ever be
                await node.fence()
        if node.suspect and node.wanted and not node.frozen:
            mended = await _mended(cluster, node)
            if mended is not None:
                failures = 0 if mended else failures + 1
            if failures == _ENOUGH:
                raise ServerKeepsDying(
                    f"{node.name} does not start, not even as a fresh copy: see {node.log_path}"
                )
            tail = Tail(node.log_path, node.log_start)


async def _mended(cluster: LocalCluster, node: Node) -> bool | None:
    """Mend a node and start it; False if it did not start, None if that could not be tried to the end."""
    began = time.monotonic()
    try:
        await rejoin.mend(cluster, node)
        if await node.start_again(cluster.upstream_port(node)):
            _log.info("%s is back after %.1f s", node.name, time.monotonic() - began)
    except (CommandFailed, OSError) as error:  # the primary is away, or another one now: it stays suspect
        _log.warning("%s cannot be mended now: %s", node.name, error)
        await asyncio.sleep(_RETRY_S)
        return None
    except ServerFailedToStart as error:
        _log.warning("%s", error)
        killed = _was_asked(node)
        node.distrust(anew=not killed)
        return None if killed else False
    return True


def _complaint(lines: list[str]) -> str | None:
    """Return what a replica says that cannot follow."""
    for line in lines:
        if _WAL_IS_GONE in line:
            return f"needs WAL that the primary no longer has: cloning it anew ({_WAL_IS_GONE})"
        if any(pattern in line for pattern in _CANNOT_FOLLOW):
            return f"cannot follow: {line}"
    return None
