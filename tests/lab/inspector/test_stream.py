"""The events as viewers get them, and what viewers cannot do to others."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING

import pytest

from rocket.lab.api import app as api
from rocket.lab.api.app import build_app, serve
from rocket.lab.api.recorder import RequestRecord
from rocket.lab.inspector import feed, stream
from rocket.lab.inspector.event_log import Paced, Staged
from rocket.lab.inspector.inspector import Inspector
from rocket.lab.inspector.targets import Targets
from tests.support.inspected import DEADLINE_S, Inspected, looking
from tests.support.user import User

if TYPE_CHECKING:
    from rocket.lab.comparison import ComparisonRouter

AN_HOUR_S = 3600.0


def paces(inspected: Inspected, *rates: float) -> None:
    """Note some happenings that can be told apart."""
    for rate in rates:
        inspected.journal.add(Paced(time.monotonic(), rate))


async def test_a_viewer_is_told_of_a_write_and_of_the_read_after_it(inspected: Inspected, email: str) -> None:
    """With where it went, by which floor, and what the replicas had."""
    async with looking(inspected.client) as viewer:
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
    assert write["lsn"] in read["words"]
    assert write["done"] <= read["at"] <= read["decided"] <= read["done"]


async def test_who_comes_back_is_told_all_that_was_missed(inspected: Inspected) -> None:
    """By the id of the last event that was read."""
    async with looking(inspected.client) as viewer:
        paces(inspected, 1.0)
        await viewer.until("simulator", rate=1.0)
    paces(inspected, 2.0, 3.0)
    async with looking(inspected.client, viewer.last_id) as again:
        await again.until("simulator", rate=3.0)
    assert again.hellos[0]["resumed"]
    numbers = [event["id"] for event in (*viewer.events, *again.events)]
    assert list(range(numbers[0], numbers[0] + len(numbers))) == numbers


@pytest.mark.parametrize("run", ["-feedbeef", "", "x", "0" * 99])
async def test_who_comes_from_somewhere_else_is_told_so(inspected: Inspected, run: str) -> None:
    """An id of another run, or none of ours, is no place to go on from."""
    async with looking(inspected.client) as viewer:
        paces(inspected, 1.0)
        await viewer.until("simulator", rate=1.0)
        async with looking(inspected.client, viewer.last_id.partition("-")[0] + run) as other:
            assert not other.hellos[0]["resumed"]


async def test_who_was_away_for_too_long_is_told_so(inspected: Inspected) -> None:
    """What lies between is gone."""
    async with looking(inspected.client) as first, looking(inspected.client) as viewer:
        paces(inspected, 1.0)
        await viewer.until("simulator", rate=1.0)
        viewer.response.close()
        for _ in range(2):
            paces(inspected, *map(float, range(2, 2 + feed.KEPT // 2)), 1.5)
            await first.until("simulator", rate=1.5)
            first.events.clear()
        async with looking(inspected.client, viewer.last_id) as again:
            assert not again.hellos[0]["resumed"]


async def test_what_happened_while_nobody_looked_is_not_taken_for_nothing(
    inspected: Inspected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some time after the last viewer has gone, events are no longer made."""
    async with looking(inspected.client) as viewer:
        paces(inspected, 1.0)
        await viewer.until("simulator", rate=1.0)
        monkeypatch.setattr(feed, "_STAYS_WARM_S", 0.0)
    await asyncio.sleep(4 * feed.BEAT_S)
    async with looking(inspected.client, viewer.last_id) as again:
        assert not again.hellos[0]["resumed"]


async def test_a_viewer_is_told_when_more_happened_than_can_be_told(inspected: Inspected) -> None:
    """It is greeted anew, and goes on from there."""
    async with looking(inspected.client) as viewer:
        paces(inspected, *map(float, range(20_000)))
        async with asyncio.timeout(DEADLINE_S):
            while len(viewer.hellos) == 1:
                await viewer.read()
        assert not viewer.hellos[1]["resumed"]
        paces(inspected, 0.5)
        await viewer.until("simulator", rate=0.5)


async def test_too_many_requests_are_thinned_and_counted(inspected: Inspected, email: str) -> None:
    """Each is either told or counted."""
    journal = inspected.journal
    journal.listen()
    user = User(inspected.client, email)
    await user.join()
    ride = await user.write()
    await user.read(ride)
    (told,) = [each for _, each in journal.since(journal.begin) if getattr(each, "detail", None) == ride]
    assert isinstance(told, RequestRecord)
    async with looking(inspected.client) as viewer:
        for _ in range(1000):
            assert journal.audience.witness is not None
            journal.audience.witness(told)
        paces(inspected, 7.0)
        await viewer.until("simulator", rate=7.0)
        await viewer.until("skipped")
    shown = sum(event["kind"] == "read" for event in viewer.events)
    skipped = sum(event["count"] for event in viewer.events if event["kind"] == "skipped")
    assert 1000 == shown + skipped
    assert 0 < shown <= 100


async def test_there_is_room_for_so_many_viewers(inspected: Inspected, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is turned away; when one has gone, there is room again."""
    monkeypatch.setattr(stream, "_MOST_VIEWERS", 1)
    async with looking(inspected.client), inspected.client.get("/inspector/events") as response:
        assert 503 == response.status
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with inspected.client.get("/inspector/events") as response:
                if response.status == 200:
                    break


def deaf(port: int) -> socket.socket:
    """Ask for the events, and never read them."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET /inspector/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client


async def test_who_does_not_listen_holds_up_nobody_and_is_dropped(
    inspected: Inspected, email: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads go on, and others are told, while its buffers are full; then its connection is ended."""
    monkeypatch.setattr(stream, "_WRITE_S", 0.5)
    monkeypatch.setattr(stream, "_MOST_VIEWERS", 2)
    user = User(inspected.client, email)
    await user.join()
    ride = await user.write()
    assert inspected.client.port is not None
    with deaf(inspected.client.port):
        async with looking(inspected.client) as viewer:
            for number in range(200):
                inspected.journal.add(Staged(time.monotonic(), "loud", f"{number}", "x" * 100_000))
            await viewer.until("scenario", phase="199")
            assert 200 == await user.read(ride)
            await viewer.until("read", ride=ride)
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    async with inspected.client.get("/inspector/events") as response:
                        if response.status == 200:
                            break


@pytest.mark.parametrize("listens", [True, False])
async def test_the_end_waits_for_no_viewer(
    router: ComparisonRouter, monkeypatch: pytest.MonkeyPatch, *, listens: bool
) -> None:
    """Neither for one that is told all there is, nor for one that does not take it."""
    for module, name in ((api, "_DRAIN_S"), (stream, "_WRITE_S"), (stream, "_HEARTBEAT_S")):
        monkeypatch.setattr(module, name, AN_HOUR_S)
    inspector = Inspector(router, Targets(""), [], 0.5)
    app = build_app(router)
    listener = socket.create_server(("127.0.0.1", 0))
    async with asyncio.timeout(DEADLINE_S), inspector.serving(app):
        async with serve(app, listener):
            client = deaf(listener.getsockname()[1])
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            assert (await loop.sock_recv(client, 15)).startswith(b"HTTP/1.1 200")
            for _ in range(0 if listens else 200):
                inspector.journal.add(Staged(time.monotonic(), "loud", "", "x" * 100_000))
            await asyncio.sleep(3 * feed.BEAT_S)  # it is full by then
        client.close()
