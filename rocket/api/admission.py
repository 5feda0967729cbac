"""How many requests are let in, so that those are answered soon, and all others told at once to come later.

What a flood takes away is the event loop: every answer waits for all the others of its turn. So the loop's turns
are timed now and then. Once they take too long, no more requests are let in than keep them short, until nobody has
to be refused any more. Who was refused and asks again too soon waits in a queue to be refused again, of which a
few are heard in each turn: so it is the loop that sets the flood's pace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket.api.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

RETRY_AFTER_S = 1
MOST = 256
"""How many requests may be in hand at a time, whatever the loop does: they may all be waiting for a server."""
LEAST = 12
"""How many are let in even if the loop is slow; eight that ask without a break load one processor fully."""
_PULSE_S = 0.01
"""How often a turn is timed."""
_SLOW_TURN_S = 0.005
"""Two turns in a row that take longer are overload."""
_SHORT_TURN_S = 0.001
"""What a turn is brought down to then: an answer takes two or three."""
HEARD_A_TURN = 4
"""How many of those who ask too soon are heard in one turn."""
MOST_BODIES = 1024
"""How many bodies may be waited for at a time, of 64 KiB at the most."""
_FOR_WATCHERS = frozenset({"/livez", "/readyz", "/replicas", "/metrics"})
"""What is never refused, so that an overload can be watched; on one connection it has the pace of a flood, too."""
_BODY = b'{"error": "There are too many requests. Please try again."}'
_HEADERS = {
    "Content-Type": "application/json; charset=utf-8",
    "Cache-Control": "no-store",
    "Retry-After": str(RETRY_AFTER_S),
}

_log = logging.getLogger("rocket.api")


class Manners:
    """How the client of a connection behaves while there is not enough for all."""

    __slots__ = ("cheap", "welcome_at")

    def __init__(self) -> None:
        self.cheap = False
        """Whether its latest request cost no server anything, and so would be repeated without end."""
        self.welcome_at = 0.0
        """Monotonic seconds: not before that was it to ask again."""


class Admission:
    """Lets requests in, or refuses them; stands before everything else that is done for one.

    Whoever handles a request lets it in by itself while fewer are `inside` than `unasked`, and asks `rationed` to
    handle it otherwise.
    """

    def __init__(self) -> None:
        self.refused = 0
        """How many were, since the start."""
        self.inside = 0
        """How many requests are in hand; whoever lets one in counts it."""
        self._bodies = 0
        self.most = MOST
        """How many may be inside."""
        self.unasked = MOST
        """`MOST`, and none during an overload."""
        self._was_slow = False
        self._refused_before = 0
        self._early: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def rationed(self, request: web.BaseRequest, handler: Handler, manners: Manners) -> web.StreamResponse:
        """Answer a request of somebody with these manners, one way or the other."""
        too_soon = time.monotonic() < manners.welcome_at
        if too_soon or manners.cheap:
            await self._turn()
        if request.path not in _FOR_WATCHERS and (too_soon or self.inside >= self.most):
            manners.welcome_at = time.monotonic() + RETRY_AFTER_S
            self.refused += 1
            return web.Response(body=_BODY, status=HTTPStatus.SERVICE_UNAVAILABLE, headers=_HEADERS)
        self.inside += 1
        try:
            response = await handler(request)
        finally:
            self.inside -= 1
        manners.cheap = "Rocket-Served-By" not in response.headers
        return response

    async def _turn(self) -> None:
        """Wait for a place among those who are heard."""
        loop = asyncio.get_running_loop()
        if not self._early:
            loop.call_soon(self._hear)
        place = loop.create_future()
        self._early.append(place)
        await place

    def _hear(self) -> None:
        for _ in range(min(HEARD_A_TURN, len(self._early))):
            place = self._early.popleft()
            if not place.done():
                place.set_result(None)
        if self._early:
            asyncio.get_running_loop().call_soon(self._hear)

    @contextlib.contextmanager
    def waiting_for_a_body(self) -> Iterator[None]:
        """Leave one's place to others while a request's body is on its way; raise a 503 if too many are."""
        if self._bodies >= MOST_BODIES:
            self.refused += 1
            raise too_many_requests()
        self._bodies += 1
        self.inside -= 1
        try:
            yield
        finally:
            self._bodies -= 1
            self.inside += 1

    # --- the loop's turns ---

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Time the running loop's turns for as long as the context lasts."""
        self._pulse_later()
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None

    def _pulse_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_PULSE_S, self._pulse)

    def _pulse(self) -> None:
        # A timer's callback runs before the others of its turn; the turn that follows is a whole one.
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: loop.call_soon(self._turned, time.monotonic()))

    def _turned(self, began: float) -> None:
        if self._timer is None:
            return
        now = time.monotonic()
        self.follow(now - began)
        if self._was_slow:  # at once: the next one tells whether it was a chance
            asyncio.get_running_loop().call_soon(self._turned, now)
        else:
            self._pulse_later()

    def follow(self, turn_s: float) -> None:
        """Let in more or fewer, now that a turn has taken so long."""
        calm = self.unasked > 0
        slow = turn_s > (_SLOW_TURN_S if calm else _SHORT_TURN_S)
        if calm:
            if slow and self._was_slow:
                self.most, self.unasked = LEAST, 0
                _log.warning("overload: a turn of the loop takes %.0f ms, so requests are refused", turn_s * 1000)
        elif slow:
            self.most = max(LEAST, self.most * 3 // 4)
        elif self._early or self.refused != self._refused_before:
            self.most = min(MOST, self.most + 1)
        else:
            self.most *= 2
            if self.most >= MOST:
                self.most = self.unasked = MOST
                _log.warning("the overload is over; %d requests were refused since the start", self.refused)
        self._refused_before = self.refused
        self._was_slow = slow


ADMISSION = web.AppKey("admission", Admission)


def too_many_requests() -> Problem:
    """Say that there is more to do than can be done soon; nothing was changed."""
    text = "There are too many requests. Please try again."
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, text, {"Retry-After": str(RETRY_AFTER_S)})
