"""A primary and its streaming replicas: the nodes of a cluster on this machine, and which is the primary."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import asyncpg

from rocket.cluster.binaries import SUPERUSER
from rocket.cluster.datadir import NodeDirectory
from rocket.cluster.directories import RunDescription
from rocket.cluster.errors import (
    DirectoryUnusable,
    NodeNotRunning,
    NoSuchNode,
    PrimaryLeftOut,
    ServerFailedToStart,
)
from rocket.cluster.node import PATIENCE_S, Fault, Node
from rocket.cluster.server import LOST
from rocket.cluster.timelines import FIRST_TIMELINE, ControlFile, newest_timeline
from rocket.errors import describe, unwrapping_group

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from rocket.cluster.binaries import Installation
    from rocket.cluster.directories import DataDirectory, RunDirectory

FIRST_PRIMARY = "primary"
"""The name of the node that is the primary of a new cluster; it keeps it when it is a replica."""

_FORCE_S = 0.3
"""How long an immediate shutdown may take when the user has asked twice."""
_STREAMING_TIMEOUT_S = 60.0  # a replica may have to be cloned anew first
_PREPARE_TIMEOUT_S = 30.0  # CREATE DATABASE copies one, and the schema is the caller's
_STATUS_TIMEOUT_S = 2.0  # to connect, and again to answer: a person is waiting
_POLL_S = 0.01

_FLUSHED = "SELECT pg_current_wal_flush_lsn()::text"
_HAS_REPLAYED = """
    SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn
       AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')
"""
_DATABASE_EXISTS = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)"
_CREATE_DATABASE = "SELECT format('CREATE DATABASE %I', $1::text)"
"""CREATE DATABASE takes no parameters: Postgres itself quotes the name."""
_PRIMARY_STATUS = """
    SELECT pg_current_wal_flush_lsn()::text AS lsn,
           ('x' || substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8))::bit(32)::int AS timeline
"""
_REPLICA_STATUS = """
    SELECT pg_last_wal_replay_lsn()::text AS replay_lsn,
           pg_wal_lsn_diff($1::text::pg_lsn, pg_last_wal_replay_lsn())::bigint AS lag_bytes,
           pg_is_wal_replay_paused() AS paused,
           (SELECT status FROM pg_stat_wal_receiver) AS receiver,
           (SELECT received_tli FROM pg_stat_wal_receiver) AS streamed,
           (SELECT pid || '@' || backend_start FROM pg_stat_activity WHERE backend_type = 'startup') AS incarnation
"""

_log = logging.getLogger("rocket.cluster")


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What a local cluster is made of."""

    replicas: int = 5
    port: int = 5433
    """Of the node `primary`; replica *i* has `port + 1 + i`. 0: any free ones."""
    data_dir: Path | None = None
    """Kept, and used again; None: a temporary one, gone at the end."""
    postgres_bin: Path | None = None
    """The directory of the Postgres programs; None: those of the wheel that comes with rocket."""
    database: str = "postgres"
    schema: str = ""
    """SQL that makes the tables, harmless to apply again."""
    patience_s: float = PATIENCE_S
    """How long a replica that follows may let no client in before its start counts as over: it is recovering."""
    retry_s: float = 1.0
    """How long to wait before a replica that could not rejoin, as the primary is away, tries that again."""
    wal_segment_mib: int = 4
    """Of a new cluster. Each clone copies a whole segment, nearly empty; Postgres' own default is 16."""


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """A command that changed the cluster, or failed to; or a fault that began or ended."""

    command: str
    node: str | None
    """None: all of them."""
    began: float
    """Monotonic seconds."""
    said: str
    """What came of it, in a sentence."""
    ok: bool
    delay_ms: int | None = None


