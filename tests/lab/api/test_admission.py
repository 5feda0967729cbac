"""Who is let in while there is not enough for all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from rocket.lab.api import limits
from rocket.lab.api.limits import Admission, Backoff
from rocket.lab.api.problems import Problem
from tests.support.servers import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BOUNDS = limits.Bounds()
LONG_S, SHORT_S = 0.1, 0.0001
"""Turns of the loop."""
PULSE_S = 0.01


class Guests:
    """Requests of clients, each with backoff of its own, that stay until they are told to leave."""

    def __init__(self, house: Admission) -> None:
        self.house = house
        self.leave = asyncio.Event()
        self._staying: list[asyncio.Task[web.StreamResponse]] = []

    async def ask(self, path: str = "/rides/1", backoff: Backoff | None = None) -> web.Response:
        """Ask for something that costs no server anything; return the answer."""

        async def handle(_request: web.BaseRequest) -> web.StreamResponse:
            return web.Response(text="here")

        answer = await self.house.rationed(make_mocked_request("GET", path), handle, backoff or Backoff())
        assert isinstance(answer, web.Response)
        return answer

    async def stay(self, count: int) -> None:
        """Have a number of requests admitted that stay in flight."""

        async def handle(_request: web.BaseRequest) -> web.StreamResponse:
            await self.leave.wait()
            return web.Response(headers={"Rocket-Served-By": "replica0"})

        inside = self.house.inside
        for _ in range(count):
            request = make_mocked_request("GET", "/rides/1")
            self._staying.append(asyncio.ensure_future(self.house.rationed(request, handle, Backoff())))
        await until(lambda: self.house.inside == inside + count)

    async def go(self) -> list[int]:
        """Have all leave; return their statuses."""
        self.leave.set()
        return [answer.status for answer in await asyncio.gather(*self._staying)]


@pytest.fixture
async def guests() -> AsyncIterator[Guests]:
    """An admission without requests."""
    guests = Guests(Admission())
    yield guests
    await guests.go()


class Loop:
    """The loop as an admission sees it, in a time of its own."""

    def __init__(self, house: Admission) -> None:
        self.now = 1.0
        self._house = house

    def turns(self, turn_s: float, times: int = 1, *, waits: bool = False) -> None:
        """Have it looked at some times, while it turns so quickly and finds time to wait, or not."""
        for _ in range(times):
            self.now += PULSE_S
            self._house.follow(self.now, turn_s, waited=waits)

    def overload(self) -> None:
        """Have it fall behind, until no more than the fewest are let in."""
        self.turns(LONG_S, 2)
        while self._house.most > limits.LEAST:
            self._house.refused += 1
            self.turns(SHORT_S)


@pytest.fixture
def loop(guests: Guests) -> Loop:
    """One that has not been looked at."""
    return Loop(guests.house)


async def test_nobody_is_refused_while_the_loop_finds_time_to_wait(guests: Guests, loop: Loop) -> None:
    """However many wait for a server, up to a bound; and however long a turn takes."""
    await guests.stay(BOUNDS.requests)
    loop.turns(LONG_S, 10, waits=True)

    assert guests.house.unchecked
    assert 503 == (await guests.ask()).status
    assert [200] * BOUNDS.requests == await guests.go()


async def test_nobody_is_refused_while_few_ask_without_a_break(guests: Guests, loop: Loop) -> None:
    """They keep the loop from ever waiting, and are answered soon all the same."""
    await guests.stay(limits.BUSY)
    loop.turns(SHORT_S, 100)

    assert guests.house.unchecked


async def test_many_who_keep_the_loop_from_waiting_are_an_overload(guests: Guests, loop: Loop) -> None:
    """Each of them waits for all the others, however short the turns are."""
    await guests.stay(limits.BUSY + 1)
    loop.turns(SHORT_S, 2)

    assert 503 == (await guests.ask()).status


async def test_a_refusal_says_when_to_come_back(guests: Guests) -> None:
    """In the API's own form."""
    await guests.stay(BOUNDS.requests)

    answer = await guests.ask()

    assert isinstance(answer.body, bytes)
    assert {"error": "There are too many requests. Please try again."} == json.loads(answer.body)
    assert ("1", "no-store", "application/json") == (
        answer.headers["Retry-After"],
        answer.headers["Cache-Control"],
        answer.content_type,
    )
    assert 1 == guests.house.refused


async def test_one_slow_turn_is_no_overload(guests: Guests, loop: Loop) -> None:
    """A collection of garbage, say."""
    loop.turns(LONG_S)
    loop.turns(SHORT_S)
    loop.turns(LONG_S)

    assert guests.house.unchecked


