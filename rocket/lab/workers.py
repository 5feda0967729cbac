"""Workers: several processes of the API that share its port, started again when they die.

`python -m rocket.lab.workers` is one of them, a child process as in `rocket.lab.subprocesses`: it receives its
`Job`, answers once it is ready, drains at SIGTERM, and ends at once when the program that started it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Mapping  # noqa: TC003 - msgspec reads the annotations of `Job`
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec

from rocket.cluster.supervisor import RestartPolicy
from rocket.errors import RocketError, unwrapping_group
from rocket.lab import logs
from rocket.lab.serving import serving
from rocket.lab.settings import Settings  # noqa: TC001 - the same
from rocket.lab.shutdown import ShutdownStack, background, shutdown_on_signals
from rocket.lab.subprocesses import Parent, Subprocess, SubprocessFailed, run_child
from rocket.routing.heartbeat import WRITERS_LOCK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    import asyncpg

    from rocket.lab.shutdown import Shutdown

COMMAND = ("rocket.lab.workers",)
"""The module that a worker runs, and its arguments."""

READY_S = 30.0
"""How long a worker may take until it serves: on a busy machine, imports alone take seconds."""
_STOP_S = 8.0
"""How long it may take to end: longer than requests in flight and, after them, the pools are given."""

_TABLE_POLL_S = 0.01
_TAKEOVER_S = 8.0
"""How long another process may take to write the table of statuses before the answer is: never."""
_TABLE_STATE = """
    SELECT (SELECT application_name
              FROM pg_locks JOIN pg_stat_activity USING (pid)
             WHERE locktype = 'advisory' AND granted AND objsubid = 1
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
               AND (classid::bigint << 32) + objid::bigint = $1) AS writer,
           (SELECT max(xmin::text::bigint) FROM replica_statuses) AS written
"""
"""The newest transaction that left a row in the table identifies the last beat."""

_log = logging.getLogger("rocket.workers")


class WorkerFailedToStart(RocketError):
    """A worker ended, or did not become ready in time, while it started."""


class WorkerKeepsDying(RocketError):
    """A worker died so often by itself that starting it again has no point."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does."""

    number: int
    """From 1; marks its log lines."""
    nodes: Mapping[str, str] = field(repr=False)
    """DSNs by name; they may hold passwords."""
    settings: Settings
    observe: bool = True
    log_levels: Mapping[str, int] = field(default_factory=dict)
    """By logger, where the program that starts it has set one."""
    listener: int | None = None
    """The descriptor of its own listening socket, which it inherits; None: it only observes."""

    def message(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        message: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str)
        return message

    @classmethod
    def read(cls, message: Mapping[str, object]) -> Self:
        """Return what `message` returned the JSON of."""
        return msgspec.convert(message, cls, dec_hook=lambda kind, text: kind(text))


class Worker:
    """A worker, whose processes follow one another.

    They share one listening socket, so a client that connects while there is no process waits for the next one.
    Without a listening socket it only observes.
    """

    def __init__(self, job: Job, listener: socket.socket | None = None, *, ready_s: float = READY_S) -> None:
        self.name = f"observer {job.number}" if listener is None else f"worker {job.number}"
        self.serves = listener is not None
        """Whether it answers requests."""
        self.up = False
        """Whether it is at work, as far as is known here."""
        self.frozen = False
        """Whether it was halted, and not resumed since."""
        self.crash_asked = False
        """Whether its last death was asked for."""
        self._job = job if listener is None else replace(job, listener=listener.fileno())
        self._listener = listener
        self._ready_s = ready_s
        self._process: Subprocess | None = None

    @property
    def pid(self) -> int | None:
        """The id of its process; None before the first."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start it and wait until it serves; raise `WorkerFailedToStart`."""
        inherited = [] if self._job.listener is None else [self._job.listener]
        try:
            self._process = await Subprocess.start(self.name, *COMMAND, pass_fds=inherited)
            await self._process.ask(self._job.message(), self._ready_s)
        except SubprocessFailed as error:
            if self._process is not None:
                self._process.kill()
                await self._process.ended()
            raise WorkerFailedToStart(f"{self.name} failed to start: {error.reason}") from None
        self.up = True

    async def died(self) -> str:
        """Wait until its process has ended; return how."""
        assert self._process is not None  # noqa: S101 - it was started
        try:
            while True:
                await self._process.receive()  # its end, since it sends nothing more
        except SubprocessFailed as error:
            self.up = False
            await self._process.ended(_STOP_S)
            return error.reason

    def crash(self) -> None:
        """Kill it as if by accident; it is started again, and the death does not count."""
        self.crash_asked = True
        self.kill()

    def freeze(self) -> None:
        """Halt it: its connections stay, and it does not answer."""
        self.frozen = True
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume it."""
        self.frozen = False
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without giving it a chance to answer what is in flight."""
        self._signal(signal.SIGKILL)

    def hang_up(self) -> None:
        """Have it read its file of nodes again."""
        if self.up:
            self._signal(signal.SIGHUP)

    async def stop(self) -> None:
        """Have it answer what is in flight, and end; kill it if that takes too long."""
        if self._listener is not None:
            # No client may connect any more, but only the worker's own copy would be closed.
            self._listener.close()
        if self._process is not None:
            await self._process.stop(_STOP_S)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.signal(number)


