"""What may stand between a router and its servers: real poolers, and an address that several servers share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from itertools import cycle
from typing import TYPE_CHECKING

import pytest

from rocket.cluster.directories import PortReservations
from rocket.cluster.process import server_account
from rocket.lab.app import DATABASE
from tests.support.servers import ROLES, fresh_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
PGPOOL = shutil.which("pgpool") or shutil.which("pgpool", path="/usr/sbin:/usr/local/sbin")
UP_WITHIN_S = 10.0
LIST_PORT = 5432


def needs_pgbouncer() -> None:
    """Skip a test where there is no PgBouncer; fail where there has to be one."""
    if PROGRAM is None:
        if os.environ.get("PGBOUNCER_REQUIRED"):
            pytest.fail("there is no pgbouncer, and PGBOUNCER_REQUIRED is set")
        pytest.skip("there is no pgbouncer (Debian's package of that name)")


def needs_pgpool() -> None:
    """Skip a test where there is no pgpool-II; fail where there has to be one."""
    if PGPOOL is None:
        if os.environ.get("PGPOOL_REQUIRED"):
            pytest.fail("there is no pgpool, and PGPOOL_REQUIRED is set")
        pytest.skip("there is no pgpool (Debian's package pgpool2)")


@contextlib.contextmanager
def pgbouncer(
    cluster: LocalCluster, who: str = ROLES["monitor"], *settings: str, files: Mapping[str, Path] | None = None
) -> Iterator[dict[str, str]]:
    """Run a PgBouncer in transaction mode before every node; give the nodes' addresses behind it.

    `files` are copied to where it may read them, in `{home}` for its settings.
    """
    needs_pgbouncer()
    assert PROGRAM is not None
    with fresh_dir() as home, PortReservations() as reservations:
        port = reservations.reserve_any()
        file = home / "pgbouncer.ini"
        file.write_text(_configuration(cluster, who, port, home, settings))
        for name, path in (files or {}).items():
            shutil.copy(path, home / name)
        with _running([PROGRAM, "--quiet", str(file)], home, port, signal.SIGTERM):  # at once, unlike SIGINT
            yield {name: f"postgresql://{who}@127.0.0.1:{port}/{name}" for name in cluster.nodes}


@contextlib.contextmanager
def pgbouncer_host_list(cluster: LocalCluster, *names: str) -> Iterator[str]:
    """Run a PgBouncer with a list of hosts, which its connections go to in turn; give its address."""
    with fresh_dir() as hosts:
        hosts.chmod(0o755)
        for name in names:  # it takes one port for all of them
            (hosts / name).mkdir(mode=0o755)
            target = cluster.socket_dir / f".s.PGSQL.{cluster.node(name).port}"
            (hosts / name / f".s.PGSQL.{LIST_PORT}").symlink_to(target)
        listed = ",".join(str(hosts / name) for name in names)
        entry = f"[databases]\nlisted = host={listed} port={LIST_PORT} dbname={DATABASE} user={ROLES['monitor']}"
        with pgbouncer(cluster, ROLES["monitor"], entry) as nodes:
            yield nodes["primary"].removesuffix("primary") + "listed"


@contextlib.contextmanager
def pgpool(cluster: LocalCluster, *replicas: str, writes: str = "off") -> Iterator[str]:
    """Run a pgpool-II before the primary and some replicas, to which all SELECTs go that may; give its address.

    `writes` is its setting `disable_load_balance_on_write`.
    """
    needs_pgpool()
    assert PGPOOL is not None
    who = ROLES["monitor"]
    with fresh_dir() as home, PortReservations() as reservations:
        port = reservations.reserve_any()
        lines = [
            "backend_clustering_mode = streaming_replication",
            "listen_addresses = '127.0.0.1'",
            f"port = {port}",
            f"socket_dir = '{home}'",
            f"pcp_socket_dir = '{home}'",
            "pcp_listen_addresses = ''",
            f"pid_file_name = '{home / 'pid'}'",
            f"logdir = '{home}'",
            "num_init_children = 30",
            "load_balance_mode = on",
            f"disable_load_balance_on_write = '{writes}'",
            f"sr_check_user = '{who}'",
            f"sr_check_database = '{DATABASE}'",
            "health_check_period = 0",
            "pool_passwd = ''",
        ]
        for number, name in enumerate((cluster.primary.name, *replicas)):
            lines += [
                f"backend_hostname{number} = '{cluster.socket_dir}'",
                f"backend_port{number} = {cluster.node(name).port}",
                f"backend_weight{number} = {min(number, 1)}",
                f"backend_flag{number} = 'DISALLOW_TO_FAILOVER'",
            ]
        file = home / "pgpool.conf"
        file.write_text("\n".join([*lines, ""]))
        command = [PGPOOL, "-n", "-f", str(file), "-F", str(home / "none"), "-a", str(home / "none")]
        with _running(command, home, port, signal.SIGINT):  # it ends its sessions
            yield f"postgresql://{who}@127.0.0.1:{port}/{DATABASE}"


@contextlib.contextmanager
def _running(command: list[str], home: Path, port: int, end: signal.Signals) -> Iterator[None]:
    account = server_account()
    if account is not None:
        for path in (home, *home.iterdir()):
            account.own(path)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - one that was found above
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=None if account is None else account.become,  # noqa: PLW1509 - it refuses root
        )
    try:
        _wait_for(port, process, home / "log")
        yield
    finally:
        process.send_signal(end)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _configuration(cluster: LocalCluster, who: str, port: int, home: Path, settings: tuple[str, ...]) -> str:
    sockets = cluster.socket_dir
    return "\n".join(
        [
            "[databases]",
            *(
                f"{name} = host={sockets} port={node.port} dbname={DATABASE} user={who}"
                for name, node in cluster.nodes.items()
            ),
            "[pgbouncer]",
            "listen_addr = 127.0.0.1",
            f"listen_port = {port}",
            "unix_socket_dir =",
            "auth_type = any",
            "pool_mode = transaction",
            "default_pool_size = 2",
            "server_login_retry = 0.1",
            f"pidfile = {home / 'pid'}",
            *(setting.format(home=home) for setting in settings),
            "",
        ]
    )


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(int(UP_WITHIN_S / 0.05)):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.05):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
            break
    pytest.fail(f"{process.args!r} did not come up: {log.read_text()}")


@contextlib.asynccontextmanager
async def shared_address(cluster: LocalCluster, *names: str) -> AsyncIterator[str]:
    """Run a proxy that gives each connection to the next one of these nodes; give the address that they share."""
    ports = cycle([cluster.node(name).port for name in names])
    pipes: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, to_there = await asyncio.open_unix_connection(cluster.socket_dir / f".s.PGSQL.{next(ports)}")
        except OSError:
            writer.close()
            return
        for source, target in ((reader, to_there), (there, writer)):
            task = asyncio.create_task(_pipe(source, target))
            pipes.add(task)
            task.add_done_callback(pipes.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"postgresql://{ROLES['monitor']}@127.0.0.1:{port}/{DATABASE}"
    finally:
        server.close()
        for task in pipes:
            task.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)


async def _pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        try:
            while data := await source.read(2**16):
                target.write(data)
                await target.drain()
        finally:
            target.close()