class LocalCluster:
    """The nodes of a cluster on this machine, as subprocesses of this program."""

    def __init__(
        self,
        settings: ClusterSettings,
        *,
        run: RunDirectory,
        data: DataDirectory,
        installation: Installation,
        ports: Mapping[str, int],
        primary: str = FIRST_PRIMARY,
    ) -> None:
        self.settings = settings
        self.data_dir = data.path
        self.password_file = data.password_file
        self.run_dir = run.path
        self.control_socket = run.control_socket
        self.socket_dir = run.sockets
        self.nodes = {
            name: Node(name, data.path / name, port, installation, patience_s=settings.patience_s)
            for name, port in ports.items()
        }
        self.primary = self.nodes[primary]
        """The node that takes writes, or was the last to do so."""
        self.timeline = FIRST_TIMELINE
        """The primary's, when it became the primary."""
        self.promotion_lock = asyncio.Lock()
        """Held while the primary changes."""
        self.upstream_overrides: dict[str, int] = {}
        """By a replica's name: the port that it follows instead of the primary's, in the same socket directory."""
        self.on_command: list[Callable[[CarriedOut], None]] = []
        """Called with each command that was carried out or refused, and with each fault of a torture run."""
        self._installation = installation
        self._streamed: dict[str, tuple[str, int]] = {}
        run.describe(
            RunDescription(
                pid=os.getpid(),
                data_dir=str(data.path),
                temporary=settings.data_dir is None,
                ports=dict(ports),
                database=settings.database,
            )
        )

    @property
    def replicas(self) -> list[Node]:
        """The nodes that follow the primary, or should."""
        return [node for node in self.nodes.values() if node is not self.primary]

    def node(self, name: str) -> Node:
        """Return a node by its name; raise `NoSuchNode`."""
        try:
            return self.nodes[name]
        except KeyError:
            raise NoSuchNode(f"there is no node {name!r}: this cluster has {', '.join(self.nodes)}") from None

    def upstream_port(self, node: Node) -> int:
        """Return the port that a node follows as a replica."""
        return self.upstream_overrides.get(node.name, self.primary.port)

    def set_primary(self, primary: Node, timeline: int) -> None:
        """Note a new primary, which takes writes already while the old one no longer can."""
        self.primary, self.timeline = primary, timeline
        primary.lift(Fault.CUT)

    async def make_missing_nodes(self) -> None:
        """Make the data directories that do not exist: the primary's by initdb, the others as clones of it."""
        first = self.primary
        if not first.exists:  # and no other does: there is no primary among them
            with step("initdb"):
                self._write_password_file()
                password_file = self.data_dir / "password.new"
                password_file.touch(mode=0o600)
                password_file.write_text(self.password())
                self._installation.own(password_file)
                try:
                    await first.directory.init(password_file, self.settings.wal_segment_mib)
                finally:
                    password_file.unlink()
        missing = [node for node in self.nodes.values() if not node.exists]
        if missing:
            with step(f"{counted(len(missing), 'replica')} cloned"):
                await together(lambda node: node.directory.clone(first.directory), missing)

    def _write_password_file(self) -> None:
        descriptor = os.open(self.password_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"127.0.0.1:*:*:{SUPERUSER}:{secrets.token_urlsafe(24)}")

    def password(self) -> str:
        """Return the superuser's password."""
        return self.password_file.read_text().rpartition(":")[2]

    async def wait_for_catchup(self) -> None:
        """Wait until every replica is up, streams, and has replayed what the primary has flushed by now.

        Raise `ServerFailedToStart` if one does not.
        """
        flushed = await flushed_by(self.primary)
        await together(lambda replica: wait_for_replay(replica, flushed), self.replicas)

    async def stop(self) -> None:
        """Stop replicas, then the primary; leave nothing running, even if this is cancelled."""
        began = time.monotonic()
        try:
            for nodes in (self.replicas, [self.primary]):
                await together(lambda node: node.stop(), nodes)
        finally:
            for node in self.nodes.values():
                if node.process is not None:
                    node.process.end()
        _log.info("%s stopped in %.2f s", counted(len(self.nodes), "server"), time.monotonic() - began)

    def force_stop(self) -> None:
        """End every server at once, as the user will not wait: recovery is left to the next start."""
        for node in self.nodes.values():
            node.force_stop()
        asyncio.get_running_loop().call_later(_FORCE_S, self._kill_all)

    def _kill_all(self) -> None:
        for node in self.nodes.values():
            if node.process is not None:
                node.process.send(signal.SIGKILL)

    # --- status ---

    async def describe_nodes(self) -> list[dict[str, object]]:
        """Return each node's state, role and position; the position is missing where a node does not answer."""
        primary = self.primary
        flush_lsn: str | None = None
        timeline: int | None = None
        with contextlib.suppress(NodeNotRunning, OSError, asyncpg.PostgresError):
            async with primary.connected(_STATUS_TIMEOUT_S) as connection:
                [(flush_lsn, timeline)] = await connection.fetch(_PRIMARY_STATUS)
        return await asyncio.gather(
            *(self._describe_node(node, primary, flush_lsn, timeline) for node in self.nodes.values())
        )

    async def _describe_node(
        self, node: Node, primary: Node, flush_lsn: str | None, timeline: int | None
    ) -> dict[str, object]:
        description: dict[str, object] = {
            "name": node.name,
            "role": "primary" if node is primary else "replica",
            "state": node.describe_state(),
            "pid": node.pid,
            "port": node.port,
            "timeline": timeline if node is primary else None,
            "lsn": flush_lsn if node is primary else None,
            "lag_bytes": None,
            "paused": False,
            "delay_ms": node.apply_delay_ms,
            "cut": node.cut,
            "receiver": None,
        }
        if node is primary:
            return description
        with contextlib.suppress(NodeNotRunning, OSError, asyncpg.PostgresError):
            async with node.connected(_STATUS_TIMEOUT_S) as connection:
                [row] = await connection.fetch(_REPLICA_STATUS, flush_lsn)
                description |= {
                    "timeline": self._streamed_timeline(node, row["incarnation"], row["streamed"]),
                    "lsn": row["replay_lsn"],
                    "lag_bytes": None if row["lag_bytes"] is None else max(0, row["lag_bytes"]),
                    "paused": row["paused"],
                    "receiver": row["receiver"],
                }
        return description

    def _streamed_timeline(self, node: Node, incarnation: str | None, streamed: int | None) -> int | None:
        """Return the timeline that a replica streams, or else the one that it last streamed in this incarnation.

        None if it has streamed none: `pg_control_checkpoint()` names the timeline before until the next
        restartpoint.
        """
        if incarnation is None:
            return streamed
        if streamed is not None:
            self._streamed[node.name] = incarnation, streamed
        last_incarnation, timeline = self._streamed.get(node.name, (None, None))
        return timeline if last_incarnation == incarnation else None


