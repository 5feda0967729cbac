"""Faults of the processes that observe, and serve the API: each a context, as in `injections`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rocket.cluster.errors import NodeNotRunning
from rocket.lab.checker.history import TAKEN_OVER
from rocket.lab.torture import takeover

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.lab.torture.faults import Detail, Injection, Target
    from rocket.lab.workers import Worker

_BACK_S = 30.0
_POLL_S = 0.05


@contextlib.asynccontextmanager
async def killed(_target: Target, process: Worker, _length_s: float) -> AsyncIterator[Detail]:
    """Kill it; healed, it has been started again."""
    process.crash()
    try:
        yield {}
    finally:
        await _up_again(process)


@contextlib.asynccontextmanager
async def frozen(_target: Target, process: Worker, _length_s: float) -> AsyncIterator[Detail]:
    """Halt it: its connections stay, and it says nothing."""
    process.freeze()
    try:
        yield {}
    finally:
        process.thaw()


def of_writer(fault: Injection) -> Injection:
    """Return the same fault of whoever writes the table of statuses, and how soon another one writes it."""

    @contextlib.asynccontextmanager
    async def hit(target: Target, _none: None, length_s: float) -> AsyncIterator[Detail]:
        primary = await target.cluster.primary.connect(target.cluster.settings.database)
        try:
            before = await takeover.look(primary)
            writer = next((each for each in target.processes if each.pid == before.writer), None)
            if writer is None or not writer.up or writer.frozen:
                raise NodeNotRunning("nobody writes the table of statuses")
            async with fault(target, writer, length_s) as detail:
                taken_over_s = await takeover.taken_over(primary, before)
                yield {**detail, "process": writer.name, TAKEN_OVER: taken_over_s}
        finally:
            primary.terminate()

    return hit


async def _up_again(process: Worker) -> None:
    try:
        async with asyncio.timeout(_BACK_S):
            while not process.up:  # noqa: ASYNC110 - whoever starts it
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise NodeNotRunning(f"{process.name} does not come back") from None
