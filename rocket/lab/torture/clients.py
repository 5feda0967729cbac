"""The client processes, seen from the process that started them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING

from rocket.errors import TaskDied, unwrapping_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rocket.lab.torture.workload import Job

_AT_WORK_S = 30.0
_POLL_S = 0.05
_END_S = 5.0
"""How long a client may take to write down what it has."""
_FLOOD_SESSIONS = 240
"""More, all clients together, than a pool lets in and has wait; not so many as to drown the API."""


class Clients:
    """The processes that make the traffic."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self._processes = processes
        self._counts: defaultdict[int, dict[str, int]] = defaultdict(dict)
        self._ending = False

    @property
    def pids(self) -> list[int]:
        """The ids of the processes."""
        return [process.pid for process in self._processes]

    @property
    def counts(self) -> Counter[str]:
        """Operations so far by request and outcome (`read ok`), not older than a second or so."""
        total: Counter[str] = Counter()
        for counts in self._counts.values():
            total.update(counts)
        return total

    async def at_work(self) -> None:
        """Wait until each process has read something; raise `TaskDied` if that does not come."""
        numbers = range(len(self._processes))
        try:
            async with asyncio.timeout(_AT_WORK_S):
                while any("read ok" not in self._counts[number] for number in numbers):  # noqa: ASYNC110 - of others
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise TaskDied(f"the clients read nothing within {_AT_WORK_S:g} s") from None

    async def flood(self, until: float) -> int:
        """Have many more sessions read until then, in seconds since zero; return how many."""
        await self._tell({"do": "flood", "sessions": _FLOOD_SESSIONS // len(self._processes), "until": until})
        return _FLOOD_SESSIONS

    async def hang_up(self, until: float) -> None:
        """Have all sessions hang up again and again until then, in seconds since zero."""
        await self._tell({"do": "hang-up", "until": until})

    async def watch(self) -> None:
        """Take their counts; raise `TaskDied` if one ends before it is told to."""
        with unwrapping_group():
            async with asyncio.TaskGroup() as group:
                for number, process in enumerate(self._processes):
                    group.create_task(self._watch(number, process), name=f"client {number}")

    async def _watch(self, number: int, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        while line := await process.stdout.readline():
            self._counts[number] = json.loads(line)
        if not self._ending:
            raise TaskDied(f"client process {number} ended with exit code {await process.wait()}")

    async def _tell(self, order: dict[str, object]) -> None:
        for process in self._processes:
            if process.stdin is not None and process.returncode is None:
                process.stdin.write(json.dumps(order).encode() + b"\n")

    async def end(self) -> None:
        """Have them write down what they have, and reap them; who takes too long is killed."""
        self._ending = True
        try:
            await self._tell({"do": "end"})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await asyncio.gather(*(process.wait() for process in self._processes))
        finally:
            for process in self._processes:
                if process.returncode is None:
                    process.kill()
                await process.wait()


@contextlib.asynccontextmanager
async def running(orders: Sequence[Job]) -> AsyncIterator[Clients]:
    """Run a client process for each of these orders for as long as the context lasts."""
    async with contextlib.AsyncExitStack() as stack:
        processes: list[asyncio.subprocess.Process] = []
        clients = Clients(processes)
        stack.push_async_callback(clients.end)
        for order in orders:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "rocket.lab.torture.client",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # the terminal's Ctrl-C is for us alone
            )
            processes.append(process)
            assert process.stdin is not None  # noqa: S101 - it is a pipe
            process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        yield clients
