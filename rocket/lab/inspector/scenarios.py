"""The guided scenarios: races that are hard to meet, made to happen, and what comes of them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket import Reason
from rocket.lab.comparison import Routing
from rocket.lab.inspector.client import Tally

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rocket.lab.inspector.client import ApiClient
    from rocket.lab.inspector.scenario_context import ScenarioContext

_LATE_MS = 3000
_BEHIND_MS = 8000
_READS = 40
_TRIES = 3
"""Before a race that does not come about is given up: other writes, or the observer, may have come between."""
_CROWD = 40
"""As many as the API takes at once without thinking of an overload (`rocket.lab.api.limits`)."""
_A_LITTLE_LATE_MS = 3
"""Well below `--max-wait`, also for a program that is busy with the crowd itself."""
_RIDERS = 4
_AFTER_S = 1.5


@dataclass(frozen=True, slots=True)
class Scenario:
    """One to choose from."""

    name: str
    title: str
    text: str
    """What happens, and what to look at."""
    play: Callable[[ScenarioContext], Awaitable[str]]
    """Plays it and returns the verdict, in numbers."""


async def _compared(
    scene: ScenarioContext, wrong: Routing, play: Callable[[ScenarioContext], Awaitable[Tally]]
) -> str:
    """Play the same twice, first by a wrong rule, and again if that did not come to show it, then by ours."""
    tallies = {}
    for routing in (wrong, Routing.NEVER_STALE):
        await scene.route(routing)
        scene.say(f"Routing: {routing}.")
        for _ in range(_TRIES):
            tallies[routing] = tally = await play(scene)
            scene.say(f"{routing}: {tally}.")
            if tally.stale or routing is Routing.NEVER_STALE:
                break
    return "; ".join(f"{routing}: {tally}" for routing, tally in tallies.items()) + "."


async def _floor_inside(scene: ScenarioContext) -> Tally:
    """Write a ride, and read it from replicas that have replayed all of it but its commit."""
    rider = await scene.rider()
    await rider.write_for_certain()
    await scene.caught_up()
    # Right after a heartbeat the next commit that replicas meet is the ride's: there they stop.
    await scene.beat()
    async with scene.applied_late(_LATE_MS):
        ride = await rider.write_for_certain()
        scene.say(f"Ride {ride} is committed; every replica has all of it but the commit, and applies that late.")
        await scene.beat(2)
        return await scene.read_again_and_again(rider, ride, _READS, 0.02)


async def _race(scene: ScenarioContext) -> str:
    return await _compared(scene, Routing.ARTICLE, _floor_inside)


async def _come_back_behind(scene: ScenarioContext) -> Tally:
    """Write a ride, have every replica replay it, and then crash so that it comes back without it."""
    rider = await scene.rider()
    ride = await rider.write_for_certain()
    await scene.caught_up()
    await scene.beat(2)
    async with scene.applied_late(_BEHIND_MS):
        scene.say(
            f"Every replica has replayed ride {ride}. Now one after the other loses a backend, and recovers."
        )
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(scene.read_until(enough, rider, ride), name="reading")
            try:
                for replica in scene.replicas:
                    # The observer has just looked there: it is back, and behind, before the next look.
                    await scene.look_at(replica)
                    await scene.do("kill-backend", replica)
                await asyncio.sleep(_AFTER_S)
            finally:
                enough.set()
        return reading.result()


async def _behind(scene: ScenarioContext) -> str:
    replicas = len(scene.replicas)

    async def play(scene: ScenarioContext) -> Tally:
        tally = await _come_back_behind(scene)
        await scene.everybody(replicas)
        return tally

    return await _compared(scene, Routing.ARTICLE, play)


async def _read_beside_paused(scene: ScenarioContext) -> Tally:
    rider = await scene.rider()
    await scene.caught_up()
    paused = scene.replicas[0]
    await scene.do("pause", paused)
    try:
        ride = await rider.write_for_certain()
        scene.say(f"{paused} does not replay; ride {ride} is written, and read {_READS} times.")
        return await scene.read_again_and_again(rider, ride, _READS, 0.02)
    finally:
        await scene.do("resume", paused)


async def _paused(scene: ScenarioContext) -> str:
    return await _compared(scene, Routing.RANDOM, _read_beside_paused)


async def _read_by_many(scene: ScenarioContext) -> Tally:
    """Write a ride, and have a crowd read it before any replica shows it."""
    rider = await scene.rider()
    await scene.read_at_once(rider, await rider.write_for_certain(), _CROWD)  # all connections are made
    await scene.caught_up()
    async with scene.applied_late(_A_LITTLE_LATE_MS):
        ride = await rider.write_for_certain()
        scene.say(f"Ride {ride} is written, and read {_CROWD} times; it is applied {_A_LITTLE_LATE_MS} ms late.")
        return await scene.read_at_once(rider, ride, _CROWD)


async def _stampede(scene: ScenarioContext) -> str:
    await scene.route(Routing.NEVER_STALE)
    tally = await _read_by_many(scene)
    if tally.refused or tally.by_primary > tally.by_replicas:
        scene.say(f"The machine was busy ({_ways_of(tally)}). Once more.")
        tally = await _read_by_many(scene)
    return f"never-stale: {tally}; {_ways_of(tally)}. The last answer came after {tally.longest_ms:.0f} ms."


def _ways_of(tally: Tally) -> str:
    """Account for every read that was answered."""
    waited = tally.reasons[Reason.WAITED]
    return f"{tally.by_replicas} by replicas, {waited} of them after a wait, and {tally.by_primary} by the primary"


async def _ride_on(rider: ApiClient, until: asyncio.Event) -> int:
    """Write and read in turn until told to stop; return how many rides were written."""
    written = 0
    while not until.is_set():
        ride = await rider.write()
        if ride is None:
            await asyncio.sleep(0.05)
            continue
        written += 1
        for _ in range(3):
            await rider.read(ride)
    return written


async def _promotion(scene: ScenarioContext) -> str:
    await scene.route(Routing.NEVER_STALE)
    await scene.caught_up()
    replicas, chosen = len(scene.replicas), scene.replicas[0]
    riders = [await scene.rider() for _ in range(_RIDERS)]
    enough = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        riding = [group.create_task(_ride_on(rider, enough), name="rider") for rider in riders]
        try:
            await asyncio.sleep(_AFTER_S)
            scene.say(f"{chosen} is promoted while {_RIDERS} sessions write and read.")
            began = time.monotonic()
            await scene.do("promote", chosen)
            took_s = time.monotonic() - began
            scene.say(f"{chosen} is the primary after {took_s:.1f} s; the others follow it.")
            await scene.everybody(replicas)
            await asyncio.sleep(_AFTER_S)
        finally:
            enough.set()
    tally = Tally.of(rider.tally for rider in riders)
    lost = sum(bool(rider.lost) for rider in riders)
    told = "nothing was lost"
    if lost:
        told = f"{lost} session{' was' if lost == 1 else 's were'} told of a possible loss"
    return f"never-stale: {tally}, {sum(one.result() for one in riding)} rides written; {told}."


SCENARIOS = {
    one.name: one
    for one in (
        Scenario(
            "race",
            "The floor that is taken too early",
            "The technique as published takes a write's position inside its transaction, before the commit. "
            "Here every replica stops right before that commit: by the published check it is caught up, and yet "
            "it does not show the ride. Look at the reads right after the write: stale under 'article', and the "
            "same again under 'never-stale', where they go to the primary.",
            _race,
        ),
        Scenario(
            "behind",
            "The replica that comes back behind",
            "A replica whose backend is killed restarts behind the place where it was, and answers. What was "
            "known of it no longer holds. Look at the replicas' replay positions: they fall. Under 'article' "
            "reads trust the table of statuses and miss the ride; under 'never-stale' a status is worth nothing "
            "for another life of a replica.",
            _behind,
        ),
        Scenario(
            "paused",
            "A replica that does not replay",
            "One replica receives WAL and does not replay it. Routed at random, about every fifth read of a new "
            "ride goes there and does not find it. Under 'never-stale' that replica serves nobody who must see "
            "more than it has; look at its lane, where no read arrives.",
            _paused,
        ),
        Scenario(
            "stampede",
            "Many reads right after one write",
            "Forty reads ask for a ride in the moment in which it was written, before a replica shows it. They "
            "wait together, for a few milliseconds, while the observer asks the likeliest replicas, with one "
            "question under way for each however many wait. Look at the arrows: most wait, and then go to a "
            "replica; one that would have to wait too long goes to the primary, and none is stale.",
            _stampede,
        ),
        Scenario(
            "promotion",
            "Another primary",
            "A replica becomes the primary while sessions write and read. Look at the lanes: the old primary "
            "goes down first, writes pause, and the router follows by itself; a replica serves again once it is "
            "known to follow the new primary.",
            _promotion,
        ),
    )
}
