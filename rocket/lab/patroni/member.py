"""One member of a local Patroni cluster: its configuration, its Patroni, and the Postgres that this runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg
import psutil
from asyncpg.connect_utils import SessionAttribute

from rocket.cluster.errors import NodeNotRunning, ServerFailedToStart
from rocket.cluster.process import end_server_processes, server_processes, spawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rocket.cluster.process import Account

# --- configuration ---

SCOPE = "rocket"
SUPERUSER, REPLICATOR, REST_USER = "postgres", "replicator", "rocket"
HOST = "127.0.0.1"
"""The only address at which anything listens."""

_DYNAMIC: dict[str, Any] = {
    "ttl": 20,  # seconds for which the leader's lock lives without being renewed; Patroni takes no less
    "loop_wait": 1,  # Patroni looks every second, so that what is done by hand shows soon
    "retry_timeout": 3,  # loop_wait + 2 * retry_timeout has to fit into the TTL
    "maximum_lag_on_failover": 16 * 2**20,
    "postgresql": {
        "use_pg_rewind": True,  # an old leader comes back as a replica
        "remove_data_directory_on_rewind_failure": True,  # or is cloned again
        "parameters": {
            "wal_log_hints": "on",  # what pg_rewind needs
            "wal_level": "replica",
            "wal_keep_size": "256MB",
            "max_connections": 100,
            "max_wal_senders": 10,
        },
    },
}
_PARAMETERS = {
    "shared_buffers": "32MB",  # three servers on one small machine
    "max_wal_size": "256MB",
    "dynamic_shared_memory_type": "mmap",  # what a killed server leaves is removed with its directory
    "wal_retrieve_retry_interval": "100ms",  # a replica finds the new leader at once
    "wal_receiver_timeout": "5s",
    "wal_receiver_status_interval": "1s",
    "wal_sender_timeout": "5s",
    "unix_socket_directories": "",  # connections are by TCP, with a password
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] ",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_NO_WORKERS = {"io_method": "sync"}  # no I/O workers beside each of three small servers
_IO_METHOD_SINCE = 18


@dataclass(frozen=True, slots=True)
class Passwords:
    """Random ones; each gives full control over its part of the cluster."""

    superuser: str
    replicator: str
    rest: str
    """Of the REST API's user `rocket`, for requests that change something."""


def member_configuration(
    *,
    name: str,
    home: Path,
    ports: tuple[int, int],
    etcd_port: int,
    bin_dir: Path,
    major: int,
    passwords: Passwords,
    tags: Mapping[str, bool],
    proxy_host: str | None = None,
) -> str:
    """Return the text of one member's configuration file: JSON, which is YAML.

    `ports` are those of its Postgres and its REST API. With a `proxy_host`, the other members reach it there, and
    it reaches etcd there.
    """
    port, rest_port = ports
    host = proxy_host or HOST
    return json.dumps(
        {
            "scope": SCOPE,
            "name": name,
            "log": {"dir": str(home), "file_num": 1, "level": "INFO"},
            "restapi": {
                "listen": f"{HOST}:{rest_port}",
                "connect_address": f"{host}:{rest_port}",
                "authentication": {"username": REST_USER, "password": passwords.rest},
            },
            "ctl": {"authentication": {"username": REST_USER, "password": passwords.rest}},
            # With a proxy, etcd is not asked for its own address, which would lead past the proxy.
            "etcd3": {"host": f"{host}:{etcd_port}", "use_proxies": proxy_host is not None},
            "bootstrap": {
                "dcs": _DYNAMIC,
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums", "no-sync"],
            },
            "postgresql": {
                "listen": f"{HOST}:{port}",
                "connect_address": f"{host}:{port}",
                "data_dir": str(home / "data"),
                "bin_dir": str(bin_dir),
                "pgpass": str(home / "pgpass"),
                "authentication": {
                    "superuser": {"username": SUPERUSER, "password": passwords.superuser},
                    "replication": {"username": REPLICATOR, "password": passwords.replicator},
                },
                "basebackup": [{"checkpoint": "fast"}, "no-sync"],  # a spread checkpoint takes minutes
                "pg_hba": [
                    f"host all all {HOST}/32 scram-sha-256",
                    f"host replication {REPLICATOR} {HOST}/32 scram-sha-256",
                ],
                "parameters": _PARAMETERS | (_NO_WORKERS if major >= _IO_METHOD_SINCE else {}),
            },
            "tags": dict(tags),
        },
        indent=1,
    )


# --- processes ---

