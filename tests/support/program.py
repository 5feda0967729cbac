"""A program in a process of its own, as its user runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[2]


READY_S = 60.0


FREE_PORTS = ("--postgres-port", "0", "--api-port", "0")


@dataclass
class Program:
    """A running program, and what it has printed; `listen` has to run, or it blocks on its output."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    errors: str = ""
    _looked_at: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _silent: bool = False

    async def listen(self) -> None:
        """Take what it prints, until it ends."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        errors = asyncio.ensure_future(self.process.stderr.read())
        async for line in self.process.stdout:
            self.lines.append(line.decode())
            self._news.set()
        self.errors = (await errors).decode()
        self._silent = True
        self._news.set()

    async def prints(self, pattern: str, timeout_s: float = READY_S) -> re.Match[str]:
        """Wait for a line that holds `pattern`, after the one that was last waited for."""
        async with asyncio.timeout(timeout_s):
            while True:
                while self._looked_at < len(self.lines):
                    self._looked_at += 1
                    if match := re.search(pattern, self.lines[self._looked_at - 1]):
                        return match
                assert not self._silent, f"ended without {pattern!r}:\n{self.output}"
                self._news.clear()
                await self._news.wait()

    async def ends(self, timeout_s: float = READY_S) -> int:
        """Wait for the end and return the exit code."""
        async with asyncio.timeout(timeout_s):
            while not self._silent:
                self._news.clear()
                await self._news.wait()
            return await self.process.wait()

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return "".join(self.lines) + self.errors


@contextlib.asynccontextmanager
async def spawned(*command: str, cwd: Path, env: dict[str, str]) -> AsyncIterator[Program]:
    """Run a command, and listen to it; it does not outlive the context."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    program = Program(process)
    listening = asyncio.create_task(program.listen(), name="listening to a program")
    try:
        yield program
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        listening.cancel()  # a child of its that lives on may hold its output open
        await asyncio.wait([listening])


def running(kept_dir: Path, *arguments: str) -> contextlib.AbstractAsyncContextManager[Program]:
    """Run a Python program with `kept_dir` as the temporary directory; it does not outlive the context."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROCKET_")}
    environment |= {"TMPDIR": str(kept_dir), "PYTHONUNBUFFERED": "1"}
    return spawned(sys.executable, *arguments, cwd=ROOT, env=environment)


def run_all(kept_dir: Path, *flags: str) -> contextlib.AbstractAsyncContextManager[Program]:
    """Run the whole system with two replicas on free ports."""
    return running(kept_dir, "-m", "rocket", "run-all", "--replicas", "2", *FREE_PORTS, *flags)


async def command(kept_dir: Path, *arguments: str) -> tuple[int, str]:
    """Run a program to its end; return exit code and output."""
    async with running(kept_dir, *arguments) as program:
        code = await program.ends()
        return code, program.output


def servers(kept_dir: Path) -> list[psutil.Process]:
    """Return the Postgres processes that live below a directory."""
    return [
        process
        for process in psutil.process_iter(["name", "cwd"])
        if process.info["name"] == "postgres" and (process.info["cwd"] or "").startswith(str(kept_dir))
    ]


def postmaster(kept_dir: Path, name: str) -> psutil.Process:
    """Return the process of one server."""
    every = [process for process in servers(kept_dir) if f"/{name}/data" in process.cwd()]
    ids = {process.pid for process in every}
    return next(process for process in every if process.ppid() not in ids)


def assert_nothing_left(kept_dir: Path) -> None:
    """No process, and no file."""
    assert [] == servers(kept_dir)
    assert [] == list(kept_dir.iterdir())
