"""Subprocesses that are never left running and never left unreaped."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from typing import IO, TYPE_CHECKING

import psutil

from rocket.cluster.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from rocket.cluster.account import Account

STOP_LADDER: Sequence[tuple[signal.Signals, float]] = (
    (
        signal.SIGINT,
        3.0,
    ),  # fast shutdown: ends sessions, writes a checkpoint. SIGTERM would wait for clients.
    (signal.SIGQUIT, 1.0),  # immediate shutdown: the next start recovers from the WAL
    (signal.SIGKILL, 5.0),  # cannot be refused; the bound is for the kernel
)
"""Signals that ask a server to stop, each harder than the one before, with the seconds that each is given."""

KILL_LADDER: Sequence[tuple[signal.Signals, float]] = ((signal.SIGKILL, 5.0),)
"""The same for a server that must not get to do anything any more."""

_PR_SET_PDEATHSIG = 1
_STEERING = ("PG", "PATRONI_", "ETCD_")


def _child_setup(account: Account | None, death_signal: signal.Signals) -> Callable[[], None]:
    """Return what a child does between fork and exec: change account, then follow its parent's death."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def setup() -> None:
        # uvloop lets the descriptors leak through that it made copies of: a server that outlives us would keep
        # the pipes of whoever started us open.
        for descriptor in os.listdir("/dev/fd"):  # noqa: PTH208 - between fork and exec, the less the better
            with contextlib.suppress(OSError):
                if int(descriptor) > 2:  # noqa: PLR2004 - standard error
                    os.set_inheritable(int(descriptor), False)
        if account is not None:
            account.become()
        if libc is not None:
            # After setuid, which clears it.
            libc.prctl(_PR_SET_PDEATHSIG, death_signal)
            if os.getppid() != parent:  # the parent died before the signal was armed
                os._exit(1)

    return setup


def _environment() -> dict[str, str]:
    """Return our environment less what would steer the programs behind our back, or have them translate."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_STEERING)}
    return {**kept, "LC_ALL": "C"}


async def spawn(
    arguments: Sequence[str | Path],
    account: Account | None,
    output: IO[bytes] | int,
    death_signal: signal.Signals = signal.SIGQUIT,
) -> asyncio.subprocess.Process:
    """Start a program in a session of its own, as `account`; on Linux our death sends it `death_signal`.

    For a Postgres server that is immediate shutdown: none waits for another one's farewell.
    """
    return await asyncio.create_subprocess_exec(
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        # The account may not be able to enter our working directory.
        cwd="/",
        env=_environment(),
        # The terminal's Ctrl-C is for us alone; we take the servers down in order.
        start_new_session=True,
        # uvloop refuses user= and group=.
        preexec_fn=_child_setup(account, death_signal),
    )


async def run_command(*arguments: str | Path, account: Account | None, timeout_s: float) -> str:
    """Run a program to its end and return what it printed.

    Raise `CommandFailed` with the tail of its output if it fails or takes longer than `timeout_s`, and
    `OSError` if it cannot be started at all.
    """
    process = await spawn(arguments, account, asyncio.subprocess.PIPE)
    program = os.path.basename(arguments[0])  # noqa: PTH119 - a str or a Path
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
    except TimeoutError:
        raise CommandFailed(f"{program} took longer than {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its session: initdb starts servers of its own
            await process.wait()
    text = output.decode(errors="replace")
    if process.returncode != 0:
        raise CommandFailed(f"{program} ended with exit code {process.returncode}:\n{text[-2000:].rstrip()}")
    return text


class ServerProcess:
    """One life of a Postgres server: its postmaster, and through that all its processes."""

    def __init__(self, process: asyncio.subprocess.Process, data_dir: Path) -> None:
        self.kill_asked = False
        """Whether its death was asked for, as a fault on demand."""
        self.taken_down = False
        """Whether its end is our own doing, and so no death."""
        self._process = process
        self._data_dir = data_dir
        self._cleared = False

    @classmethod
    async def spawn(cls, postgres: Path, data_dir: Path, log: Path, account: Account | None) -> ServerProcess:
        """Start `postgres` on a data directory; what it prints is appended to `log`."""
        with log.open("ab") as output:
            return cls(await spawn([postgres, "-D", data_dir], account, output), data_dir)

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative if a signal ended it, as in `subprocess`."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait until the postmaster has ended and nothing of its server is left; return its exit code."""
        exit_code = await self._process.wait()
        self._clear_up()
        return exit_code

    def send(self, number: signal.Signals) -> None:
        """Send the postmaster a signal; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def send_all(self, number: signal.Signals) -> None:
        """Send a signal to the postmaster and, after it, to every process of the server."""
        self.send(number)
        for process in server_processes(self._data_dir):
            if process.pid != self.pid:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)

    def is_halted(self) -> bool:
        """Tell whether somebody has halted the postmaster."""
        with contextlib.suppress(psutil.Error):
            return self.exit_code is None and psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        return False

    async def stop(self, ladder: Sequence[tuple[signal.Signals, float]] = STOP_LADDER) -> None:
        """Take the server down by the signals of `ladder`, and return when nothing of it is left."""
        try:
            for number, patience_s in ladder:
                if self.exit_code is not None:
                    break
                self.send(number)
                self.send(signal.SIGCONT)  # a halted one would take notice of nothing but SIGKILL
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await self.wait()
        finally:
            self.end()

    def end(self) -> None:
        """Kill whatever is left of the server, without waiting for it to be gone."""
        if self.exit_code is None:
            self.send(signal.SIGKILL)
            end_server_processes(self._data_dir)
        else:
            self._clear_up()

    def _clear_up(self) -> None:
        # A postmaster that did not end by itself leaves processes, and they hold the data directory.
        if self.exit_code and not self._cleared:
            end_server_processes(self._data_dir)
        self._cleared = True


def server_processes(data_dir: Path) -> Iterator[psutil.Process]:
    """Find the processes of the server that runs in `data_dir`: each has it as its working directory.

    The kernel's word, where `postmaster.pid` may name a process that took over a dead server's id.
    """
    wanted = str(data_dir)
    for process in psutil.process_iter(["name", "cwd"]):
        if process.info["cwd"] == wanted and "postgres" in (process.info["name"] or ""):
            yield process


def end_server_processes(data_dir: Path) -> list[int]:
    """Kill what is left of a server whose postmaster is gone or must go; return the ids."""
    ended = []
    for process in server_processes(data_dir):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            ended.append(process.pid)
    return ended
