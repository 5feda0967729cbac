"""Makes a replica the primary, and notices when somebody else did.

The order is what keeps two nodes from taking writes: the old primary is down for certain before anybody is
promoted. Whoever may hold more of the old timeline than the new primary becomes suspect, and is mended before it
runs again (`mending`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

import asyncpg

from rocket.cluster import datadir
from rocket.cluster.errors import (
    NodeFrozen,
    NodeNotRunning,
    NotAReplica,
    NotThePrimary,
    PromotionFailed,
    ServerFailedToStart,
)
from rocket.cluster.faults import end_receiver
from rocket.cluster.timelines import Lineage, position
from rocket.errors import describe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

_PROMOTE_TIMEOUT_S = 30
"""All that was received is replayed first; a delay on demand ends with the promotion."""
_ANSWER_TIMEOUT_S = 15.0
"""How long a node that crashed while it was promoted may take to come back as what it has become."""
_CHECKPOINT_TIMEOUT_S = 30.0
_RECEIVER_PATIENCE_S = 0.3  # the connection to a server that is down ends by itself
_RECEIVED_TIMEOUT_S = 2.0
_POLL_S = 0.01

_RECEIVED = """
    SELECT pg_last_wal_receive_lsn()::text AS received, pg_last_wal_replay_lsn()::text AS replayed,
           (SELECT pid FROM pg_stat_wal_receiver) AS receiver
"""
_SILENT = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

_log = logging.getLogger("rocket.cluster")


async def promote(cluster: LocalCluster, name: str) -> str:
    """Make a replica the primary, and say what came of it once it takes writes.

    The others are made to follow; whom that takes longer than a reload is left to the supervisor. Raise
    `NotAReplica`, `NodeNotRunning` or `NodeFrozen` if it cannot be promoted, and `PromotionFailed` if that did not
    work: the old primary then is the primary again. One promotion goes on at a time.
    """
    async with cluster.promotion:
        new, old = cluster.node(name), cluster.primary
        _refuse_the_unfit(cluster, new)
        began = time.monotonic()
        _log.info("promoting %s: %s goes down first", new.name, old.name)
        await old.fence()
        down = time.monotonic()
        received = await _all_received(cluster)
        try:
            lineage = await _promoted(new, cluster.timeline)
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
    """Take a node for the primary that somebody else has promoted; the primary of before goes down for it."""
    async with cluster.promotion:
        if new is cluster.primary or new.is_replica or new.suspect or not new.up.is_set():
            return
        old = cluster.primary
        _log.warning("%s was promoted, and not by rocket: it is the primary from now on", new.name)
        try:
            lineage = await _takes_writes(new, cluster.timeline)
        except PromotionFailed as error:
            _log.warning("%s: it goes back to being a replica of %s", error, old.name)
            await _demote(new)
            return
        await old.fence()
        await _take_over(cluster, new, lineage, await _all_received(cluster))
        _log.info("%s is the primary now, timeline %d; %s", new.name, lineage.timeline, _outlook(old))


def _outlook(old: Node) -> str:
    return f"{old.name} follows it" if old.wanted else f"{old.name} will follow it when it is started"


def _refuse_the_unfit(cluster: LocalCluster, node: Node) -> None:
    if node is cluster.primary:
        raise NotAReplica(f"{node.name} is the primary already")
    if node.frozen or node.halted:
        raise NodeFrozen(f"{node.name} is frozen: thaw it first")
    if node.suspect or node.pid is None or not node.up.is_set():
        raise NodeNotRunning(f"{node.name} is not up: only a replica that runs can be promoted")


# --- the replica that becomes the primary ---


async def _promoted(new: Node, before: int) -> Lineage:
    """Promote a replica of timeline `before`; raise `PromotionFailed` if it does not take writes in the end."""
    why = f"{new.name} was not promoted within {_PROMOTE_TIMEOUT_S} s"
    try:
        connection = await new.connect()
        try:
            # A replica that holds its replay would go on by itself; one that is about to would not.
            await connection.execute("SELECT pg_wal_replay_resume()")
            done = await connection.fetchval(
                "SELECT pg_promote(true, $1)", _PROMOTE_TIMEOUT_S, timeout=_PROMOTE_TIMEOUT_S + 5
            )
        finally:
            connection.terminate()
    except _SILENT as error:
        done, why = False, f"{new.name} was not promoted: {describe(error)}"
    # It may have been, whatever it said: its directory knows.
    if not done and new.is_replica:
        raise PromotionFailed(why)
    lineage = await _takes_writes(new, before)
    try:
        connection = await new.connect()
        try:
            # Until then pg_control names the old timeline, and so does pg_rewind.
            await connection.execute("CHECKPOINT", timeout=_CHECKPOINT_TIMEOUT_S)
        finally:
            connection.terminate()
    except _SILENT as error:
        _log.warning("%s wrote no checkpoint: %s", new.name, describe(error))
    return lineage


async def _takes_writes(new: Node, before: int) -> Lineage:
    """Wait until a node is out of recovery, on a later timeline than `before`; raise `PromotionFailed`."""
    why = "it does not answer"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            while True:
                try:
                    lineage = await Lineage.of(new)
                except (*_SILENT, NotThePrimary) as error:
                    why = describe(error)
                    await asyncio.sleep(_POLL_S)
                    continue
                if lineage.timeline > before:
                    return lineage
                # It crashed between two steps of its promotion, or somebody else was promoted before.
                why = f"it is on timeline {lineage.timeline}, which is not a new one"
                break
    raise PromotionFailed(f"{new.name} did not become the primary: {why}")


async def _give_back(new: Node, old: Node) -> None:
    """Undo a promotion that failed: the new node is down before the old one takes writes again."""
    await _demote(new)
    old.suspect = False
    if old.wanted:
        try:
            await old.start_again(old.port)
        except ServerFailedToStart as error:
            raise PromotionFailed(f"and the old primary does not come back: {error}") from None


async def _demote(node: Node) -> None:
    """Make a node that should not take writes suspect, and its directory a replica's whoever looks next."""
    await node.fence()
    datadir.become_standby(node)


