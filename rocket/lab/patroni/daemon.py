"""A long-running program of a local Patroni cluster: etcd, or a member's Patroni."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING

import psutil

from rocket.cluster.errors import ServerFailedToStart
from rocket.cluster.process import spawn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rocket.cluster.process import Account

_GONE_S = 5.0
"""How long a process that was killed may take to be gone; the bound is for the kernel."""
_TAIL_BYTES = 3000

_log = logging.getLogger("rocket.patroni")


class Daemon:
    """One program that is kept running, life after life."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str | Path],
        log_path: Path,
        account: Account | None,
        patience_s: float,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self.wanted = False
        """Whether it should run: an end is then unexpected."""
        self._arguments = arguments
        self._account = account
        self._patience_s = patience_s
        """How long it may take to end when it is asked to."""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start it, unless it runs; raise `ServerFailedToStart` if it cannot be executed."""
        self.wanted = True
        if self.pid is not None:
            return
        try:
            with self.log_path.open("ab") as output:
                self._process = await spawn(self._arguments, self._account, output, signal.SIGTERM)
        except OSError as error:
            raise ServerFailedToStart(f"{self.name} could not be started: {error}") from None

    async def died(self) -> int:
        """Wait for its end; return its exit code."""
        assert self._process is not None  # noqa: S101 - it was started
        return await self._process.wait()

    async def stop(self) -> None:
        """Ask it to end, and end it if it does not."""
        self.wanted = False
        if self.pid is None:
            return
        try:
            self.send(signal.SIGTERM)
            self.send(signal.SIGCONT)  # a halted one would take notice of nothing but SIGKILL
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience_s):
                    await self.died()
        finally:
            self.send(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GONE_S):
                await self.died()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def send_all(self, number: signal.Signals) -> None:
        """Send it and the processes that it has started, Postgres' own apart, a signal."""
        with contextlib.suppress(psutil.Error):
            children = [] if self.pid is None else psutil.Process(self.pid).children(recursive=True)
            for child in children:
                with contextlib.suppress(psutil.Error):
                    child.send_signal(number)
        self.send(number)

    def last_words(self) -> str:
        """Return the end of its log."""
        with contextlib.suppress(OSError), self.log_path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
        return "(no log)"
