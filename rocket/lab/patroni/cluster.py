"""A cluster that Patroni runs on this machine: three members, and the etcd in which they agree on a leader."""

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
from typing import TYPE_CHECKING, Self, TypeAlias
from urllib.parse import quote

import psutil

from rocket.cluster import directories
from rocket.cluster.binaries import locate
from rocket.cluster.cluster import prepare_database
from rocket.cluster.errors import ServerFailedToStart, ServerKeepsDying
from rocket.cluster.process import end_server_processes, server_account
from rocket.cluster.supervisor import RestartPolicy
from rocket.errors import unwrapping_group
from rocket.lab.patroni import programs
from rocket.lab.patroni.member import (
    HOST,
    REST_USER,
    SUPERUSER,
    Daemon,
    Passwords,
    PatroniNode,
    member_configuration,
)
from rocket.topology.patroni import PatroniUnavailable
from rocket.topology.patroni_rest import RestClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from rocket.cluster.binaries import Binaries
    from rocket.cluster.directories import RunDirectory
    from rocket.cluster.process import Account
    from rocket.topology.patroni import Member

MEMBERS = 3
"""Enough for reads to choose between two replicas, and for one to be left when the leader is lost."""

_START_TIMEOUT_S = 90.0
"""Until all members stream: the first is made by initdb, the others by base backups of it."""
_STOP_PATRONI_TIMEOUT_S = 15.0
"""Patroni stops its Postgres, by a fast shutdown, before it ends."""
_STOP_ETCD_TIMEOUT_S = 3.0
_POLL_S = 0.1
_SUPERVISE_S = 0.2
_RUNNING, _STREAMING = "running", "streaming"
_FIRST_REST_PORT = 8008
"""Patroni's default port; of the first member, unless any free ports are asked for."""
_CONFIGURATION = "patroni.json"
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
    tags: Mapping[str, Mapping[str, bool]] | None = None
    """Patroni's tags, by member."""
    proxy_hosts: Mapping[str, str] | None = None
    """By member, the address at which the others reach it, and at which it reaches etcd; None: 127.0.0.1.

    A proxy has to listen there, and pass each port on to the same port of 127.0.0.1.
    """