def node_names(replicas: int) -> list[str]:
    """Return the names of a cluster's nodes, which they keep whatever their roles."""
    return [FIRST_PRIMARY, *(f"replica{number}" for number in range(replicas))]


# --- a kept directory ---


def check_version(data_dir: Path, major: int) -> None:
    """Raise `DirectoryUnusable` if a kept directory was made by another major version of Postgres."""
    for version_file in sorted(data_dir.glob("*/data/PG_VERSION")):
        if (found := version_file.read_text().strip()) != str(major):
            raise DirectoryUnusable(
                f"{data_dir} was made by Postgres {found}, and the programs here are Postgres {major}"
            )


def has_history(data_dir: Path) -> bool:
    """Return whether any node of a kept directory knows of more than the first timeline."""
    return any(path.suffix == ".history" for path in data_dir.glob("*/data/pg_wal/*.history"))


async def find_primary(data_dir: Path, names: Iterable[str], installation: Installation) -> str:
    """Return the name of the one node that follows no other.

    There are several where a program died in the middle of a promotion: then it is the one with the newest
    timeline. One that was still recovering has not taken a single write, whatever its files say. Raise
    `PrimaryLeftOut` if there is none, or if it is not among `names`.
    """
    found = _node_directories(data_dir, installation)
    if not found:
        return FIRST_PRIMARY
    candidates = [node for node in found if not node.is_replica and not node.half_rewound.exists()]
    if not candidates:
        followers = ", ".join(node.home.name for node in found)
        raise PrimaryLeftOut(
            f"{data_dir} has no primary any more: all nodes that are left follow one ({followers})"
        )
    if len(candidates) > 1:
        states = [(await ControlFile.read(node.data, installation)).state for node in candidates]
        # A primary that crashes while it recovers from a crash has taken writes before.
        settled = [
            node
            for node, state in zip(candidates, states, strict=True)
            if state == "in crash recovery" or "recovery" not in state
        ]
        candidates = settled or candidates
    primary = max(candidates, key=lambda node: newest_timeline(node.data)).home.name
    asked_for = list(names)
    if primary not in asked_for:
        raise PrimaryLeftOut(
            f"the primary of {data_dir} is {primary}, which is not among {', '.join(asked_for)}: "
            "give more --replicas"
        )
    return primary


