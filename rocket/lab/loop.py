"""The event loop that everything runs on."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

ResultT = TypeVar("ResultT")


def run(main_task: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a program's main task to its end, on uvloop where there is one; return what it returns."""
    if sys.platform == "win32":
        return asyncio.run(main_task)
    import uvloop  # noqa: PLC0415 - not on every platform

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main_task)
