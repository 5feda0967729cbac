"""How a local Patroni cluster is made, from the programs that there are to the directory that goes again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

import psutil

from rocket.cluster import directories
from rocket.cluster.binaries import locate
from rocket.cluster.process import server_account
from rocket.lab.patroni import programs
from rocket.lab.patroni.cluster import CONFIGURATION, PatroniCluster
from rocket.lab.patroni.configuration import HOST, REST_USER, SUPERUSER, Secrets, member_configuration
from rocket.lab.patroni.daemon import Daemon
from rocket.lab.patroni.node import PatroniNode
from rocket.topology.patroni_rest import RestClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from rocket.cluster.binaries import Binaries
    from rocket.cluster.directories import RunDirectory
    from rocket.cluster.process import Account
    from rocket.lab.patroni.cluster import PatroniSettings

_PATRONI_ENDS_S = 15.0
"""It takes Postgres down, by a fast shutdown, before it ends."""
_ETCD_ENDS_S = 3.0
_FIRST_REST_PORT = 8008
"""Patroni's own; of the first member, unless ports are left to us."""

_log = logging.getLogger("rocket.patroni")


Around: TypeAlias = "Callable[[PatroniCluster], AbstractAsyncContextManager[object]]"


@dataclass(frozen=True, slots=True)
class _Tools:
    """What the members are made with."""

    programs: programs.Programs
    binaries: Binaries
    account: Account | None


@dataclass(frozen=True, slots=True)
class _Ports:
    """Who listens where."""

    members: dict[str, tuple[int, int]]
    """Of each member by name: its Postgres', and its REST API's."""
    etcd: int
    etcd_peer: int

    @classmethod
    def choose(cls, settings: PatroniSettings, reservations: directories.PortReservations) -> Self:
        """Reserve free ports, or those that were asked for; raise `PortInUse`."""
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


@contextlib.asynccontextmanager
async def patroni_cluster(
    settings: PatroniSettings, around: Around = contextlib.nullcontext
) -> AsyncIterator[PatroniCluster]:
    """Run a cluster of Patroni's for as long as the context lasts, and leave nothing of it behind.

    It lives inside of the context that `around` makes of it, once it is known who is to listen where.
    Raise `SetupError` where the machine does not allow it, and `ServerFailedToStart`.
    """
    for line in await asyncio.to_thread(directories.clear_up_dead_runs):
        _log.warning("%s", line)
    await asyncio.to_thread(_end_orphans)
    account = server_account()
    found = programs.find(account)
    with directories.PortReservations() as reservations:
        ports = _Ports.choose(settings, reservations)
        run = directories.RunDirectory.create(account)
        try:
            binaries = await locate(settings.postgres_bin, account, run.scratch)
            cluster = _made(settings, run, _Tools(found, binaries, account), ports)
            async with around(cluster):
                try:
                    await cluster.start()
                    yield cluster
                finally:
                    await cluster.stop()
        finally:
            await asyncio.to_thread(run.remove)


def _made(settings: PatroniSettings, run: RunDirectory, tools: _Tools, ports: _Ports) -> PatroniCluster:
    """Make the directories, write what the programs read, and describe the run to others."""
    data_dir = run.data_dir().resolve()
    _make_dir(data_dir, tools.account)
    keys = Secrets(*(secrets.token_urlsafe(24) for _ in range(3)))
    password_file = run.path / "pgpass"
    _write_private(password_file, f"{HOST}:*:*:{SUPERUSER}:{keys.superuser}\n", None)
    etcd = _etcd(tools, data_dir / "etcd", ports)
    nodes = {
        name: _node(name, data_dir / name, own, tools=tools, etcd_port=ports.etcd, keys=keys, settings=settings)
        for name, own in ports.members.items()
    }
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
    login = (REST_USER, keys.rest)
    return PatroniCluster(
        settings, nodes, etcd, client, etcd_port=ports.etcd, password_file=password_file, login=login
    )


def _node(
    name: str,
    home: Path,
    ports: tuple[int, int],
    *,
    tools: _Tools,
    etcd_port: int,
    keys: Secrets,
    settings: PatroniSettings,
) -> PatroniNode:
    _make_dir(home, tools.account)
    text = member_configuration(
        name=name,
        home=home,
        port=ports[0],
        rest_port=ports[1],
        etcd_port=etcd_port,
        bin_dir=tools.binaries.directory,
        major=tools.binaries.major,
        secrets=keys,
        tags=(settings.tags or {}).get(name, {}),
        detour=(settings.detours or {}).get(name),
    )
    _write_private(home / CONFIGURATION, text, tools.account)
    # Its command line changes the account by itself.
    arguments = (*tools.programs.patroni, str(home / CONFIGURATION))
    patroni = Daemon(f"the Patroni of {name}", arguments, home / "server.log", None, _PATRONI_ENDS_S)
    return PatroniNode(name, home, ports, keys.superuser, patroni)


def _etcd(tools: _Tools, home: Path, ports: _Ports) -> Daemon:
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
    return Daemon("etcd", arguments, home / "etcd.log", tools.account, _ETCD_ENDS_S)


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