def _node_directories(data_dir: Path, installation: Installation) -> list[NodeDirectory]:
    return [NodeDirectory(home, installation) for home in sorted(data_dir.iterdir()) if (home / "data").is_dir()]


# --- catching up ---


async def flushed_by(primary: Node) -> str:
    """Return the primary's flush LSN; raise `ServerFailedToStart` if it does not answer."""
    with failing_to_start("the primary does not answer"):
        connection = await primary.connect()
        try:
            return str(await connection.fetchval(_FLUSHED))
        finally:
            connection.terminate()


async def wait_for_replay(replica: Node, lsn: str, *, while_: Callable[[], bool] = lambda: True) -> None:
    """Wait until a replica is up, receives WAL and has replayed `lsn`, or, between two lives of it, `while_` ends.

    Raise `ServerFailedToStart` if that takes too long.
    """
    try:
        async with asyncio.timeout(_STREAMING_TIMEOUT_S):
            while while_() and not await _has_replayed(replica, lsn):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise ServerFailedToStart(
            f"{replica.name} does not stream from the primary: see {replica.log_path}"
        ) from None


async def _has_replayed(replica: Node, lsn: str) -> bool:
    """Wait until a replica is up, streams and has replayed `lsn`; return False if it is restarted meanwhile."""
    try:
        connection = await replica.connect()
        try:
            # It may stream before the task that starts it has seen it answer, and that could still stop it.
            while not (await connection.fetchval(_HAS_REPLAYED, lsn) and replica.up.is_set()):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
        finally:
            connection.terminate()
    except LOST:
        return False
    return True


# --- the application's database ---


class Server(Protocol):
    """A server that its superuser can connect to."""

    async def connect(self, database: str = ..., *, timeout_s: float = ...) -> asyncpg.Connection[Any]:
        """Connect to one of its databases."""


async def prepare_database(primary: Server, name: str, schema: str) -> None:
    """Make the database unless it exists, and apply the schema in one transaction."""
    admin = await primary.connect(timeout_s=_PREPARE_TIMEOUT_S)
    try:
        if not await admin.fetchval(_DATABASE_EXISTS, name):
            await admin.execute(await admin.fetchval(_CREATE_DATABASE, name))
    finally:
        admin.terminate()
    connection = await primary.connect(name, timeout_s=_PREPARE_TIMEOUT_S)
    try:
        connection.add_log_listener(_ignore)
        async with connection.transaction():
            if schema:  # asyncpg does not take an empty script
                await connection.execute(schema)
        connection.remove_log_listener(_ignore)
    finally:
        connection.terminate()


def _ignore(_connection: object, _message: asyncpg.PostgresLogMessage) -> None:
    """Ignore "already exists, skipping"."""


# --- several nodes at once, and what the log says of it ---


async def together(act: Callable[[Node], Awaitable[None]], nodes: Iterable[Node]) -> None:
    """Do something with several nodes at once; the first failure ends the rest and is raised as itself."""

    async def on(node: Node) -> None:
        await act(node)

    with unwrapping_group():
        async with asyncio.TaskGroup() as group:
            for node in nodes:
                group.create_task(on(node), name=f"node {node.name}")


@contextlib.contextmanager
def failing_to_start(what: str) -> Iterator[None]:
    """Raise a server's refusal or silence as `ServerFailedToStart`."""
    try:
        yield
    except LOST as error:
        raise ServerFailedToStart(f"{what}: {describe(error)}") from None


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Log how long a step of the start took."""
    began = time.monotonic()
    yield
    _log.info("%-28s %5.2f s", what, time.monotonic() - began)


def counted(count: int, what: str) -> str:
    """Return a count with its noun: `1 server`, `2 servers`."""
    return f"{count} {what}{'' if count == 1 else 's'}"
