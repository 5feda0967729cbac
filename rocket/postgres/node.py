"""One server of a local cluster: its directory, its process and the way in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import asyncpg

from rocket.errors import NodeNotRunning, ServerFailedToStart
from rocket.postgres.configuration import FILE_NAME, server_configuration
from rocket.postgres.process import STOP_LADDER, ServerProcess, run_command

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rocket.postgres.account import Account
    from rocket.postgres.binaries import Binaries

SUPERUSER = "postgres"
START_TIMEOUT_S = 60.0
"""How long a server may take to answer: crash recovery of a kept directory is part of it."""

_INITDB_TIMEOUT_S = 60.0
_CLONE_TIMEOUT_S = 300.0  # a kept directory may be large
_POLL_S = 0.01
_CONNECT_TIMEOUT_S = 5.0
_LOG_TAIL_LINES = 12

_log = logging.getLogger("rocket.cluster")


@dataclass(frozen=True, slots=True)
class Installation:
    """What all nodes of a cluster share on this machine."""

    binaries: Binaries
    account: Account | None
    """Owns the directories and runs the servers; None: we do ourselves."""
    socket_dir: Path


class Node:
    """A Postgres server with a name of its own, which it keeps whatever its role."""

    def __init__(self, name: str, home: Path, port: int, installation: Installation) -> None:
        self.name = name
        self.port = port
        self.home = home
        self.data_dir = home / "data"
        self.log_path = home / "server.log"
        self.wanted = False
        """Whether it should be up: a death is then unexpected."""
        self.frozen = False
        self.apply_delay_ms = 0
        self.up = asyncio.Event()
        """Set from the moment at which it answers until it is stopped or found dead."""
        self.process: ServerProcess | None = None
        self._installation = installation
        self._lock = asyncio.Lock()
        self.log_start = 0
        """Where in `server.log` the present life of the server begins."""

    @property
    def exists(self) -> bool:
        """Whether its data directory has been made."""
        return self.data_dir.is_dir()

    @property
    def is_replica(self) -> bool:
        """Whether it is told to follow another node, as its directory has it."""
        return (self.data_dir / "standby.signal").exists()

    @property
    def pid(self) -> int | None:
        """The postmaster's id while it runs."""
        return self.process.pid if self.process is not None and self.process.exit_code is None else None

    # --- its directory ---

    async def init(self, password_file: Path) -> None:
        """Make a new database cluster in its directory: one with a system identifier of its own."""
        fresh = await self._fresh_dir()
        await run_command(
            self._installation.binaries.program("initdb"),
            f"--pgdata={fresh}",
            f"--username={SUPERUSER}",
            f"--pwfile={password_file}",
            "--auth-local=trust",  # whoever gets into the 0700 socket directory is us
            "--auth-host=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",  # the first checkpoint writes it out
            account=self._installation.account,
            timeout_s=_INITDB_TIMEOUT_S,
        )
        with (fresh / "postgresql.conf").open("a") as file:
            file.write(f"\ninclude '{FILE_NAME}'\n")
        fresh.rename(self.data_dir)

    async def clone(self, source: Node) -> None:
        """Make its directory a copy of a *stopped* node's, as a replica of it.

        Far cheaper than a base backup of a running server (design fact F7).
        """
        fresh = await self._fresh_dir()
        await run_command(
            "cp", "-a", f"{source.data_dir}/.", fresh,
            account=self._installation.account, timeout_s=_CLONE_TIMEOUT_S,
        )  # fmt: skip
        (fresh / "postmaster.pid").unlink(missing_ok=True)  # of a source that was killed
        (fresh / "standby.signal").touch()
        fresh.rename(self.data_dir)

    async def back_up(self, source: Node) -> None:
        """Make its directory anew as a base backup of a *running* node; it must be stopped itself.

        Raise `CommandFailed` if that fails: the old directory is then as it was.
        """
        fresh = await self._fresh_dir()
        await run_command(
            self._installation.binaries.program("pg_basebackup"),
            f"--pgdata={fresh}",
            f"--host={self._installation.socket_dir}",
            f"--port={source.port}",
            f"--username={SUPERUSER}",
            "--checkpoint=fast",
            "--wal-method=stream",
            "--no-sync",
            account=self._installation.account,
            timeout_s=_CLONE_TIMEOUT_S,
        )
        (fresh / "standby.signal").touch()
        await asyncio.to_thread(shutil.rmtree, self.data_dir)
        fresh.rename(self.data_dir)

    async def _fresh_dir(self) -> Path:
        """Return an empty directory that becomes the data directory only when it is complete."""
        self._make_dir(self.home)
        fresh = self.home / "data.new"
        if fresh.exists():  # a start that was cut off
            await asyncio.to_thread(shutil.rmtree, fresh)
        self._make_dir(fresh)
        return fresh

    def _make_dir(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        if (account := self._installation.account) is not None:
            account.own(directory)

    # --- its life ---

    async def start(self, primary_port: int, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it and wait until it takes connections; nothing happens if it runs.

        Raise `ServerFailedToStart`, with the tail of its log, as soon as it dies or when `timeout_s` is over.
        It is then left down.
        """
        async with self._lock:
            self.wanted = True
            try:
                await self._launch(primary_port, timeout_s)
            except BaseException:
                self.wanted = False
                raise

    async def start_again(self, primary_port: int, *, timeout_s: float = START_TIMEOUT_S) -> bool:
        """Do the same after a death, unless it was stopped meanwhile; tell whether it is up.

        It stays wanted when that fails, so that it can be tried again.
        """
        async with self._lock:
            if self.wanted:
                await self._launch(primary_port, timeout_s)
            return self.wanted

    async def _launch(self, primary_port: int, timeout_s: float) -> None:
        if self.pid is not None:
            return
        lock_file = self.data_dir / "postmaster.pid"
        if lock_file.exists() and not lock_file.stat().st_size:
            # Left by a start that was killed before it could write its process id: Postgres would refuse it for
            # ever. Nothing runs here: what ran before is reaped and cleared up, and the directory is ours.
            lock_file.unlink()
        self.configure(primary_port)
        self.log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        try:
            process = await ServerProcess.spawn(
                self._installation.binaries.program("postgres"),
                self.data_dir,
                self.log_path,
                self._installation.account,
            )
        except OSError as error:
            raise ServerFailedToStart(f"{self.name} could not be started: {error}") from None
        self.process = process
        try:
            async with asyncio.timeout(timeout_s):
                answers = await self._answers(process)
        except TimeoutError:
            await process.stop()
            raise ServerFailedToStart(
                f"{self.name} did not answer within {timeout_s:g} s:\n{self._log_tail()}"
            ) from None
        except BaseException:
            await process.stop()
            raise
        if not answers:
            raise ServerFailedToStart(
                f"{self.name} died while starting ({ending(process.exit_code)}):\n{self._log_tail()}"
            )
        self.up.set()

    async def _answers(self, process: ServerProcess) -> bool:
        """Try to connect until it works (True) or the process has died (False)."""
        while process.exit_code is None:
            try:
                connection = await self.connect()
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
                await asyncio.sleep(_POLL_S)
                continue
            connection.terminate()
            return True
        return False

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError), self.log_path.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode(errors="replace").splitlines()
            return "\n".join(f"    {line}" for line in lines[-_LOG_TAIL_LINES:])
        return "    (no log)"

    def configure(self, primary_port: int) -> None:
        """Write its configuration file; a running server reads it at a reload."""
        path = self.data_dir / FILE_NAME
        path.write_text(
            server_configuration(
                name=self.name,
                major=self._installation.binaries.major,
                port=self.port,
                socket_dir=self._installation.socket_dir,
                primary_port=primary_port,
                apply_delay_ms=self.apply_delay_ms,
            )
        )
        if (account := self._installation.account) is not None:
            account.own(path)

    async def stop(self, ladder: Sequence[tuple[signal.Signals, float]] = STOP_LADDER) -> None:
        """Take it down and leave it down."""
        self.wanted = False  # at once, so that nobody starts it again while we wait for the lock
        async with self._lock:
            self.wanted = False
            self.up.clear()
            if self.process is not None:
                self.thaw()
                await self.process.stop(ladder)

    async def died(self) -> ServerProcess:
        """Wait for the death of its process that no `stop` has asked for, and return that process."""
        while True:
            await self.up.wait()
            process = self.process
            assert process is not None  # noqa: S101 - up says so
            await process.wait()
            # The lock: a stop or restart that brought this about is through, and has said what is wanted.
            async with self._lock:
                if self.process is process:
                    self.up.clear()
                    if self.wanted:
                        return process

    def freeze(self) -> None:
        """Halt every process of the server: it keeps its connections and says nothing."""
        if self.process is None or self.pid is None:
            raise NodeNotRunning(f"{self.name} is not running")
        self.process.send_all(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """Let a frozen server go on."""
        if self.frozen and self.process is not None:
            self.process.send_all(signal.SIGCONT)
        self.frozen = False

    def kill(self) -> None:
        """Crash the whole server, as a power cut would."""
        if self.process is None or self.pid is None:
            raise NodeNotRunning(f"{self.name} is not running")
        self.process.kill_asked = True
        self.process.send_all(signal.SIGKILL)
        self.frozen = False

    # --- the way in ---

    async def connect(
        self, database: str = "postgres", *, timeout_s: float = _CONNECT_TIMEOUT_S
    ) -> asyncpg.Connection[Any]:
        """Connect as the superuser over the private socket."""
        return await asyncpg.connect(
            host=str(self._installation.socket_dir),
            port=self.port,
            user=SUPERUSER,
            database=database,
            timeout=timeout_s,
            command_timeout=timeout_s,
            server_settings={"application_name": "rocket"},
        )

    def dsn(self, database: str) -> str:
        """Return the address of a database on this node, over the private socket."""
        host = quote(str(self._installation.socket_dir), safe="")
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={host}&port={self.port}"


def ending(exit_code: int | None) -> str:
    """Say in words how a server's process ended."""
    if exit_code is not None and exit_code < 0:
        return f"by signal {-exit_code}, {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"
