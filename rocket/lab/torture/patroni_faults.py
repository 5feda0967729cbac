"""Faults of a cluster that Patroni runs, most of them failovers; each ends when all members stream again."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import signal
import time
from typing import TYPE_CHECKING, Any

from rocket.cluster.errors import NodeNotRunning
from rocket.lab.checker.history import Fault
from rocket.lab.patroni.member import HOST
from rocket.lab.torture.proxy import Mode, TcpProxy
from rocket.topology.patroni import PatroniUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from rocket.lab.checker.history import HistoryWriter
    from rocket.lab.patroni.cluster import PatroniCluster
    from rocket.lab.patroni.member import PatroniNode

PROXY_HOSTS: Mapping[str, str] = {f"node{number}": f"127.0.0.{10 + number}" for number in range(1, 4)}
"""An address of this machine for each member; Linux has all of 127.0.0.0/8."""

_SUCCESSION_S = 60.0
"""How long Patroni may take: its lock expires 20 s after the leader renewed it last."""
_WHOLE_S = 90.0
"""How long an old leader may take to be rewound or cloned, and to stream."""
_STORE_DOWN_S = 8.0
"""Longer than a leader goes on without etcd."""
_ALONE_S = 2.0
"""How long the Postgres of an old leader goes on before its Patroni does."""
_PAUSE_S = 3.0
"""Seconds without a fault before each."""
_POLL_S = 0.1
_PROMOTED = "promoted self to leader"
_WALL = "_wall_s"
"""The end of the name of a detail that is a moment by the wall clock."""

Detail = dict[str, Any]

_log = logging.getLogger("rocket.torture")


class Links:
    """Proxies between the members, and between each of them and etcd; clients connect without them."""

    def __init__(self) -> None:
        self._links: dict[str, list[TcpProxy]] = {}

    @contextlib.asynccontextmanager
    async def around(self, cluster: PatroniCluster) -> AsyncIterator[None]:
        """Pass everything on for as long as the context lasts, unless a member is cut off."""
        async with contextlib.AsyncExitStack() as stack:
            for node in cluster.nodes.values():
                ports = (cluster.etcd_port, node.port, node.rest_port)
                self._links[node.name] = [TcpProxy(PROXY_HOSTS[node.name], port, HOST) for port in ports]
                for link in self._links[node.name]:
                    await stack.enter_async_context(link.listening())
            yield

    @contextlib.contextmanager
    def cut(self, node: PatroniNode) -> Iterator[None]:
        """Let nothing through between a member and etcd, nor from the others to it."""
        for link in self._links[node.name]:
            link.turn(Mode.SILENT)
        try:
            yield
        finally:
            for link in self._links[node.name]:
                link.turn(Mode.PASS)


class PatroniNemesis:
    """Injects one fault after the other, and waits until each is healed."""

    def __init__(
        self,
        cluster: PatroniCluster,
        links: Links,
        faults: Sequence[str],
        history: HistoryWriter,
        zero: float,
    ) -> None:
        self.under_way: list[str] = []
        """The fault that is on."""
        self.cluster = cluster
        self.links = links
        self._faults = faults
        self._history = history
        self._zero = zero

    async def run(self) -> str:
        """Inject all faults, and return when all are healed: a phrase for the log.

        Raise `NodeNotRunning` if no leader is found, or if not all members stream in the end.
        """
        for number, name in enumerate(self._faults, start=1):
            await asyncio.sleep(_PAUSE_S)
            _log.info("%6.1f s  %d of %d: %s", time.monotonic() - self._zero, number, len(self._faults), name)
            self.under_way.append(name)
            self._history.add(await self._inject(name))
            self.under_way.remove(name)
        return "the last fault is healed"

    async def _inject(self, name: str) -> Fault:
        """Inject a fault and heal it; return the record of it, with the promotions that Patroni logged."""
        at = time.monotonic()
        wall_zero_s = time.time() - (at - self._zero)
        await _until(self.cluster.is_whole, _WHOLE_S, "the cluster is not whole")
        leader = await self.cluster.leader()
        node = leader
        if PATRONI_FAULTS[name] is _cloned:
            node = next(node for node in self.cluster.nodes.values() if node is not leader)
        before = {node.name: len(_promotions(node)) for node in self.cluster.nodes.values()}
        detail = await PATRONI_FAULTS[name](self, node)
        await _until(self.cluster.is_whole, _WHOLE_S, f"the cluster is not whole again after {name}")
        promoted = [
            {"leader": node.name, "at": round(wall_s - wall_zero_s, 3), "fork": _fork(node)}
            for node in self.cluster.nodes.values()
            for wall_s in _promotions(node)[before[node.name] :]
        ]
        moments = {
            key.removesuffix(_WALL): round(value - wall_zero_s, 3)
            for key, value in detail.items()
            if key.endswith(_WALL)
        }
        leader = await self.cluster.leader()
        return Fault(
            name=name,
            node=node.name,
            at=round(at - self._zero, 6),
            until=round(time.monotonic() - self._zero, 6),
            detail={"promoted": promoted, "leader": leader.name, **moments},
        )


async def _killed(nemesis: PatroniNemesis, leader: PatroniNode) -> Detail:
    await leader.kill()
    try:
        await _succeeded(nemesis.cluster, leader)
    finally:
        await leader.start()
    return {}


async def _frozen(nemesis: PatroniNemesis, leader: PatroniNode) -> Detail:
    """Freeze Patroni and Postgres; thaw Postgres first, which goes on until Patroni stops it."""
    leader.freeze()
    try:
        await _succeeded(nemesis.cluster, leader)
        thawed = time.time()
        leader.thaw_postgres()
        await asyncio.sleep(_ALONE_S)
    finally:
        leader.thaw()
    return {"thawed_wall_s": thawed}


async def _hung(nemesis: PatroniNemesis, leader: PatroniNode) -> Detail:
    """Freeze Patroni alone: its Postgres goes on taking writes, even while there is a new leader."""
    leader.patroni.send_all(signal.SIGSTOP)
    try:
        await _succeeded(nemesis.cluster, leader)
        await asyncio.sleep(_ALONE_S)
    finally:
        leader.thaw()
    return {}


async def _switched_over(nemesis: PatroniNemesis, leader: PatroniNode) -> Detail:
    await nemesis.cluster.request(leader, "switchover", leader=leader.name)
    await _succeeded(nemesis.cluster, leader)
    return {}


async def _store_down(nemesis: PatroniNemesis, _leader: PatroniNode) -> Detail:
    """Freeze etcd: the leader demotes itself, since it cannot know whether it still is the leader."""
    nemesis.cluster.etcd.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(_STORE_DOWN_S)
    finally:
        nemesis.cluster.etcd.send(signal.SIGCONT)
    return {}


async def _cut_off(nemesis: PatroniNemesis, leader: PatroniNode) -> Detail:
    """Keep the leader from etcd, and the others from it; clients still reach its Postgres."""
    with nemesis.links.cut(leader):
        await _succeeded(nemesis.cluster, leader)
        succeeded = time.time()
        await asyncio.sleep(_ALONE_S)
    return {"succeeded_wall_s": succeeded}


async def _cloned(nemesis: PatroniNemesis, replica: PatroniNode) -> Detail:
    """Have Patroni discard the data of a replica, and clone the leader."""
    version_file = replica.data_dir / "PG_VERSION"
    before = version_file.stat().st_ctime_ns

    async def is_cloned() -> bool:
        try:
            return version_file.stat().st_ctime_ns != before
        except FileNotFoundError:
            return False

    await nemesis.cluster.request(replica, "reinitialize", force=True)
    await _until(is_cloned, _WHOLE_S, f"{replica.name} is not cloned")
    return {"cloned_wall_s": time.time()}


PARTITION = "partition"

PATRONI_FAULTS: Mapping[str, Callable[[PatroniNemesis, PatroniNode], Awaitable[Detail]]] = {
    "leader-killed": _killed,
    "leader-frozen": _frozen,
    "leader-hung": _hung,
    "switchover": _switched_over,
    "store-down": _store_down,
    PARTITION: _cut_off,
    "reinit": _cloned,
}
"""Every fault of a cluster that Patroni runs, by name."""


async def _succeeded(cluster: PatroniCluster, before: PatroniNode) -> None:
    """Wait until Patroni has another leader."""

    async def is_another() -> bool:
        try:
            return await cluster.leader() is not before
        except PatroniUnavailable:
            return False

    await _until(is_another, _SUCCESSION_S, f"no member took over from {before.name}")


async def _until(reached: Callable[[], Awaitable[bool]], timeout_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not await reached():
        if time.monotonic() > deadline:
            raise NodeNotRunning(f"{otherwise} within {timeout_s:g} s")
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
    """Return up to which LSN a promoted member had its predecessor's WAL, by its newest history file."""
    histories = sorted((node.data_dir / "pg_wal").glob("????????.history"))
    lines = histories[-1].read_text().split("\n") if histories else []
    forks = [line.split()[1] for line in lines if line.strip()]
    return forks[-1] if forks else None
