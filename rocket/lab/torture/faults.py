"""The faults of our own cluster: each a context that begins with the fault and ends when it is healed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from rocket.cluster import faults
from rocket.cluster.errors import NodeNotRunning
from rocket.cluster.node import Fault
from rocket.cluster.promotion import promote
from rocket.cluster.rejoin import bring_up
from rocket.lab.checker.history import TAKEN_OVER
from rocket.lab.shutdown import background
from rocket.lab.torture.histories import (
    CRASH,
    FAILURES,
    HEAL_S,
    POLL_S,
    all_back,
    foreign_cluster,
    healed,
    restored_snapshot,
    signal_removed,
)
from rocket.lab.torture.proxy import Mode
from rocket.lab.workers import table_state, wait_for_takeover

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node
    from rocket.lab.torture.clients import Clients
    from rocket.lab.torture.proxy import Proxy
    from rocket.lab.workers import Worker

Detail = dict[str, Any]

_SLOW_MS = 400
_STUCK_MS = 5_000
"""Longer than the fault lasts: the replica stops right before the next commit record, and has all of a transaction
but its commit, which is what a floor that was read too early calls enough. No longer, since a server that is
restarted meanwhile may accept no connection before it is over."""
_LINK_DELAY_S = 0.15
_FAR_S = (0.1, 0.3)
"""The round trip time of a replica that is far."""
_UNSENT_S = 0.4
"""How long writes go on that no replica receives."""
_ALONE_S = 3.0
"""How long a replica may take to come up while the primary is away; it may need WAL from there."""
_LOCK_EVERY_S = 0.01

_CANCEL_AT_ONCE = "ALTER SYSTEM SET max_standby_streaming_delay = 0"
_CANCEL_AS_EVER = "ALTER SYSTEM RESET max_standby_streaming_delay"
_AWAIT_STANDBY = "ALTER SYSTEM SET synchronous_standby_names = 'away'"
_AWAIT_NONE = "ALTER SYSTEM RESET synchronous_standby_names"
_RELOAD = "SELECT pg_reload_conf()"
_LOCK_RIDES = "LOCK TABLE rides IN ACCESS EXCLUSIVE MODE"
"""Reaches the replicas as WAL; replay cancels reads that are in its way."""
_CHANGE_BACK = "ALTER TABLE rides ALTER COLUMN idempotency_key TYPE text"
_CHANGE_RIDES = ("ALTER TABLE rides ALTER COLUMN idempotency_key TYPE varchar", _CHANGE_BACK)
_IMPATIENT = "SET LOCAL lock_timeout = '100ms'"
_CONFLICTS = "SELECT sum(confl_lock + confl_snapshot)::int FROM pg_stat_database_conflicts"
_log = logging.getLogger("rocket.torture")


@dataclass(frozen=True, slots=True)
class Target:
    """What faults are injected into."""

    cluster: LocalCluster
    links: Mapping[str, Proxy]
    """By the name of the node that follows through it."""
    accesses: Mapping[str, Proxy]
    """Between clients and each node, by its name."""
    clients: Clients
    processes: Sequence[Worker]
    """Those of the API, and those that only observe; none if this program serves the API itself."""
    zero: float
    """The moment from which times are counted, by the monotonic clock."""


Injection = Callable[[Target, Any, float], AbstractAsyncContextManager[Detail]]
"""Injects a fault into a node, for this many seconds; the context gives its details."""


async def _back(node: Node) -> None:
    """Wait until a node answers again."""

    async def answers() -> None:
        connection = await node.connect()
        connection.terminate()

    await healed(answers, node)


# --- faults of a replica ---


@contextlib.asynccontextmanager
async def _replay_paused(_target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    await faults.pause(node)
    try:
        yield {}
    finally:
        await healed(lambda: faults.resume(node), node)


def _replay_delayed(delay_ms: int) -> Injection:
    @contextlib.asynccontextmanager
    async def delayed(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
        await faults.delay(node, delay_ms, target.cluster.upstream_port(node))
        try:
            yield {"delay_ms": delay_ms}
        finally:
            node.lift(Fault.DELAYED)  # whatever becomes of it: its next start is an undelayed one
            await healed(lambda: faults.delay(node, 0, target.cluster.upstream_port(node)), node)

    return delayed


@contextlib.asynccontextmanager
async def _killed(
    _target: Target, node: Node, _length_s: float, *, backend: bool = False
) -> AsyncIterator[Detail]:
    if backend:
        await faults.kill_backend(node)
    else:
        node.kill()
    try:
        yield {}
    finally:
        await _back(node)


_backend_killed = partial(_killed, backend=True)


@contextlib.asynccontextmanager
async def _frozen(_target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    node.freeze()
    try:
        yield {}
    finally:
        node.thaw()


def _link(mode: Mode, *, kills_sender: bool = False) -> Injection:
    @contextlib.asynccontextmanager
    async def turned(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
        if kills_sender:
            await faults.cut_sender(target.cluster, node)
        link = target.links[node.name]
        link.turn(mode, delay_s=_LINK_DELAY_S)
        try:
            yield {"delay_ms": _LINK_DELAY_S * 1000} if mode is Mode.DELAYED else {}
        finally:
            link.turn(Mode.PASS)

    return turned


def _access(change: Callable[[Target, Node, Proxy], Detail], *, ends_sessions: bool = False) -> Injection:
    """Return a fault of the way from clients to a node; with `ends_sessions`, pools need it at once."""

    @contextlib.asynccontextmanager
    async def changed(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
        link = target.accesses[node.name]
        upstream = link.upstream
        try:
            detail = change(target, node, link)
            if ends_sessions:
                await faults.end_sessions(node, target.cluster.settings.database)
            yield detail
        finally:
            link.upstream = upstream
            link.turn(Mode.PASS)

    return changed


def _put_far(_target: Target, _node: Node, link: Proxy) -> Detail:
    round_trip_s = random.uniform(*_FAR_S)  # noqa: S311 - to be various, not to be secret
    link.turn(Mode.DELAYED, delay_s=round_trip_s / 2)
    return {"round_trip_ms": round(1000 * round_trip_s)}


def _refuse(_target: Target, _node: Node, link: Proxy) -> Detail:
    link.turn(Mode.REFUSING)
    return {}


def _forget(_target: Target, _node: Node, link: Proxy) -> Detail:
    link.forget()
    return {}


def _repoint(target: Target, node: Node, link: Proxy) -> Detail:
    other = next((each for each in target.cluster.replicas if each is not node and each.up.is_set()), None)
    if other is None:
        raise NodeNotRunning("there is no other replica")
    link.upstream = target.accesses[other.name].upstream
    return {"to": other.name}


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
        await asyncio.sleep(_UNSENT_S)  # writes that this replica has not received
        await primary.stop(CRASH)
        try:
            async with asyncio.timeout(_ALONE_S):
                await bring_up(cluster, node)
        except TimeoutError:
            # It needs WAL from the primary before it accepts connections, so no client has read from it either.
            _log.info("%s does not come up without %s", node.name, primary.name)
        yield {"primary": primary.name}
    finally:
        for each in (primary, node):
            if each.pid is None:
                await healed(partial(bring_up, cluster, each), each)


@contextlib.asynccontextmanager
async def _promotion(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    old = target.cluster.primary
    await promote(target.cluster, node.name)
    yield {"old": old.name, "timeline": target.cluster.timeline}
    await all_back(target.cluster)


@contextlib.asynccontextmanager
async def _promotion_lossy(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    """Cut the replicas off while writes go on, crash the primary, and promote one of them."""
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
    await all_back(target.cluster)


@contextlib.asynccontextmanager
async def _recovery_conflict(target: Target, _node: Node, _length_s: float) -> AsyncIterator[Detail]:
    """Have replicas that do not wait for reads replay locks on the table that is read."""
    replicas = [node for node in target.cluster.replicas if node.up.is_set() and not node.frozen]
    before = {node.name: await _conflicts(node, target, _CANCEL_AT_ONCE) for node in replicas}
    detail: Detail = {"locks": 0, "cancelled": 0}
    try:
        async with background(_again(target, detail, "locks", [_LOCK_RIDES]), "locks on rides"):
            yield detail
    finally:
        for node in replicas:
            conflicts = await _conflicts(node, target, _CANCEL_AS_EVER)
            detail["cancelled"] += max(0, conflicts - before[node.name])


async def _conflicts(node: Node, target: Target, statement: str) -> int:
    """Change a replica's settings by a statement; return how many reads it has cancelled since it started."""
    cancelled = 0

    async def change() -> None:
        nonlocal cancelled
        cancelled = await _execute(node, target, statement, _RELOAD, _CONFLICTS)

    await healed(change, node)
    return cancelled


