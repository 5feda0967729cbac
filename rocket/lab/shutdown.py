"""The event loop of a program, its background tasks, and the one way in which it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from rocket.errors import TaskDied, unwrapping_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from types import TracebackType

ResultT = TypeVar("ResultT")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_log = logging.getLogger("rocket.run")


def run(main_task: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a program's main task to its end, on uvloop where there is one; return what it returns."""
    if sys.platform == "win32":
        return asyncio.run(main_task)
    import uvloop  # noqa: PLC0415 - not on every platform

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main_task)


class Shutdown:
    """The way a program ends: one cancellation of its main task, whatever asks for it."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.asked = False
        """Whether the end was asked for; otherwise it is a failure."""
        self.begun = False
        """Whether the program is being taken down, for any reason: from then on nothing is cancelled."""
        self.forced = False
        """Whether the end was asked for a second time."""
        self.on_force: list[Callable[[], None]] = []
        """Called each time the end is asked for again."""
        self.on_hangup: list[Callable[[], None]] = []
        """Called at SIGHUP; while the list is empty, SIGHUP ends the program as SIGTERM does."""
        self._task = task

    def ask(self, why: str) -> None:
        """Ask for the end; asked again, or while the program is being taken down, force it."""
        if not self.asked and not self.begun:
            _log.info("%s: shutting down", why)
            self.asked = True
            self._task.cancel()
            return
        if not self.forced:
            _log.info("%s: forcing shutdown", why)
        self.forced = True
        for force in self.on_force:
            force()

    def hang_up(self) -> None:
        """Act on SIGHUP: read files again or, where there is none to read, end, since the terminal is gone."""
        if self.asked or self.begun:
            return  # a terminal that goes away sends it more than once, and does not mean to force anything
        if not self.on_hangup:
            self.ask(signal.SIGHUP.name)
            return
        _log.info("%s: reading files again", signal.SIGHUP.name)
        for call in self.on_hangup:
            call()


@contextlib.contextmanager
def shutdown_on_signals() -> Iterator[Shutdown]:
    """Turn SIGINT, SIGTERM and SIGHUP into a cancellation of the current task, which counts as a normal end.

    A second signal forces it. SIGHUP is left alone where it is ignored, as under `nohup`; see
    `Shutdown.on_hangup`. Previous handlers are restored afterwards.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in a task
    shutdown = Shutdown(task)
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
        loop.add_signal_handler(signal.SIGHUP, shutdown.hang_up)
    for number in _SIGNALS:
        loop.add_signal_handler(number, shutdown.ask, number.name)
    try:
        yield shutdown
    except asyncio.CancelledError:
        if not shutdown.asked:
            raise
        task.uncancel()
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


class ShutdownStack(contextlib.AsyncExitStack):
    """The parts of a program in the order of their start; they are taken down in reverse."""

    def __init__(self, shutdown: Shutdown) -> None:
        super().__init__()
        self._shutdown = shutdown

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        self._shutdown.begun = True
        return await super().__aexit__(kind, failure, trace)


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run a task beside the body, and cancel it afterwards; if it fails or ends by itself, the body is cancelled.

    Raise what the task raised, or `TaskDied`.
    """
    with unwrapping_group():
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_forever(work, name), name=name)
            try:
                yield
            finally:
                task.cancel()


async def _forever(work: Coroutine[Any, Any, None], name: str) -> None:
    await work
    raise TaskDied(f"{name} ended by itself")
