"""A cluster on this machine that Patroni runs: three members and the etcd that they agree by."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil

from rocket.errors import PortInUse, ServerFailedToStart, ServerKeepsDying, failing_plainly
from rocket.patroni import programs
from rocket.patroni.configuration import HOST, SUPERUSER, Secrets, member_configuration
from rocket.patroni.daemon import Daemon
from rocket.patroni.node import PatroniNode
from rocket.patroni.rest import PatroniSilent, RestClient
from rocket.postgres import directories, placement
from rocket.postgres.account import server_account
from rocket.postgres.binaries import locate
from rocket.postgres.database import prepare_database
from rocket.postgres.process import end_server_processes
from rocket.postgres.restarts import RestartPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from rocket.patroni.members import Member
    from rocket.postgres.account import Account
    from rocket.postgres.directories import RunDirectory

MEMBERS = 3
"""As many as it takes for a replica to be left when the leader is lost, and for reads to choose."""

_START_S = 90.0
"""Until all members stream: one is made by initdb, the others as base backups of it."""
_POLL_S = 0.1
_PATRONI_ENDS_S = 15.0
"""It takes Postgres down, by a fast shutdown, before it ends."""
_ETCD_ENDS_S = 3.0
_FIRST_REST_PORT = 8008
"""Patroni's own; of the first member, unless ports are left to us."""
_STREAMING = "streaming"
_CHECK_S = 0.2
CONFIGURATION = "patroni.json"
"""In each member's directory."""

_log = logging.getLogger("rocket.patroni")


@dataclass(frozen=True, slots=True)
class PatroniSettings:
    """What a local Patroni cluster is made of."""

    members: int = MEMBERS
    port: int = 5433
    """Of the first member; the others have the next ones. 0: any free ones, also for the REST API."""
    postgres_bin: Path | None = None
    database: str = "postgres"
    schema: str = ""
    """SQL that makes the tables, harmless to apply again."""
    tags: Mapping[str, dict[str, bool]] | None = None
    """Patroni's tags, by member."""


