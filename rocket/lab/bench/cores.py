"""Which processor cores are whose: where the system lets us say so, the API has one to itself.

So it would be with the servers on machines of their own. On one machine the scheduler puts a server process on the
API's core for some runs and not for others, and the API then costs more for each read, by its cold caches.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def shared_out() -> Iterator[Callable[[], None] | None]:
    """Keep this process, and those that it starts from now on, off one core; put it back in the end.

    Yield what a new process calls to have that core for itself; None where there is nothing to share out.
    """
    if not hasattr(os, "sched_setaffinity"):  # macOS
        yield None
        return
    cores = os.sched_getaffinity(0)
    own = min(cores)
    if not cores - {own}:
        yield None
        return
    os.sched_setaffinity(0, cores - {own})
    try:
        yield lambda: os.sched_setaffinity(0, {own})
    finally:
        os.sched_setaffinity(0, cores)
