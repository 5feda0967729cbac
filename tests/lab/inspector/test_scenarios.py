"""The guided scenarios show what they are there to show, and put everything back."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio

from rocket.cluster import control
from rocket.cluster.errors import NotHealed
from rocket.lab.app import whole_system
from rocket.lab.inspector import runner, scenario_context
from rocket.lab.inspector.scenarios import SCENARIOS
from rocket.lab.settings import Settings
from rocket.lab.shutdown import Shutdown
from tests.support.inspected import HEADERS, Viewer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import LocalCluster

System = tuple["LocalCluster", aiohttp.ClientSession]
STALE = re.compile(r"([a-z-]+): (\d+) of \d+ reads stale")
STOPPED = "Stopped before its end; what it had done is undone."
CROWD = re.compile(
    r"of (\d+) reads stale(?:, (\d+) told to try again \(503\))?; "
    r"(\d+) by replicas, (\d+) of them after a wait, and (\d+) by the primary\."
)


@pytest_asyncio.fixture(scope="module")
async def system() -> AsyncIterator[System]:
    """A whole system of its own, which scenarios may turn upside down."""
    task = asyncio.current_task()
    assert task is not None
    settings = Settings(replicas=2, postgres_port=0, api_port=0, observer_interval=0.25)
    async with contextlib.AsyncExitStack() as stack:
        cluster, url, _ = await whole_system(settings, Shutdown(task), stack)
        yield cluster, await stack.enter_async_context(aiohttp.ClientSession(url))


async def order(http: aiohttp.ClientSession, **order: object) -> int:
    """Order something; return the status."""
    async with http.post("/inspector/control", json=order, headers=HEADERS) as response:
        return response.status


@contextlib.asynccontextmanager
async def looking(http: aiohttp.ClientSession) -> AsyncIterator[Viewer]:
    """Look at the events."""
    async with http.get("/inspector/events", timeout=aiohttp.ClientTimeout(total=60)) as response:
        viewer = Viewer(response)
        await viewer.read()
        yield viewer


async def outcome(viewer: Viewer, name: str) -> dict[str, Any]:
    """Wait for the end of a scenario, however it ends."""
    async with asyncio.timeout(60):
        while True:
            for event in viewer.fresh:
                if (event["kind"], event.get("name")) == ("scenario", name) and event["phase"] in {
                    "ended",
                    "failed",
                    "stopped",
                }:
                    return event
            await viewer.read()


def assert_back_to_normal(cluster: LocalCluster, viewer: Viewer) -> None:
    """Nothing is held back, and reads are routed as before."""
    for node in cluster.nodes.values():
        assert (0, False, False, True) == (node.apply_delay_ms, node.cut, node.frozen, node.up.is_set())
    routings = [event["routing"] for event in viewer.fresh if event["kind"] == "routing"]
    assert ["never-stale"] == routings[-1:] or not routings


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_scenario_shows_stale_reads_by_the_wrong_rule_only(system: System, name: str) -> None:
    """What its verdict says, the checker says too."""
    cluster, http = system
    async with looking(http) as viewer:
        assert 200 == await order(http, command="scenario", name=name)
        assert 409 == await order(http, command="scenario", name=name)
        assert 409 == await order(http, command="routing", routing="random")
        end = await outcome(viewer, name)
    assert "ended" == end["phase"], end["text"]
    counts = {routing: int(count) for routing, count in STALE.findall(end["text"])}
    assert 0 == counts.pop("never-stale")
    assert all(counts.values())
    assert ("article" in counts, "random" in counts) == (name in {"race", "behind"}, name == "paused")
    found = sum(event["kind"] == "stale" for event in viewer.fresh)
    assert sum(counts.values()) == found
    assert_back_to_normal(cluster, viewer)


async def test_the_verdict_on_many_reads_accounts_for_each_of_them(system: System) -> None:
    """Those that a replica served, those of the primary, and those that were refused are all that there were."""
    _, http = system
    async with looking(http) as viewer:
        assert 200 == await order(http, command="scenario", name="stampede")
        end = await outcome(viewer, "stampede")
    match = CROWD.search(end["text"])
    assert match is not None, end["text"]
    reads, refused, replicas, waited, primary = (int(number or 0) for number in match.groups())
    assert reads == refused + replicas + primary
    assert waited <= replicas


async def test_to_heal_ends_a_scenario_and_puts_everything_back(system: System) -> None:
    """In the middle of it."""
    cluster, http = system
    async with looking(http) as viewer:
        assert 200 == await order(http, command="scenario", name="race")
        while not any((event["kind"], event.get("name")) == ("fault", "delay") for event in viewer.fresh):
            await viewer.read()
        assert 200 == await order(http, command="heal")
        end = await outcome(viewer, "race")
    assert ("stopped", STOPPED) == (end["phase"], end["text"])
    assert_back_to_normal(cluster, viewer)
    assert 409 != await order(http, command="routing", routing="never-stale")


async def begun(http: aiohttp.ClientSession, viewer: Viewer) -> None:
    """Play a scenario until it has switched the routing."""
    assert 200 == await order(http, command="scenario", name="race")
    while not any(event["kind"] == "routing" for event in viewer.fresh):
        await viewer.read()


async def test_reads_are_routed_as_before_also_if_not_every_node_is_healed(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thing that cannot be put back does not keep the others from it, and is named."""
    cluster, http = system

    async def failing(*_: object) -> str:
        raise NotHealed("replica0 is not back")

    async with looking(http) as viewer:
        await begun(http, viewer)
        with monkeypatch.context() as patch:
            patch.setattr(control, "heal", failing)
            assert 409 == await order(http, command="heal")
            end = await outcome(viewer, "race")
        assert 200 == await order(http, command="heal")
    assert "failed" == end["phase"]
    assert "replica0 is not back" in end["text"]
    assert_back_to_normal(cluster, viewer)


async def test_to_heal_again_does_not_cancel_what_is_being_put_back(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for, but not for long."""
    cluster, http = system
    heal, let_go = control.heal, asyncio.Event()

    async def held(*given: Any) -> str:
        await let_go.wait()
        return await heal(*given)

    monkeypatch.setattr(runner, "_PATIENCE_S", 0.1)
    async with looking(http) as viewer:
        await begun(http, viewer)
        monkeypatch.setattr(control, "heal", held)
        assert [504, 504] == [await order(http, command="heal") for _ in range(2)]
        let_go.set()
        end = await outcome(viewer, "race")
    assert ("stopped", STOPPED) == (end["phase"], end["text"])
    assert_back_to_normal(cluster, viewer)


async def test_a_scenario_that_comes_to_nothing_says_why_and_puts_everything_back(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the primary falls silent."""
    monkeypatch.setattr(scenario_context, "_PATIENCE_S", 1.0)
    cluster, http = system
    async with looking(http) as viewer:
        await begun(http, viewer)
        cluster.primary.freeze()
        end = await outcome(viewer, "race")
    assert "failed" == end["phase"]
    assert end["text"].startswith("It came to nothing: ")
    assert_back_to_normal(cluster, viewer)