_KILLED_TIMEOUT_S = 5.0
"""For a killed process to be gone: the kernel's part."""
_POLL_S = 0.02
_LOG_TAIL_BYTES = 3000

_log = logging.getLogger("rocket.patroni")


class Daemon:
    """A long-running program: etcd, or a member's Patroni."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str | Path],
        log_path: Path,
        account: Account | None,
        stop_timeout_s: float,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self.should_run = False
        """Whether its end would be unexpected."""
        self._arguments = arguments
        self._account = account
        self._stop_timeout_s = stop_timeout_s
        """How long it may take to end by SIGTERM."""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start it, unless it runs; raise `ServerFailedToStart` if it cannot be executed."""
        self.should_run = True
        if self.pid is not None:
            return
        try:
            with self.log_path.open("ab") as output:
                self._process = await spawn(self._arguments, self._account, output, signal.SIGTERM)
        except OSError as error:
            raise ServerFailedToStart(f"{self.name} could not be started: {error}") from None

    async def stop(self) -> None:
        """Stop it by SIGTERM, or by SIGKILL if that takes too long."""
        self.should_run = False
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            self.send(signal.SIGTERM)
            self.send(signal.SIGCONT)  # a halted process reacts to SIGKILL alone
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._stop_timeout_s):
                    await process.wait()
        finally:
            self.send(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILLED_TIMEOUT_S):
                await process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def send_all(self, number: signal.Signals) -> None:
        """Send a signal to it and its child processes; a member's Postgres is not one of them."""
        with contextlib.suppress(psutil.Error):
            children = [] if self.pid is None else psutil.Process(self.pid).children(recursive=True)
            for child in children:
                with contextlib.suppress(psutil.Error):
                    child.send_signal(number)
        self.send(number)

    def log_tail(self) -> str:
        """Return the end of its log."""
        with contextlib.suppress(OSError), self.log_path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
        return "(no log)"


class PatroniNode:
    """A member by name, whatever its role is."""

    def __init__(self, name: str, home: Path, ports: tuple[int, int], password: str, patroni: Daemon) -> None:
        self.name = name
        self.home = home
        self.data_dir = home / "data"
        self.patroni_log = home / "patroni.log"
        self.port, self.rest_port = ports
        self.url = f"http://{HOST}:{self.rest_port}"
        """Of its REST API."""
        self.patroni = patroni
        self._password = password

    async def start(self) -> None:
        """Start its Patroni, which starts its Postgres."""
        await self.patroni.start()

    async def stop(self) -> None:
        """Stop its Patroni, which stops its Postgres; kill what is left of either."""
        try:
            self.thaw_postgres()
            await self.patroni.stop()
        finally:
            await self.kill_postgres()

    async def kill(self) -> None:
        """Crash Patroni and Postgres, as a power cut would; both stay down until `start`."""
        self.patroni.should_run = False
        self.patroni.send_all(signal.SIGKILL)
        await self.kill_postgres()

    async def kill_postgres(self) -> None:
        """Kill the processes of its Postgres, and wait until they are gone."""
        deadline = time.monotonic() + _KILLED_TIMEOUT_S
        while end_server_processes(self.data_dir) and time.monotonic() < deadline:  # noqa: ASYNC110 - the kernel's
            await asyncio.sleep(_POLL_S)

    def freeze(self) -> None:
        """Halt Patroni first, so that it cannot react, and then every process of Postgres."""
        if self.patroni.pid is None:
            raise NodeNotRunning(f"{self.name} is not running")
        self.patroni.send_all(signal.SIGSTOP)
        self._send_postgres(signal.SIGSTOP)

    def thaw_postgres(self) -> None:
        """Let its Postgres go on, and its Patroni not yet."""
        self._send_postgres(signal.SIGCONT)

    def thaw(self) -> None:
        """Let both go on."""
        self.thaw_postgres()
        self.patroni.send_all(signal.SIGCONT)

    def _send_postgres(self, number: signal.Signals) -> None:
        for process in server_processes(self.data_dir):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    async def connect(self, database: str = "postgres", *, timeout_s: float = 5.0) -> asyncpg.Connection[Any]:
        """Connect as the superuser."""
        return await asyncpg.connect(
            host=HOST,
            port=self.port,
            user=SUPERUSER,
            password=self._password,
            database=database,
            timeout=timeout_s,
            command_timeout=timeout_s,
            ssl=False,
            target_session_attrs=SessionAttribute.any,
            server_settings={"application_name": "rocket"},
        )
