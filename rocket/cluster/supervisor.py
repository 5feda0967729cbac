"""Brings a cluster up and keeps its servers alive and in step.

A server that dies is started again, a replica that cannot follow rejoins, and a promotion by another program is
accepted. A replica that does not come up with the directory that it has gets a fresh copy of the primary's. If it
does not come up even so, it is given up: it stays down until it is started by hand, and the others go on. The
program ends when the primary does not come up, since no other node has all that it has.

A replica that follows the primary and lets no client in is recovering, which is no reason for a start or a copy:
while one transaction on the primary holds more than 64 subtransactions that write, it would answer 57P03 after
them, too (design fact F16).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from rocket.cluster import cluster as clusters
from rocket.cluster import promotion, rejoin
from rocket.cluster.binaries import Installation, locate
from rocket.cluster.cluster import ClusterSettings, LocalCluster, node_names
from rocket.cluster.directories import DataDirectory, PortReservations, RunDirectory, clear_up_dead_runs
from rocket.cluster.errors import CommandFailed, DirectoryUnusable, ServerFailedToStart, ServerKeepsDying
from rocket.cluster.process import describe_exit, server_account
from rocket.errors import RocketError, unwrapping_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rocket.cluster.node import Node

_CHECK_S = 0.2
_ENOUGH = 5
_LARGEST_READ = 256 * 1024
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
_servers_log = logging.getLogger("rocket.servers")


# --- a cluster's beginning and end ---


@contextlib.asynccontextmanager
async def local_cluster(settings: ClusterSettings) -> AsyncIterator[LocalCluster]:
    """Run a cluster for as long as the context lasts, and leave nothing of it behind but a kept directory.

    Raise `SetupError` where the machine does not allow it, `ServerFailedToStart` or `CommandFailed` where the
    servers do not come up.
    """
    for line in await asyncio.to_thread(clear_up_dead_runs):
        _log.warning("%s", line)
    with PortReservations() as reservations:
        ports = _reserve_ports(reservations, settings)  # fails before anything is made
        account = server_account()
        run = RunDirectory.create(account)
        try:
            binaries = await locate(settings.postgres_bin, account, run.scratch)
            data = DataDirectory.claim((settings.data_dir or run.data_dir()).resolve(), account)
            try:
                if account is not None and not account.can_enter(data.path):
                    raise DirectoryUnusable(
                        f"servers started by root run as user {account.name!r}, who may not enter {data.path}"
                    )
                clusters.check_version(data.path, binaries.major)
                installation = Installation(binaries, account, run.sockets)
                primary = await clusters.find_primary(data.path, ports, installation)
                cluster = LocalCluster(
                    settings, run=run, data=data, installation=installation, ports=ports, primary=primary
                )
                try:
                    await _start(cluster)
                    yield cluster
                finally:
                    await cluster.stop()
            finally:
                data.release()
        finally:
            await asyncio.to_thread(run.remove)


def _reserve_ports(reservations: PortReservations, settings: ClusterSettings) -> dict[str, int]:
    ports = {}
    for number, name in enumerate(node_names(settings.replicas)):
        if settings.port:
            ports[name] = settings.port + number
            reservations.reserve(ports[name])
        else:
            ports[name] = reservations.reserve_any()
    return ports


async def _start(cluster: LocalCluster) -> None:
    """Make what is missing, start every node, and return when all replicas stream that do not stay behind.

    A replica that does not start is given up, and one that does not serve is left to it: both are logged. Raise
    `ServerFailedToStart` or `CommandFailed` as soon as anything else fails.
    """
    has_history = clusters.has_history(cluster.data_dir)
    if has_history:
        for node in cluster.replicas:
            if node.exists:
                node.distrust()  # only its directory knows what happened to it in an earlier run
    await cluster.make_missing_nodes()
    async with _kept_following(cluster):
        with clusters.step(f"{clusters.counted(len(cluster.nodes), 'server')} up"):
            if has_history:
                await cluster.primary.start(cluster.primary.port)
                with clusters.failing_to_start("the primary does not answer"):
                    cluster.timeline = (await cluster.primary.lineage()).timeline
            await clusters.together(lambda node: _bring_up(cluster, node), cluster.nodes.values())
        settings = cluster.settings
        with (
            clusters.step("database and tables ready"),
            clusters.failing_to_start("the database could not be prepared"),
        ):
            await clusters.prepare_database(cluster.primary, settings.database, settings.schema)
        if cluster.replicas:
            with clusters.step("replicas streaming"):
                flushed = await clusters.flushed_by(cluster.primary)
                await clusters.together(lambda node: _catch_up(node, flushed), cluster.replicas)


async def _bring_up(cluster: LocalCluster, node: Node) -> None:
    try:
        await rejoin.bring_up(cluster, node)
    except (ServerFailedToStart, CommandFailed) as error:
        _give_up(cluster, node, error)


async def _catch_up(replica: Node, lsn: str) -> None:
    """Wait until a replica has replayed `lsn`, unless it turns out not to serve; log it if it takes too long."""
    try:
        await clusters.wait_for_replay(replica, lsn, while_=lambda: replica.wanted and not replica.recovering)
    except ServerFailedToStart as error:
        _log.error("%s; the others go on", error)


@contextlib.asynccontextmanager
async def _kept_following(cluster: LocalCluster) -> AsyncIterator[None]:
    """Have replicas of a kept directory rejoin, meanwhile, that turn out to be unable to follow."""
    with unwrapping_group():
        async with asyncio.TaskGroup() as group:
            keepers = [
                group.create_task(_keep_following(cluster, node), name=f"keep {node.name} following")
                for node in cluster.replicas
            ]
            yield
            for keeper in keepers:
                keeper.cancel()


# --- supervision ---


class RestartPolicy:
    """Decides when a server that died is started again, and when no more.

    Five failed starts in a row, or five deaths within a minute, are enough. A death on demand (a fault) never
    counts. Has no clock of its own.
    """

    FIRST_PAUSE_S = 0.1
    _DUBIOUS_STARTS = 2
    _DUBIOUS_DEATHS = 3
    _WITHIN_S = 60.0

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=_ENOUGH)
        self._failed_starts = 0
        self._recent = 0

    @property
    def dubious(self) -> bool:
        """Whether the directory may be at fault: two failed starts in a row, or three deaths within a minute.

        A death on demand says nothing of that.
        """
        return self._failed_starts >= self._DUBIOUS_STARTS or self._recent >= self._DUBIOUS_DEATHS

    def after_death(self, now: float, *, asked: bool) -> float | None:
        """Return the seconds to wait before the next start, growing from death to death; None: give up."""
        if asked:
            self._recent = 0
            return self.FIRST_PAUSE_S
        self._deaths.append(now)
        self._recent = sum(1 for death in self._deaths if now - death <= self._WITHIN_S)
        return None if self._recent == _ENOUGH else self.FIRST_PAUSE_S * 2.0 ** (self._recent - 1)

    def after_failed_start(self, *, asked: bool) -> float | None:
        """Return the same after a start that ended in the server's death, or timed out."""
        if asked:
            return self.FIRST_PAUSE_S
        self._failed_starts += 1
        return None if self._failed_starts == _ENOUGH else self.FIRST_PAUSE_S * 2.0**self._failed_starts

    def started(self) -> None:
        """Note a start that succeeded."""
        self._failed_starts = 0