# --- the others ---


async def _all_received(cluster: LocalCluster) -> dict[str, int]:
    """Ask every replica how much WAL it has, now that there is no more to come; leave out who cannot be asked."""
    others = [node for node in cluster.replicas if _can_be_asked(node)]
    ends = await asyncio.gather(*(_received(node) for node in others))
    return {node.name: end for node, end in zip(others, ends, strict=True) if end is not None}


def _can_be_asked(node: Node) -> bool:
    return node.up.is_set() and not node.frozen and not node.halted and not node.suspect


async def _received(node: Node) -> int | None:
    """Return where a replica's WAL ends, or None if that is not certain.

    Asked when its receiver is gone, which has flushed by then what it got. A receiver whose connection outlives
    the primary is ended: whatever stands between the two may still hold something back.
    """
    began = time.monotonic()
    ended = False
    try:
        async with asyncio.timeout(_RECEIVED_TIMEOUT_S):
            connection = await node.connect()
            try:
                while True:
                    received, replayed, receiver = await _state(connection)
                    if receiver is None:
                        break
                    if not ended and time.monotonic() - began > _RECEIVER_PATIENCE_S:
                        end_receiver(node, receiver)
                        ended = True
                    await asyncio.sleep(_POLL_S)
            finally:
                connection.terminate()
    except _SILENT:
        return None
    if received is None:  # it has not got to the end of its own files
        return None
    return max(position(received), position(replayed or "0/0"))


async def _state(connection: asyncpg.Connection[Any]) -> tuple[str | None, str | None, int | None]:
    row = await connection.fetchrow(_RECEIVED)
    assert row is not None  # noqa: S101 - a SELECT without FROM has one
    return row["received"], row["replayed"], row["receiver"]


async def _take_over(cluster: LocalCluster, new: Node, lineage: Lineage, received: Mapping[str, int]) -> None:
    """Let the new primary be the primary, and all others follow it.

    A replica that has received no more than the new primary had holds at most the beginning of a record beyond
    the fork, which is never replayed. All others are suspect.
    """
    bound = max(lineage.forks.get(cluster.timeline, 0), received.get(new.name, 0))
    doubtful = []
    for node in cluster.nodes.values():
        if node is new:
            continue
        end = received.get(node.name)
        if end is None or end > bound or not node.is_replica:
            node.suspect = True
            if node.up.is_set() and not node.frozen:
                doubtful.append(node)
    if doubtful:
        names = ", ".join(node.name for node in doubtful)
        _log.warning("%s may hold WAL that %s has not: stopped to be mended", names, new.name)
        # Before anything that asks who the primary is could connect them to the new one.
        await asyncio.gather(*(node.fence() for node in doubtful))
    cluster.become(new, lineage.timeline)
    for node in cluster.nodes.values():
        if node.exists and not node.suspect:  # those are told when they are started
            node.reconfigure(cluster.upstream_port(node))