async def test_an_overload_is_logged_once_a_request_is_refused(
    guests: Guests, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    """Once each time, and its end as well; an overload without refusals is not logged."""
    for _ in range(2):
        caplog.clear()
        loop.turns(LONG_S, 2)
        assert 0 == guests.house.unchecked
        loop.turns(SHORT_S, 1000, waits=True)
        assert 0 != guests.house.unchecked
        assert [] == caplog.messages

        loop.turns(LONG_S, 2)
        guests.house.refused += 1
        loop.turns(SHORT_S)
        guests.house.refused += 1
        loop.turns(SHORT_S)
        assert ["overload: more than 48 requests at a time are refused"] == caplog.messages
        loop.turns(SHORT_S, 1000, waits=True)
        assert ["overload", "the overload is over"] == [line[:20].partition(":")[0] for line in caplog.messages]


async def test_in_an_overload_few_are_let_in(guests: Guests, loop: Loop) -> None:
    """And those who are in stay."""
    loop.overload()
    await guests.stay(limits.LEAST)

    assert 503 == (await guests.ask()).status
    assert [200] * limits.LEAST == await guests.go()
    assert 200 == (await guests.ask()).status


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/replicas", "/metrics"])
async def test_who_watches_is_never_refused(guests: Guests, loop: Loop, path: str) -> None:
    """Not even who asks again and again."""
    loop.overload()
    await guests.stay(limits.LEAST)
    backoff = Backoff()

    assert [200] * 3 == [(await guests.ask(path, backoff)).status for _ in range(3)]


async def test_who_comes_back_too_soon_is_refused_though_there_is_room(guests: Guests, loop: Loop) -> None:
    """It was told when to come; others are let in meanwhile."""
    loop.overload()
    await guests.stay(limits.LEAST)
    backoff = Backoff()
    await guests.ask(backoff=backoff)
    await guests.go()

    assert 503 == (await guests.ask(backoff=backoff)).status
    assert 200 == (await guests.ask()).status
    backoff.until = time.monotonic()
    assert 200 == (await guests.ask(backoff=backoff)).status


async def heard_in_a_turn(guests: Guests, path: str, backoff: list[Backoff]) -> int:
    """Have all of them ask at the same time; return how many at the most are answered in a turn of the loop."""
    asking = [asyncio.ensure_future(guests.ask(path, each)) for each in backoff]
    answered = [0]
    while answered[-1] < len(asking):
        await asyncio.sleep(0)
        answered.append(sum(each.done() for each in asking))
    return max(later - earlier for earlier, later in itertools.pairwise(answered))


async def test_one_of_those_who_come_back_too_soon_is_heard_in_a_turn(guests: Guests, loop: Loop) -> None:
    """So what refusing them costs does not grow with their number."""
    loop.overload()
    await guests.stay(limits.LEAST)
    rude = [Backoff() for _ in range(20)]

    assert 20 == await heard_in_a_turn(guests, "/rides/1", rude)
    assert 1 == await heard_in_a_turn(guests, "/rides/1", rude)


@pytest.mark.parametrize("path", ["/livez", "/nowhere"])
async def test_one_of_those_who_ask_for_nothing_is_heard_in_a_turn(guests: Guests, loop: Loop, path: str) -> None:
    """A flood need not be of reads: those wait for a node anyway."""
    loop.overload()
    idle = [Backoff() for _ in range(20)]

    assert 20 == await heard_in_a_turn(guests, path, idle)
    assert 1 == await heard_in_a_turn(guests, path, idle)


async def test_when_nobody_had_to_be_refused_for_a_while_everybody_is_let_in(guests: Guests, loop: Loop) -> None:
    """Those who were have had the time to ask again."""
    loop.overload()
    loop.turns(SHORT_S, int(limits.RETRY_AFTER_S / PULSE_S))
    assert not guests.house.unchecked

    loop.turns(SHORT_S, 60)

    await guests.stay(BOUNDS.requests)


async def test_while_many_have_to_wait_to_be_heard_the_overload_lasts(guests: Guests, loop: Loop) -> None:
    """Without it they would all be heard at once."""
    loop.overload()
    idle = [Backoff() for _ in range(2 * limits.LEAST)]
    await heard_in_a_turn(guests, "/nowhere", idle)
    asking = [asyncio.ensure_future(guests.ask("/nowhere", each)) for each in idle]
    await asyncio.sleep(0)
    loop.turns(SHORT_S, 1000)

    assert not guests.house.unchecked
    await asyncio.gather(*asking)


async def test_who_never_waits_is_let_in_once_the_loop_does(guests: Guests, loop: Loop) -> None:
    """One client alone, however rude, is no overload."""
    loop.overload()
    await guests.stay(limits.LEAST)
    backoff = Backoff()
    assert 503 == (await guests.ask(backoff=backoff)).status
    loop.turns(SHORT_S, 60, waits=True)

    assert 200 == (await guests.ask(backoff=backoff)).status


async def test_a_loop_that_finds_time_to_wait_lets_in_more(guests: Guests, loop: Loop) -> None:
    """Those inside may wait for a server that hangs: then there is room for others."""
    loop.overload()
    guests.house.refused += 1
    loop.turns(SHORT_S, 30, waits=True)

    await guests.stay(5 * limits.LEAST)


async def test_a_body_on_its_way_takes_nobodys_place(guests: Guests, loop: Loop) -> None:
    """The client may take as long as a body may take."""
    loop.overload()
    await guests.stay(limits.LEAST)
    with contextlib.ExitStack() as stack:
        stack.enter_context(guests.house.waiting_for_a_body())
        assert 200 == (await guests.ask()).status
    assert 503 == (await guests.ask()).status


async def test_bodies_on_their_way_have_a_bound(guests: Guests) -> None:
    """Each of them takes memory."""
    with contextlib.ExitStack() as stack:
        for _ in range(BOUNDS.bodies):
            stack.enter_context(guests.house.waiting_for_a_body())
        with pytest.raises(Problem) as refused:
            stack.enter_context(guests.house.waiting_for_a_body())
        assert (503, "1") == (refused.value.status, refused.value.headers["Retry-After"])


async def test_a_loop_that_is_held_up_is_noticed(guests: Guests) -> None:
    """And so is that it is not any more."""
    running = asyncio.get_running_loop()
    busy = True

    def hold_up() -> None:
        began = time.monotonic()
        while time.monotonic() - began < 4 * limits.LONG_TURN_S:
            """A sleep would be a wait."""
        if busy:
            running.call_soon(hold_up)

    async with asyncio.timeout(10):
        with guests.house.watching_the_loop():
            hold_up()
            await until(lambda: not guests.house.unchecked)
            busy = False
            await until(lambda: guests.house.unchecked > 0)
