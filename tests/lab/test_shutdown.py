"""How the program comes to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

from rocket.cluster.errors import ServerKeepsDying
from rocket.errors import TaskDied
from rocket.lab.shutdown import ShutdownStack, background, shutdown_on_signals

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def forever() -> None:
    """Run until cancelled."""
    await asyncio.Event().wait()


async def test_signal_is_a_normal_end() -> None:
    """The body is cancelled, and the code after it goes on."""
    with shutdown_on_signals() as shutdown:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(5)
    assert shutdown.asked


async def test_forcing_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """However often Ctrl-C is pressed; `on_force` is called each time."""
    forced = 0

    def force() -> None:
        nonlocal forced
        forced += 1

    with caplog.at_level("INFO", "rocket.run"), shutdown_on_signals() as shutdown:
        shutdown.on_force.append(force)
        for _ in range(4):
            shutdown.ask("SIGINT")
        await asyncio.sleep(5)
    assert ["SIGINT: shutting down", "SIGINT: forcing shutdown"] == caplog.messages
    assert 3 == forced


async def test_handlers_are_put_back() -> None:
    """Ctrl-C means again what it meant before."""
    before = signal.getsignal(signal.SIGINT)
    with shutdown_on_signals():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


async def test_failure_in_the_background_is_raised_as_itself() -> None:
    """The body does not go on without its part."""

    async def fail() -> None:
        raise ServerKeepsDying("replica0")

    with pytest.raises(ServerKeepsDying):
        async with background(fail(), "part"):
            await asyncio.sleep(5)


async def test_part_that_ends_by_itself_is_a_failure() -> None:
    """A loop that should run for ever has no business to end."""

    async def end() -> None:
        pass

    with pytest.raises(TaskDied, match="part"):
        async with background(end(), "part"):
            await asyncio.sleep(5)


async def test_signal_while_a_failure_unwinds_forces_and_does_not_cancel() -> None:
    """The clean-up runs to its end, and the failure stays the failure."""
    cleaned_up = asyncio.Event()
    forced: list[bool] = []

    @contextlib.asynccontextmanager
    async def slow_to_clean_up() -> AsyncIterator[None]:
        try:
            yield
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.05)
            cleaned_up.set()

    async def program() -> None:
        with shutdown_on_signals() as shutdown:
            shutdown.on_force.append(lambda: forced.append(True))
            async with ShutdownStack(shutdown) as stack:
                await stack.enter_async_context(slow_to_clean_up())
                raise ServerKeepsDying("replica0")

    with pytest.raises(ServerKeepsDying):
        await program()
    assert cleaned_up.is_set()
    assert [True] == forced


async def test_second_signal_forces() -> None:
    """The first one has asked already."""
    forced: list[bool] = []
    with shutdown_on_signals() as shutdown:
        shutdown.on_force.append(lambda: forced.append(True))
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await forever()
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.05)
    assert [True] == forced
