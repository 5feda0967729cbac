"""The guided scenarios: rare races, made to happen, with a verdict in numbers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket import Reason
from rocket.lab.client import UnexpectedAnswer
from rocket.lab.comparison import Routing
from rocket.lab.inspector.scenario_context import ReadTally

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rocket.lab.inspector.scenario_context import ScenarioContext, ScenarioUser

_RACE_DELAY_MS = 3000
_BEHIND_DELAY_MS = 8000
_READS = 40
_READ_INTERVAL_S = 0.02
_TRIES = 3
"""Attempts to bring about a race, which other writes or the observer may prevent."""
_SIMULTANEOUS_READS = 40
"""As many as the API handles at once below its limit for overloads (`rocket.lab.api.limits`)."""
_STAMPEDE_DELAY_MS = 3
"""Well below `--max-wait`, even while the program is busy with the reads themselves."""
_USERS = 4
_AFTERWARDS_S = 1.5


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario that the page offers."""

    name: str
    title: str
    text: str
    """What happens, and what to watch."""
    play: Callable[[ScenarioContext], Awaitable[str]]
    """Plays it and returns the verdict, in numbers."""


async def _compare(
    context: ScenarioContext, wrong: Routing, play: Callable[[ScenarioContext], Awaitable[ReadTally]]
) -> str:
    """Play the same under a wrong routing, repeatedly until that is stale, and then under never-stale."""
    tallies = {}
    for routing in (wrong, Routing.NEVER_STALE):
        await context.set_routing(routing)
        context.report(f"Routing: {routing}.")
        for _ in range(_TRIES):
            tallies[routing] = tally = await play(context)
            context.report(f"{routing}: {tally}.")
            if tally.stale or routing is Routing.NEVER_STALE:
                break
    return "; ".join(f"{routing}: {tally}" for routing, tally in tallies.items()) + "."


async def _read_before_commit(context: ScenarioContext) -> ReadTally:
    """Write a ride, and read it from replicas that have replayed all of it except its commit."""
    user = await context.user()
    await user.write()
    await context.wait_for_catchup()
    # Right after a heartbeat, the next commit that replicas replay is the ride's: they stop before it.
    await context.wait_for_heartbeat()
    async with context.apply_delay(_RACE_DELAY_MS):
        ride = await user.write()
        context.report(f"Ride {ride} is committed; every replica delays its commit, and has replayed the rest.")
        await context.wait_for_heartbeat(2)
        return await user.read_repeatedly(ride, _READS, _READ_INTERVAL_S)


async def _race(context: ScenarioContext) -> str:
    return await _compare(context, Routing.ARTICLE, _read_before_commit)


async def _read_beside_crashes(context: ScenarioContext) -> ReadTally:
    """Write a ride, wait until every replica has replayed it, and crash each so that it restarts without it."""
    user = await context.user()
    ride = await user.write()
    await context.wait_for_catchup()
    await context.wait_for_heartbeat(2)
    async with context.apply_delay(_BEHIND_DELAY_MS):
        context.report(f"Every replica has replayed ride {ride}. Now each loses a backend in turn, and recovers.")
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(user.read_until(stop, ride), name="reading")
            try:
                for replica in context.replicas:
                    # The replica restarts, and is behind, before its next status.
                    await context.wait_for_status(replica)
                    await context.command("kill-backend", replica)
                await asyncio.sleep(_AFTERWARDS_S)
            finally:
                stop.set()
        return reading.result()


async def _behind(context: ScenarioContext) -> str:
    replicas = len(context.replicas)

    async def play(context: ScenarioContext) -> ReadTally:
        tally = await _read_beside_crashes(context)
        await context.wait_for_replicas(replicas)
        return tally

    return await _compare(context, Routing.ARTICLE, play)


async def _read_beside_paused(context: ScenarioContext) -> ReadTally:
    user = await context.user()
    await context.wait_for_catchup()
    paused = context.replicas[0]
    await context.command("pause", paused)
    try:
        ride = await user.write()
        context.report(f"{paused} does not replay; ride {ride} is written, and read {_READS} times.")
        return await user.read_repeatedly(ride, _READS, _READ_INTERVAL_S)
    finally:
        await context.command("resume", paused)


async def _paused(context: ScenarioContext) -> str:
    return await _compare(context, Routing.RANDOM, _read_beside_paused)


