"""Child Python processes: parent and child exchange JSON objects, one a line, over a socket.

The parent starts a module by `Subprocess.start` or, for as long as a context lasts, by `child_process`. That
module's `main` is `run_child(work)`. The child's standard input is the socket; its standard output stays free
for a log.

A child never outlives its parent: it ends at once when the parent's end of the socket is closed, and on Linux also
by the parent-death signal, since a halted process reads nothing. A module that knows nothing of this protocol is
started as `python -m rocket.lab.subprocesses MODULE ARGUMENTS`: it gets SIGTERM when its parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import runpy
import signal
import socket
import sys
import threading
from typing import IO, TYPE_CHECKING, Any, Self

from rocket.cluster.process import describe_exit
from rocket.errors import RocketError, describe
from rocket.lab.shutdown import background, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence

OK, FAILED = 0, 1
"""Exit codes of a child: its work is done; it could not go on."""

STOP_S = 5.0
"""How long a child may take to end after SIGTERM."""

_STANDARD_INPUT = 0
_LONGEST_LINE = 2**20
_PR_SET_PDEATHSIG = 1


class SubprocessFailed(RocketError):
    """A child process ended, did not answer in time, or could not do what it was asked for."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason
        """The child's own error message, or how it ended: `exit code 1`."""


class Subprocess:
    """A child process, seen from its parent. `stop`, `kill` or `ended` has to follow `start`."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        lines: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.name = name
        self._process = process
        self._lines = lines
        self._writer = writer

    @classmethod
    async def start(
        cls,
        name: str,
        module: str,
        *arguments: str,
        output: IO[bytes] | None = None,
        pass_fds: Collection[int] = (),
        preexec_fn: Callable[[], None] | None = None,
        python: Sequence[str] = (),
    ) -> Self:
        """Run `python -m MODULE ARGUMENTS`; raise `SubprocessFailed` if that is not possible.

        The child writes to our standard output and standard error, or to `output` instead of both. `python` is
        another interpreter than this one, with its options.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            lines, writer = await asyncio.open_unix_connection(sock=ours, limit=_LONGEST_LINE)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(python or (sys.executable,)),
                    *("-m", module, *arguments),
                    stdin=theirs.fileno(),
                    stdout=output,
                    stderr=output,
                    pass_fds=pass_fds,
                    preexec_fn=preexec_fn,
                    # The terminal's Ctrl-C is for the parent, which takes its children down in order.
                    start_new_session=True,
                )
            except OSError as error:
                writer.close()
                raise SubprocessFailed(name, describe(error)) from None
            except BaseException:
                writer.close()
                raise
        return cls(name, process, lines, writer)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative if a signal ended it, as in `subprocess`."""
        return self._process.returncode

    def send(self, message: Mapping[str, object]) -> None:
        """Send it a message; nothing happens if it has ended."""
        if not self._writer.is_closing():
            self._writer.write(_line(message))

    async def receive(self) -> dict[str, Any]:
        """Wait for its next message; raise `SubprocessFailed` once it has ended, or reports an error."""
        line = b""
        with contextlib.suppress(ConnectionError):  # it died before it had read what it was sent
            line = await self._lines.readline()
        if not line:
            raise SubprocessFailed(self.name, await self.ended())
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise SubprocessFailed(self.name, message["error"])
        return message

    async def ask(self, message: Mapping[str, object], timeout_s: float) -> dict[str, Any]:
        """Send it a message and wait for its answer; raise `SubprocessFailed`."""
        try:
            async with asyncio.timeout(timeout_s):
                self.send(message)
                return await self.receive()
        except TimeoutError:
            raise SubprocessFailed(self.name, f"no answer within {timeout_s:g} s") from None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.signal(signal.SIGKILL)

    def close(self) -> None:
        """Close our end of the socket: the child ends at once, as if we were gone."""
        self._writer.close()

    async def stop(self, timeout_s: float = STOP_S) -> str:
        """End it by SIGTERM, or by SIGKILL if that takes too long; return how it ended."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)  # a halted process would take no notice
        return await self.ended(timeout_s)

    async def ended(self, timeout_s: float = STOP_S) -> str:
        """Wait until it has ended by itself, or kill it if that takes too long; return how it ended."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
        finally:
            self.kill()
            self.close()
            exit_code = await self._process.wait()
        return describe_exit(exit_code)


@contextlib.asynccontextmanager
async def child_process(
    name: str,
    module: str,
    *arguments: str,
    output: IO[bytes] | None = None,
    preexec_fn: Callable[[], None] | None = None,
    python: Sequence[str] = (),
) -> AsyncIterator[Subprocess]:
    """Run a child process for as long as the context lasts; see `Subprocess.start` and `Subprocess.stop`."""
    process = await Subprocess.start(name, module, *arguments, output=output, preexec_fn=preexec_fn, python=python)
    try:
        yield process
    finally:
        await process.stop()


class Parent:
    """The parent process, seen from its child."""

    def __init__(self, lines: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines = lines
        self._writer = writer
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def receive(self) -> dict[str, Any]:
        """Wait for the next message."""
        return await self._messages.get()

    def send(self, message: Mapping[str, object]) -> None:
        """Send a message; one with the key `error` is raised in the parent as `SubprocessFailed`."""
        self._writer.write(_line(message))

    async def watch(self) -> None:
        """Read messages for `receive`, and end this process as soon as the parent is gone; never returns."""
        with contextlib.suppress(ConnectionError):
            while line := await self._lines.readline():
                self._messages.put_nowait(json.loads(line))
        os._exit(FAILED)

    async def close(self) -> None:
        """Close the connection once everything has been sent."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


def run_child(work: Callable[[Parent], Coroutine[Any, Any, None]]) -> int:
    """Run the main task of a child process; return the exit code.

    A `RocketError` or `OSError` out of `work`, which is about the machine rather than the program, is sent to the
    parent in place of a traceback.
    """
    follow_parent_death()
    try:
        inherited = socket.socket(fileno=_STANDARD_INPUT)
    except OSError:
        sys.stderr.write("rocket: this module is started by rocket itself\n")
        return FAILED
    return run(_run_child(work, inherited))


async def _run_child(work: Callable[[Parent], Coroutine[Any, Any, None]], inherited: socket.socket) -> int:
    parent = Parent(*await asyncio.open_unix_connection(sock=inherited, limit=_LONGEST_LINE))
    try:
        async with background(parent.watch(), "parent watch"):
            await work(parent)
    except (RocketError, OSError) as error:
        parent.send({"error": describe(error)})
        return FAILED
    else:
        return OK
    finally:
        await parent.close()


def follow_parent_death() -> None:
    """Have the kernel kill this process when its parent dies, where the kernel is Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _watch_parent() -> None:
    """Wait for the end of the input in a thread, which costs the module nothing; then ask it to end."""
    while os.read(_STANDARD_INPUT, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_watch_parent, name="parent watch", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
