"""The faults themselves: each a context that begins with the fault and ends when it is healed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg

from rocket.cluster import faults
from rocket.cluster.errors import NodeNotRunning, NotAReplica
from rocket.cluster.node import Fault
from rocket.cluster.promotion import promote
from rocket.cluster.rejoin import bring_up
from rocket.errors import RocketError, describe
from rocket.lab.shutdown import background
from rocket.lab.torture import processes
from rocket.lab.torture.proxy import Mode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node
    from rocket.lab.torture.clients import Clients
    from rocket.lab.torture.proxy import Proxy
    from rocket.lab.workers.processes import Worker


Detail = dict[str, Any]

_SLOW_MS = 400
_STUCK_MS = 5_000
"""Longer than the fault lasts: the replica stops right before the next commit record, and has all of a transaction
but its commit, which is what a floor that was read too early calls enough. No longer, since a server that is
restarted meanwhile may let nobody in before it is over."""
_LINK_DELAY_S = 0.15
_CRASH = ((signal.SIGQUIT, 2.0), (signal.SIGKILL, 5.0))
"""Ends a server without its farewell, which would wait for replicas."""
_HEAL_S = 30.0
_POLL_S = 0.05
_UNSENT_S = 0.4
"""How long writes go on that a lossy promotion is to lose."""
_ALONE_S = 3.0
"""How long a replica may take to come up while the primary is away; it may need WAL from there."""
_LOCK_EVERY_S = 0.01
_UNHEALED = (RocketError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

_CANCEL_AT_ONCE = "ALTER SYSTEM SET max_standby_streaming_delay = 0"
_CANCEL_AS_EVER = "ALTER SYSTEM RESET max_standby_streaming_delay"
_RELOAD = "SELECT pg_reload_conf()"
_LOCK_RIDES = "LOCK TABLE rides IN ACCESS EXCLUSIVE MODE"
"""Reaches the replicas as WAL; replay cancels reads that are in its way."""
_IMPATIENT = "SET LOCAL lock_timeout = '100ms'"
_CONFLICTS = "SELECT sum(confl_lock + confl_snapshot)::int FROM pg_stat_database_conflicts"

_log = logging.getLogger("rocket.torture")


@dataclass(frozen=True, slots=True)
class Target:
    """What faults are brought upon."""

    cluster: LocalCluster
    links: Mapping[str, Proxy]
    """By the name of the node that follows through it."""
    clients: Clients
    processes: Sequence[Worker]
    """Those of the API, and those that only observe; none if one program does it all."""
    zero: float
    """The moment from which times are counted, by the monotonic clock."""


async def _healed(act: Callable[[], Awaitable[object]], node: Node) -> None:
    """Undo a fault, again and again until the node takes it; a node that changed its role has shaken it off."""
    deadline = time.monotonic() + _HEAL_S
    while True:
        try:
            await act()
        except NotAReplica:
            return
        except _UNHEALED as error:
            if time.monotonic() > deadline:
                raise NodeNotRunning(f"{node.name} cannot be healed: {describe(error)}") from error
            await asyncio.sleep(_POLL_S)
        else:
            return


async def _back(node: Node) -> None:
    """Wait until a node answers again."""

    async def answers() -> None:
        connection = await node.connect()
        connection.terminate()

    await _healed(answers, node)


# --- faults of a replica ---


@contextlib.asynccontextmanager
async def _replay_paused(_target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    await faults.pause(node)
    try:
        yield {}
    finally:
        await _healed(lambda: faults.resume(node), node)


def _replay_delayed(delay_ms: int) -> Injection:
    @contextlib.asynccontextmanager
    async def delayed(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
        await faults.delay(node, delay_ms, target.cluster.upstream_port(node))
        try:
            yield {"delay_ms": delay_ms}
        finally:
            node.lift(Fault.DELAYED)  # whatever becomes of it: its next start is an undelayed one
            await _healed(lambda: faults.delay(node, 0, target.cluster.upstream_port(node)), node)

    return delayed


@contextlib.asynccontextmanager
async def _backend_killed(_target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    await faults.kill_backend(node)
    try:
        yield {}
    finally:
        await _back(node)


@contextlib.asynccontextmanager
async def _killed(_target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    node.kill()
    try:
        yield {}
    finally:
        await _back(node)


@contextlib.asynccontextmanager
async def _frozen(_target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    node.freeze()
    try:
        yield {}
    finally:
        node.thaw()


def _link(mode: Mode) -> Injection:
    @contextlib.asynccontextmanager
    async def turned(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
        link = target.links[node.name]
        link.turn(mode, delay_s=_LINK_DELAY_S)
        try:
            yield {"delay_ms": _LINK_DELAY_S * 1000} if mode is Mode.DELAYED else {}
        finally:
            link.turn(Mode.PASS)

    return turned


@contextlib.asynccontextmanager
async def _walsender_killed(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    """End the process that sends to a replica, and let the replica reach no other one for a while."""
    await faults.cut_sender(target.cluster, node)
    link = target.links[node.name]
    link.turn(Mode.CUT)
    try:
        yield {}
    finally:
        link.turn(Mode.PASS)


def _halted(kind: faults.ReplicationProcess) -> Injection:
    @contextlib.asynccontextmanager
    async def halted(_target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
        await faults.halt(node, kind)
        try:
            yield {}
        finally:
            with contextlib.suppress(NodeNotRunning):  # its server has ended since, and the process with it
                faults.let_go(node, kind)

    return halted


# --- faults of the primary ---


@contextlib.asynccontextmanager
async def _replica_restarted_without_primary(
    target: Target, node: Node, _length_s: float
) -> AsyncIterator[Detail]:
    """Stop a replica, then the primary; the replica comes back first."""
    cluster = target.cluster
    primary = cluster.primary
    await node.stop()
    try:
        await asyncio.sleep(_UNSENT_S)  # writes that this replica has no notion of
        await primary.stop(_CRASH)
        try:
            async with asyncio.timeout(_ALONE_S):
                await bring_up(cluster, node)
        except TimeoutError:
            # It needs WAL of the primary's before anybody may look at it. Nor has anybody, then.
            _log.info("%s does not come up without %s", node.name, primary.name)
        yield {"primary": primary.name}
    finally:
        for each in (primary, node):
            if each.pid is None:
                await _healed(partial(bring_up, cluster, each), each)


@contextlib.asynccontextmanager
async def _promotion(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    old = target.cluster.primary
    await promote(target.cluster, node.name)
    yield {"old": old.name, "timeline": target.cluster.timeline}
    await _all_back(target)


@contextlib.asynccontextmanager
async def _promotion_lossy(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    """Keep what is written from the replicas for a while, crash the primary, and promote one of them."""
    old = target.cluster.primary
    for link in target.links.values():
        link.turn(Mode.CUT)
    try:
        await asyncio.sleep(_UNSENT_S)
        old.kill()
        await promote(target.cluster, node.name)
    finally:
        for link in target.links.values():
            link.turn(Mode.PASS)
    yield {"old": old.name, "timeline": target.cluster.timeline}
    await _all_back(target)


async def _all_back(target: Target) -> None:
    """Wait until the nodes that had to be mended are there again."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_HEAL_S):
            nodes = target.cluster.nodes.values()
            while not all(node.up.is_set() or not node.wanted for node in nodes):  # noqa: ASYNC110 - of all nodes
                await asyncio.sleep(_POLL_S)


