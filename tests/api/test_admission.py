"""Who is let in while there is not enough for all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from rocket.api import admission
from rocket.api.admission import Admission, Manners
from tests.routing.test_observer import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LONG_S, SHORT_S = 0.1, 0.0001
"""Turns of the loop."""


class Guests:
    """Requests of clients, each with manners of its own, that stay until they are told to leave."""

    def __init__(self, house: Admission) -> None:
        self.house = house
        self.leave = asyncio.Event()
        self._staying: list[asyncio.Task[web.StreamResponse]] = []

    async def ask(self, path: str = "/rides/1", manners: Manners | None = None) -> web.Response:
        """Ask for something that costs no server anything; return the answer."""

        async def handle(_request: web.BaseRequest) -> web.StreamResponse:
            return web.Response(text="here")

        answer = await self.house.rationed(make_mocked_request("GET", path), handle, manners or Manners())
        assert isinstance(answer, web.Response)
        return answer

    async def stay(self, count: int) -> None:
        """Have so many let in that stay."""

        async def handle(_request: web.BaseRequest) -> web.StreamResponse:
            await self.leave.wait()
            return web.Response(headers={"Rocket-Served-By": "replica0"})

        inside = self.house.inside
        for _ in range(count):
            request = make_mocked_request("GET", "/rides/1")
            self._staying.append(asyncio.ensure_future(self.house.rationed(request, handle, Manners())))
        await until(lambda: self.house.inside == inside + count)

    async def go(self) -> list[int]:
        """Have all leave; return their statuses."""
        self.leave.set()
        return [answer.status for answer in await asyncio.gather(*self._staying)]


@pytest.fixture
async def guests() -> AsyncIterator[Guests]:
    """A house nobody is in."""
    guests = Guests(Admission())
    yield guests
    await guests.go()


def overload(house: Admission) -> None:
    """Have the loop turn too slowly, until no more than the fewest are let in."""
    for _ in range(2):
        house.follow(LONG_S)
    assert not house.unasked


def calm(house: Admission, pulses: int) -> None:
    """Have the loop turn quickly for a while."""
    for _ in range(pulses):
        house.follow(SHORT_S)


async def test_nobody_is_refused_while_the_loop_turns_quickly(guests: Guests) -> None:
    """However many wait for a server, up to a bound that they have anyway."""
    await guests.stay(admission.MOST)

    assert 503 == (await guests.ask()).status
    assert [200] * admission.MOST == await guests.go()


async def test_a_refusal_says_when_to_come_back(guests: Guests) -> None:
    """In the API's own form."""
    await guests.stay(admission.MOST)

    answer = await guests.ask()

    assert isinstance(answer.body, bytes)
    assert {"error": "There are too many requests. Please try again."} == json.loads(answer.body)
    assert ("1", "no-store", "application/json") == (
        answer.headers["Retry-After"],
        answer.headers["Cache-Control"],
        answer.content_type,
    )
    assert 1 == guests.house.refused


async def test_one_slow_turn_is_no_overload(guests: Guests) -> None:
    """A collection of garbage, say."""
    guests.house.follow(LONG_S)
    guests.house.follow(SHORT_S)
    guests.house.follow(LONG_S)

    assert guests.house.unasked


async def test_in_an_overload_few_are_let_in(guests: Guests) -> None:
    """And those who are in stay."""
    overload(guests.house)
    await guests.stay(admission.LEAST)

    assert 503 == (await guests.ask()).status
    assert [200] * admission.LEAST == await guests.go()
    assert 200 == (await guests.ask()).status


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/replicas", "/metrics"])
async def test_who_watches_is_never_refused(guests: Guests, path: str) -> None:
    """Not even who asks again and again."""
    overload(guests.house)
    await guests.stay(admission.LEAST)
    manners = Manners()

    assert [200] * 3 == [(await guests.ask(path, manners)).status for _ in range(3)]


async def test_who_comes_back_too_soon_is_refused_though_there_is_room(guests: Guests) -> None:
    """It was told when to come; others are let in meanwhile."""
    overload(guests.house)
    await guests.stay(admission.LEAST)
    manners = Manners()
    await guests.ask(manners=manners)
    await guests.go()

    assert 503 == (await guests.ask(manners=manners)).status
    assert 200 == (await guests.ask()).status
    manners.welcome_at = time.monotonic()
    assert 200 == (await guests.ask(manners=manners)).status


async def test_a_few_of_those_who_come_back_too_soon_are_heard_in_a_turn(guests: Guests) -> None:
    """So what refusing them costs does not grow with their number."""
    overload(guests.house)
    rude = [Manners() for _ in range(10 * admission.HEARD_A_TURN)]
    for manners in rude:
        manners.welcome_at = time.monotonic() + 60
    asking = [asyncio.ensure_future(guests.ask(manners=manners)) for manners in rude]

    answered = []
    for _ in range(5):
        await asyncio.sleep(0)
        answered.append(sum(each.done() for each in asking))

    most = max(later - earlier for earlier, later in itertools.pairwise(answered))
    assert 0 < most <= admission.HEARD_A_TURN
    assert {503} == {answer.status for answer in await asyncio.gather(*asking)}


async def test_more_are_let_in_as_soon_as_nobody_has_to_be_refused(guests: Guests) -> None:
    """A tenth of a second after a flood it is as if it had not been."""
    overload(guests.house)
    calm(guests.house, 10)

    await guests.stay(admission.LEAST + 1)


async def test_as_long_as_some_are_refused_more_are_let_in_slowly(guests: Guests) -> None:
    """Those inside may wait for a server that hangs: then there is room for others, and no flood comes in."""
    overload(guests.house)
    for _ in range(10):
        guests.house.refused += 1
        calm(guests.house, 1)

    assert admission.LEAST < guests.house.most <= admission.LEAST + 10


async def test_a_body_on_its_way_takes_nobodys_place(guests: Guests) -> None:
    """Whoever sends it may take as long as that may take."""
    overload(guests.house)
    await guests.stay(admission.LEAST)
    with contextlib.ExitStack() as stack:
        stack.enter_context(guests.house.waiting_for_a_body())
        assert 200 == (await guests.ask()).status
    assert 503 == (await guests.ask()).status


async def test_bodies_on_their_way_have_a_bound(guests: Guests) -> None:
    """Each of them takes memory."""
    with contextlib.ExitStack() as stack:
        for _ in range(admission.MOST_BODIES):
            stack.enter_context(guests.house.waiting_for_a_body())
        with pytest.raises(admission.Problem) as refused:
            stack.enter_context(guests.house.waiting_for_a_body())
        assert (503, "1") == (refused.value.status, refused.value.headers["Retry-After"])


async def test_a_loop_that_is_held_up_is_noticed(guests: Guests) -> None:
    """And so is that it is not any more."""
    loop = asyncio.get_running_loop()
    busy = True

    def hold_up(*_: Any) -> None:
        if busy:
            time.sleep(0.02)
            loop.call_soon(hold_up)

    async with asyncio.timeout(5):
        with guests.house.timing():
            hold_up()
            await until(lambda: not guests.house.unasked)
            busy = False
            await until(lambda: guests.house.unasked > 0)
