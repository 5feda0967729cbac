"""The two processes of a measurement, seen from the one that starts them: the server and the load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psutil

from rocket.errors import RocketError
from rocket.lab.bench.connection import PATIENCE_S
from rocket.lab.bench.orders import Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from rocket.lab.bench.orders import Job

_READY_S = 30.0
_POLL_S = 0.02
_END_S = 5.0
"""How long a process may take to end by itself; the API drains for two seconds at the most."""
_LEEWAY_S = 30.0
"""How much longer than it was ordered a load may take: requests under way, and those of a crowd that joins."""
_URL = re.compile(r"http://[0-9.]+:[0-9]+")
_TAIL = 2000

_log = logging.getLogger("rocket.bench")


class ProcessFailed(RocketError):
    """A process of the benchmark ended, or did not get ready; carries what it said last."""


class Server:
    """The server that is measured."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self._process = psutil.Process(pid)

    def cpu_s(self) -> float:
        """Return the processor time taken so far by it, and by its children that live."""
        with _alive():
            return sum(times.user + times.system for times in (each.cpu_times() for each in self._every()))

    def rss_bytes(self) -> int:
        """Return how much memory it holds now, its children included."""
        with _alive():
            return sum(each.memory_info().rss for each in self._every())

    def _every(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        raise ProcessFailed("the server that is measured has ended") from None


@contextlib.asynccontextmanager
async def serving(
    command: Sequence[str], log: Path, settle: Callable[[], None] | None = None
) -> AsyncIterator[Server]:
    """Run a module that serves, and says where, for as long as the context lasts; raise `ProcessFailed`.

    Its process calls `record_floor` first.

    It writes its log into a file, as a service would; the file goes with it.
    """
    with contextlib.ExitStack() as files:
        files.callback(log.unlink, missing_ok=True)
        output = files.enter_context(log.open("wb"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "rocket.lab.bench.leash", *command,
            stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output,
            start_new_session=True,  # the terminal's Ctrl-C is for us alone
            preexec_fn=settle,
        )  # fmt: skip
        try:
            yield Server(await _url(process, log), process.pid)
            if process.returncode is not None:
                raise ProcessFailed(f"the server that was measured has ended: {_said(log)[-_TAIL:].strip()}")
        finally:
            await _ended(process)


async def _url(process: asyncio.subprocess.Process, log: Path) -> str:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.returncode is None:
        if found := _URL.search(_said(log)):
            return found[0]
        await asyncio.sleep(_POLL_S)
    said = _said(log)[-_TAIL:].strip()
    raise ProcessFailed(f"the server that was to be measured did not get ready: {said or 'it said nothing'}")


def _said(log: Path) -> str:
    return log.read_text(errors="replace")


async def _ended(process: asyncio.subprocess.Process) -> None:
    """End a process, by force if it takes too long, and reap it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Client:
    """The process that makes the load."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def join(self, orders: Job) -> None:
        """Have a crowd made; raise `ProcessFailed`."""
        await self._tell(orders)

    async def load(self, orders: Job) -> Tally:
        """Have a load made; raise `ProcessFailed`."""
        tally = Tally(**await self._tell(orders))
        if tally.failed:
            _log.warning("%d requests failed, such as: %s", tally.failed, "; ".join(tally.failures))
        return tally

    async def _tell(self, orders: Job) -> dict[str, Any]:
        assert self._process.stdin is not None  # noqa: S101 - they are pipes
        assert self._process.stdout is not None  # noqa: S101
        try:
            async with asyncio.timeout(orders.seconds + PATIENCE_S + _LEEWAY_S):
                self._process.stdin.write(json.dumps(asdict(orders)).encode() + b"\n")
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise ProcessFailed("the load did not come to its end") from None
        except ConnectionError:
            line = b""
        if not line:
            raise ProcessFailed(f"the load process ended with exit code {await self._process.wait()}")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise ProcessFailed(said["error"])
        return said


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[Client]:
    """Run a load process for as long as the context lasts."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rocket.lab.bench.client",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield Client(process)
    finally:
        await _ended(process)