@contextlib.asynccontextmanager
async def _schema_changes(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    """Change the type of a column that is read and written, so that prepared statements are outdated."""
    detail: Detail = {"changes": 0}
    try:
        async with background(_again(target, detail, "changes", _CHANGE_RIDES), "schema changes"):
            yield detail
    finally:
        await healed(lambda: _execute(node, target, _CHANGE_BACK), node)


@contextlib.asynccontextmanager
async def _standby_away(target: Target, node: Node, _length_s: float) -> AsyncIterator[Detail]:
    """Have each COMMIT wait for a synchronous standby that is not there, and comes back."""
    await _execute(node, target, _AWAIT_STANDBY, _RELOAD)
    try:
        yield {}
    finally:
        await healed(lambda: _execute(node, target, _AWAIT_NONE, _RELOAD), node)


async def _execute(node: Node, target: Target, *statements: str) -> Any:
    """Execute statements one by one; return what the last one gives."""
    connection = await node.connect(target.cluster.settings.database)
    try:
        return [await connection.fetchval(statement) for statement in statements][-1]
    finally:
        connection.terminate()


async def _again(target: Target, detail: Detail, counted: str, statements: Sequence[str]) -> None:
    """Take one statement after the other that locks the rides, until cancelled; wait while the primary is away."""
    rest = itertools.cycle(statements)
    while True:
        with contextlib.suppress(*FAILURES):
            connection = await target.cluster.primary.connect(target.cluster.settings.database)
            try:
                while True:
                    with contextlib.suppress(asyncpg.LockNotAvailableError):
                        async with connection.transaction():
                            await connection.execute(_IMPATIENT)
                            await connection.execute(next(rest))
                        detail[counted] += 1
                    await asyncio.sleep(_LOCK_EVERY_S)
            finally:
                connection.terminate()
        await asyncio.sleep(POLL_S)


def _of_cluster(
    fault: Callable[[LocalCluster, Node], AbstractAsyncContextManager[Detail]],
) -> Injection:
    """Return as an injection what needs the cluster alone."""

    def inject(target: Target, node: Node, _length_s: float) -> AbstractAsyncContextManager[Detail]:
        return fault(target.cluster, node)

    return inject


# --- faults that come in by the API ---


@contextlib.asynccontextmanager
async def _pool_exhaustion(target: Target, _node: Node | None, length_s: float) -> AsyncIterator[Detail]:
    sessions = target.clients.flood(time.monotonic() - target.zero + length_s)
    yield {"sessions": sessions}


@contextlib.asynccontextmanager
async def _clients_hang_up(target: Target, _node: Node | None, length_s: float) -> AsyncIterator[Detail]:
    target.clients.hang_up(time.monotonic() - target.zero + length_s)
    yield {}


# --- faults of the processes that observe, and serve the API ---


@contextlib.asynccontextmanager
async def _process_killed(_target: Target, process: Worker, _length_s: float) -> AsyncIterator[Detail]:
    process.crash()
    try:
        yield {}
    finally:
        try:
            async with asyncio.timeout(HEAL_S):
                while not process.up:  # noqa: ASYNC110 - its supervisor starts it again
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise NodeNotRunning(f"{process.name} does not come back") from None


@contextlib.asynccontextmanager
async def _process_frozen(_target: Target, process: Worker, _length_s: float) -> AsyncIterator[Detail]:
    process.freeze()
    try:
        yield {}
    finally:
        process.thaw()


def _of_writer(fault: Injection) -> Injection:
    """Return the same fault of the process that writes the table of statuses; it measures the takeover."""

    @contextlib.asynccontextmanager
    async def hit(target: Target, _none: None, length_s: float) -> AsyncIterator[Detail]:
        primary = await target.cluster.primary.connect(target.cluster.settings.database)
        try:
            before = await table_state(primary)
            writer = next((each for each in target.processes if each.pid == before.writer), None)
            if writer is None or not writer.up or writer.frozen:
                raise NodeNotRunning("no process writes the table of statuses")
            async with fault(target, writer, length_s) as detail:
                yield {**detail, "process": writer.name, TAKEN_OVER: await wait_for_takeover(primary, before)}
        finally:
            primary.terminate()

    return hit


# --- all of them ---

REPLICA, PRIMARY, API, PROCESS, WRITER = "replica", "primary", "api", "process", "writer"


class FaultKind(NamedTuple):
    """What is known of a fault before it happens."""

    inject: Injection
    hits: str
    """What the nemesis chooses for it: a replica, the primary or a process; nothing for the API and the writer."""
    longest_s: float
    """How long it lasts at the most, where it is not over by itself."""
    own_lane: str | None = None
    slots: int = 1
    """How much of its lane's time it gets, compared with others."""
    by_name: bool = False
    """Whether it happens only where it is named, since it costs a run all its replicas."""

    @property
    def lane(self) -> str:
        """Faults of one lane follow one another; those of different lanes overlap."""
        return self.own_lane or self.hits

    @property
    def needs_processes(self) -> bool:
        """Whether the API must have several processes."""
        return self.hits in {PROCESS, WRITER}


FAULTS: Mapping[str, FaultKind] = {
    "replay-paused": FaultKind(_replay_paused, REPLICA, 3.0),
    "replay-slow": FaultKind(_replay_delayed(_SLOW_MS), REPLICA, 3.0),
    "commit-stuck": FaultKind(_replay_delayed(_STUCK_MS), REPLICA, 2.0),
    "startup-frozen": FaultKind(_halted("startup"), REPLICA, 3.0),
    "receiver-frozen": FaultKind(_halted("walreceiver"), REPLICA, 3.0),
    "walsender-killed": FaultKind(_link(Mode.CUT, kills_sender=True), REPLICA, 2.0),
    "link-cut": FaultKind(_link(Mode.CUT), REPLICA, 3.0),
    "link-delayed": FaultKind(_link(Mode.DELAYED), REPLICA, 4.0),
    "link-half-open": FaultKind(_link(Mode.SILENT_PRIMARY), REPLICA, 7.0),
    "backend-killed": FaultKind(_backend_killed, REPLICA, 1.0),
    "replica-killed": FaultKind(_killed, REPLICA, 1.0),
    "replica-frozen": FaultKind(_frozen, REPLICA, 3.0),
    "far": FaultKind(_access(_put_far), REPLICA, 6.0),
    "refusing": FaultKind(_access(_refuse, ends_sessions=True), REPLICA, 4.0),
    "silent": FaultKind(_access(_forget), REPLICA, 4.0),
    "repointed": FaultKind(_access(_repoint, ends_sessions=True), REPLICA, 4.0),
    "full": FaultKind(_of_cluster(faults.full), REPLICA, 4.0),
    "long-query": FaultKind(_of_cluster(partial(faults.long_query, table="users")), REPLICA, 4.0),
    "primary-backend-killed": FaultKind(_backend_killed, PRIMARY, 1.0),
    "primary-killed": FaultKind(_killed, PRIMARY, 1.5),
    "replica-restarted-without-primary": FaultKind(_replica_restarted_without_primary, REPLICA, 2.0, PRIMARY),
    "promotion": FaultKind(_promotion, REPLICA, 2.0, PRIMARY),
    "promotion-lossy": FaultKind(_promotion_lossy, REPLICA, 2.5, PRIMARY),
    "recovery-conflict": FaultKind(_recovery_conflict, PRIMARY, 2.0),
    "standby-away": FaultKind(_standby_away, PRIMARY, 8.0, slots=3),
    "schema-changes": FaultKind(_schema_changes, PRIMARY, 2.0),
    "foreign-cluster": FaultKind(_of_cluster(foreign_cluster), REPLICA, 3.0),
    "restored-snapshot": FaultKind(_of_cluster(restored_snapshot), PRIMARY, 5.0, slots=3, by_name=True),
    "signal-removed": FaultKind(_of_cluster(signal_removed), REPLICA, 5.0, PRIMARY, slots=3, by_name=True),
    "pool-exhaustion": FaultKind(_pool_exhaustion, API, 1.5),
    "clients-hang-up": FaultKind(_clients_hang_up, API, 2.0),
    "api-killed": FaultKind(_process_killed, PROCESS, 2.0),
    "api-frozen": FaultKind(_process_frozen, PROCESS, 3.0),
    # In the primary's lane, since the takeover is measured while the primary is up.
    "writer-killed": FaultKind(_of_writer(_process_killed), WRITER, 2.0, PRIMARY),
    "writer-frozen": FaultKind(_of_writer(_process_frozen), WRITER, 3.0, PRIMARY),
}
"""Every fault, by name."""
