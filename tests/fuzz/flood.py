"""More clients than the API can serve: `python -m tests.fuzz.flood [--seconds S] [--clients N]`.

The load comes from other processes. Clients ask again as soon as they have their answer: first eight of them, then
a flood of one kind after the other, and eight again. Exit code 1 if anything broke; whether the latencies stayed
within bounds is printed, since it depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from rocket.bench.cores import shared_out
from rocket.bench.figures import percentile
from rocket.loop import run
from tests.fuzz.crowd import Orders, Tally
from tests.fuzz.stage import errors_in, staged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rocket.bench.processes import Server

CLIENTS = 8
REPLICAS = 5
TIMES = 3.0
"""How much longer an accepted read may take in a flood."""
_SETTLING_S = 1.0
"""How long the server may take to find out that there is a flood: what is answered before is not timed."""
_HEALTH_PAUSE_S = 0.05
_LEEWAY_S = 30.0
_RSS_GROWTH_BYTES = 100 * 2**20
_MIB = 2**20


class Broken(Exception):
    """The API did what it must not do."""


async def asked(orders: Orders) -> Tally:
    """Have a process ask; return what came of it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fuzz.crowd", json.dumps(asdict(orders)), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(orders.seconds + _LEEWAY_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Broken("the clients failed")
    return Tally(*json.loads(said))


async def a_ride(url: str) -> str:
    """Make a user with a ride; return the user's name and the ride's path, for `Orders.path`."""
    import aiohttp  # noqa: PLC0415 - here alone

    email = "flood@example.com"
    async with aiohttp.ClientSession(url, headers={"Authorization": email}) as session:
        async with session.post("/users", data={"email": email}) as made:
            made.raise_for_status()
        async with session.post("/rides", data={"distance": "123.4"}) as written:
            written.raise_for_status()
            return f"{email} /rides/{(await written.json())['id']}"


@contextlib.asynccontextmanager
async def watched(url: str, seconds: float) -> AsyncIterator[dict[str, Tally]]:
    """Ask the health endpoints all the while, by a new connection each time; yield what the tallies will be in."""
    tallies: dict[str, Tally] = {}
    orders = Orders(url, 1, seconds, anew=True, pause_s=_HEALTH_PAUSE_S)

    async def ask(path: str) -> None:
        tallies[path] = await asked(replace(orders, path=path))

    async with asyncio.TaskGroup() as group:
        for path in ("/livez", "/readyz"):
            group.create_task(ask(path), name=path)
        yield tallies


def shown(what: str, tally: Tally, seconds: float) -> tuple[float, float]:
    """Print a tally; return the median and the 99th percentile of what was accepted, in milliseconds."""
    ordered = sorted(tally.accepted_ms)
    if not ordered:
        raise Broken(f"{what}: nothing was accepted, but {dict(tally.statuses)}")
    p50, p99 = percentile(ordered, 50), percentile(ordered, 99)
    line = f"{what:<26} p50 {p50:7.2f} ms   p99 {p99:7.2f} ms   {len(ordered) / seconds:7.0f}/s accepted"
    if tally.refused_ms:
        refused = sorted(tally.refused_ms)
        line += f"   {len(refused) / seconds:7.0f}/s refused (p50 {percentile(refused, 50):.0f} ms)"
    print(line, flush=True)
    return p50, p99


def only(tally: Tally, *statuses: str) -> None:
    """Raise `Broken` unless nothing else was answered."""
    others = {status: count for status, count in tally.statuses.items() if status not in statuses}
    if others:
        raise Broken(f"there were answers that are none of {', '.join(statuses)}: {others}")


async def flood(server: Server, log: Path, clients: int, seconds: float) -> None:
    """Make the measurements; raise `Broken`."""
    ride = await a_ride(server.url)
    calm = Orders(server.url, CLIENTS, seconds, ride, from_s=_SETTLING_S / 2)
    before = await asked(calm)
    only(before, "200")
    p50, p99 = shown(f"{CLIENTS} clients", before, seconds - calm.from_s)
    rss = server.rss_bytes()
    crowds = {
        "who ask again at once": Orders(server.url, clients, seconds, ride, from_s=_SETTLING_S),
        "who wait as they are told": Orders(server.url, clients, seconds, ride, from_s=_SETTLING_S, polite=True),
        "who connect anew": Orders(server.url, clients // 4, seconds, ride, from_s=_SETTLING_S, anew=True),
        "who ask for nothing": Orders(server.url, clients, seconds, "/nowhere", from_s=_SETTLING_S),
    }
    for name, orders in crowds.items():
        async with watched(server.url, seconds) as health, asyncio.TaskGroup() as group:
            beside = group.create_task(
                asked(replace(calm, clients=1, pause_s=0.01, from_s=_SETTLING_S, polite=True))
            )
            tally = await asked(orders)
        print(f"\n{orders.clients} {name}, for {seconds:g} s")
        only(tally, "200", "503", "404")
        only(beside.result(), "200", "503")
        timed_s = seconds - _SETTLING_S
        flood_p50, flood_p99 = shown("  accepted", tally, timed_s)
        times = max(flood_p50 / p50, flood_p99 / p99)
        verdict = "met" if times <= TIMES else "MISSED"
        print(f"  {flood_p50 / p50:.1f} and {flood_p99 / p99:.1f} times as long: {verdict}")
        if beside.result().accepted_ms:
            shown("  somebody else's reads", beside.result(), timed_s)
        for path, answers in health.items():
            only(answers, "200")
            shown(f"  {path}", answers, timed_s)
        grown = server.rss_bytes() - rss
        print(f"  resident memory {(rss + grown) / _MIB:.0f} MiB ({grown / _MIB:+.0f})")
        if grown > _RSS_GROWTH_BYTES:
            raise Broken("the memory grew without bound")
        after = await asked(replace(calm, seconds=2.0))
        only(after, "200", *(("503",) if name == "who ask again at once" else ()))
        shown(f"  {CLIENTS} clients after it", after, 2.0 - calm.from_s)
    if errors := errors_in(log):
        raise Broken("\n".join(errors[:5]))


async def main(clients: int, seconds: float) -> int:
    """Run the flood; return the exit code."""
    with shared_out() as settle:
        async with staged(REPLICAS, settle) as (server, log):
            try:
                await flood(server, log, clients, seconds)
            except Broken as broken:
                print(f"BROKEN: {broken}")
                return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.flood", description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=8.0)
    given = parser.parse_args()
    sys.exit(run(main(given.clients, given.seconds)))
