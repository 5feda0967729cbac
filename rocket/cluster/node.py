"""One server of a local cluster: its state, the faults in force on it, and its address."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from enum import Enum, IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

import asyncpg

from rocket.cluster.datadir import NodeDirectory
from rocket.cluster.errors import NodeFrozen, NodeNotRunning, ServerFailedToStart
from rocket.cluster.process import KILL_LADDER, STOP_LADDER, ServerProcess, describe_exit
from rocket.cluster.server import CONNECT_TIMEOUT_S, LOST, Server
from rocket.errors import describe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from rocket.cluster.binaries import Installation

START_TIMEOUT_S = 60.0
"""How long a server may take to answer: crash recovery of a kept directory is part of it."""
PATIENCE_S = 10.0
"""How long a replica that follows may let no client in before it counts as recovering, and is left to it."""
_POLL_S = 0.01
_ASK_S = 0.2
_log = logging.getLogger("rocket.cluster")


class NodeState(StrEnum):
    """What a node is doing, in the words of `status`."""

    STOPPED = "stopped"
    """Down, until it is started."""
    STARTING = "starting"
    RECOVERING = "recovering"
    """A replica that follows, and lets no client in until its primary allows for it (design fact F16)."""
    UP = "up"
    """It has answered."""
    STOPPING = "stopping"
    RESTARTING = "restarting"
    """Down, and to be started again: it crashed, or it was fenced."""
    TRIMMING = "trimming"
    """Down, while its directory is made to fit the primary: by removing surplus WAL, ..."""
    REWINDING = "rewinding"
    """... by pg_rewind, ..."""
    CLONING = "cloning"
    """... or by a fresh copy."""
    GIVEN_UP = "given up"
    """Down, since it did not come up or kept dying; `start` and `heal` try again."""


_RUNNING = {NodeState.STARTING, NodeState.RECOVERING, NodeState.UP, NodeState.STOPPING}
_DOWN = {NodeState.STOPPED, NodeState.RESTARTING, NodeState.GIVEN_UP}
_REJOINING = {NodeState.TRIMMING, NodeState.REWINDING, NodeState.CLONING}
_FROM: Mapping[NodeState, set[NodeState]] = {
    NodeState.STARTING: _DOWN,
    NodeState.RECOVERING: {NodeState.STARTING},
    NodeState.UP: {NodeState.STARTING, NodeState.RECOVERING},
    NodeState.STOPPING: {NodeState.STARTING, NodeState.RECOVERING, NodeState.UP},
    NodeState.TRIMMING: _DOWN,
    NodeState.REWINDING: _DOWN,
    # Where trimming or rewinding fails, too.
    NodeState.CLONING: _DOWN | _REJOINING,
}
"""The states from which each may be entered. A node is down as soon as its process has ended."""


class Fitness(IntEnum):
    """Whether the directory of a node may follow the present primary as it is."""

    FIT = 0
    SUSPECT = 1
    """It may hold WAL that the primary's history lacks: it has to rejoin before it is started again."""
    UNFIT = 2
    """The same, and only a fresh copy will do, whatever it says of itself."""


class Fault(Enum):
    """A fault that is in force on a node until it is undone."""

    FROZEN = "frozen"
    """All its processes are halted; ends with the server."""
    STARTUP_HALTED = "startup"
    """The process that replays is halted; ends with the server."""
    WALRECEIVER_HALTED = "walreceiver"
    """The process that receives WAL is halted; ends with the server."""
    CUT = "cut"
    """Kept from its primary, also after a restart."""
    DELAYED = "delayed"
    """Applies each commit late, by that many milliseconds, also after a restart."""


_ENDS_WITH_SERVER = (Fault.FROZEN, Fault.STARTUP_HALTED, Fault.WALRECEIVER_HALTED)


