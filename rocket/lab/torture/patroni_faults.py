"""Faults of a cluster that Patroni runs: most bring a new leader about, and each ends when all is well again."""

from __future__ import annotations

import asyncio
import datetime as dt
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from rocket.cluster.errors import NodeNotRunning
from rocket.lab.checker.history import PARTITION, REINIT
from rocket.topology.patroni_rest import PatroniSilent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rocket.lab.patroni.cluster import PatroniCluster
    from rocket.lab.patroni.node import PatroniNode
    from rocket.lab.torture.partition import Links

_SUCCESSION_S = 60.0
"""How long Patroni may take: its lock lives for 20 s after the last word of who held it."""
_WHOLE_S = 90.0
"""How long an old leader may take to be rewound, or made anew, and to stream."""
_STORE_DOWN_S = 8.0
"""Longer than a leader holds out without the store."""
_ALONE_S = 2.0
"""How long the Postgres of an old leader goes on before its Patroni does."""
_POLL_S = 0.1
_PROMOTED = "promoted self to leader"

Detail = dict[str, Any]


class Runner(NamedTuple):
    """What faults are brought upon."""

    cluster: PatroniCluster
    links: Links


async def bring_about(name: str, stage: Runner) -> tuple[PatroniNode, Detail]:
    """Have a fault of `history.OF_PATRONI` happen, and heal it; return whom it hit, and what Patroni said.

    Raise `NodeNotRunning` if no leader is found, or if the cluster does not become whole again.
    """
    cluster = stage.cluster
    await _until(cluster.is_whole, _WHOLE_S, "the cluster is not whole")
    leader = await cluster.leader()
    hit = leader
    if name == REINIT:
        hit = next(node for node in cluster.nodes.values() if node is not leader)
    seen = {node.name: _promotions(node) for node in cluster.nodes.values()}
    detail = await _FAULTS[name](stage, hit)
    await _until(cluster.is_whole, _WHOLE_S, f"the cluster is not whole again after {name}")
    now = await cluster.leader()
    promoted = [
        {"leader": node.name, "wall_s": wall_s, "fork": _fork(node)}
        for node in cluster.nodes.values()
        for wall_s in _promotions(node)[len(seen[node.name]) :]
    ]
    return hit, {"promoted": promoted, "leader": now.name, **detail}


async def _killed(stage: Runner, leader: PatroniNode) -> Detail:
    await leader.kill()
    try:
        await _succeeded(stage.cluster, leader)
    finally:
        await leader.start()
    return {}


async def _frozen(stage: Runner, leader: PatroniNode) -> Detail:
    """Freeze all of it; when it thaws, Postgres goes on for a while before Patroni can hold it back."""
    leader.freeze()
    try:
        await _succeeded(stage.cluster, leader)
        thawed = time.time()
        leader.thaw_postgres()
        await asyncio.sleep(_ALONE_S)
    finally:
        leader.thaw()
    return {"thawed_wall_s": thawed}


async def _hung(stage: Runner, leader: PatroniNode) -> Detail:
    """Freeze Patroni alone: Postgres takes writes for as long as it is asked to, also beside its successor."""
    leader.patroni.send_all(signal.SIGSTOP)
    try:
        await _succeeded(stage.cluster, leader)
        await asyncio.sleep(_ALONE_S)
    finally:
        leader.thaw()
    return {}


async def _switched_over(stage: Runner, leader: PatroniNode) -> Detail:
    await stage.cluster.order(leader, "switchover", leader=leader.name)
    await _succeeded(stage.cluster, leader)
    return {}


async def _store_down(stage: Runner, _leader: PatroniNode) -> Detail:
    """Freeze the store: the leader gives up, since it cannot know who leads."""
    stage.cluster.etcd.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(_STORE_DOWN_S)
    finally:
        stage.cluster.etcd.send(signal.SIGCONT)
    return {}


async def _cut_off(stage: Runner, leader: PatroniNode) -> Detail:
    """Keep the leader from etcd, and the others from it; clients still reach its Postgres."""
    with stage.links.cut(leader):
        await _succeeded(stage.cluster, leader)
        succeeded = time.time()
        await asyncio.sleep(_ALONE_S)
    return {"succeeded_wall_s": succeeded}


async def _made_anew(stage: Runner, replica: PatroniNode) -> Detail:
    """Have Patroni throw away the data of a replica, and clone the leader."""
    mark = replica.data_dir / "PG_VERSION"
    before = mark.stat().st_ctime_ns

    async def is_cloned() -> bool:
        try:
            return mark.stat().st_ctime_ns != before
        except FileNotFoundError:
            return False

    await stage.cluster.order(replica, "reinitialize", force=True)
    await _until(is_cloned, _WHOLE_S, f"{replica.name} is not made anew")
    return {"cloned_wall_s": time.time()}


_FAULTS: dict[str, Callable[[Runner, PatroniNode], Awaitable[Detail]]] = {
    "leader-killed": _killed,
    "leader-frozen": _frozen,
    "leader-hung": _hung,
    "switchover": _switched_over,
    "store-down": _store_down,
    PARTITION: _cut_off,
    REINIT: _made_anew,
}


async def _succeeded(cluster: PatroniCluster, before: PatroniNode) -> None:
    """Wait until Patroni has another leader."""

    async def is_another() -> bool:
        try:
            return await cluster.leader() is not before
        except PatroniSilent:
            return False

    await _until(is_another, _SUCCESSION_S, f"nobody took over from {before.name}")


async def _until(reached: Callable[[], Awaitable[bool]], patience_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + patience_s
    while not await reached():
        if time.monotonic() > deadline:
            raise NodeNotRunning(f"{otherwise} within {patience_s:g} s")
        await asyncio.sleep(_POLL_S)


def _promotions(node: PatroniNode) -> list[float]:
    """Return when its Patroni, by its own log, made it the leader: seconds by the wall clock."""
    try:
        lines = node.patroni_log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [
        dt.datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()
        for line in lines
        if _PROMOTED in line
    ]


def _fork(node: PatroniNode) -> str | None:
    """Return up to which LSN a member that was promoted had its predecessor's WAL, by its newest history file."""
    histories = sorted((node.data_dir / "pg_wal").glob("????????.history"))
    lines = histories[-1].read_text().split("\n") if histories else []
    forks = [line.split()[1] for line in lines if line.strip()]
    return forks[-1] if forks else None
