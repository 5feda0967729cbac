"""How many requests are let in, so that those are answered soon, and all others told at once to come later.

What a flood takes away is the event loop: every answer waits for all the others of its turn. So it is looked at
now and then whether the loop still finds a moment to wait in. While it does not, and many are inside or turns take
long, no more requests are let in than are answered soon. Who was refused and asks again too soon waits in a queue
to be refused again, of which one is heard in each turn: so it is the loop that sets the flood's pace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import time
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from rocket.lab.api.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

RETRY_AFTER_S = 1
MOST = 256
"""How many requests may be inside at a time, whatever the loop does: they may all be waiting for a server."""
CROWD = 48
"""More than so many inside are overload, unless the loop finds time to wait."""
LEAST = 12
"""How many are let in at the least; eight that ask without a break keep the loop from ever waiting."""
LONG_TURN_S = 0.005
"""A turn of the loop that takes longer is overload too, unless it was by chance."""
_PULSE_S = 0.01
"""How often the loop is looked at."""
_QUIET_S = RETRY_AFTER_S + 0.5
"""The overload is over when for so long nobody had to be refused, nor many to wait to be heard."""
MOST_BODIES = 1024
"""How many bodies may be waited for at a time, of 64 KiB at the most."""
_FOR_WATCHERS = ("/livez", "/readyz", "/replicas", "/metrics")
_TEXT = "There are too many requests. Please try again."
_BODY = json.dumps({"error": _TEXT}).encode()
_HEADERS = {
    "Content-Type": "application/json; charset=utf-8",
    "Cache-Control": "no-store",
    "Retry-After": str(RETRY_AFTER_S),
}

_log = logging.getLogger("rocket.api")


class ClientGone:
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
        self.never_refused = set(_FOR_WATCHERS)
        """Paths for those who watch an overload; asked without a break, they have the pace of a flood, too."""
        self._bodies = 0
        self.most = MOST
        """How many may be inside."""
        self.unasked = MOST
        """`MOST`, and none during an overload."""
        self._told = False
        """Whether it was said that there is an overload: not before somebody is refused."""
        self._was_behind = False
        self._refused_before = 0
        self._quiet_since = 0.0
        self._waits = 0
        self._early: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def rationed(
        self, request: web.BaseRequest, handler: Handler, manners: ClientGone
    ) -> web.StreamResponse:
        """Answer a request of somebody with these manners, one way or the other."""
        too_soon = self.most < MOST and time.monotonic() < manners.welcome_at
        if too_soon or manners.cheap:
            await self._turn()
        if request.path not in self.never_refused and (too_soon or self.inside >= self.most):
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
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, {"Retry-After": str(RETRY_AFTER_S)})
        self._bodies += 1
        self.inside -= 1
        try:
            yield
        finally:
            self._bodies -= 1
            self.inside += 1

    # --- the loop ---

    @contextlib.contextmanager
    def watching_the_loop(self) -> Iterator[None]:
        """Let in fewer when the running loop cannot keep up, for as long as the context lasts."""
        self._timer = asyncio.get_running_loop().call_later(_PULSE_S, self._pulse)
        try:
            yield
        finally:
            self._timer.cancel()
            self._timer = None

    def _pulse(self) -> None:
        # A timer's callback comes before the others of its turn; the turn that follows is a whole one.
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: loop.call_soon(self._turned, time.monotonic()))

    def _turned(self, began: float) -> None:
        if self._timer is None:
            return
        now = time.monotonic()
        # To wait for events is to give up the processor of one's own accord, which the system counts.
        waits = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        self.follow(now, now - began, waited=waits > self._waits)
        self._waits = waits
        self._timer = asyncio.get_running_loop().call_later(_PULSE_S, self._pulse)

    def follow(self, now: float, turn_s: float, *, waited: bool) -> None:
        """Let in more or fewer: the loop `waited` since the last time, or did not, and a turn took so long."""
        refusing = self.refused != self._refused_before
        self._refused_before = self.refused
        if refusing or len(self._early) > LEAST:
            self._quiet_since = now
        if self.unasked:
            behind = not waited and (turn_s > LONG_TURN_S or self.inside > CROWD)
            if behind and self._was_behind:
                self.most, self.unasked, self._quiet_since = CROWD, 0, now
            self._was_behind = behind
            return
        if refusing and not self._told:
            self._told = True
            _log.warning("overload: more than %d requests at a time are refused", self.most)
        if now - self._quiet_since > _QUIET_S:
            self.most = self.unasked = MOST
            if self._told:
                self._told = False
                _log.warning("the overload is over; %d requests were refused since the start", self.refused)
        elif waited:
            self.most = min(MOST, self.most + self.most // 16 + 1)
        elif refusing:
            self.most = max(LEAST, self.most * 3 // 4)


ADMISSION = web.AppKey("admission", Admission)