@contextlib.asynccontextmanager
async def _recovery_conflict(target: Target, _node: Node, _length_s: float) -> AsyncIterator[Detail]:
    """Have replicas that wait for no read replay locks on what is being read."""
    replicas = [node for node in target.cluster.replicas if node.up.is_set() and not node.frozen]
    before = {node.name: await _conflicts(node, target, _CANCEL_AT_ONCE) for node in replicas}
    detail: Detail = {"locks": 0, "cancelled": 0}
    try:
        async with background(_locks(target, detail), "locks on rides"):
            yield detail
    finally:
        for node in replicas:
            conflicts = await _conflicts(node, target, _CANCEL_AS_EVER)
            detail["cancelled"] += max(0, conflicts - before[node.name])


async def _conflicts(node: Node, target: Target, statement: str) -> int:
    """Tell a replica how long to wait for reads, and return how many it has cancelled since it started."""
    cancelled = 0

    async def change() -> None:
        nonlocal cancelled
        connection = await node.connect(target.cluster.settings.database)
        try:
            await connection.execute(statement)
            await connection.execute(_RELOAD)
            cancelled = await connection.fetchval(_CONFLICTS)
        finally:
            connection.terminate()

    await _healed(change, node)
    return cancelled


async def _locks(target: Target, detail: Detail) -> None:
    """Lock the rides again and again, for a moment each, until cancelled; a primary that is gone is waited for."""
    while True:
        with contextlib.suppress(*_UNHEALED):
            connection = await target.cluster.primary.connect(target.cluster.settings.database)
            try:
                while True:
                    with contextlib.suppress(asyncpg.LockNotAvailableError):
                        async with connection.transaction():
                            await connection.execute(_IMPATIENT)
                            await connection.execute(_LOCK_RIDES)
                        detail["locks"] += 1
                    await asyncio.sleep(_LOCK_EVERY_S)
            finally:
                connection.terminate()
        await asyncio.sleep(_POLL_S)


# --- faults that come in by the API ---


@contextlib.asynccontextmanager
async def _pool_exhaustion(target: Target, _node: Node | None, length_s: float) -> AsyncIterator[Detail]:
    sessions = await target.clients.flood(time.monotonic() - target.zero + length_s)
    yield {"sessions": sessions}


@contextlib.asynccontextmanager
async def _clients_hang_up(target: Target, _node: Node | None, length_s: float) -> AsyncIterator[Detail]:
    await target.clients.hang_up(time.monotonic() - target.zero + length_s)
    yield {}


Injection = Callable[[Target, Any, float], AbstractAsyncContextManager[Detail]]
"""Brings a fault upon a node, for so many seconds; the context gives its details."""

INJECTIONS: Mapping[str, Injection] = {
    "replay-paused": _replay_paused,
    "replay-slow": _replay_delayed(_SLOW_MS),
    "commit-stuck": _replay_delayed(_STUCK_MS),
    "walsender-killed": _walsender_killed,
    "startup-frozen": _halted("startup"),
    "receiver-frozen": _halted("walreceiver"),
    "link-cut": _link(Mode.CUT),
    "link-delayed": _link(Mode.DELAYED),
    "link-half-open": _link(Mode.SILENT_PRIMARY),
    "backend-killed": _backend_killed,
    "replica-killed": _killed,
    "replica-frozen": _frozen,
    "primary-backend-killed": _backend_killed,
    "primary-killed": _killed,
    "replica-restarted-without-primary": _replica_restarted_without_primary,
    "pool-exhaustion": _pool_exhaustion,
    "promotion": _promotion,
    "promotion-lossy": _promotion_lossy,
    "recovery-conflict": _recovery_conflict,
    "clients-hang-up": _clients_hang_up,
    "api-killed": processes.killed,
    "api-frozen": processes.frozen,
    "writer-killed": processes.of_writer(processes.killed),
    "writer-frozen": processes.of_writer(processes.frozen),
}
"""Every fault, by its name."""

HIT_A_REPLICA = {"replica-restarted-without-primary", "promotion", "promotion-lossy"}
"""Faults of the primary's sequence that a replica is chosen for."""
