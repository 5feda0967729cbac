"""The workers, seen from the program that started them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from rocket.cluster.process import describe_exit
from rocket.cluster.supervisor import RestartPolicy
from rocket.errors import WorkerFailedToStart, WorkerKeepsDying, describe, unwrapping_group
from rocket.lab.shutdown import background
from rocket.lab.workers.orders import Job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from rocket.lab.serving import Service
    from rocket.lab.shutdown import Shutdown

COMMAND = ("-m", "rocket.lab.workers.worker")
"""What a worker's Python runs."""

_READY_S = 30.0
"""How long a worker may take to come up: on a machine that has better things to do, imports alone take seconds."""
_END_S = 8.0
"""How long it may take to end: longer than what is in flight is given, and the pools after that."""

_log = logging.getLogger("rocket.workers")


class Worker:
    """One worker, in all its lives: they have a listening socket in common, and who connects in between waits.

    One without a listening socket only observes.
    """

    def __init__(self, number: int, listener: socket.socket | None, log_format: str, service: Service) -> None:
        self.name = f"observer {number}" if listener is None else f"worker {number}"
        self.serves = listener is not None
        """Whether it answers requests."""
        self.up = False
        """Whether it is at work, as far as that is known here."""
        self.frozen = False
        """Whether it was halted, and not let go on since."""
        self.crash_asked = False
        """Whether its last death was asked for."""
        self._listener = listener
        descriptor = None if listener is None else listener.fileno()
        self._orders = Job(number, descriptor, log_format, _levels_set(), service)
        self._process: asyncio.subprocess.Process | None = None
        self._lines: asyncio.StreamReader
        self._line: asyncio.StreamWriter

    @property
    def pid(self) -> int | None:
        """The id of its process; None before the first."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start it and wait until it serves; raise `WorkerFailedToStart`."""
        try:
            async with asyncio.timeout(_READY_S):
                await self._spawn()
                said = await self._heard()
        except TimeoutError:
            self.kill()
            await self._reaped()
            raise WorkerFailedToStart(f"{self.name} was not ready within {_READY_S:g} s") from None
        except OSError as error:
            raise WorkerFailedToStart(f"{self.name} failed to start: {describe(error)}") from None
        if "ready" not in said:
            raise WorkerFailedToStart(f"{self.name} failed to start: {await self._ended(said)}")
        self.up = True

    async def died(self) -> str:
        """Wait until it has ended; return how."""
        said = await self._heard()
        self.up = False
        return await self._ended(said)

    def crash(self) -> None:
        """Have it die as by an accident, and come back; that counts for nothing."""
        self.crash_asked = True
        self.kill()

    def freeze(self) -> None:
        """Halt it: its connections stay, and it says nothing."""
        self.frozen = True
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.frozen = False
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """End it without giving it a chance to answer what is in flight."""
        self._send(signal.SIGKILL)

    def hang_up(self) -> None:
        """Have it read again what it reads from a file."""
        if self.up:
            self._send(signal.SIGHUP)

    async def stop(self) -> None:
        """Have it answer what is in flight, and end; who takes too long is killed."""
        if self._listener is not None:
            # Nobody shall connect any more, but only its own copy would be closed.
            self._listener.close()
        self._send(signal.SIGTERM)
        self._send(signal.SIGCONT)  # a halted one would take no notice
        await self._reaped()

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._lines, self._line = await asyncio.open_unix_connection(sock=ours)
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, *COMMAND),
                    stdin=theirs.fileno(),
                    pass_fds=[] if self._orders.listener is None else [self._orders.listener],
                    # The terminal's Ctrl-C is for us alone; we take the workers down in order.
                    start_new_session=True,
                )
            except BaseException:
                self._line.close()
                raise
        self._line.write(self._orders.line())

    async def _heard(self) -> dict[str, str]:
        """Return what it says next; nothing if it has ended, or will."""
        with contextlib.suppress(ConnectionError):  # it died before it read what it was told
            if line := await self._lines.readline():
                said: dict[str, str] = json.loads(line)
                return said
        return {}

    async def _ended(self, said: dict[str, str]) -> str:
        """Wait until it has ended, and return how: in its own words, if it found any."""
        exit_code = await self._reaped()
        return said.get("failed") or describe_exit(exit_code)

    async def _reaped(self) -> int | None:
        if self._process is None:
            return None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await self._process.wait()
        finally:
            self.kill()
            self._line.close()
        return await self._process.wait()

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


class Workers:
    """All of them."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    async def start(self) -> None:
        """Start them all, at the same time; raise `WorkerFailedToStart`."""
        began = time.monotonic()
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for worker in self._workers:
                    group.create_task(worker.start(), name=f"start {worker.name}")
        pids = ", ".join(str(worker.pid) for worker in self._workers)
        _log.info("%-28s %5.2f s", f"{len(self._workers)} processes up: {pids}", time.monotonic() - began)

    async def keep(self) -> None:
        """Start again whatever dies; never returns. Raise `WorkerKeepsDying` when there is no point any more."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for worker in self._workers:
                    group.create_task(_keep(worker), name=f"keep {worker.name}")

    async def stop(self) -> None:
        """Take them down, and return when nothing of them is left."""
        began = time.monotonic()
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        _log.info("%d processes stopped in %.2f s", len(self._workers), time.monotonic() - began)

    def hang_up(self) -> None:
        """Have them read again what they read from a file."""
        for worker in self._workers:
            worker.hang_up()

    def hurry(self) -> None:
        """End them at once, for someone who will not wait."""
        for worker in self._workers:
            worker.kill()


async def _keep(worker: Worker) -> None:
    policy = RestartPolicy()
    while True:
        how = await worker.died()
        asked, worker.crash_asked, worker.frozen = worker.crash_asked, False, False
        pause_s = policy.after_death(time.monotonic(), asked=asked)
        while True:
            if pause_s is None:
                raise WorkerKeepsDying(f"{worker.name} keeps dying ({how})")
            _log.warning("%s died (%s): starting it again in %.1f s", worker.name, how, pause_s)
            await asyncio.sleep(pause_s)
            began = time.monotonic()
            try:
                await worker.start()
            except WorkerFailedToStart as error:
                _log.warning("%s", error)
                how = "while starting"
                pause_s = policy.after_failed_start(asked=False)
            else:
                break
        policy.started()
        _log.info("%s is back after %.1f s", worker.name, time.monotonic() - began)


@contextlib.asynccontextmanager
async def working(
    service: Service,
    listeners: Sequence[socket.socket],
    log_format: str,
    ending: Shutdown,
    observers: int = 0,
) -> AsyncIterator[Workers]:
    """Run a worker for each listener for as long as the context lasts, once all are ready.

    Beside them run so many `observers`, which serve nobody. Raise `WorkerFailedToStart` at the beginning, and
    `WorkerKeepsDying` out of the body.
    """
    workers = Workers(
        [
            Worker(number, listener, log_format, service)
            for number, listener in enumerate([*listeners, *[None] * observers], start=1)
        ]
    )
    ending.on_force.append(workers.hurry)
    if service.nodes_file is not None:
        ending.on_hangup.append(workers.hang_up)
    try:
        await workers.start()
        async with background(workers.keep(), "workers"):
            yield workers
    finally:
        await workers.stop()


def _levels_set() -> dict[str, int]:
    """Return the loggers that this program wants to hear less of, or more."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("rocket.")]
    return {logger.name: logger.level for logger in loggers if logger.level}
