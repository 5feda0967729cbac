"""The stream of events, and what its viewers cannot do to others."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from rocket.lab.api.app import build_app, serve
from rocket.lab.api.limits import Bounds
from rocket.lab.api.recorder import RequestRecord
from rocket.lab.inspector.controls import Targets
from rocket.lab.inspector.event_log import RateChanged, ScenarioStep
from rocket.lab.inspector.feed import BATCH_S, CAPACITY
from rocket.lab.inspector.inspector import Inspector
from tests.support.inspected import DEADLINE_S, QUICK, viewing
from tests.support.servers import until
from tests.support.user import TOKEN, User

if TYPE_CHECKING:
    from rocket.lab.comparison import ComparisonRouter
    from tests.support.inspected import Client, Inspected

AN_HOUR_S = 3600.0


def change_rate(inspected: Inspected, *rates: float) -> None:
    """Log entries that can be distinguished."""
    for rate in rates:
        inspected.event_log.add(RateChanged(time.monotonic(), rate))


def huge_step(phase: str = "") -> ScenarioStep:
    """Return an entry whose event is large."""
    return ScenarioStep(time.monotonic(), "huge", phase, "x" * 100_000)


async def test_a_viewer_receives_a_write_and_the_read_after_it(inspected: Inspected, email: str) -> None:
    """With the node, the floor, and the positions of the replicas."""
    async with viewing(inspected.client) as viewer:
        user = User(inspected.client, email)
        await user.join()
        ride = await user.write()
        assert 200 == await user.read(ride)
        write = await viewer.until("write", request="write", subject=email)
        read = await viewer.until("read", ride=ride)
    assert (ride, write["session"], write["lsn"]) == (write["ride"], read["session"], read["floor"])
    assert {"replica0", "replica1"} == {one["name"] for one in read["candidates"]}
    assert {"not-caught-up"} == {one["obstacle"] for one in read["candidates"]}
    assert ("primary", "not-caught-up", True) == (read["node"], read["reason"], read["found"])
    assert write["lsn"] in read["explanation"]
    assert write["done"] <= read["at"] <= read["decided"] <= read["done"]


async def test_a_viewer_sees_what_a_read_asked_for_and_where_its_floor_came_from(
    inspected: Inspected, email: str
) -> None:
    """From its token, or from the primary: also where it brings no token, and so asks for everything."""
    async with viewing(inspected.client) as viewer:
        user = User(inspected.client, email)
        await user.join()
        rides = [await user.write() for _ in range(5)]
        token = user.token
        seen = []
        for ride, freshness in zip(rides, (None, "global", "within 10s", "any", "bare"), strict=True):
            headers = {"Authorization": email} | ({TOKEN: token} if freshness != "bare" and token else {})
            headers |= {"Rocket-Freshness": freshness} if freshness not in {None, "bare"} else {}
            async with inspected.client.get(f"/rides/{ride}", headers=headers) as response:
                assert response.status in {200, 404}
            read = await viewer.until("read", ride=ride)
            seen.append((read["freshness"], read["floor_from"], read["floor"] is None))
    assert [
        ("session", "token", False),
        ("global", "primary", False),
        ("within 10s", "token", False),
        ("any", None, True),
        ("global", "primary", False),
    ] == seen


async def test_a_viewer_that_reconnects_receives_what_it_missed(inspected: Inspected) -> None:
    """By the id of the last event that it received."""
    async with viewing(inspected.client) as viewer:
        change_rate(inspected, 1.0)
        await viewer.until("simulator", rate=1.0)
    change_rate(inspected, 2.0, 3.0)
    async with viewing(inspected.client, viewer.last_id) as again:
        await again.until("simulator", rate=3.0)
    assert again.hellos[0]["resumed"]
    numbers = [event["id"] for event in (*viewer.events, *again.events)]
    assert list(range(numbers[0], numbers[0] + len(numbers))) == numbers


@pytest.mark.parametrize("run", ["-feedbeef", "", "x", "0" * 99])
async def test_a_viewer_with_an_unknown_id_cannot_resume(inspected: Inspected, run: str) -> None:
    """The id is of another process, or malformed."""
    async with viewing(inspected.client) as viewer:
        change_rate(inspected, 1.0)
        await viewer.until("simulator", rate=1.0)
        async with viewing(inspected.client, viewer.last_id.partition("-")[0] + run) as other:
            assert not other.hellos[0]["resumed"]


async def test_a_viewer_that_was_away_too_long_cannot_resume(inspected: Inspected) -> None:
    """Some of the events that it missed are no longer kept."""
    async with viewing(inspected.client) as first, viewing(inspected.client) as viewer:
        change_rate(inspected, 1.0)
        await viewer.until("simulator", rate=1.0)
        viewer.response.close()
        for _ in range(2):
            change_rate(inspected, *map(float, range(2, 2 + CAPACITY // 2)), 1.5)
            await first.until("simulator", rate=1.5)
            first.events.clear()
        async with viewing(inspected.client, viewer.last_id) as again:
            assert not again.hellos[0]["resumed"]


@pytest.mark.parametrize("limits", [replace(QUICK, idle_s=0.0)])
async def test_a_viewer_cannot_resume_after_the_feed_was_idle(inspected: Inspected) -> None:
    """Some time after the last viewer has left, no further events are made."""
    async with viewing(inspected.client) as viewer:
        change_rate(inspected, 1.0)
        await viewer.until("simulator", rate=1.0)
    await until(lambda: not inspected.event_log.is_recording, DEADLINE_S)
    async with viewing(inspected.client, viewer.last_id) as again:
        assert not again.hellos[0]["resumed"]


async def test_a_viewer_is_greeted_again_when_events_were_dropped(inspected: Inspected) -> None:
    """More happened than can be sent; it continues from there."""
    async with viewing(inspected.client) as viewer:
        change_rate(inspected, *map(float, range(20_000)))
        async with asyncio.timeout(DEADLINE_S):
            while len(viewer.hellos) == 1:
                await viewer.read()
        assert not viewer.hellos[1]["resumed"]
        change_rate(inspected, 0.5)
        await viewer.until("simulator", rate=0.5)


async def test_too_many_requests_are_thinned_and_counted(inspected: Inspected, email: str) -> None:
    """Each request is either sent or counted."""
    log = inspected.event_log
    log.start_recording()
    user = User(inspected.client, email)
    await user.join()
    ride = await user.write()
    await user.read(ride)
    (record,) = [each for _, each in log.since(log.begin) if getattr(each, "detail", None) == ride]
    assert isinstance(record, RequestRecord)
    async with viewing(inspected.client) as viewer:
        for _ in range(1000):
            log.record(record)
        change_rate(inspected, 7.0)
        await viewer.until("simulator", rate=7.0)
        await viewer.until("skipped")
    shown = sum(event["kind"] == "read" for event in viewer.events)
    skipped = sum(event["count"] for event in viewer.events if event["kind"] == "skipped")
    assert 1000 == shown + skipped
    assert 0 < shown <= 100


async def wait_for_room(client: Client) -> None:
    """Wait until another viewer is admitted."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with client.get("/inspector/events") as response:
                if response.status == 200:
                    return