class PatroniCluster:
    """The members, as subprocesses of this program."""

    def __init__(
        self, settings: PatroniSettings, run: RunDirectory, data_dir: Path, etcd: Daemon, etcd_port: int
    ) -> None:
        self.settings = settings
        self.run_dir = run.path
        self.data_dir = data_dir
        self.password_file = run.path / "pgpass"
        self.etcd = etcd
        self.etcd_port = etcd_port
        self.nodes: dict[str, PatroniNode] = {}
        self.client: RestClient

    @property
    def urls(self) -> list[str]:
        """The members' REST APIs."""
        return [node.url for node in self.nodes.values()]

    @property
    def dsn_template(self) -> str:
        """The address of the database on a member, with `{host}` and `{port}` for where that is."""
        passfile = quote(str(self.password_file), safe="/")
        return f"postgresql://{SUPERUSER}@{{host}}:{{port}}/{self.settings.database}?passfile={passfile}"

    @property
    def control(self) -> str:
        """The beginning of a command line by which people talk to Patroni."""
        return programs.patronictl(next(iter(self.nodes.values())).home / CONFIGURATION)

    def how_to_use(self) -> list[str]:
        """Return lines that tell people what they can do with it."""
        way = f"-h {HOST} -p {next(iter(self.nodes.values())).port} -U {SUPERUSER} {self.settings.database}"
        source = f"--patroni {','.join(self.urls)} --patroni-dsn '{self.dsn_template}'"
        return [
            f"connect:  PGPASSFILE={self.password_file} psql {way}",
            f"Patroni:  {self.control} list",
            f"rocket:   python -m rocket run-all --no-cluster {source}",
        ]

    async def members(self) -> dict[str, Member]:
        """Return the members as Patroni lists them; raise `PatroniSilent`."""
        return {member.name: member for member in await self.client.members()}

    async def leader(self) -> PatroniNode:
        """Return the member that leads now; raise `PatroniSilent` if there is none."""
        for member in (await self.members()).values():
            if member.leads:
                return self.nodes[member.name]
        raise PatroniSilent("Patroni has no leader")

    # --- the beginning ---

    async def start(self) -> None:
        """Start etcd and the members, and return when there are a leader, the tables, and replicas that stream.

        Raise `ServerFailedToStart` as soon as one of them dies, or where that takes too long.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(_START_S):
                await self.etcd.start()
                await self._until(self._etcd_listens)
                for node in self.nodes.values():
                    await node.start()
                await self._until(self._has_leader)
                _log.info("%-28s %5.2f s", "a leader", time.monotonic() - began)
                leader = await self.leader()
                await prepare_database(leader, self.settings.database, self.settings.schema)
                await self._until(self._all_stream)
        except TimeoutError:
            raise ServerFailedToStart(
                f"Patroni's cluster did not come up within {_START_S:g} s:\n{self._last_words()}"
            ) from None
        _log.info("%-28s %5.2f s", f"{len(self.nodes)} members stream", time.monotonic() - began)

    async def _until(self, reached: Callable[[], Any]) -> None:
        while not await reached():
            for daemon in self._daemons():
                if daemon.wanted and daemon.pid is None:
                    raise ServerFailedToStart(f"{daemon.name} died while starting:\n{daemon.last_words()}")
            await asyncio.sleep(_POLL_S)

    async def _etcd_listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(HOST, self.etcd_port)
        except OSError:
            return False
        writer.close()
        return True

    async def _has_leader(self) -> bool:
        with contextlib.suppress(PatroniSilent):
            return any(member.leads and member.state == "running" for member in (await self.members()).values())
        return False

    async def _all_stream(self) -> bool:
        with contextlib.suppress(PatroniSilent):
            members = await self.members()
            return len(members) == len(self.nodes) and all(
                member.leads or member.state == _STREAMING for member in members.values()
            )
        return False

    def _daemons(self) -> Iterator[Daemon]:
        yield self.etcd
        yield from (node.patroni for node in self.nodes.values())

    def _last_words(self) -> str:
        return "\n".join(f"{daemon.name}:\n{daemon.last_words()}" for daemon in self._daemons())

    # --- meanwhile ---

    async def supervise(self) -> None:
        """Start again what dies without having been stopped; never returns. Raise `ServerKeepsDying`."""
        with failing_plainly():
            async with asyncio.TaskGroup() as group:
                for daemon in self._daemons():
                    group.create_task(_keep(daemon), name=f"keep {daemon.name}")

    # --- the end ---

    async def stop(self) -> None:
        """Stop the replicas, then who leads, then etcd; leave nothing running, even if this is cut off."""
        began = time.monotonic()
        try:
            leads = None
            with contextlib.suppress(PatroniSilent):
                leads = await self.leader()
            for node in self.nodes.values():
                node.patroni.wanted = False
            for nodes in ([node for node in self.nodes.values() if node is not leads], [leads]):
                await asyncio.gather(*(node.stop() for node in nodes if node is not None))
            await self.etcd.stop()
        finally:
            await self.client.close()
            self.kill_all()
        _log.info("Patroni, etcd and Postgres stopped in %.2f s", time.monotonic() - began)

    def kill_all(self) -> None:
        """Kill whatever runs, for someone who will not wait."""
        for daemon in self._daemons():
            daemon.wanted = False
            daemon.send_all(signal.SIGKILL)
        for node in self.nodes.values():
            end_server_processes(node.data_dir)


async def _keep(daemon: Daemon) -> None:
    policy = RestartPolicy()
    while True:
        await asyncio.sleep(_CHECK_S)
        if daemon.wanted and daemon.pid is None:
            pause_s = policy.after_death(time.monotonic(), asked=False)
            if pause_s is None:
                raise ServerKeepsDying(f"{daemon.name} keeps dying:\n{daemon.last_words()}")
            _log.warning("%s died: starting it again in %.1f s", daemon.name, pause_s)
            await asyncio.sleep(pause_s)
            if daemon.wanted:
                await daemon.start()


@contextlib.asynccontextmanager
async def patroni_cluster(settings: PatroniSettings) -> AsyncIterator[PatroniCluster]:
    """Run a cluster of Patroni's for as long as the context lasts, and leave nothing of it behind.

    Raise `SetupError` where the machine does not allow it, and `ServerFailedToStart`.
    """
    for line in await asyncio.to_thread(directories.clear_up_after_the_dead):
        _log.warning("%s", line)
    await asyncio.to_thread(_end_orphans)
    account = server_account()
    found = programs.find(account)
    names = [f"node{number}" for number in range(1, settings.members + 1)]
    ports, rest_ports, (etcd_port, peer_port) = _ports(settings, len(names))
    run = directories.RunDirectory.create(account)
    try:
        binaries = await locate(settings.postgres_bin, account, run.scratch)
        data_dir = placement.apart(run.scratch).resolve()
        _make_dir(data_dir, account)
        etcd = _etcd(found, data_dir / "etcd", account, etcd_port, peer_port)
        cluster = PatroniCluster(settings, run, data_dir, etcd, etcd_port)
        keys = Secrets(*(secrets.token_urlsafe(24) for _ in range(3)))
        _write_private(cluster.password_file, f"{HOST}:*:*:{SUPERUSER}:{keys.superuser}\n", None)
        for name, port, rest_port in zip(names, ports, rest_ports, strict=True):
            home = data_dir / name
            _make_dir(home, account)
            text = member_configuration(
                name=name,
                home=home,
                port=port,
                rest_port=rest_port,
                etcd_port=etcd_port,
                bin_dir=binaries.directory,
                major=binaries.major,
                secrets=keys,
                tags=(settings.tags or {}).get(name, {}),
            )
            _write_private(home / CONFIGURATION, text, account)
            # Its command line changes the account by itself.
            arguments = (*found.patroni, str(home / CONFIGURATION))
            patroni = Daemon(f"the Patroni of {name}", arguments, home / "server.log", None, _PATRONI_ENDS_S)
            cluster.nodes[name] = PatroniNode(name, home, (port, rest_port), keys.superuser, patroni)
        cluster.client = RestClient(cluster.urls)
        run.describe(
            directories.RunDescription(
                pid=os.getpid(),
                data_dir=str(data_dir),
                temporary=True,
                ports={node.name: node.port for node in cluster.nodes.values()},
                database=settings.database,
            )
        )
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.stop()
    finally:
        await asyncio.to_thread(run.remove)


def _etcd(found: programs.Programs, home: Path, account: Account | None, port: int, peer_port: int) -> Daemon:
    _make_dir(home, account)
    clients, peers = f"http://{HOST}:{port}", f"http://{HOST}:{peer_port}"
    arguments = (
        found.etcd,
        "--name=rocket",
        f"--data-dir={home / 'data'}",
        f"--listen-client-urls={clients}",
        f"--advertise-client-urls={clients}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=rocket={peers}",
        "--logger=zap",
        "--log-outputs=stderr",
    )
    return Daemon("etcd", arguments, home / "etcd.log", account, _ETCD_ENDS_S)


def _ports(settings: PatroniSettings, members: int) -> tuple[list[int], list[int], tuple[int, int]]:
    """Return the ports of the servers, of the REST APIs, and of etcd for clients and peers."""
    free: set[int] = set()
    while len(free) < 2 * members + 2:
        free.add(directories.free_port())
    ports = [free.pop() for _ in range(members)]
    rest_ports = [free.pop() for _ in range(members)]
    if settings.port:
        ports = list(range(settings.port, settings.port + members))
        rest_ports = list(range(_FIRST_REST_PORT, _FIRST_REST_PORT + members))
    for port in (*ports, *rest_ports):
        if not directories.port_is_free(port):
            raise PortInUse(f"port {port} is in use{directories.port_holder(port)}: try --postgres-port 0")
    return ports, rest_ports, (free.pop(), free.pop())


def _make_dir(path: Path, account: Account | None) -> None:
    path.mkdir(mode=0o700)
    if account is not None:
        account.own(path)


def _write_private(path: Path, text: str, account: Account | None) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    if account is not None:
        account.own(path)


def _end_orphans() -> None:
    """Kill each Patroni whose program died while it was halted, so that it never came to its own end."""
    for process in psutil.process_iter(["cmdline"]):
        *_, last = process.info["cmdline"] or [""]
        if last.endswith(f"/{CONFIGURATION}") and "rocket-" in last and not Path(last).exists():
            with contextlib.suppress(psutil.Error):
                process.kill()