class PatroniCluster:
    """The members and etcd, as subprocesses of this program."""

    def __init__(
        self,
        settings: PatroniSettings,
        nodes: Mapping[str, PatroniNode],
        etcd: Daemon,
        client: RestClient,
        *,
        etcd_port: int,
        password_file: Path,
        login: tuple[str, str],
    ) -> None:
        self.settings = settings
        self.nodes = nodes
        self.etcd = etcd
        self.etcd_port = etcd_port
        self.password_file = password_file
        """The superuser's, in libpq's own format."""
        self._client = client
        self._login = login

    @property
    def urls(self) -> list[str]:
        """The members' REST APIs."""
        return [node.url for node in self.nodes.values()]

    @property
    def dsn_template(self) -> str:
        """The DSN of the database on a member, with `{host}` and `{port}` in place of the member's."""
        passfile = quote(str(self.password_file), safe="/")
        if self.settings.proxy_hosts:  # which are for members alone
            rest = f"{self.settings.database}?passfile={passfile}&application_name={{host}}"
            return f"postgresql://{SUPERUSER}@{HOST}:{{port}}/{rest}"
        return f"postgresql://{SUPERUSER}@{{host}}:{{port}}/{self.settings.database}?passfile={passfile}"

    @property
    def control(self) -> str:
        """The beginning of a `patronictl` command line for this cluster."""
        return programs.patronictl(next(iter(self.nodes.values())).home / _CONFIGURATION)

    def how_to_use(self) -> list[str]:
        """Return the command lines for psql, patronictl and rocket."""
        options = f"-h {HOST} -p {next(iter(self.nodes.values())).port} -U {SUPERUSER} {self.settings.database}"
        source = f"--patroni {','.join(self.urls)} --patroni-dsn '{self.dsn_template}'"
        return [
            f"connect:  PGPASSFILE={self.password_file} psql {options}",
            f"Patroni:  {self.control} list",
            f"rocket:   python -m rocket run-all --no-cluster {source}",
        ]

    async def members(self) -> dict[str, Member]:
        """Return the members by name, as Patroni lists them; raise `PatroniUnavailable`."""
        return {member.name: member for member in (await self._client.listing()).members}

    async def leader(self) -> PatroniNode:
        """Return the current leader; raise `PatroniUnavailable` if there is none."""
        for member in (await self.members()).values():
            if member.is_leader:
                return self.nodes[member.name]
        raise PatroniUnavailable("Patroni has no leader")

    async def is_whole(self) -> bool:
        """Return whether there is a leader, and all others stream from it."""
        with contextlib.suppress(PatroniUnavailable):
            members = await self.members()
            return len(members) == len(self.nodes) and all(
                member.state == (_RUNNING if member.is_leader else _STREAMING) for member in members.values()
            )
        return False

    async def request(self, node: PatroniNode, action: str, **body: object) -> None:
        """Post an action (`switchover`, say) to a member's Patroni; raise `PatroniUnavailable` if it fails."""
        await self._client.request(node.url, action, self._login, **body)

    async def start(self) -> None:
        """Start etcd and the members; return once there are a leader, the tables, and replicas that stream.

        Raise `ServerFailedToStart` as soon as one of the programs dies, or if all of it takes too long.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self.etcd.start()
                for node in self.nodes.values():
                    await node.start()
                await self._until(self._has_leader)
                _log.info("%-28s %5.2f s", "a leader", time.monotonic() - began)
                leader = await self.leader()
                await prepare_database(leader, self.settings.database, self.settings.schema)
                await self._until(self.is_whole)
        except TimeoutError:
            tails = "\n".join(f"{daemon.name}:\n{daemon.log_tail()}" for daemon in self._daemons())
            raise ServerFailedToStart(
                f"the Patroni cluster did not start within {_START_TIMEOUT_S:g} s:\n{tails}"
            ) from None
        _log.info("%-28s %5.2f s", f"{len(self.nodes)} members stream", time.monotonic() - began)

    async def supervise(self) -> None:
        """Restart each program that dies without having been stopped, for ever; raise `ServerKeepsDying`."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for daemon in self._daemons():
                    group.create_task(_keep_running(daemon), name=f"supervise {daemon.name}")

    async def stop(self) -> None:
        """Stop the replicas, then the leader, then etcd; leave nothing running, even if this is cut off."""
        began = time.monotonic()
        try:
            leader = None
            with contextlib.suppress(PatroniUnavailable):
                leader = await self.leader()
            for node in self.nodes.values():
                node.patroni.should_run = False
            for nodes in ([node for node in self.nodes.values() if node is not leader], [leader]):
                await asyncio.gather(*(node.stop() for node in nodes if node is not None))
            await self.etcd.stop()
        finally:
            await self._client.close()
            self.kill_all()
        _log.info("Patroni, etcd and Postgres stopped in %.2f s", time.monotonic() - began)

    def kill_all(self) -> None:
        """Kill every process at once: a forced shutdown."""
        for daemon in self._daemons():
            daemon.should_run = False
            daemon.send_all(signal.SIGKILL)
        for node in self.nodes.values():
            end_server_processes(node.data_dir)

    def _daemons(self) -> Iterator[Daemon]:
        yield self.etcd
        yield from (node.patroni for node in self.nodes.values())

    async def _until(self, reached: Callable[[], Awaitable[bool]]) -> None:
        while not await reached():
            for daemon in self._daemons():
                if daemon.should_run and daemon.pid is None:
                    raise ServerFailedToStart(f"{daemon.name} died while starting:\n{daemon.log_tail()}")
            await asyncio.sleep(_POLL_S)

    async def _has_leader(self) -> bool:
        with contextlib.suppress(PatroniUnavailable):
            members = await self.members()
            return any(member.is_leader and member.state == _RUNNING for member in members.values())
        return False


async def _keep_running(daemon: Daemon) -> None:
    policy = RestartPolicy()
    while True:
        await asyncio.sleep(_SUPERVISE_S)
        if daemon.should_run and daemon.pid is None:
            pause_s = policy.after_death(time.monotonic(), asked=False)
            if pause_s is None:
                raise ServerKeepsDying(f"{daemon.name} keeps dying:\n{daemon.log_tail()}")
            _log.warning("%s died: starting it again in %.1f s", daemon.name, pause_s)
            await asyncio.sleep(pause_s)
            if daemon.should_run:
                await daemon.start()


# --- from directories to a running cluster, and back ---

Around: TypeAlias = "Callable[[PatroniCluster], AbstractAsyncContextManager[object]]"
"""Returns a context manager inside which the cluster runs: of the proxies before it, for example."""


@contextlib.asynccontextmanager
async def patroni_cluster(
    settings: PatroniSettings, around: Around = contextlib.nullcontext
) -> AsyncIterator[PatroniCluster]:
    """Run a cluster for as long as the context lasts, and leave nothing of it behind.

    `around` is called once the ports are known, and before anything is started. Raise `SetupError` if the machine
    does not allow it, and `ServerFailedToStart`.
    """
    for line in await asyncio.to_thread(directories.clear_up_dead_runs):
        _log.warning("%s", line)
    await asyncio.to_thread(_kill_orphans)
    account = server_account()
    found = programs.find(account)
    with directories.PortReservations() as reservations:
        ports = _Ports.choose(settings, reservations)
        run = directories.RunDirectory.create(account)
        try:
            binaries = await locate(settings.postgres_bin, account, run.scratch)
            cluster = _make(settings, run, _Tools(found, binaries, account), ports)
            async with around(cluster):
                try:
                    await cluster.start()
                    yield cluster
                finally:
                    await cluster.stop()
        finally:
            await asyncio.to_thread(run.remove)


