"""How the program comes to its end: by one cancellation, whoever asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING, Any

from rocket.errors import TaskDied, unwrapping_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from types import TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_log = logging.getLogger("rocket.run")


class Shutdown:
    """Lets a task be asked to end, once gently and then in a hurry."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.asked = False
        """Whether the end was asked for, in contrast to a failure."""
        self.begun = False
        """Whether the program is being taken down, for whatever reason: then nothing is cancelled any more."""
        self.hurried = False
        """Whether somebody has asked a second time."""
        self.on_force: list[Callable[[], None]] = []
        """Called when somebody asks a second time."""
        self.on_hangup: list[Callable[[], None]] = []
        """Called at SIGHUP; as long as there is nothing to call, that ends the program as SIGTERM does."""
        self._task = task

    def ask(self, why: str) -> None:
        """Ask for the end; whoever asks again, or while it has begun already, is in a hurry."""
        if not self.asked and not self.begun:
            _log.info("%s: shutting down", why)
            self.asked = True
            self._task.cancel()
        else:
            if not self.hurried:
                _log.info("%s: in a hurry", why)
            self.hurried = True
            for hurry in self.on_force:
                hurry()

    def hang_up(self) -> None:
        """Do what SIGHUP is for: have read again what a service reads, or end, since the terminal is gone."""
        if self.asked or self.begun:
            return  # a terminal that goes says so more than once, and is in no hurry
        if not self.on_hangup:
            self.ask(signal.SIGHUP.name)
            return
        _log.info("%s: looking again at what is read from files", signal.SIGHUP.name)
        for call in self.on_hangup:
            call()


@contextlib.contextmanager
def shutdown_on_signals() -> Iterator[Shutdown]:
    """Turn SIGINT, SIGTERM and SIGHUP into cancellation of the current task, which is taken for a normal end.

    A second signal forces it. SIGHUP is left alone where it is ignored, as under `nohup`: see
    `Shutdown.on_hangup`.
    The handlers that were there before are put back.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in a task
    ending = Shutdown(task)
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
        loop.add_signal_handler(signal.SIGHUP, ending.hang_up)
    for number in _SIGNALS:
        loop.add_signal_handler(number, ending.ask, number.name)
    try:
        yield ending
    except asyncio.CancelledError:
        if not ending.asked:
            raise
        task.uncancel()
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


class ShutdownStack(contextlib.AsyncExitStack):
    """The parts of a program, in the order in which they were started; the end takes them down in reverse."""

    def __init__(self, ending: Shutdown) -> None:
        super().__init__()
        self._ending = ending

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        self._ending.begun = True
        return await super().__aexit__(kind, failure, trace)


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run something beside the body and cancel it at the end; if it fails or ends by itself, so does the body.

    Raise what it raised, or `TaskDied`.
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
    raise TaskDied(f"{name} came to an end by itself")
