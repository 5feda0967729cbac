"""Makes a replica the primary, also one that was promoted behind the cluster's back.

The order keeps two nodes from taking writes: the old primary is certainly down before another node is promoted. A
node that may hold more of the old timeline than the new primary becomes suspect, and has to rejoin before it runs
again (`rejoin`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

import psutil

from rocket.cluster.errors import (
    NodeFrozen,
    NodeNotRunning,
    NotAReplica,
    NotThePrimary,
    PromotionFailed,
    ServerFailedToStart,
)
from rocket.cluster.server import LOST
from rocket.cluster.timelines import Lineage, position
from rocket.errors import describe

if TYPE_CHECKING:
    from collections.abc import Mapping

    import asyncpg

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

PROMOTE_TIMEOUT_S = 30
"""All that was received is replayed first; a delay on demand ends with the promotion."""
_ANSWER_TIMEOUT_S = 15.0
"""How long a node that crashed while it was promoted may take to come back as what it has become."""
_CHECKPOINT_TIMEOUT_S = 30.0  # it writes all dirty buffers to a disk that may be busy
_RECEIVER_TIMEOUT_S = 0.3  # its connection to a server that is down ends by itself
_RECEIVED_TIMEOUT_S = 2.0  # a replica that does not answer counts as one that may hold more
_POLL_S = 0.01

_RECEIVED = """
    SELECT pg_last_wal_receive_lsn()::text AS received, pg_last_wal_replay_lsn()::text AS replayed,
           (SELECT pid FROM pg_stat_wal_receiver) AS receiver
"""

_log = logging.getLogger("rocket.cluster")


async def promote(cluster: LocalCluster, name: str, *, timeout_s: int = PROMOTE_TIMEOUT_S) -> str:
    """Make a replica the primary; return what came of it once it takes writes.

    The other nodes are made to follow it; those that need more than a reload are left to the supervisor. Raise
    `NotAReplica`, `NodeNotRunning` or `NodeFrozen` if it cannot be promoted, and `PromotionFailed` if it does not
    take writes: the old primary then is the primary again. Only one promotion runs at a time.
    """
    async with cluster.promotion_lock:
        new, old = cluster.node(name), cluster.primary
        _check_promotable(cluster, new)
        began = time.monotonic()
        _log.info("promoting %s: %s goes down first", new.name, old.name)
        await old.fence()
        down = time.monotonic()
        received = await _all_received(cluster)
        try:
            lineage = await _promoted(new, cluster.timeline, timeout_s)
        except PromotionFailed as error:
            await _give_back(new, old)
            raise PromotionFailed(f"{error}; {old.name} is the primary again") from None
        await _take_over(cluster, new, lineage, received)
        _log.info(
            "%s is the primary now, timeline %d, after %.2f s (%.2f s to stop %s)",
            new.name, lineage.timeline, time.monotonic() - began, down - began, old.name,
        )  # fmt: skip
        return f"is the primary now (timeline {lineage.timeline}); {_outlook(old)}"


async def adopt(cluster: LocalCluster, new: Node) -> None:
    """Accept as the primary a node that another program has promoted; the primary before is stopped for it."""
    async with cluster.promotion_lock:
        if new is cluster.primary or new.is_replica or new.suspect or not new.up.is_set():
            return
        old = cluster.primary
        _log.warning("%s was promoted, and not by rocket: it is the primary from now on", new.name)
        try:
            lineage = await _takes_writes(new, cluster.timeline)
        except PromotionFailed as error:
            _log.warning("%s: it becomes a replica of %s again", error, old.name)
            await _demote(new)
            return
        await old.fence()
        await _take_over(cluster, new, lineage, await _all_received(cluster))
        _log.info("%s is the primary now, timeline %d; %s", new.name, lineage.timeline, _outlook(old))


def _outlook(old: Node) -> str:
    return f"{old.name} follows it" if old.wanted else f"{old.name} will follow it when it is started"


def _check_promotable(cluster: LocalCluster, node: Node) -> None:
    if node is cluster.primary:
        raise NotAReplica(f"{node.name} is the primary already")
    if node.halted:
        raise NodeFrozen(f"{node.name} is frozen: thaw it first")
    if node.suspect or node.pid is None or not node.up.is_set():
        raise NodeNotRunning(f"{node.name} is not up: only a replica that runs can be promoted")


# --- the replica that becomes the primary ---


async def _promoted(new: Node, before: int, timeout_s: int) -> Lineage:
    """Promote a replica of timeline `before`; raise `PromotionFailed` if it does not take writes in the end."""
    why = f"{new.name} was not promoted within {timeout_s} s"
    try:
        connection = await new.connect()
        try:
            # A promotion ends a pause of the replay, but not one that was requested and has not begun.
            await connection.execute("SELECT pg_wal_replay_resume()")
            done = await connection.fetchval("SELECT pg_promote(true, $1)", timeout_s, timeout=timeout_s + 5)
        finally:
            connection.terminate()
    except LOST as error:
        done, why = False, f"{new.name} was not promoted: {describe(error)}"
    # It may have been promoted all the same: its directory knows.
    if not done and new.is_replica:
        raise PromotionFailed(why)
    lineage = await _takes_writes(new, before)
    try:
        connection = await new.connect()
        try:
            # Until then pg_control names the old timeline, and pg_rewind believes it.
            await connection.execute("CHECKPOINT", timeout=_CHECKPOINT_TIMEOUT_S)
        finally:
            connection.terminate()
    except LOST as error:
        _log.warning("%s wrote no checkpoint: %s", new.name, describe(error))
    return lineage


async def _takes_writes(new: Node, before: int) -> Lineage:
    """Wait until a node is out of recovery, on a later timeline than `before`; raise `PromotionFailed`."""
    why = "it does not answer"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            while True:
                try:
                    lineage = await new.lineage()
                except (*LOST, NotThePrimary) as error:
                    why = describe(error)
                    await asyncio.sleep(_POLL_S)
                    continue
                if lineage.timeline > before:
                    return lineage
                # It crashed between two steps of its promotion, or another node was promoted before.
                why = f"it is on timeline {lineage.timeline}, which is not a new one"
                break
    raise PromotionFailed(f"{new.name} did not become the primary: {why}")


async def _give_back(new: Node, old: Node) -> None:
    """Undo a promotion that failed: the new node is down before the old one takes writes again."""
    await _demote(new)
    old.trust()
    if old.wanted:
        try:
            await old.start_again(old.port)
        except ServerFailedToStart as error:
            raise PromotionFailed(f"and the old primary does not come back: {error}") from None


async def _demote(node: Node) -> None:
    """Fence a node that should not take writes, and mark its directory as a replica's for the next start too."""
    await node.fence()
    node.directory.become_standby()