@dataclass(frozen=True, slots=True)
class _Tools:
    """The programs, and the account that runs them."""

    programs: programs.Programs
    binaries: Binaries
    account: Account | None


@dataclass(frozen=True, slots=True)
class _Ports:
    """Each program's ports."""

    members: dict[str, tuple[int, int]]
    """By member: of its Postgres, and of its REST API."""
    etcd: int
    etcd_peer: int

    @classmethod
    def choose(cls, settings: PatroniSettings, reservations: directories.PortReservations) -> Self:
        """Reserve the ports that were asked for, or free ones; raise `PortInUse`."""
        members = settings.members
        if settings.port:
            ports = list(range(settings.port, settings.port + members))
            rest_ports = list(range(_FIRST_REST_PORT, _FIRST_REST_PORT + members))
            for port in (*ports, *rest_ports):
                reservations.reserve(port)
        else:
            ports, rest_ports = ([reservations.reserve_any() for _ in range(members)] for _ in range(2))
        both = zip(ports, rest_ports, strict=True)
        names = {f"node{number}": pair for number, pair in enumerate(both, start=1)}
        return cls(names, reservations.reserve_any(), reservations.reserve_any())


def _make(settings: PatroniSettings, run: RunDirectory, tools: _Tools, ports: _Ports) -> PatroniCluster:
    """Make the directories and configuration files, and describe the run to other programs."""
    data_dir = run.data_dir().resolve()
    _make_dir(data_dir, tools.account)
    passwords = Passwords(*(secrets.token_urlsafe(24) for _ in range(3)))
    password_file = run.path / "pgpass"
    _write_private(password_file, f"{HOST}:*:*:{SUPERUSER}:{passwords.superuser}\n", None)
    etcd = _make_etcd(tools, data_dir / "etcd", ports)
    nodes = {name: _make_node(name, data_dir / name, settings, tools, ports, passwords) for name in ports.members}
    run.describe(
        directories.RunDescription(
            pid=os.getpid(),
            data_dir=str(data_dir),
            temporary=True,
            ports={node.name: node.port for node in nodes.values()},
            database=settings.database,
        )
    )
    client = RestClient(node.url for node in nodes.values())
    login = (REST_USER, passwords.rest)
    return PatroniCluster(
        settings, nodes, etcd, client, etcd_port=ports.etcd, password_file=password_file, login=login
    )


def _make_node(  # noqa: PLR0917 - all of them, once
    name: str, home: Path, settings: PatroniSettings, tools: _Tools, ports: _Ports, passwords: Passwords
) -> PatroniNode:
    _make_dir(home, tools.account)
    text = member_configuration(
        name=name,
        home=home,
        ports=ports.members[name],
        etcd_port=ports.etcd,
        bin_dir=tools.binaries.directory,
        major=tools.binaries.major,
        passwords=passwords,
        tags=(settings.tags or {}).get(name, {}),
        proxy_host=(settings.proxy_hosts or {}).get(name),
    )
    _write_private(home / _CONFIGURATION, text, tools.account)
    # Its command line changes the account by itself.
    arguments = (*tools.programs.patroni, str(home / _CONFIGURATION))
    patroni = Daemon(f"the Patroni of {name}", arguments, home / "server.log", None, _STOP_PATRONI_TIMEOUT_S)
    return PatroniNode(name, home, ports.members[name], passwords.superuser, patroni)


def _make_etcd(tools: _Tools, home: Path, ports: _Ports) -> Daemon:
    _make_dir(home, tools.account)
    clients, peers = f"http://{HOST}:{ports.etcd}", f"http://{HOST}:{ports.etcd_peer}"
    arguments = (
        tools.programs.etcd,
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
    return Daemon("etcd", arguments, home / "etcd.log", tools.account, _STOP_ETCD_TIMEOUT_S)


def _make_dir(path: Path, account: Account | None) -> None:
    path.mkdir(mode=0o700)
    if account is not None:
        account.own(path)


def _write_private(path: Path, text: str, account: Account | None) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    if account is not None:
        account.own(path)


def _kill_orphans() -> None:
    """Kill each Patroni whose program died while Patroni was halted, and so missed its signal."""
    for process in psutil.process_iter(["cmdline"]):
        *_, last = process.info["cmdline"] or [""]
        if last.endswith(f"/{_CONFIGURATION}") and "rocket-" in last and not Path(last).exists():
            with contextlib.suppress(psutil.Error):
                process.kill()