async def supervise(cluster: LocalCluster) -> None:
    """Start every server again that dies without having been stopped, and have replicas rejoin that cannot follow.

    Never returns; raise `ServerKeepsDying` when the primary does not stay up. A replica is given up by itself.
    """
    with unwrapping_group():
        async with asyncio.TaskGroup() as group:
            group.create_task(_notice_promotions(cluster), name="notice promotions")
            for node in cluster.nodes.values():
                group.create_task(_keep_alive(cluster, node), name=f"keep {node.name} alive")
                group.create_task(_keep_following(cluster, node), name=f"keep {node.name} following")


async def _keep_alive(cluster: LocalCluster, node: Node) -> None:
    policy = RestartPolicy()
    while True:
        dead = await node.died()
        how, asked = describe_exit(dead.exit_code), dead.kill_asked
        pause_s = policy.after_death(time.monotonic(), asked=asked)
        while True:
            if pause_s is None:
                _give_up(cluster, node, ServerKeepsDying(f"{node.name} keeps dying ({how}): see {node.log_path}"))
                policy = RestartPolicy()  # for the day on which it is started by hand
                break
            if not asked:
                _distrust_dead(cluster, node, how, dubious=policy.dubious)
            # A suspect node is left to `_keep_following`.
            if node.suspect or await _start_again(cluster, node, how, pause_s):
                break
            how = "while starting"
            asked = _was_asked(node)
            pause_s = policy.after_failed_start(asked=asked)
        policy.started()


def _give_up(cluster: LocalCluster, node: Node, why: RocketError) -> None:
    """Leave a replica down, and say so; raise `why` of the primary, without which the others are nothing."""
    if node is cluster.primary:
        raise why
    node.give_up()
    _log.error(
        "%s\n%s is given up, and the others go on: `start %s` or `heal` tries again", why, node.name, node.name
    )


def _was_asked(node: Node) -> bool:
    """Return whether a start failed on demand: by a kill or a fence."""
    return node.suspect or (node.process is not None and node.process.kill_asked)


def _distrust_dead(cluster: LocalCluster, node: Node, how: str, *, dubious: bool) -> None:
    """Have a replica rejoin that died by itself if it has logged why, or be cloned anew if it is `dubious`."""
    # A replica that another program has promoted, unnoticed so far, may hold what no other node has.
    if node is cluster.primary or node.suspect or (node.exists and not node.is_replica):
        return
    # It may have been up for too short a time for `_keep_following` to read its log.
    complaint = _complaint(node.log_lines())
    if dubious:
        _log.warning("%s died again (%s): it is cloned anew from %s", node.name, how, cluster.primary.name)
        node.distrust(unfit=True)
    elif complaint:
        _log.warning("%s died (%s) and %s", node.name, how, complaint)
        _distrust(cluster, node, complaint)


