"""Subprocesses that are never left running and never left unreaped, and what killed servers leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import pwd
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import psutil

from rocket.cluster.errors import CommandFailed
from rocket.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_CANDIDATES = ("postgres", "nobody")
"""Existing unprivileged accounts that root runs the servers as, the best first."""

STOP_LADDER: Sequence[tuple[signal.Signals, float]] = (
    # Fast shutdown: ends sessions and writes a checkpoint. SIGTERM would wait for clients.
    (signal.SIGINT, 3.0),
    # Immediate shutdown: the next start recovers from the WAL.
    (signal.SIGQUIT, 1.0),
    # Cannot be refused; the bound is for the kernel.
    (signal.SIGKILL, 5.0),
)
"""Signals that ask a server to stop, each harder than the one before, and the seconds that each is given."""

KILL_LADDER: Sequence[tuple[signal.Signals, float]] = ((signal.SIGKILL, 5.0),)
"""For a server that must not execute another instruction."""

DETACH_TIMEOUT_S = 2.0
"""For processes that were just killed to be gone from their shared memory."""

_PR_SET_PDEATHSIG = 1
_IPC_RMID = 0
_POLL_S = 0.01
_CONFIGURING = ("PG", "PATRONI_", "ETCD_")
"""Prefixes of environment variables by which the programs would take settings other than ours."""


_log = logging.getLogger("rocket.cluster")


@dataclass(frozen=True, slots=True)
class Account:
    """An unprivileged account, since Postgres refuses to run as root."""

    name: str
    uid: int
    gid: int

    def become(self) -> None:
        """Turn this process into the account's, for good. Only for a child between fork and exec."""
        os.setgroups([])
        os.setgid(self.gid)
        os.setuid(self.uid)

    def own(self, path: Path) -> None:
        """Make the account the owner of a file or directory, not of what is in it."""
        os.chown(path, self.uid, self.gid)

    def can_enter(self, directory: Path) -> bool:
        """Return whether the account may pass through every directory on the way to, and into, this one."""
        for step in (directory, *directory.parents):
            status = step.stat()
            if status.st_uid == self.uid:
                needed = stat.S_IXUSR
            elif status.st_gid == self.gid:
                needed = stat.S_IXGRP
            else:
                needed = stat.S_IXOTH
            if not status.st_mode & needed:
                return False
        return True


def server_account() -> Account | None:
    """Return the account that servers must run as, or None where that is this process's own.

    Raise `SetupError` as root on a machine that has no unprivileged account known here.
    """
    if os.geteuid() != 0:
        return None
    for name in _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise SetupError(
        f"Postgres does not run as root, and there is no account {' or '.join(_CANDIDATES)} to run it as: "
        "run rocket as an ordinary user"
    )


def _child_setup(account: Account | None, death_signal: signal.Signals) -> Callable[[], None]:
    """Return what a child runs between fork and exec: it changes account and arms the parent-death signal."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def setup() -> None:
        # uvloop duplicates descriptors and leaves the copies inheritable: a server that outlives this program
        # would keep the pipes of its caller open.
        for descriptor in os.listdir("/dev/fd"):  # noqa: PTH208 - as little as possible between fork and exec
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
    """Return this process's environment without variables that configure the programs, in the C locale."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_CONFIGURING)}
    return {**kept, "LC_ALL": "C"}