class Node(Server):
    """A Postgres server with a name of its own, which it keeps whatever its role.

    Its state, whether it is wanted, its fitness and the faults on it change by its methods alone.
    """

    def __init__(
        self, name: str, home: Path, port: int, installation: Installation, *, patience_s: float = PATIENCE_S
    ) -> None:
        super().__init__(name, port, installation)
        self.patience_s = patience_s
        self.directory = NodeDirectory(home, installation)
        self.home = home
        self.data_dir = self.directory.data
        self.log_path = self.directory.log
        self.up = asyncio.Event()
        """Set from the moment at which it answers until it is stopped or found dead."""
        self.log_start = self.directory.log_size
        """Where in `server.log` the present run of the server begins; earlier ones lie before."""
        self._running = asyncio.Event()
        """The same from the moment at which its start is over: it is up, or recovering."""
        self._process: ServerProcess | None = None
        self._state = NodeState.STOPPED
        self._wanted = False
        self._given_up = False
        self._fitness = Fitness.FIT
        self._rejoined_on = 0
        self._faults: dict[Fault, Any] = {}
        self._lock = asyncio.Lock()

    # --- its state ---

    @property
    def state(self) -> NodeState:
        """What it is doing now: it is down as soon as its process has ended, whether that was noticed or not."""
        if self._state in _REJOINING or (self._state in _RUNNING and self.pid is not None):
            return self._state
        if self._wanted:
            return NodeState.RESTARTING
        return NodeState.GIVEN_UP if self._given_up else NodeState.STOPPED

    @property
    def recovering(self) -> bool:
        """Whether it follows, and lets no client in."""
        return self.state is NodeState.RECOVERING

    @property
    def wanted(self) -> bool:
        """Whether it should be up: if it dies, it is started again."""
        return self._wanted

    @property
    def process(self) -> ServerProcess | None:
        """Its server's process: the present one, or the last."""
        return self._process

    @property
    def pid(self) -> int | None:
        """The postmaster's id while it runs."""
        return self._process.pid if self._process is not None and self._process.exit_code is None else None

    @property
    def exists(self) -> bool:
        """Whether its data directory has been made."""
        return self.directory.exists

    @property
    def is_replica(self) -> bool:
        """Whether its directory says that it follows another node."""
        return self.directory.is_replica

    def enter(self, state: NodeState) -> None:
        """Change the state; raise `RuntimeError` where that cannot follow the present one."""
        if self.state not in _FROM.get(state, ()):
            raise RuntimeError(f"{self.name} cannot become {state} while it is {self.state}")
        self._state = state
        (self.up.set if state is NodeState.UP else self.up.clear)()
        (self._running.set if state in {NodeState.UP, NodeState.RECOVERING} else self._running.clear)()

    def _settle(self) -> None:
        """Notice that its process has ended; faults of the process end with it."""
        if self.pid is None:
            self.up.clear()
            self._running.clear()
            self._state = NodeState.STOPPED
            for fault in _ENDS_WITH_SERVER:
                self._faults.pop(fault, None)

    # --- whether its directory fits ---

    @property
    def suspect(self) -> bool:
        """Whether it has to rejoin before it is started again."""
        return self._fitness is not Fitness.FIT

    @property
    def unfit(self) -> bool:
        """Whether it has to rejoin by a fresh copy."""
        return self._fitness is Fitness.UNFIT

    @property
    def rejoined_on(self) -> int:
        """The primary's timeline when it last rejoined; 0 if it never did."""
        return self._rejoined_on

    def distrust(self, *, unfit: bool = False) -> None:
        """Have it rejoin before it is started again; `unfit`: by a fresh copy."""
        self._fitness = max(self._fitness, Fitness.UNFIT if unfit else Fitness.SUSPECT)

    def trust(self, rejoined_on: int | None = None) -> None:
        """Let it be started as it is, perhaps since it has rejoined on a timeline."""
        self._fitness = Fitness.FIT
        if rejoined_on is not None:
            self._rejoined_on = rejoined_on

    # --- faults ---

    @property
    def faults(self) -> frozenset[Fault]:
        """The faults in force."""
        return frozenset(self._faults)

    @property
    def frozen(self) -> bool:
        """Whether all its processes are halted."""
        return Fault.FROZEN in self._faults

    @property
    def halted(self) -> bool:
        """Whether all its processes are halted, or one that replicates."""
        return any(fault in self._faults for fault in _ENDS_WITH_SERVER)

    @property
    def cut(self) -> bool:
        """Whether it is kept, as a replica, from its primary."""
        return Fault.CUT in self._faults

    @property
    def apply_delay_ms(self) -> int:
        """How late it applies each commit as a replica."""
        return int(self._faults.get(Fault.DELAYED, 0))

    def impose(self, fault: Fault, value: Any = True) -> None:
        """Note a fault as in force; a `value` of 0 lifts it.

        Raise `NodeNotRunning` for one that needs a running server where there is none, and `NodeFrozen` where that
        is halted already.
        """
        if fault in _ENDS_WITH_SERVER:
            if self.pid is None:
                raise NodeNotRunning(f"{self.name} is not running")
            if fault is not Fault.FROZEN and fault in self._faults:
                raise NodeFrozen(f"the {fault.value} process of {self.name} is halted already")
        if value:
            self._faults[fault] = value
        else:
            self.lift(fault)

    def lift(self, fault: Fault) -> Any:
        """Note a fault as undone; return its value, or None if it was not in force."""
        return self._faults.pop(fault, None)

    def freeze(self) -> None:
        """Halt every process of the server: it keeps its connections and says nothing."""
        self.impose(Fault.FROZEN)
        assert self._process is not None  # noqa: S101 - it runs
        self._process.send_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server and halted processes of it continue; one that became suspect meanwhile is killed."""
        if self._process is not None and self.frozen and self.suspect:
            self._process.kill()
        elif self._process is not None and self.halted:
            self._process.send_all(signal.SIGCONT)
        for fault in _ENDS_WITH_SERVER:
            self.lift(fault)

    def kill(self) -> None:
        """Crash the whole server, as a power cut would; raise `NodeNotRunning`."""
        if self._process is None or self.pid is None:
            raise NodeNotRunning(f"{self.name} is not running")
        self._process.kill()
        self.lift(Fault.FROZEN)

    # --- start and stop ---

    async def start(self, upstream_port: int, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it and wait until it takes connections, or is recovering; nothing happens if it runs.

        Raise `ServerFailedToStart`, with the tail of its log, as soon as it dies or when `timeout_s` is over.
        It is then stopped.
        """
        async with self._lock:
            self._wanted = True
            try:
                await self._launch(upstream_port, timeout_s)
            except BaseException:
                self._wanted = False
                raise
            self._given_up = False

    async def start_again(self, upstream_port: int, *, timeout_s: float = START_TIMEOUT_S) -> bool:
        """Start it after a crash, unless it was stopped or became suspect since; return whether it was wanted.

        Raise `ServerFailedToStart`; it stays wanted then, so that it can be tried again.
        """
        async with self._lock:
            due = self._wanted and not self.suspect
            if due:
                await self._launch(upstream_port, timeout_s)
            return due

    async def _launch(self, upstream_port: int, timeout_s: float) -> None:
        if self.pid is not None:
            return
        if self.suspect:
            raise ServerFailedToStart(
                f"{self.name} may not fit the primary: it has to rejoin before it is started"
            )
        lock_file = self.data_dir / "postmaster.pid"
        if lock_file.exists() and not lock_file.stat().st_size:
            # Left by a start that was killed before it could write its process id: Postgres would never accept
            # it. Nothing runs here: the server before is reaped and cleared up, and the directory is ours.
            lock_file.unlink()
        await self.directory.clear_after_kill()
        self._settle()
        self.log_start = self.directory.log_size
        self._process = None  # the end of the process before says nothing about this start
        try:
            self.configure(upstream_port)
            process = await ServerProcess.spawn(
                self.installation.binaries.program("postgres"),
                self.data_dir,
                self.log_path,
                self.installation.account,
            )
        except OSError as error:
            raise ServerFailedToStart(f"{self.name} could not be started: {error}") from None
        self.enter(NodeState.STARTING)
        self._process = process
        try:
            async with asyncio.timeout(timeout_s):
                state = await self._first_state(process, upstream_port)
        except TimeoutError:
            await process.stop()
            raise ServerFailedToStart(
                f"{self.name} did not answer within {timeout_s:g} s:\n{self.directory.log_tail(self.log_start)}"
            ) from None
        except BaseException:
            await process.stop()
            raise
        if state is None or process.exit_code is not None:
            raise ServerFailedToStart(
                f"{self.name} died while starting ({describe_exit(process.exit_code)}):\n"
                f"{self.directory.log_tail(self.log_start)}"
            )
        self.enter(state)
        if self.recovering:
            _log.warning("%s %s", self.name, self.outlook)

    async def _first_state(self, process: ServerProcess, upstream_port: int) -> NodeState | None:
        """Wait until it takes connections or is certainly recovering; return None if the process has ended.

        It is recovering, and no start would get further, if its patience is over and it gets WAL, or cannot: its
        primary does not answer, or it is cut from that.
        """
        patient_until, pause_s = time.monotonic() + self.patience_s, _POLL_S
        while process.exit_code is None:
            if await self.lets_in():
                return NodeState.UP
            if self.refusal and self.is_replica and time.monotonic() >= patient_until:
                if self.cut or await self.is_sent_wal(upstream_port):
                    return NodeState.RECOVERING
                pause_s = _ASK_S
            await asyncio.sleep(pause_s)
        return None

    async def look_again(self) -> None:
        """Notice that a replica that was recovering takes connections now."""
        process = self._process
        lets_in = self.recovering and await self.lets_in()
        if lets_in and self.recovering and self._process is process:  # it is the same still
            self.enter(NodeState.UP)
            _log.info("%s lets clients in again", self.name)

    @property
    def outlook(self) -> str:
        """What to say of it after a start."""
        return f"follows, and lets no client in yet ({self.refusal})" if self.recovering else "is up"

    def give_up(self) -> None:
        """Leave it down until it is started by hand."""
        self._wanted, self._given_up = False, True

    async def stop(self, ladder: Sequence[tuple[signal.Signals, float]] = STOP_LADDER) -> None:
        """Stop it, and leave it down until it is started."""
        self._wanted = self._given_up = False  # at once: nothing starts it again while this waits for the lock
        async with self._lock:
            self._wanted = False
            await self.go_down(ladder)

    def force_stop(self) -> None:
        """Begin an immediate shutdown, and leave it down; the next start recovers from the WAL."""
        self._wanted = False
        if self._process is not None:
            self.thaw()
            self._process.send(signal.SIGQUIT)

    async def fence(self) -> None:
        """Stop it for certain, and keep it down until it has rejoined; it stays wanted if it was.

        A halted server is killed without ever continuing, and executing what its clients have sent meanwhile.
        """
        self.distrust()  # at once, as in `stop`
        if self._process is not None and not self.up.is_set():  # it is starting: nothing is lost by a crash
            self._process.kill()
        async with self._lock:
            await self.go_down()

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Keep other tasks from starting or stopping it."""
        async with self._lock:
            try:
                yield
            finally:
                self._settle()

    async def go_down(self, ladder: Sequence[tuple[signal.Signals, float]] = STOP_LADDER) -> None:
        """Stop it while it is held; a suspect one that is halted never continues."""
        process = self._process
        if process is None:
            return
        if self.state in _FROM[NodeState.STOPPING]:
            self.enter(NodeState.STOPPING)
        if self.suspect and (self.frozen or process.is_halted()):
            process.send_all(signal.SIGKILL)
            ladder = KILL_LADDER
        else:
            self.thaw()
        await process.stop(ladder)
        self._settle()

    async def died(self) -> ServerProcess:
        """Wait until its server ends without having been stopped or fenced; return that process."""
        while True:
            await self._running.wait()
            process = self._process
            assert process is not None  # noqa: S101 - it runs
            await process.wait()
            # The lock: a stop or restart that brought this about has come to its end.
            async with self._lock:
                if self._process is process:
                    self._settle()
                    if self._wanted and not self.suspect and not process.stop_asked:
                        return process

    def reconfigure(self, upstream_port: int) -> None:
        """Write its configuration file and have it read: soon, after a thaw, or at the next start."""
        if self.exists:
            self.configure(upstream_port)
        if self._process is not None and self._running.is_set():  # earlier, SIGHUP would end it
            self._process.send(signal.SIGHUP)

    def configure(self, upstream_port: int) -> None:
        """Write its configuration file, for a reload or the next start."""
        self.directory.configure(
            name=self.name,
            port=self.port,
            upstream_port=None if self.cut else upstream_port,
            apply_delay_ms=self.apply_delay_ms,
        )

    def log_lines(self) -> list[str]:
        """Return the last lines that the present or last run of its server has logged."""
        return self.directory.log_lines(self.log_start)

    # --- for those who ask ---

    @contextlib.asynccontextmanager
    async def connected(self, timeout_s: float = CONNECT_TIMEOUT_S) -> AsyncIterator[asyncpg.Connection[Any]]:
        """Connect for as long as the context lasts; raise `NodeNotRunning` if it does not answer, or no longer."""
        if self.pid is None or self.frozen:
            raise NodeNotRunning(f"{self.name} is {self.describe_state()}")
        try:
            connection = await self.connect(timeout_s=timeout_s)
        except LOST as error:
            raise NodeNotRunning(f"{self.name} does not answer: {describe(error)}") from None
        try:
            yield connection
        except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            raise NodeNotRunning(f"{self.name} no longer answers: {describe(error)}") from None
        finally:
            connection.terminate()

    def describe_state(self) -> str:
        """Return its state in a word, as `status` shows it."""
        return "frozen" if self.frozen and self.pid is not None else self.state
