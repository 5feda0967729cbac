"""A primary and its streaming replicas: made, started, kept alive and taken down together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rocket.cluster import catchup, datadir, directories, placement, promotion, rejoin, roles, supervisor
from rocket.cluster.account import server_account
from rocket.cluster.binaries import locate
from rocket.cluster.database import prepare_database
from rocket.cluster.errors import DirectoryUnusable, NoSuchNode, PortInUse
from rocket.cluster.installation import SUPERUSER, Installation
from rocket.cluster.node import Node
from rocket.cluster.timelines import FIRST_TIMELINE, Lineage
from rocket.errors import unwrapping_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from rocket.cluster.control import CarriedOut
    from rocket.cluster.directories import DataDirectory, RunDirectory

_HURRY_S = 0.3
"""How long an immediate shutdown may take somebody who has asked twice."""
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
    database: str = "postgres"
    schema: str = ""
    """SQL that makes the tables, harmless to apply again."""


class LocalCluster:
    """The nodes of a cluster on this machine, as subprocesses of this program."""

    def __init__(
        self,
        settings: ClusterSettings,
        run: RunDirectory,
        data: DataDirectory,
        installation: Installation,
        primary: str = roles.FIRST_PRIMARY,
    ) -> None:
        self.settings = settings
        self.data_dir = data.path
        self.password_file = data.password_file
        self.run_dir = run.path
        self.control_socket = run.control_socket
        self.socket_dir = run.sockets
        names = node_names(settings.replicas)
        ports = _ports(settings, names)
        self.nodes = {
            name: Node(name, data.path / name, port, installation) for name, port in zip(names, ports, strict=True)
        }
        self.primary = self.nodes[primary]
        """The node that takes writes, or was the last to do so."""
        self.timeline = FIRST_TIMELINE
        """The primary's, when it became the primary."""
        self.promotion = asyncio.Lock()
        """Held while the primary changes."""
        self.detours: dict[str, int] = {}
        """By the name of a replica: the port that it follows in place of the primary's, in the same directory."""
        self.on_command: list[Callable[[CarriedOut], None]] = []
        """Called with each command that was carried out or refused, and with each fault of a torture run."""
        self._installation = installation
        run.describe(
            directories.RunDescription(
                pid=os.getpid(),
                data_dir=str(data.path),
                temporary=settings.data_dir is None,
                ports={node.name: node.port for node in self.nodes.values()},
                database=settings.database,
            )
        )

    @property
    def replicas(self) -> list[Node]:
        """The nodes that follow it, or should."""
        return [node for node in self.nodes.values() if node is not self.primary]

    def node(self, name: str) -> Node:
        """Return a node by its name; raise `NoSuchNode`."""
        try:
            return self.nodes[name]
        except KeyError:
            raise NoSuchNode(f"there is no node {name!r}: this cluster has {', '.join(self.nodes)}") from None

    def upstream_port(self, node: Node) -> int:
        """Return the port that a node follows as a replica."""
        return self.detours.get(node.name, self.primary.port)

    async def promote(self, name: str) -> str:
        """Make a replica the primary; see `promotion.promote`."""
        return await promotion.promote(self, name)

    def become(self, primary: Node, timeline: int) -> None:
        """Take note of a new primary, which takes writes already while the old one no longer can."""
        self.primary, self.timeline = primary, timeline
        primary.cut = False

    async def bring_up(self, node: Node) -> None:
        """Start a node, after mending it if it is suspect; see `rejoin.bring_up`."""
        await rejoin.bring_up(self, node)

    # --- the beginning ---

    async def start(self) -> None:
        """Make what is missing, start every node, and return when all replicas stream.

        Raise `ServerFailedToStart` or `CommandFailed` as soon as one part of it fails.
        """
        if roles.has_history(self.data_dir):
            for node in self.replicas:
                node.suspect = node.exists  # what it went through in an earlier run, its directory tells
        await self._make_missing_nodes()
        async with self._kept_following():
            with _step(f"{_counted(len(self.nodes), 'server')} up"):
                if roles.has_history(self.data_dir):
                    await self.primary.start(self.primary.port)
                    with catchup.said_plainly("the primary does not answer"):
                        self.timeline = (await Lineage.of(self.primary)).timeline
                await self._together(self.bring_up)
            with _step("database and tables ready"), catchup.said_plainly("the database could not be prepared"):
                await prepare_database(self.primary, self.settings.database, self.settings.schema)
            if self.replicas:
                with _step("replicas streaming"):
                    await self.wait_for_catchup()

    @contextlib.asynccontextmanager
    async def _kept_following(self) -> AsyncIterator[None]:
        """Have replicas of a kept directory mended, meanwhile, that turn out not to be able to follow."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                keepers = [
                    group.create_task(supervisor.keep_following(self, node), name=f"keep {node.name} following")
                    for node in self.replicas
                ]
                yield
                for keeper in keepers:
                    keeper.cancel()

    async def _make_missing_nodes(self) -> None:
        first = self.primary
        if not first.exists:  # and so is no other: there is no primary among them
            with _step("initdb"):
                self._write_password_file()
                password_file = self.data_dir / "password.new"
                password_file.touch(mode=0o600)
                password_file.write_text(self.password_file.read_text().rpartition(":")[2])
                self._installation.own(password_file)
                try:
                    await datadir.init(first, password_file)
                finally:
                    password_file.unlink()
        missing = [node for node in self.nodes.values() if not node.exists]
        if missing:
            with _step(f"{_counted(len(missing), 'replica')} cloned"):
                await self._together(lambda node: datadir.clone(node, first), missing)

    def _write_password_file(self) -> None:
        descriptor = os.open(self.password_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"127.0.0.1:*:*:{SUPERUSER}:{secrets.token_urlsafe(24)}")

    async def wait_for_catchup(self) -> None:
        """Wait until every replica is up, streams, and has replayed what the primary has flushed by now.

        Raise `ServerFailedToStart` if one does not.
        """
        flushed = await catchup.flushed_by(self.primary)
        await self._together(lambda replica: catchup.replayed_by(replica, flushed), self.replicas)

    async def _together(self, act: Callable[[Node], Any], nodes: list[Node] | None = None) -> None:
        """Do something with several nodes at once; the first failure ends the rest and is raised plain."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for node in self.nodes.values() if nodes is None else nodes:
                    group.create_task(act(node), name=f"node {node.name}")

    # --- the end ---

    async def stop(self) -> None:
        """Stop replicas, then the primary; leave nothing running, even if this is cut off."""
        began = time.monotonic()
        try:
            for nodes in (self.replicas, [self.primary]):
                with unwrapping_group():
                    async with asyncio.TaskGroup() as group:
                        for node in nodes:
                            group.create_task(node.stop(), name=f"stop {node.name}")
        finally:
            for node in self.nodes.values():
                if node.process is not None:
                    node.process.end()
        _log.info("%s stopped in %.2f s", _counted(len(self.nodes), "server"), time.monotonic() - began)

    def hurry(self) -> None:
        """End every server at once, for someone who will not wait: recovery is left to the next start."""
        for node in self.nodes.values():
            node.wanted = False
            if node.process is not None:
                node.thaw()
                node.process.send(signal.SIGQUIT)
        asyncio.get_running_loop().call_later(_HURRY_S, self._kill_all)

    def _kill_all(self) -> None:
        for node in self.nodes.values():
            if node.process is not None:
                node.process.send(signal.SIGKILL)


