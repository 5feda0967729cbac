"""One server of a local cluster: its directory, its process and the way in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import asyncpg

from rocket.cluster.configuration import FILE_NAME, server_configuration
from rocket.cluster.errors import NodeNotRunning, ServerFailedToStart
from rocket.cluster.installation import SUPERUSER
from rocket.cluster.process import KILL_LADDER, STOP_LADDER, ServerProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    import psutil

    from rocket.cluster.installation import Installation

START_TIMEOUT_S = 60.0
"""How long a server may take to answer: crash recovery of a kept directory is part of it."""

_POLL_S = 0.01
CONNECT_TIMEOUT_S = 5.0
_LOG_TAIL_LINES = 12

_log = logging.getLogger("rocket.cluster")


class Node:
    """A Postgres server with a name of its own, which it keeps whatever its role."""

    def __init__(self, name: str, home: Path, port: int, installation: Installation) -> None:
        self.name = name
        self.port = port
        self.home = home
        self.data_dir = home / "data"
        self.log_path = home / "server.log"
        self.half_mended = home / "half-mended"
        """There while its directory is rewound: what it then says of itself is not to be trusted."""
        self.wanted = False
        """Whether it should be up: a death is then unexpected."""
        self.suspect = False
        """Whether it may hold what the primary's history lacks: it is mended before it is started again."""
        self.unfit = False
        """Whether, being suspect, it is mended by a fresh copy, whatever its directory says of itself."""
        self.mended_on = 0
        """The timeline that it was last made fit for."""
        self.mending: str | None = None
        """What is being done to its directory, in a word."""
        self.frozen = False
        self.halted: dict[str, psutil.Process] = {}
        """Single processes that were halted, by kind, in a server that goes on otherwise."""
        self.apply_delay_ms = 0
        self.cut = False
        """Whether it is kept, as a replica, from its primary."""
        self.streamed: tuple[str, int] | None = None
        """The incarnation in which it was last seen to stream as a replica, and the timeline that it streamed."""
        self.up = asyncio.Event()
        """Set from the moment at which it answers until it is stopped or found dead."""
        self.process: ServerProcess | None = None
        self.installation = installation
        self._lock = asyncio.Lock()
        self.log_start = _size(self.log_path)
        """Where in `server.log` the present life of the server begins; what an earlier run left lies before."""

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

    def distrust(self, *, anew: bool) -> None:
        """Have it mended before it is started again; `anew`: by a fresh copy."""
        self.suspect = True
        self.unfit = self.unfit or anew

    async def start_again(self, primary_port: int, *, timeout_s: float = START_TIMEOUT_S) -> bool:
        """Do the same after a death, unless it was stopped or became suspect; tell whether it is up.

        It stays wanted when that fails, so that it can be tried again.
        """
        async with self._lock:
            due = self.wanted and not self.suspect
            if due:
                await self._launch(primary_port, timeout_s)
            return due

    async def _launch(self, primary_port: int, timeout_s: float) -> None:
        if self.pid is not None:
            return
        if self.suspect:
            raise ServerFailedToStart(
                f"{self.name} cannot be started before it is mended: it may not fit the primary"
            )
        lock_file = self.data_dir / "postmaster.pid"
        if lock_file.exists() and not lock_file.stat().st_size:
            # Left by a start that was killed before it could write its process id: Postgres would refuse it for
            # ever. Nothing runs here: what ran before is reaped and cleared up, and the directory is ours.
            lock_file.unlink()
        self.log_start = _size(self.log_path)
        # What became of the process of before says nothing of this start.
        self.up.clear()
        self.process = None
        try:
            self.configure(primary_port)
            process = await ServerProcess.spawn(
                self.installation.binaries.program("postgres"),
                self.data_dir,
                self.log_path,
                self.installation.account,
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

    def last_words(self) -> list[str]:
        """Return the last lines that its present life, or its last one, has logged."""
        with contextlib.suppress(OSError), self.log_path.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return ["(no log)"]

    def _log_tail(self) -> str:
        return "\n".join(f"    {line}" for line in self.last_words())

    def configure(self, primary_port: int) -> None:
        """Write its configuration file; a running server reads it at a reload."""
        path = self.data_dir / FILE_NAME
        draft = self.data_dir / f"{FILE_NAME}.new"  # a reload meets the whole file or the one before
        draft.write_text(
            server_configuration(
                name=self.name,
                major=self.installation.binaries.major,
                port=self.port,
                socket_dir=self.installation.socket_dir,
                primary_port=None if self.cut else primary_port,
                apply_delay_ms=self.apply_delay_ms,
            )
        )
        self.installation.own(draft)
        draft.rename(path)

    def reconfigure(self, primary_port: int) -> None:
        """Write its configuration file and have it read: soon, after a thaw, or at the next start."""
        if self.exists:
            self.configure(primary_port)
        if self.process is not None and self.up.is_set():  # earlier, SIGHUP would end it
            self.process.send(signal.SIGHUP)

    async def stop(self, ladder: Sequence[tuple[signal.Signals, float]] = STOP_LADDER) -> None:
        """Take it down and leave it down."""
        self.wanted = False  # at once, so that nobody starts it again while we wait for the lock
        async with self._lock:
            self.wanted = False
            await self.go_down(ladder)

    async def fence(self) -> None:
        """Take it down for certain, and keep it down until it has been mended; what it is wanted for stays.

        A halted server is killed without ever going on: it would accept what waits at its door.
        """
        self.suspect = True  # at once, as in `stop`
        if self.process is not None and not self.up.is_set():  # it is starting: nothing is lost by a crash
            self.process.kill_asked = True
            self.process.send_all(signal.SIGKILL)
        async with self._lock:
            await self.go_down()

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Keep everybody else from starting or stopping it."""
        async with self._lock:
            yield

    async def go_down(self, ladder: Sequence[tuple[signal.Signals, float]] = STOP_LADDER) -> None:
        """Take it down while it is held; a suspect one that is halted never goes on."""
        self.up.clear()
        if self.process is None:
            return
        if self.suspect and (self.frozen or self.process.is_halted()):
            self.process.send_all(signal.SIGKILL)
            ladder = KILL_LADDER
        else:
            self.thaw()
        self.process.taken_down = True
        await self.process.stop(ladder)
        self.frozen = False
        self.halted.clear()

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
                    self.halted.clear()
                    if self.wanted and not self.suspect and not process.taken_down:
                        return process

    def freeze(self) -> None:
        """Halt every process of the server: it keeps its connections and says nothing."""
        if self.process is None or self.pid is None:
            raise NodeNotRunning(f"{self.name} is not running")
        self.process.send_all(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """Let a frozen server go on, and single processes of it; one that became suspect meanwhile is killed."""
        if self.process is not None and self.frozen and self.suspect:
            self.process.kill_asked = True
            self.process.send_all(signal.SIGKILL)
        elif self.process is not None and (self.frozen or self.halted):
            self.process.send_all(signal.SIGCONT)
        self.frozen = False
        self.halted.clear()

    def kill(self) -> None:
        """Crash the whole server, as a power cut would."""
        if self.process is None or self.pid is None:
            raise NodeNotRunning(f"{self.name} is not running")
        self.process.kill_asked = True
        self.process.send_all(signal.SIGKILL)
        self.frozen = False

    # --- the way in ---

    async def connect(
        self, database: str = "postgres", *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> asyncpg.Connection[Any]:
        """Connect as the superuser over the private socket."""
        return await asyncpg.connect(
            host=str(self.installation.socket_dir),
            port=self.port,
            user=SUPERUSER,
            database=database,
            timeout=timeout_s,
            command_timeout=timeout_s,
            server_settings={"application_name": "rocket"},
        )

    def dsn(self, database: str) -> str:
        """Return the address of a database on this node, over the private socket."""
        host = quote(str(self.installation.socket_dir), safe="")
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={host}&port={self.port}"

    def tcp_dsn(self, database: str, password: str) -> str:
        """Return its address for those who cannot get to the private socket."""
        return (
            f"postgresql://{SUPERUSER}:{quote(password, safe='')}@127.0.0.1:{self.port}/{quote(database, safe='')}"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def ending(exit_code: int | None) -> str:
    """Say in words how a server's process ended."""
    if exit_code is not None and exit_code < 0:
        return f"by signal {-exit_code}, {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"
