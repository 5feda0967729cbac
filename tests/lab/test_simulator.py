"""The simulator against a stub of the API, which lies and fails when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import pytest_asyncio
from aiohttp import web

from rocket import Freshness
from rocket.lab.shutdown import background
from rocket.lab.simulator import Outcome, Simulator, Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from pytest_aiohttp.plugin import AiohttpServer

    Answer: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

DEADLINE_S = 5.0
"""For whatever a test waits for: much longer than it takes."""


class NoPauses(random.Random):
    """Chance as ever, but no pause between writing and reading."""

    def uniform(self, a: float, b: float) -> float:
        """Return the lower bound where it is zero: that is a pause."""
        return a if a == 0 else super().uniform(a, b)


class StubApi:
    """Answers as the API does, unless an answer is put in the place of its own."""

    def __init__(self) -> None:
        self.users: list[str] = []
        self.rides: dict[int, dict[str, Any]] = {}
        self.reads: Counter[int] = Counter()
        self.on_user: Answer = self.new_user
        self.on_write: Answer = self.new_ride
        self.on_read: Answer = self.ride
        self._ids = itertools.count(1)

    def app(self) -> web.Application:
        """Make an application of it."""
        app = web.Application()
        app.router.add_post("/users", self._answer_user)
        app.router.add_post("/rides", self._answer_write)
        app.router.add_get("/rides/{id}", self._answer_read)
        return app

    # What is put in the place of an answer counts from then on: it is looked up for each request.

    async def _answer_user(self, request: web.Request) -> web.StreamResponse:
        return await self.on_user(request)

    async def _answer_write(self, request: web.Request) -> web.StreamResponse:
        return await self.on_write(request)

    async def _answer_read(self, request: web.Request) -> web.StreamResponse:
        return await self.on_read(request)

    async def new_user(self, request: web.Request) -> web.StreamResponse:
        """Make a user."""
        self.users.append((await request.json())["email"])
        return web.json_response({"email": self.users[-1], "id": len(self.users)}, status=201)

    async def new_ride(self, request: web.Request) -> web.StreamResponse:
        """Write a ride."""
        user_id = self.users.index(request.headers["Authorization"]) + 1
        ride_id = next(self._ids)
        distance = float(str((await request.post())["distance"]))
        self.rides[ride_id] = {"distance": distance, "id": ride_id, "user_id": user_id}
        return web.json_response(self.rides[ride_id], status=201)

    async def ride(self, request: web.Request) -> web.StreamResponse:
        """Read a ride: odd ones from a replica, the others from the primary."""
        ride = self.rides[int(request.match_info["id"])]
        self.reads[ride["id"]] += 1
        assert request.headers["Authorization"] == self.users[ride["user_id"] - 1]
        node, reason = ("replica0", "caught-up") if ride["id"] % 2 else ("primary", "not-caught-up")
        role = "primary" if node == "primary" else "replica"
        return web.json_response(
            ride,
            headers={"Rocket-Served-By": node, "Rocket-Served-As": role, "Rocket-Route-Reason": reason},
        )


def answers(status: int, body: object = None) -> Answer:
    """Answer in the same way whatever is asked."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        headers = {"Rocket-Served-By": "replica1", "Rocket-Route-Reason": "caught-up"}
        return web.json_response(body or {"error": "as told"}, status=status, headers=headers)

    return answer


async def drop(request: web.Request) -> web.StreamResponse:
    """Drop the connection instead of answering."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def break_off(request: web.Request) -> web.StreamResponse:
    """Drop the connection in the middle of an answer."""
    response = web.StreamResponse(status=201 if request.method == "POST" else 200)
    response.content_type = "application/json"
    response.content_length = 100
    await response.prepare(request)
    await response.write(b'{"distance": 1')
    return await drop(request)


async def garble(request: web.Request) -> web.StreamResponse:
    """Answer with something that claims to be JSON."""
    status = 201 if request.method == "POST" else 200
    return web.Response(status=status, body=b'{"distance": 1', content_type="application/json")


TROUBLE = {"503": answers(503), "500": answers(500), "drop": drop, "break off": break_off, "garble": garble}


@pytest.fixture
def stub() -> StubApi:
    """Return an API that answers rightly."""
    return StubApi()


@pytest_asyncio.fixture
async def url(stub: StubApi, aiohttp_server: AiohttpServer) -> str:
    """Serve the stub and return where."""
    return str((await aiohttp_server(stub.app())).make_url("/"))


def simulator(url: str, **options: Any) -> Simulator:
    """Return a simulator that tries again soon after a failure: the pauses are for people."""
    return Simulator(url, retry_s=0.01, **{"chance": NoPauses(1), **options})


@contextlib.asynccontextmanager
async def running(traffic: Simulator) -> AsyncIterator[Tally]:
    """Run a simulator beside the body, and cancel it at the end; if it fails, so does the body."""
    async with asyncio.timeout(DEADLINE_S), background(traffic.run(), "simulator"):
        yield traffic.tally


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds; the caller has the deadline."""
    while not condition():
        await asyncio.sleep(0.005)