@contextlib.asynccontextmanager
async def local_cluster(settings: ClusterSettings) -> AsyncIterator[LocalCluster]:
    """Run a cluster for as long as the context lasts, and leave nothing of it behind but a kept directory.

    Raise `SetupError` where the machine does not allow it, `ServerFailedToStart` or `CommandFailed` where the
    servers do not come up.
    """
    for line in await asyncio.to_thread(directories.clear_up_after_the_dead):
        _log.warning("%s", line)
    if settings.port:
        _ports(settings, node_names(settings.replicas))  # fail before anything is made
    account = server_account()
    run = directories.RunDirectory.create(account)
    try:
        binaries = await locate(settings.postgres_bin, account, run.scratch)
        path = (settings.data_dir or placement.apart(run.scratch)).resolve()
        data = directories.DataDirectory.claim(path, account)
        try:
            if account is not None and not account.can_enter(data.path):
                raise DirectoryUnusable(
                    f"servers started by root run as user {account.name!r}, who may not enter {data.path}"
                )
            _refuse_other_version(data.path, binaries.major)
            installation = Installation(binaries, account, run.sockets)
            primary = await roles.find_primary(data.path, node_names(settings.replicas), installation)
            cluster = LocalCluster(settings, run, data, installation, primary)
            try:
                await cluster.start()
                yield cluster
            finally:
                await cluster.stop()
        finally:
            data.release()
    finally:
        await asyncio.to_thread(run.remove)


def node_names(replicas: int) -> list[str]:
    """Return the names of a cluster's nodes; they are names, whatever the roles."""
    return [roles.FIRST_PRIMARY, *(f"replica{number}" for number in range(replicas))]


def _ports(settings: ClusterSettings, names: list[str]) -> list[int]:
    if settings.port == 0:
        chosen: list[int] = []
        while len(chosen) < len(names):
            if (port := directories.free_port()) not in chosen:
                chosen.append(port)
        return chosen
    ports = list(range(settings.port, settings.port + len(names)))
    if ports[-1] > 65535:  # noqa: PLR2004 - the last port there is
        raise PortInUse(f"ports {ports[0]} to {ports[-1]} are asked for, and 65535 is the last one there is")
    for port in ports:
        if not directories.port_is_free(port):
            raise PortInUse(f"port {port} is in use{directories.port_holder(port)}: try --postgres-port 0")
    return ports


def _refuse_other_version(data_dir: Path, major: int) -> None:
    for version_file in sorted(data_dir.glob("*/data/PG_VERSION")):
        if (found := version_file.read_text().strip()) != str(major):
            raise DirectoryUnusable(
                f"{data_dir} was made by Postgres {found}, and the programs here are Postgres {major}"
            )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    _log.info("%-28s %5.2f s", what, time.monotonic() - began)