class Workers:
    """All workers of a program."""

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
        """Start each worker again that dies; never returns. Raise `WorkerKeepsDying` when there is no point."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for worker in self._workers:
                    group.create_task(_keep(worker), name=f"keep {worker.name}")

    async def stop(self) -> None:
        """Take them all down, and return when nothing of them is left."""
        began = time.monotonic()
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        _log.info("%d processes stopped in %.2f s", len(self._workers), time.monotonic() - began)

    def hang_up(self) -> None:
        """Have them read their file of nodes again."""
        for worker in self._workers:
            worker.hang_up()

    def kill(self) -> None:
        """End them all at once."""
        for worker in self._workers:
            worker.kill()


async def _keep(worker: Worker) -> None:
    policy = RestartPolicy()
    while True:
        reason = await worker.died()
        asked, worker.crash_asked, worker.frozen = worker.crash_asked, False, False
        pause_s = policy.after_death(time.monotonic(), asked=asked)
        while True:
            if pause_s is None:
                raise WorkerKeepsDying(f"{worker.name} keeps dying ({reason})")
            _log.warning("%s died (%s): starting it again in %.1f s", worker.name, reason, pause_s)
            await asyncio.sleep(pause_s)
            began = time.monotonic()
            try:
                await worker.start()
            except WorkerFailedToStart as error:
                _log.warning("%s", error)
                reason = "while starting"
                pause_s = policy.after_failed_start(asked=False)
            else:
                break
        policy.started()
        _log.info("%s is back after %.1f s", worker.name, time.monotonic() - began)


@contextlib.asynccontextmanager
async def working(
    settings: Settings,
    nodes: Mapping[str, str],
    listeners: Sequence[socket.socket],
    shutdown: Shutdown,
    *,
    observe: bool = True,
    observers: int = 0,
) -> AsyncIterator[Workers]:
    """Run a worker for each listener for as long as the context lasts, once all are ready.

    Beside them run as many `observers`, which serve no requests. Raise `WorkerFailedToStart` at the beginning, and
    `WorkerKeepsDying` out of the body.
    """
    levels = _log_levels()
    workers = Workers(
        [
            Worker(Job(number, nodes, settings, observe, levels), listener)
            for number, listener in enumerate([*listeners, *[None] * observers], start=1)
        ]
    )
    shutdown.on_force.append(workers.kill)
    if settings.nodes_file is not None:
        shutdown.on_hangup.append(workers.hang_up)
    try:
        await workers.start()
        async with background(workers.keep(), "workers"):
            yield workers
    finally:
        await workers.stop()


def _log_levels() -> dict[str, int]:
    """Return the levels that this program has set for its loggers."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("rocket.")]
    return {logger.name: logger.level for logger in loggers if logger.level}


# --- the process that writes the table of statuses ---


class TableState(NamedTuple):
    """Which process writes the table of statuses, and its last write."""

    writer: int | None
    """The id of the process that has the right to write it."""
    written: int | None
    """The transaction of the last write; None while it is empty."""


async def table_state(primary: asyncpg.Connection[Any]) -> TableState:
    """Return the state of the table of statuses."""
    row = await primary.fetchrow(_TABLE_STATE, WRITERS_LOCK)
    assert row is not None  # noqa: S101 - it has no FROM
    process = (row["writer"] or "").rpartition(" ")[2]
    return TableState(int(process) if process.isdecimal() else None, row["written"])


async def wait_for_takeover(primary: asyncpg.Connection[Any], before: TableState) -> float | None:
    """Wait until a process other than the writer of `before` has written the table; return the seconds it took.

    None if none did in time.
    """
    began = time.monotonic()
    lost = before.writer
    while time.monotonic() - began < _TAKEOVER_S:
        now = await table_state(primary)
        if now.writer in {None, lost}:
            before = now
        elif now.written != before.written:
            return time.monotonic() - began
        await asyncio.sleep(_TABLE_POLL_S)
    return None


# --- a worker's process ---


async def work(parent: Parent) -> None:
    """Serve, or only observe, until asked to end."""
    job = Job.read(await parent.receive())
    logs.configure(job.settings.log_format, worker=job.number)
    for name, level in job.log_levels.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger("rocket.run").setLevel(logging.WARNING)  # the program itself reports what it does
    listening = contextlib.nullcontext() if job.listener is None else socket.socket(fileno=job.listener)
    with listening as listener, shutdown_on_signals() as shutdown:
        async with ShutdownStack(shutdown) as stack:
            await stack.enter_async_context(
                serving(job.settings, job.nodes, listener, shutdown, observe=job.observe)
            )
            parent.send({"ready": True})
            await asyncio.Event().wait()  # until it is cancelled


def main() -> int:
    """Run until asked to end; return the exit code."""
    return run_child(work)


if __name__ == "__main__":
    sys.exit(main())