async def spawn(
    arguments: Sequence[str | Path],
    account: Account | None,
    output: IO[bytes] | int,
    death_signal: signal.Signals = signal.SIGQUIT,
) -> asyncio.subprocess.Process:
    """Start a program in a session of its own, as `account`; on Linux it gets `death_signal` when we die.

    The default means immediate shutdown to a Postgres server: none of them waits for another to disconnect.
    """
    return await asyncio.create_subprocess_exec(
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        # The account may not be able to enter our working directory.
        cwd="/",
        env=_environment(),
        # Ctrl-C in a terminal goes to this program alone, which stops the servers in order.
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
    """One run of a Postgres server: its postmaster and, through that, all its processes."""

    def __init__(self, process: asyncio.subprocess.Process, data_dir: Path) -> None:
        self._process = process
        self._data_dir = data_dir
        self._kill_asked = False
        self._stop_asked = False
        self._cleared = False

    @classmethod
    async def spawn(cls, postgres: Path, data_dir: Path, log: Path, account: Account | None) -> ServerProcess:
        """Start `postgres` on a data directory; what it prints is appended to `log`."""
        with log.open("ab") as output:
            return cls(await spawn([postgres, "-D", data_dir], account, output), data_dir)

    @property
    def kill_asked(self) -> bool:
        """Whether `kill` was called: its death is a fault on demand."""
        return self._kill_asked

    @property
    def stop_asked(self) -> bool:
        """Whether `stop` was called: its end is no crash."""
        return self._stop_asked

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

    def kill(self) -> None:
        """Crash the server, as a power cut would; `kill_asked` is true from then on."""
        self._kill_asked = True
        self.send_all(signal.SIGKILL)

    def is_halted(self) -> bool:
        """Return whether the postmaster is halted (SIGSTOP), by this program or another."""
        with contextlib.suppress(psutil.Error):
            return self.exit_code is None and psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        return False

    async def stop(self, ladder: Sequence[tuple[signal.Signals, float]] = STOP_LADDER) -> None:
        """Stop the server by the signals of `ladder`, and return when nothing of it is left."""
        self._stop_asked = True
        try:
            for number, timeout_s in ladder:
                if self.exit_code is not None:
                    break
                self.send(number)
                self.send(signal.SIGCONT)  # a halted postmaster reacts to nothing but SIGKILL
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
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
    """Yield the processes of the server that runs in `data_dir`: each has it as its working directory.

    The kernel says so; `postmaster.pid` may name a process that has a dead server's id by now.
    """
    wanted = str(data_dir)
    for process in psutil.process_iter(["name", "cwd"]):
        if process.info["cwd"] == wanted and "postgres" in (process.info["name"] or ""):
            yield process


def end_server_processes(data_dir: Path) -> list[int]:
    """Kill all processes of the server in `data_dir`; return their ids."""
    ended = []
    for process in server_processes(data_dir):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            ended.append(process.pid)
    return ended


def describe_exit(exit_code: int | None) -> str:
    """Return how a process ended: `exit code 1`, or `by signal 9, SIGKILL`."""
    if exit_code is not None and exit_code < 0:
        return f"by signal {-exit_code}, {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


# --- shared memory ---


class SharedMemorySegment(NamedTuple):
    """A System V shared memory segment, as the kernel lists it."""

    identifier: int
    key: int
    """As an unsigned number."""
    creator: int
    """The id of the process that made it."""
    owner: int
    """The id of the user."""
    attached: int
    """How many processes are attached to it."""


def remove_shared_memory(data_dir: Path, timeout_s: float) -> None:
    """Remove the shared memory that a killed server of `data_dir` has left.

    Each server has a System V segment of 56 bytes, by which Postgres notices processes that outlived their
    postmaster. After a SIGKILL it stays until a server is started on the same directory; the kernel allows 4,096
    of them (macOS 32). All other shared memory is unnamed, or a file in the data directory.

    A segment that a process is still attached to after `timeout_s` is left; that is logged.
    """
    deadline = time.monotonic() + timeout_s
    while (segment := _segment_of(data_dir)) is not None:
        if not segment.attached:
            ctypes.CDLL(None).shmctl(segment.identifier, _IPC_RMID, None)  # ipcrm(1) may not be installed
            return
        if time.monotonic() > deadline:
            _log.warning("shared memory segment %d is left: a process still uses it", segment.identifier)
            return
        time.sleep(_POLL_S)


def _segment_of(data_dir: Path) -> SharedMemorySegment | None:
    """Return the segment that `postmaster.pid` names; None if it is gone, or another one has its id by now.

    The first line of the file is the postmaster's process id (negative of a standalone server), the seventh the
    segment's key and id.
    """
    try:
        lines = (data_dir / "postmaster.pid").read_text().splitlines()
        key, identifier = map(int, lines[6].split())
        named = (identifier, key % 2**32, abs(int(lines[0])), data_dir.stat().st_uid)
    except (OSError, ValueError, IndexError):  # it ended in order just now, or was killed before it wrote the line
        return None
    return next((segment for segment in _segments() if segment[:4] == named), None)


def _segments() -> Iterator[SharedMemorySegment]:
    """Yield every System V shared memory segment of this machine that this user may see."""
    if sys.platform == "linux":
        with contextlib.suppress(FileNotFoundError):  # a kernel without any
            for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
                key, identifier, _, _, creator, _, attached, owner = map(int, line.split()[:8])
                yield SharedMemorySegment(identifier, key % 2**32, creator, owner, attached)
    else:
        listing = subprocess.run(["/usr/bin/ipcs", "-mop"], capture_output=True, text=True, check=False)
        yield from segments_listed_by_ipcs(listing.stdout)


def segments_listed_by_ipcs(listing: str) -> Iterator[SharedMemorySegment]:
    """Parse what `ipcs -mop` prints where it does so as POSIX has it, as on macOS."""
    for line in listing.splitlines():
        match line.split():
            case ["m", identifier, key, _, owner, _, attached, creator, _]:
                with contextlib.suppress(KeyError):  # an owner without a name is not one of ours
                    uid = pwd.getpwnam(owner).pw_uid
                    yield SharedMemorySegment(int(identifier), int(key, 16), int(creator), uid, int(attached))