def stale_reads(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged of stale reads, as errors."""
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


class TestRightAnswers:
    """An API that keeps its promise."""

    async def test_reads_are_fresh(self, stub: StubApi, url: str, caplog: pytest.LogCaptureFixture) -> None:
        """Every ride is read back as it was written, and nothing is amiss."""
        async with running(simulator(url)) as tally:
            await until(lambda: tally.reads.total() >= 10)
        assert set(tally.reads) == {Outcome.FRESH}
        assert (tally.stale, tally.unwritten, tally.left_out) == (0, 0, 0)
        assert len(stub.rides) - tally.rides in {0, 1}  # one may have been under way at the end
        assert stale_reads(caplog) == []

    async def test_reads_are_counted_by_node_and_reason(self, stub: StubApi, url: str) -> None:
        """Who served is told from the headers, and for the primary why."""
        async with running(simulator(url)) as tally:
            await until(lambda: tally.reads.total() >= 10)
        read = range(1, tally.reads.total() + 1)
        by_node = Counter("replica0" if number % 2 else "primary" for number in read)
        assert tally.by_node == by_node
        assert tally.fallbacks == {"not-caught-up": by_node["primary"]}
        assert set(stub.reads.values()) == {1}

    async def test_a_ride_is_read_back_after_a_pause_of_at_most_two_seconds(self, url: str) -> None:
        """Without a rate one client takes its time, at random."""
        asked: list[tuple[float, float]] = []

        class Chance(NoPauses):
            def uniform(self, a: float, b: float) -> float:
                asked.append((a, b))
                return super().uniform(a, b)

        async with running(Simulator(url, chance=Chance(1))) as tally:
            await until(lambda: tally.reads.total() >= 1)
        assert asked[:2] == [(0, 2.0), (5.0, 1000.0)]

    async def test_a_session_brings_what_the_last_answer_gave_it(self, stub: StubApi, url: str) -> None:
        """From ride to ride; where an answer gave none, the next request brings none."""
        brought: list[str | None] = []
        given = ["a", "b", "c", None, "d", "e"]

        def giving(answer: Answer) -> Answer:
            async def answer_with_token(request: web.Request) -> web.StreamResponse:
                brought.append(request.headers.get("Rocket-Session"))
                response = await answer(request)
                token = given[len(brought) - 1] if len(brought) <= len(given) else None
                if token is not None:
                    response.headers["Rocket-Session"] = token
                return response

            return answer_with_token

        stub.on_write, stub.on_read = giving(stub.new_ride), giving(stub.ride)
        async with running(Simulator(url, rate=2, chance=NoPauses())):
            await until(lambda: len(brought) > len(given))
        assert [None, "a", "b", "c", None, "d", "e"] == brought[: len(given) + 1]

    @pytest.mark.parametrize(("reconnect", "connections"), [(False, 1), (True, 5)])
    async def test_connections_are_kept_unless_requests_shall_reach_several_processes(
        self, stub: StubApi, url: str, reconnect: bool, connections: int
    ) -> None:
        """One leisurely client needs no more than one; or each of its requests has one of its own."""
        ports = []

        async def noted(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            ports.append(request.transport.get_extra_info("peername")[1])
            return await stub.ride(request)

        stub.on_read = noted
        async with running(simulator(url, reconnect=reconnect)) as tally:
            await until(lambda: tally.reads.total() >= 5)
        assert connections == len(set(ports[:5]))


class TestStaleAnswers:
    """An API that breaks its promise."""

    async def test_a_ride_that_is_not_there_is_stale(
        self, stub: StubApi, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A 404 for a ride that was acknowledged is counted, and logged as the error that it is."""
        stub.on_read = answers(404)
        async with running(simulator(url)) as tally:
            await until(lambda: tally.stale >= 3)
        assert set(tally.reads) == {Outcome.STALE}
        assert tally.by_node == {"replica1": tally.stale}
        assert stale_reads(caplog)[0] == (
            f"STALE READ: wrote ride {stub.rides[1]}, and replica1 (caught-up) answered 404 {{'error': 'as told'}}"
        )

    @pytest.mark.parametrize("wrong", [{"distance": 0.5}, {"id": 0}, {"user_id": 0}, {"more": True}])
    async def test_a_ride_that_is_another_is_stale(
        self, stub: StubApi, url: str, caplog: pytest.LogCaptureFixture, wrong: dict[str, object]
    ) -> None:
        """A ride has to come back exactly as it was acknowledged."""

        async def other_ride(request: web.Request) -> web.StreamResponse:
            return web.json_response(stub.rides[int(request.match_info["id"])] | wrong)

        stub.on_read = other_ride
        async with running(simulator(url)) as tally:
            await until(lambda: tally.stale >= 3)
        assert set(tally.reads) == {Outcome.STALE}
        assert all(message.startswith("STALE READ: wrote ride ") for message in stale_reads(caplog))

    async def test_one_stale_read_among_many_is_found(
        self, stub: StubApi, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A single wrong answer is told from the right ones before and after it."""

        async def once_not_there(request: web.Request) -> web.StreamResponse:
            answer = answers(404) if request.match_info["id"] == "5" else stub.ride
            return await answer(request)

        stub.on_read = once_not_there
        async with running(simulator(url)) as tally:
            await until(lambda: tally.reads.total() >= 10)
        assert tally.stale == 1
        assert len(stale_reads(caplog)) == 1


class TestReadsThatAskForLess:
    """What a read need not show yet is not stale without it; a ride that is another one still is."""

    @pytest.mark.parametrize("freshness", [Freshness.ANY, Freshness.within(60)])
    async def test_a_ride_that_is_not_there_yet_is_late(
        self, stub: StubApi, url: str, caplog: pytest.LogCaptureFixture, freshness: Freshness
    ) -> None:
        """And counted as late; the reads ask by their header."""
        asked: set[str | None] = set()

        async def not_there(request: web.Request) -> web.StreamResponse:
            asked.add(request.headers.get("Rocket-Freshness"))
            return await answers(404)(request)

        stub.on_read = not_there
        async with running(simulator(url, freshness=freshness)) as tally:
            await until(lambda: tally.reads[Outcome.LATE] >= 3)
            stub.on_read = answers(200, {"id": 0})
            await until(lambda: tally.stale >= 1)
        assert {str(freshness)} == asked
        assert {Outcome.LATE, Outcome.STALE} == set(tally.reads)
        assert f"{tally.reads[Outcome.LATE]} reads without a ride that it need not show yet" in tally.lines()[2]
        assert tally.stale == len(stale_reads(caplog))

    @pytest.mark.parametrize("freshness", [Freshness.GLOBAL, Freshness.within(0.000001)])
    async def test_what_it_has_to_show_is_stale_without(
        self, stub: StubApi, url: str, freshness: Freshness
    ) -> None:
        """Also what was acknowledged longer ago than the read allows."""
        stub.on_read = answers(404)
        async with running(simulator(url, freshness=freshness)) as tally:
            await until(lambda: tally.stale >= 3)
        assert {Outcome.STALE} == set(tally.reads)


class TestTrouble:
    """An API that is away for a while. Nothing of it is stale, and none of it ends the simulator."""

    @pytest.mark.parametrize("trouble", ["503", "500"])
    async def test_a_read_that_is_refused_is_counted_as_such(
        self, stub: StubApi, url: str, caplog: pytest.LogCaptureFixture, trouble: str
    ) -> None:
        """An API that says that it cannot answer has not lied; the simulator goes on."""
        stub.on_read = TROUBLE[trouble]
        async with running(simulator(url)) as tally:
            await until(lambda: tally.reads[Outcome.REFUSED] >= 3)
            stub.on_read = stub.ride
            await until(lambda: tally.reads[Outcome.FRESH] >= 3)
        assert set(tally.reads) == {Outcome.REFUSED, Outcome.FRESH}
        assert stale_reads(caplog) == []

    @pytest.mark.parametrize("trouble", ["drop", "break off", "garble"])
    async def test_a_read_without_an_answer_is_counted_as_failed(
        self, stub: StubApi, url: str, caplog: pytest.LogCaptureFixture, trouble: str
    ) -> None:
        """No answer, or half of one, says nothing about staleness; the simulator goes on."""
        stub.on_read = TROUBLE[trouble]
        async with running(simulator(url)) as tally:
            await until(lambda: tally.reads[Outcome.FAILED] >= 3)
            stub.on_read = stub.ride
            await until(lambda: tally.reads[Outcome.FRESH] >= 3)
        assert set(tally.reads) == {Outcome.FAILED, Outcome.FRESH}
        assert stale_reads(caplog) == []

    @pytest.mark.parametrize("trouble", TROUBLE)
    async def test_a_write_without_acknowledgement_is_not_read_back(
        self, stub: StubApi, url: str, caplog: pytest.LogCaptureFixture, trouble: str
    ) -> None:
        """Nothing was promised for it: it is counted, and the simulator goes on."""
        stub.on_write = TROUBLE[trouble]
        async with running(simulator(url)) as tally:
            await until(lambda: tally.unwritten >= 3)
            assert tally.reads.total() == 0
            stub.on_write = stub.new_ride
            await until(lambda: tally.reads[Outcome.FRESH] >= 3)
        assert set(tally.reads) == {Outcome.FRESH}
        assert stale_reads(caplog) == []

    @pytest.mark.parametrize("trouble", ["503", "500", "drop"])
    async def test_users_are_made_as_soon_as_the_api_is_there(self, stub: StubApi, url: str, trouble: str) -> None:
        """An API that is not up yet is waited for."""
        asked = 0

        async def not_yet(request: web.Request) -> web.StreamResponse:
            nonlocal asked
            asked += 1
            return await TROUBLE[trouble](request)

        stub.on_user = not_yet
        async with running(simulator(url)) as tally:
            await until(lambda: asked >= 3)
            stub.on_user = stub.new_user
            await until(lambda: tally.reads[Outcome.FRESH] >= 3)
        assert len(stub.users) == 1


class TestRate:
    """A simulator with a rate."""

    async def test_it_makes_as_many_rides_as_asked_and_reads_each_back(self, stub: StubApi, url: str) -> None:
        """Fifty rides at a hundred a second take half a second, and each is read once."""
        began = time.monotonic()
        async with running(simulator(url, rate=100)) as tally:
            await until(lambda: len(stub.rides) >= 50)
            took_s = time.monotonic() - began
            stub.on_write = answers(503)
            await until(lambda: tally.reads.total() == tally.rides == len(stub.rides))
            assert stub.reads == dict.fromkeys(stub.rides, 1)
        assert 0.48 <= took_s <= 2.0  # never faster than asked; later on a busy machine
        assert set(tally.reads) == {Outcome.FRESH}

    async def test_rides_come_from_many_clients(self, stub: StubApi, url: str) -> None:
        """There is a client for every two rides a second, and chance picks among them."""
        async with running(simulator(url, rate=19)):
            await until(lambda: len(stub.rides) >= 5)
        assert len(stub.users) == 10
        assert len(set(stub.users)) == 10
        assert len({ride["user_id"] for ride in stub.rides.values()}) > 1

    async def test_a_slow_api_does_not_slow_it_down(self, stub: StubApi, url: str) -> None:
        """New rides are begun while others still wait for their answer."""
        waiting = asyncio.Event()
        begun = 0

        async def slow(request: web.Request) -> web.StreamResponse:
            nonlocal begun
            begun += 1
            await waiting.wait()
            return await stub.new_ride(request)

        stub.on_write = slow
        async with running(simulator(url, rate=200)) as tally:
            await until(lambda: begun >= 20)
            assert tally.rides == 0
            waiting.set()
            await until(lambda: tally.reads[Outcome.FRESH] >= 20)

    async def test_rides_beyond_what_may_be_under_way_are_left_out(self, stub: StubApi, url: str) -> None:
        """An API that does not keep up is not buried under requests, and what was left out is counted."""
        waiting = asyncio.Event()
        begun = 0

        async def slow(request: web.Request) -> web.StreamResponse:
            nonlocal begun
            begun += 1
            await waiting.wait()
            return await stub.new_ride(request)

        stub.on_write = slow
        async with running(simulator(url, rate=200, most_in_flight=2)) as tally:
            await until(lambda: tally.left_out >= 5)
            assert begun == 2
            waiting.set()
            await until(lambda: tally.reads[Outcome.FRESH] >= 2)

    async def test_trouble_ends_none_of_its_clients(self, stub: StubApi, url: str) -> None:
        """One ride that fails takes no other with it."""
        chance = random.Random(1)

        async def sometimes(request: web.Request) -> web.StreamResponse:
            return await chance.choice([drop, break_off, garble, answers(503), stub.ride])(request)

        stub.on_read = sometimes
        async with running(simulator(url, rate=200)) as tally:
            await until(lambda: set(tally.reads) == {Outcome.FRESH, Outcome.REFUSED, Outcome.FAILED})
            await until(lambda: tally.reads.total() >= 40)
        assert tally.stale == 0


class TestCancellation:
    """The end of a simulator, which is always a cancellation."""

    @pytest.mark.parametrize("rate", [None, 200.0])
    @pytest.mark.parametrize("step", ["on_user", "on_write", "on_read"])
    async def test_it_leaves_no_task_behind(self, stub: StubApi, url: str, rate: float | None, step: str) -> None:
        """Whatever it waits for, cancelled it ends at once, and every ride with it."""
        waiting = asyncio.Event()

        async def never(_request: web.Request) -> web.StreamResponse:
            waiting.set()
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        setattr(stub, step, never)
        before = asyncio.all_tasks()
        task = asyncio.create_task(simulator(url, rate=rate).run(), name="simulator")
        async with asyncio.timeout(DEADLINE_S):
            await waiting.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        ours = [left for left in asyncio.all_tasks() - before if "Simulator" in repr(left.get_coro())]
        assert ours == []


class TestTally:
    """The summary for people."""

    def test_an_undisturbed_run_has_three_lines(self) -> None:
        """Rides, reads by node, fallbacks by reason, and the number that matters."""
        tally = Tally(rides=3)
        tally.reads.update({Outcome.FRESH: 3})
        tally.by_node.update({"replica0": 2, "primary": 1})
        tally.fallbacks.update({"not-caught-up": 1})
        assert tally.lines() == [
            "3 rides written, 3 reads: primary 1, replica0 2",
            "1 read by the primary (not-caught-up 1)",
            "0 stale reads",
        ]

    def test_trouble_is_in_the_summary(self) -> None:
        """What went wrong without being stale has a line of its own, in which only what happened stands."""
        tally = Tally(rides=4, unwritten=2, left_out=1)
        tally.reads.update({Outcome.STALE: 1, Outcome.REFUSED: 1, Outcome.FAILED: 2})
        tally.by_node.update({"replica0": 1})
        assert tally.lines() == [
            "4 rides written, 4 reads: replica0 1",
            "0 reads by the primary",
            "2 rides not acknowledged, 1 ride left out, 1 read refused, 2 reads without an answer",
            "1 stale read",
        ]

    def test_a_run_without_answers_says_so(self) -> None:
        """Nothing read is not mistaken for nothing stale."""
        assert Tally().lines()[0] == "0 rides written, 0 reads: none answered"


class TestChangingRate:
    """The rate is changed while it runs."""

    async def test_it_goes_faster_stops_and_goes_on(self, stub: StubApi, url: str) -> None:
        """Users come with the rate; at rate 0 nothing is begun."""
        traffic = simulator(url)
        async with running(traffic) as tally:
            await until(lambda: tally.reads.total() >= 2)
            assert 1 == len(stub.users)
            traffic.rate = 200.0
            await until(lambda: tally.reads.total() >= 20)
            assert 100 == len(stub.users)
            traffic.rate = 0
            before = -1
            while before != (before := len(stub.rides)):
                await asyncio.sleep(0.1)  # as long as twenty rides would take
            traffic.rate = None
            await until(lambda: len(stub.rides) >= before + 2)

    async def test_a_pause_does_not_keep_it_from_going_faster(self, url: str) -> None:
        """The one client's ride goes on beside the others."""

        class Chance(random.Random):
            def uniform(self, a: float, b: float) -> float:
                return 3600.0 if a == 0 else super().uniform(a, b)

            def choice(self, seq: Any) -> Any:
                return seq[0]

        traffic = simulator(url, chance=Chance(1))
        async with running(traffic) as tally:
            await until(lambda: tally.rides == 1)
            traffic.rate = 100.0
            await until(lambda: tally.reads.total() >= 5)
