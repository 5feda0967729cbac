"""The guided scenarios show what they promise, and restore everything."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio

from rocket.errors import RocketError
from rocket.lab.api.app import build_app, serve
from rocket.lab.app import whole_system
from rocket.lab.comparison import ComparisonRouter
from rocket.lab.inspector.controls import Targets
from rocket.lab.inspector.inspector import Inspector, Limits
from rocket.lab.inspector.scenarios import SCENARIOS
from rocket.lab.settings import Settings
from rocket.lab.shutdown import Shutdown, background
from tests.support.inspected import HEADERS, viewing
from tests.support.servers import dsns, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import LocalCluster
    from tests.support.inspected import Viewer

System = tuple["LocalCluster", aiohttp.ClientSession]
INTERVAL_S = 0.25
STALE = re.compile(r"([a-z-]+): (\d+) of \d+ reads stale")
STOPPED = "Stopped before its end; its changes are undone."
STAMPEDE = re.compile(
    r"of (\d+) reads stale(?:, (\d+) told to try again \(503\))?; "
    r"(\d+) by replicas, (\d+) of them after a wait, and (\d+) by the primary\."
)


@pytest_asyncio.fixture(scope="module")
async def system() -> AsyncIterator[System]:
    """A whole system of its own, which scenarios may turn upside down."""
    task = asyncio.current_task()
    assert task is not None
    settings = Settings(replicas=2, postgres_port=0, api_port=0, observer_interval=INTERVAL_S)
    async with contextlib.AsyncExitStack() as stack:
        cluster, url, _ = await whole_system(settings, Shutdown(task), stack)
        yield cluster, await stack.enter_async_context(aiohttp.ClientSession(url))


async def command(http: aiohttp.ClientSession, **command: object) -> int:
    """Send a command; return the status."""
    async with http.post("/inspector/control", json=command, headers=HEADERS) as response:
        return response.status


async def outcome(viewer: Viewer, name: str) -> dict[str, Any]:
    """Wait for the last event of a scenario."""
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


def assert_restored(cluster: LocalCluster, viewer: Viewer) -> None:
    """Assert that no fault is in force, and that reads are routed as before."""
    for node in cluster.nodes.values():
        assert (0, False, False, True) == (node.apply_delay_ms, node.cut, node.frozen, node.up.is_set())
    routings = [event["routing"] for event in viewer.fresh if event["kind"] == "routing"]
    assert ["never-stale"] == routings[-1:] or not routings


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_scenario_shows_stale_reads_under_the_wrong_routing_only(system: System, name: str) -> None:
    """Its verdict agrees with the checker."""
    cluster, http = system
    async with viewing(http) as viewer:
        assert 200 == await command(http, command="scenario", name=name)
        assert 409 == await command(http, command="scenario", name=name)
        assert 409 == await command(http, command="routing", routing="random")
        end = await outcome(viewer, name)
    assert "ended" == end["phase"], end["text"]
    counts = {routing: int(count) for routing, count in STALE.findall(end["text"])}
    assert 0 == counts.pop("never-stale")
    assert all(counts.values())
    assert ("article" in counts, "random" in counts) == (name in {"race", "behind"}, name == "paused")
    found = sum(event["kind"] == "stale" for event in viewer.fresh)
    assert sum(counts.values()) == found
    assert_restored(cluster, viewer)
    if name == "stampede":
        match = STAMPEDE.search(end["text"])
        assert match is not None, end["text"]
        reads, refused, replicas, waited, primary = (int(number or 0) for number in match.groups())
        assert reads == refused + replicas + primary
        assert waited <= replicas


async def test_heal_stops_a_scenario_and_restores_everything(system: System) -> None:
    """In the middle of the scenario."""
    cluster, http = system
    async with viewing(http) as viewer:
        assert 200 == await command(http, command="scenario", name="race")
        await viewer.until("fault", name="delay")
        assert 200 == await command(http, command="heal")
        end = await outcome(viewer, "race")
    assert ("stopped", STOPPED) == (end["phase"], end["text"])
    assert_restored(cluster, viewer)
    assert 409 != await command(http, command="routing", routing="never-stale")


# --- when restoring fails, or takes long ---


@dataclass(frozen=True, slots=True)
class FaultyTargets(Targets):
    """Targets whose `heal` waits, or fails."""

    may_heal: asyncio.Event = field(default_factory=asyncio.Event)
    failures: list[RocketError] = field(default_factory=list)

    async def ask(self, command: str, **details: object) -> Any:
        """Send a command to the cluster and return its answer."""
        if command == "heal":
            await self.may_heal.wait()
            for failure in self.failures:
                raise failure
        return await Targets.ask(self, command, **details)


@contextlib.asynccontextmanager
async def second_api(cluster: LocalCluster, limits: Limits) -> AsyncIterator[tuple[FaultyTargets, System]]:
    """Serve another API on a cluster, with an inspector whose `heal` can be held up."""
    listener = socket.create_server(("127.0.0.1", 0))
    targets = FaultyTargets(f"http://127.0.0.1:{listener.getsockname()[1]}", cluster)
    targets.may_heal.set()
    async with (
        await ComparisonRouter.open(dsns(cluster), observer_interval_s=INTERVAL_S) as router,
        background(router.observing(), "observer"),
    ):
        inspector = Inspector(router, targets, list(cluster.nodes), INTERVAL_S, limits=limits)
        app = build_app(router, recorder=inspector.event_log.recorder)
        async with inspector.serving(app), serve(app, listener), aiohttp.ClientSession(targets.url) as http:
            await until(lambda: len(router.board.replicas) == len(cluster.replicas))
            yield targets, (cluster, http)


async def begin(http: aiohttp.ClientSession, viewer: Viewer) -> None:
    """Play a scenario until it has changed the routing."""
    assert 200 == await command(http, command="scenario", name="race")
    while not any(event["kind"] == "routing" for event in viewer.fresh):
        await viewer.read()


async def test_the_routing_is_restored_even_if_not_every_node_is_healed(system: System) -> None:
    """One thing that cannot be restored does not keep the others from it, and is named."""
    async with second_api(system[0], Limits()) as (targets, (cluster, http)), viewing(http) as viewer:
        await begin(http, viewer)
        targets.failures.append(RocketError("replica0 is not back"))
        assert 409 == await command(http, command="heal")
        end = await outcome(viewer, "race")
        targets.failures.clear()
        assert 200 == await command(http, command="heal")
        assert "failed" == end["phase"]
        assert "replica0 is not back" in end["text"]
        assert_restored(cluster, viewer)


async def test_a_second_heal_does_not_cancel_what_is_being_restored(system: System) -> None:
    """It waits for that, but not for long."""
    limits = replace(Limits(), stop_timeout_s=0.1)
    async with second_api(system[0], limits) as (targets, (cluster, http)), viewing(http) as viewer:
        await begin(http, viewer)
        targets.may_heal.clear()
        assert [504, 504] == [await command(http, command="heal") for _ in range(2)]
        targets.may_heal.set()
        end = await outcome(viewer, "race")
        assert ("stopped", STOPPED) == (end["phase"], end["text"])
        assert_restored(cluster, viewer)


async def test_a_scenario_that_fails_says_why_and_restores_everything(system: System) -> None:
    """Here the primary stops answering."""
    limits = replace(Limits(), step_timeout_s=1.0)
    async with second_api(system[0], limits) as (_, (cluster, http)), viewing(http) as viewer:
        await begin(http, viewer)
        cluster.primary.freeze()
        end = await outcome(viewer, "race")
        assert "failed" == end["phase"]
        assert end["text"].startswith("The scenario failed: ")
        assert_restored(cluster, viewer)
