"""The client processes, which make the traffic: their side, and that of the program that runs them.

A client receives its `Job`, then messages like `{"do": "flood", "sessions": 50, "until": 12.5}` or
`{"do": "hang-up", "until": 12.5}`, and at last `{"do": "end"}`. It sends its counts of requests twice a second.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rocket.errors import TaskDied, unwrapping_group
from rocket.lab.checker.history import HistoryWriter
from rocket.lab.client import Api
from rocket.lab.shutdown import background
from rocket.lab.subprocesses import Subprocess, SubprocessFailed, run_child
from rocket.lab.torture.workload import API_TIMEOUT_S, Job, Workload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rocket.lab.subprocesses import Parent

_MODULE = "rocket.lab.torture.clients"
_COUNTS_S = 0.5
_FIRST_READ_S = 30.0
_POLL_S = 0.05
_END_S = 5.0
"""How long a client may take to write down what it has."""
_FLOOD_SESSIONS = 240
"""More, all clients together, than a pool admits and lets wait; not enough to overload the machine."""


class Clients:
    """The client processes, seen from the program that runs them."""

    def __init__(self, processes: Sequence[Subprocess]) -> None:
        self._processes = processes
        self._counts: defaultdict[Subprocess, dict[str, int]] = defaultdict(dict)
        self._shutdown = False

    @property
    def pids(self) -> list[int]:
        """The ids of the processes."""
        return [process.pid for process in self._processes]

    @property
    def counts(self) -> Counter[str]:
        """Requests so far by kind and outcome (`read ok`), not older than a second or so."""
        total: Counter[str] = Counter()
        for counts in self._counts.values():
            total.update(counts)
        return total

    async def have_read(self) -> None:
        """Wait until each process has read something; raise `TaskDied` if one does not in time."""
        try:
            async with asyncio.timeout(_FIRST_READ_S):
                while any("read ok" not in self._counts[process] for process in self._processes):  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise TaskDied(f"the clients read nothing within {_FIRST_READ_S:g} s") from None

    def flood(self, until: float) -> int:
        """Start many more sessions, which read until then, in seconds since zero; return their number."""
        self._send({"do": "flood", "sessions": _FLOOD_SESSIONS // len(self._processes), "until": until})
        return _FLOOD_SESSIONS

    def hang_up(self, until: float) -> None:
        """Have all sessions hang up again and again until then, in seconds since zero."""
        self._send({"do": "hang-up", "until": until})

    async def watch(self) -> None:
        """Receive their counts; raise `TaskDied` if a process ends before `end`."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for process in self._processes:
                    group.create_task(self._watch(process), name=process.name)

    async def _watch(self, process: Subprocess) -> None:
        while True:
            try:
                self._counts[process] = await process.receive()
            except SubprocessFailed as error:
                if self._shutdown:
                    return
                raise TaskDied(str(error)) from None

    def _send(self, message: dict[str, object]) -> None:
        for process in self._processes:
            process.send(message)

    async def end(self) -> None:
        """Have them write down what they have, and reap them; one that takes too long is killed."""
        self._shutdown = True
        self._send({"do": "end"})
        await asyncio.gather(*(process.ended(_END_S) for process in self._processes))


@contextlib.asynccontextmanager
async def running(jobs: Sequence[Job]) -> AsyncIterator[Clients]:
    """Run a client process for each job for as long as the context lasts."""
    async with contextlib.AsyncExitStack() as stack:
        processes: list[Subprocess] = []
        clients = Clients(processes)
        stack.push_async_callback(clients.end)
        for job in jobs:
            process = await Subprocess.start(f"client process {job.process}", _MODULE)
            processes.append(process)
            process.send(asdict(job))
        yield clients


# --- in a client process ---


async def work(parent: Parent) -> None:
    """Make traffic until the parent asks for the end."""
    job = Job(**await parent.receive())
    with HistoryWriter(Path(job.history)) as history:
        async with (
            Api(job.url, timeout_s=API_TIMEOUT_S, retries=False) as api,
            Api(job.url, timeout_s=API_TIMEOUT_S, retries=False, reconnect=True) as fresh,
        ):
            workload = Workload(job, api, fresh, history)
            async with background(workload.run(), "sessions"), background(_count(workload, parent), "counts"):
                await _follow(parent, workload)
        parent.send(workload.counts)


async def _follow(parent: Parent, workload: Workload) -> None:
    """Do what the parent asks for, until it asks for the end."""
    while True:
        match await parent.receive():
            case {"do": "flood", "sessions": int(sessions), "until": until}:
                workload.flood(sessions, until)
            case {"do": "hang-up", "until": until}:
                workload.hang_up_until = until
            case _:
                return


async def _count(workload: Workload, parent: Parent) -> None:
    while True:
        parent.send(workload.counts)
        await asyncio.sleep(_COUNTS_S)


if __name__ == "__main__":
    raise SystemExit(run_child(work))