@pytest.mark.parametrize("limits", [replace(QUICK, max_viewers=1)])
async def test_the_number_of_viewers_is_limited(inspected: Inspected) -> None:
    """One more is refused; when one has left, there is room again."""
    async with viewing(inspected.client), inspected.client.get("/inspector/events") as response:
        assert 503 == response.status
    await wait_for_room(inspected.client)


def deaf_viewer(port: int) -> socket.socket:
    """Request the events, and never read them."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET /inspector/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client


@pytest.mark.parametrize("limits", [replace(QUICK, write_timeout_s=0.5, max_viewers=2)])
async def test_a_viewer_that_does_not_read_delays_no_one_and_is_dropped(inspected: Inspected, email: str) -> None:
    """Reads continue, and other viewers are served, while its buffers are full; then its connection is ended."""
    user = User(inspected.client, email)
    await user.join()
    ride = await user.write()
    assert inspected.client.port is not None
    with deaf_viewer(inspected.client.port):
        async with viewing(inspected.client) as viewer:
            for first in range(0, 200, 20):  # a few at a time: on a busy machine this one may be slow to read, too
                for number in range(first, first + 20):
                    inspected.event_log.add(huge_step(f"{number}"))
                await viewer.until("scenario", phase=f"{first + 19}")
            assert 200 == await user.read(ride)
            await viewer.until("read", ride=ride)
            await wait_for_room(inspected.client)


@pytest.mark.parametrize("reads", [True, False])
async def test_shutdown_waits_for_no_viewer(router: ComparisonRouter, *, reads: bool) -> None:
    """Neither for one that has received everything, nor for one that does not read."""
    limits = replace(QUICK, write_timeout_s=AN_HOUR_S, heartbeat_s=AN_HOUR_S)
    inspector = Inspector(router, Targets(""), [], 0.5, limits=limits)
    app = build_app(router, bounds=Bounds(drain_s=AN_HOUR_S))
    listener = socket.create_server(("127.0.0.1", 0))
    async with asyncio.timeout(DEADLINE_S), inspector.serving(app):
        async with serve(app, listener):
            client = deaf_viewer(listener.getsockname()[1])
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            assert (await loop.sock_recv(client, 15)).startswith(b"HTTP/1.1 200")
            for _ in range(0 if reads else 200):
                inspector.event_log.add(huge_step())
            await asyncio.sleep(3 * BATCH_S)  # its buffers are full by then
        client.close()