def _distrust(cluster: LocalCluster, node: Node, complaint: str) -> None:
    """Have a replica rejoin for what it logged: by a fresh copy if nothing less would help, or has."""
    node.distrust(unfit=_WAL_IS_GONE in complaint or node.rejoined_on == cluster.timeline)


async def _start_again(cluster: LocalCluster, node: Node, how: str, pause_s: float) -> bool:
    """Start a server that died; return False if that failed, True if it is up or no longer wanted."""
    _log.warning("%s died (%s): starting it again in %.1f s", node.name, how, pause_s)
    await asyncio.sleep(pause_s)
    began = time.monotonic()
    try:
        if await node.start_again(cluster.upstream_port(node)) and not node.recovering:
            _log.info("%s is back after %.1f s", node.name, time.monotonic() - began)
    except ServerFailedToStart as error:
        _log.warning("%s", error)
        return False
    return True


async def _notice_promotions(cluster: LocalCluster) -> None:
    """Adopt a replica as the primary when its directory no longer says that it is one; never returns."""
    while True:
        await asyncio.sleep(_CHECK_S)
        for node in cluster.replicas:
            if node.up.is_set() and not node.frozen and not node.suspect and not node.is_replica:
                await promotion.adopt(cluster, node)


async def _keep_following(cluster: LocalCluster, node: Node) -> None:
    """Have a node rejoin that became suspect, or logs that it cannot follow; never returns.

    Give it up when it does not start, not even as a fresh copy.
    """
    tail = Tail(node.log_path, node.log_start)
    failures = 0
    while True:
        await asyncio.sleep(_CHECK_S)
        complaint = _complaint(tail.new_lines())
        await node.look_again()
        if node is cluster.primary or cluster.promotion_lock.locked():
            continue
        if complaint and node.pid is not None and node.is_replica and not node.suspect:
            _log.warning("%s %s", node.name, complaint)
            _distrust(cluster, node, complaint)
            if not node.up.is_set():  # and it would never be
                await node.fence()
        if node.suspect and node.wanted and not node.frozen:
            rejoined = await _rejoined(cluster, node)
            if rejoined is not None:
                failures = 0 if rejoined else failures + 1
            if failures == _ENOUGH:
                failures = 0
                why = f"{node.name} does not start, not even as a fresh copy: see {node.log_path}"
                _give_up(cluster, node, ServerKeepsDying(why))
            tail = Tail(node.log_path, node.log_start)


async def _rejoined(cluster: LocalCluster, node: Node) -> bool | None:
    """Have a node rejoin and start it; return False if it did not start, None if that could not be found out."""
    began = time.monotonic()
    try:
        await rejoin.rejoin(cluster, node)
        if await node.start_again(cluster.upstream_port(node)) and not node.recovering:
            _log.info("%s is back after %.1f s", node.name, time.monotonic() - began)
    except (CommandFailed, OSError) as error:  # the primary is away, or another one now: it stays suspect
        _log.warning("%s cannot rejoin now: %s", node.name, error)
        await asyncio.sleep(cluster.settings.retry_s)
        return None
    except ServerFailedToStart as error:
        _log.warning("%s", error)
        killed = _was_asked(node)
        node.distrust(unfit=not killed)
        return None if killed else False
    return True


def _complaint(lines: list[str]) -> str | None:
    """Return, of what a replica logged, why it cannot follow."""
    for line in lines:
        if _WAL_IS_GONE in line:
            return f"needs WAL that the primary no longer has: cloning it anew ({_WAL_IS_GONE})"
        if any(pattern in line for pattern in _CANNOT_FOLLOW):
            return f"cannot follow: {line}"
    return None


# --- the servers' logs ---


class Tail:
    """Reads a growing file in whole lines."""

    def __init__(self, path: Path, position: int) -> None:
        self._path = path
        self._position = position

    def new_lines(self) -> list[str]:
        """Return what has been written since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read(_LARGEST_READ)
        except FileNotFoundError:
            return []
        whole = len(data) if len(data) == _LARGEST_READ else data.rfind(b"\n") + 1
        self._position += whole
        return data[:whole].decode(errors="replace").splitlines()


async def forward_logs(cluster: LocalCluster) -> None:
    """Log each new line of each node's `server.log`, with the node's name in front; never returns."""
    tails = {name: Tail(node.log_path, node.log_start) for name, node in cluster.nodes.items()}
    while True:
        for name, tail in tails.items():
            for line in tail.new_lines():
                _servers_log.info("%s: %s", name, line)
        await asyncio.sleep(_CHECK_S)