# --- the others ---


async def _all_received(cluster: LocalCluster) -> dict[str, int]:
    """Return where each replica's WAL ends, now that no more comes; a replica that cannot be asked is missing."""
    others = [node for node in cluster.replicas if _can_be_asked(node)]
    ends = await asyncio.gather(*(_received(node) for node in others))
    return {node.name: end for node, end in zip(others, ends, strict=True) if end is not None}


def _can_be_asked(node: Node) -> bool:
    return node.up.is_set() and not node.halted and not node.suspect


async def _received(node: Node) -> int | None:
    """Return where a replica's WAL ends, or None if that is not certain.

    It is asked when its receiver is gone, which has flushed by then what it got. A receiver whose connection
    outlives the primary is terminated: a proxy between the two may still hold something back.
    """
    began = time.monotonic()
    terminated = False
    try:
        async with asyncio.timeout(_RECEIVED_TIMEOUT_S):
            connection = await node.connect()
            try:
                while True:
                    received, replayed, receiver = await _state(connection)
                    if receiver is None:
                        break
                    if not terminated and time.monotonic() - began > _RECEIVER_TIMEOUT_S:
                        terminate_receiver(node, receiver)
                        terminated = True
                    await asyncio.sleep(_POLL_S)
            finally:
                connection.terminate()
    except LOST:
        return None
    if received is None:  # it has not come to the end of its own files
        return None
    return max(position(received), position(replayed or "0/0"))


def terminate_receiver(node: Node, pid: int) -> None:
    """Terminate a replica's WAL receiver, which no SQL can; not a process that has its id by now."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.cwd() == str(node.data_dir):
            process.terminate()


async def _state(connection: asyncpg.Connection[Any]) -> tuple[str | None, str | None, int | None]:
    row = await connection.fetchrow(_RECEIVED)
    assert row is not None  # noqa: S101 - a SELECT without FROM has one
    return row["received"], row["replayed"], row["receiver"]


async def _take_over(cluster: LocalCluster, new: Node, lineage: Lineage, received: Mapping[str, int]) -> None:
    """Make the new primary the cluster's, and all other nodes follow it.

    A replica that has received no more than the new primary had holds at most the beginning of a record beyond
    the fork, which is never replayed. All other nodes are suspect.
    """
    bound = max(lineage.forks.get(cluster.timeline, 0), received.get(new.name, 0))
    running = []
    for node in cluster.nodes.values():
        if node is new:
            continue
        end = received.get(node.name)
        if end is None or end > bound or not node.is_replica:
            node.distrust()
            if (node.up.is_set() or node.recovering) and not node.frozen:
                running.append(node)
    if running:
        names = ", ".join(node.name for node in running)
        _log.warning("%s may hold WAL that %s has not: stopped, to rejoin", names, new.name)
        # Before anything that asks for the primary could connect them to the new one.
        await asyncio.gather(*(node.fence() for node in running))
    cluster.set_primary(new, lineage.timeline)
    for node in cluster.nodes.values():
        if node.exists and not node.suspect:  # suspect ones are configured when they are started
            node.reconfigure(cluster.upstream_port(node))
