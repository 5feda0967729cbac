"""One member of a local Patroni cluster: its Patroni, the Postgres that this runs, and the way in."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any

import asyncpg
import psutil

from rocket.cluster.errors import NodeNotRunning
from rocket.cluster.process import end_server_processes, server_processes
from rocket.lab.patroni.configuration import HOST, SUPERUSER

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.lab.patroni.daemon import Daemon

_GONE_S = 5.0
_POLL_S = 0.02
_CONNECT_S = 5.0


class PatroniNode:
    """A member by name, whatever its role is."""

    def __init__(self, name: str, home: Path, ports: tuple[int, int], password: str, patroni: Daemon) -> None:
        self.name = name
        self.home = home
        self.data_dir = home / "data"
        self.patroni_log = home / "patroni.log"
        self.port, self.rest_port = ports
        self.url = f"http://{HOST}:{self.rest_port}"
        self.patroni = patroni
        self._password = password

    # --- its life ---

    async def start(self) -> None:
        """Start its Patroni, which starts its Postgres."""
        await self.patroni.start()

    async def stop(self) -> None:
        """Have its Patroni stop Postgres and end; nothing of either is left."""
        try:
            self.thaw_postgres()
            await self.patroni.stop()
        finally:
            await self.end_postgres()

    async def kill(self) -> None:
        """Crash Patroni and Postgres, as a power cut would; both stay down until `start`."""
        self.patroni.wanted = False
        self.patroni.send_all(signal.SIGKILL)
        await self.end_postgres()

    async def end_postgres(self) -> None:
        """Kill what is left of its Postgres, and wait until that is gone."""
        deadline = time.monotonic() + _GONE_S
        while end_server_processes(self.data_dir) and time.monotonic() < deadline:  # noqa: ASYNC110 - the kernel's
            await asyncio.sleep(_POLL_S)

    def freeze(self) -> None:
        """Halt Patroni first, so that it sees nothing of it, and then every process of Postgres."""
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
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    # --- the way in ---

    async def connect(
        self, database: str = "postgres", *, timeout_s: float = _CONNECT_S
    ) -> asyncpg.Connection[Any]:
        """Connect as the superuser."""
        return await asyncpg.connect(
            host=HOST,
            port=self.port,
            user=SUPERUSER,
            password=self._password,
            database=database,
            timeout=timeout_s,
            command_timeout=timeout_s,
            server_settings={"application_name": "rocket"},
        )