async def _read_at_once(context: ScenarioContext) -> ReadTally:
    """Write a ride, and read it many times at once before any replica shows it."""
    user = await context.user()
    await user.read_at_once(await user.write(), _SIMULTANEOUS_READS)  # opens all connections
    await context.wait_for_catchup()
    async with context.apply_delay(_STAMPEDE_DELAY_MS):
        ride = await user.write()
        context.report(
            f"Ride {ride} is written, and read {_SIMULTANEOUS_READS} times; "
            f"replicas apply it {_STAMPEDE_DELAY_MS} ms late."
        )
        return await user.read_at_once(ride, _SIMULTANEOUS_READS)


async def _stampede(context: ScenarioContext) -> str:
    await context.set_routing(Routing.NEVER_STALE)
    tally = await _read_at_once(context)
    if tally.refused or tally.by_primary > tally.by_replicas:
        context.report(f"The machine was busy ({_routes_of(tally)}). It is played once more.")
        tally = await _read_at_once(context)
    return f"never-stale: {tally}; {_routes_of(tally)}. The last answer came after {tally.longest_ms:.0f} ms."


def _routes_of(tally: ReadTally) -> str:
    """Account for every read that was answered."""
    waited = tally.reasons[Reason.WAITED]
    return f"{tally.by_replicas} by replicas, {waited} of them after a wait, and {tally.by_primary} by the primary"


async def _write_and_read(user: ScenarioUser, stop: asyncio.Event) -> int:
    """Write and read in turn until `stop` is set; return the number of rides written."""
    written = 0
    while not stop.is_set():
        try:
            ride = await user.write()
        except UnexpectedAnswer:  # while there is no primary
            await asyncio.sleep(0.05)
            continue
        written += 1
        for _ in range(3):
            await user.read(ride)
    return written


async def _promotion(context: ScenarioContext) -> str:
    await context.set_routing(Routing.NEVER_STALE)
    await context.wait_for_catchup()
    replicas, chosen = len(context.replicas), context.replicas[0]
    users = [await context.user() for _ in range(_USERS)]
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_write_and_read(user, stop), name="scenario user") for user in users]
        try:
            await asyncio.sleep(_AFTERWARDS_S)
            context.report(f"{chosen} is promoted while {_USERS} sessions write and read.")
            began = time.monotonic()
            await context.command("promote", chosen)
            took_s = time.monotonic() - began
            context.report(f"{chosen} is the primary after {took_s:.1f} s; the others follow it.")
            await context.wait_for_replicas(replicas)
            await asyncio.sleep(_AFTERWARDS_S)
        finally:
            stop.set()
    tally = ReadTally.sum(user.tally for user in users)
    lost = sum(bool(user.lost) for user in users)
    losses = "nothing was lost"
    if lost:
        losses = f"{lost} session{' was' if lost == 1 else 's were'} warned of a possible loss"
    return f"never-stale: {tally}, {sum(task.result() for task in tasks)} rides written; {losses}."


SCENARIOS = {
    one.name: one
    for one in (
        Scenario(
            "race",
            "The floor that is taken too early",
            "The technique as published records a write's position inside its transaction, before the commit. "
            "Here every replica stops right before that commit: by the published check it is caught up, yet it "
            "does not show the ride. Watch the reads right after the write: they are stale under 'article'; under "
            "'never-stale' they go to the primary.",
            _race,
        ),
        Scenario(
            "behind",
            "The replica that comes back behind",
            "A replica whose backend is killed restarts behind its earlier position, and answers. Its last status "
            "no longer holds. Watch the replicas' replay positions: they fall. Under 'article' reads trust the "
            "table of statuses and miss the ride; under 'never-stale' a status counts only for the replica's "
            "incarnation that reported it.",
            _behind,
        ),
        Scenario(
            "paused",
            "A replica that does not replay",
            "One replica receives WAL and does not replay it. Routed at random, about every fifth read of a new "
            "ride goes there and does not find it. Under 'never-stale' that replica serves no session that must "
            "see more than it has; watch its lane, where no read arrives.",
            _paused,
        ),
        Scenario(
            "stampede",
            "Many reads right after one write",
            "Forty reads ask for a ride at the moment of its commit, before any replica shows it. They wait "
            "together for a few milliseconds while the observer polls the likeliest replicas, with one poll at a "
            "time for each replica, however many reads wait. Watch the arrows: most wait, and then go to a "
            "replica; one that would have to wait too long goes to the primary, and none is stale.",
            _stampede,
        ),
        Scenario(
            "promotion",
            "Another primary",
            "A replica becomes the primary while sessions write and read. Watch the lanes: the old primary stops "
            "first, writes pause, and the router follows by itself; a replica serves again once it is known to "
            "follow the new primary.",
            _promotion,
        ),
    )
}
