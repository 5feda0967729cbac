"""Limits to how long reads and writes may take, and to how many are at work at once."""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager


@dataclass(frozen=True, slots=True)
class Limits:
    """How long reads and writes may take, in seconds, and how many connections there may be."""

    read_s: float = 5.0
    """A read, with all its attempts."""
    attempt_s: float = 1.0
    """One attempt on one replica."""
    replicas_tried: int = 2
    """How many replicas may fail a read, and not at once, before it goes to the primary."""
    write_s: float = 5.0
    """A write until its COMMIT is sent, with all its attempts."""
    commit_s: float = 5.0
    """A COMMIT, and the statement that records the floor after it."""
    connections: int = 10
    """Connections per node, with those whose COMMIT was given up and still runs on the server."""
    queue: int = 100
    """Waiters per node before further requests are rejected."""
    warm: int = 1
    """Connections per node that are kept open, in use or not: opened before they are needed, and again when one
    ends. What asyncpg's pool calls `min_size`."""
    idle_s: float = 300.0
    """A connection beyond those is closed once it was not used for so long; 0: never."""
    lifetime_s: float = 3600.0
    """A connection is closed when it is given back so long after it was opened, since backends grow; 0: never."""
    primary_reads: int = 7
    """How many of the primary's connections reads may take: when all replicas lag, writes go on.

    At most half of them, and half of all connections for writes, are held by what waits for commits of others.
    """
    close_s: float = 2.0
    """Closing a pool gracefully."""


class Timeout:
    """What `asyncio.timeout` is, at a third of its cost, which every read pays; a plain context manager.

    Cancels the current task once `timeout_s` is over, and raises `TimeoutError` in place of that cancellation.
    """

    __slots__ = ("_cancelled_before", "_is_over", "_task", "_timer")

    def __init__(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._task = task
        self._cancelled_before = task.cancelling()
        self._is_over = False
        self._timer = loop.call_later(timeout_s, self._end)

    def _end(self) -> None:
        self._is_over = True
        self._task.cancel()

    def restart(self, timeout_s: float) -> None:
        """Let the time begin anew."""
        self._timer.cancel()
        if not self._is_over:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        self._timer.cancel()
        # A cancellation by others, at the same time, stays one.
        if self._is_over and self._task.uncancel() <= self._cancelled_before and kind is asyncio.CancelledError:
            raise TimeoutError from error


class TooManyWaiting(ConnectionError):
    """The queue for a connection is full."""


class Place:
    """One of a limiter's places, which is taken."""

    __slots__ = ("_limiter", "_nested")

    def __init__(self, limiter: CapacityLimiter | None) -> None:
        self._limiter = limiter
        self._nested = 0

    def give_back(self) -> None:
        """Let another one have it."""
        if (limiter := self._limiter) is not None:
            self._limiter = None
            limiter.inside -= 1
            limiter._places.release()  # noqa: SLF001 - they are made for each other
            limiter._stuck -= self._nested > 0  # noqa: SLF001

    def pass_on(self) -> Place:
        """Return a place in place of this one, which is none any more."""
        other = Place(self._limiter)
        self._limiter = None
        return other

    @property
    def is_taken(self) -> bool:
        """Whether it has not been given back, or passed on."""
        return self._limiter is not None

    def is_of(self, limiter: CapacityLimiter) -> bool:
        """Return whether it is still one of a limiter's."""
        return self._limiter is limiter

    @contextlib.contextmanager
    def waiting_for_another(self) -> Iterator[None]:
        """Count it among those that will not be given back until another one of the same limiter is."""
        limiter = self._limiter
        assert limiter is not None  # noqa: S101 - see `is_of`
        self._nested += 1
        limiter._stuck += self._nested == 1  # noqa: SLF001
        try:
            yield
        finally:
            self._nested -= 1
            limiter._stuck -= self._nested == 0 and self._limiter is limiter  # noqa: SLF001


HELD: ContextVar[tuple[Place, ...]] = ContextVar("held", default=())
"""The places that what is running now was given; a task that it starts inherits them."""


class CapacityLimiter:
    """Lets `width` through at a time; `queue` more may wait, and further ones are rejected.

    An asynchronous context manager that many use at once: it waits for a place, keeps it for the body, and raises
    `TooManyWaiting` at once if the queue is full. Where each place is held by something that waits for another one
    of them, as work does that reads by another session, none would ever be free: raise `RuntimeError` then.
    """

    __slots__ = ("_places", "_queue", "_stuck", "_what", "inside", "waiting", "width")

    def __init__(self, what: str, *, width: int, queue: int) -> None:
        self._what = what
        self._queue = queue
        self._places = asyncio.Semaphore(width)
        self._stuck = 0
        self.width = width
        """How many places there are."""
        self.waiting = 0
        """How many wait for a place."""
        self.inside = 0
        """How many have one."""

    def unless_nested(self) -> AbstractAsyncContextManager[None]:
        """Return this limiter, or no limit for what has a place of any already, which others may wait for."""
        is_nested = any(place.is_taken for place in HELD.get())
        return contextlib.nullcontext() if is_nested else self

    @property
    def is_full(self) -> bool:
        """Whether the next one has to wait."""
        return self._places.locked()

    async def take(self) -> Place:
        """Wait for a place."""
        if self._places.locked():
            await self._wait()
        else:
            await self._places.acquire()
        self.inside += 1
        place = Place(self)
        HELD.set((*HELD.get(), place))
        return place

    async def _wait(self) -> None:
        if self.waiting >= self._queue:
            raise TooManyWaiting(f"{self.waiting} wait already for {self._what}")
        outer = next((place for place in HELD.get() if place.is_of(self)), None)
        self.waiting += 1
        try:
            with contextlib.nullcontext() if outer is None else outer.waiting_for_another():
                if self._stuck >= self.width:
                    raise RuntimeError(
                        f"this read or write is nested in work that has {self._what}, and would wait for ever for "
                        f"another one: all {self.width} are held by work like that. Use the connection that work "
                        "is given, or do it before or after"
                    )
                await self._places.acquire()
        finally:
            self.waiting -= 1

    async def __aenter__(self) -> None:
        await self.take()

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give back the place that was taken last."""
        held = HELD.get()
        place = next(place for place in reversed(held) if place.is_of(self))
        HELD.set(tuple(other for other in held if other is not place))
        place.give_back()


def commit_waits(places: int, queue: int) -> CapacityLimiter:
    """Return what keeps waits for commits of others to half of the `places` that they and others take."""
    return CapacityLimiter("a place to wait for commits", width=max(1, places // 2), queue=queue + places)
