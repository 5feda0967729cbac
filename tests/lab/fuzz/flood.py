"""More clients than the API can serve: `python -m tests.lab.fuzz.flood [--seconds S] [--clients N]`.

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
from typing import TYPE_CHECKING, NamedTuple

from rocket.lab.bench.testbed import reserved_core
from rocket.lab.shutdown import run
from tests.lab.fuzz.load import Job, Times
from tests.lab.fuzz.testbed import errors_in, running_api

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rocket.lab.bench.testbed import Server

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


class Came(NamedTuple):
    """What came of a load."""

    statuses: dict[str, int]
    accepted: Times | None
    refused: Times | None


class Broken(Exception):
    """The API did what it must not do."""


async def asked(orders: Job) -> Came:
    """Have a process ask; return what came of it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.lab.fuzz.load", json.dumps(asdict(orders)), stdout=asyncio.subprocess.PIPE
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
    statuses, *times = json.loads(said)
    return Came(statuses, *(each and Times(*each) for each in times))


async def a_ride(url: str) -> str:
    """Make a user with a ride; return the user's name and the ride's path, for `Job.path`."""
    import aiohttp  # noqa: PLC0415 - here alone

    email = "flood@example.com"
    async with aiohttp.ClientSession(url, headers={"Authorization": email}) as session:
        async with session.post("/users", data={"email": email}) as made:
            made.raise_for_status()
        async with session.post("/rides", data={"distance": "123.4"}) as written:
            written.raise_for_status()
            return f"{email} /rides/{(await written.json())['id']}"


@contextlib.asynccontextmanager
async def watched(url: str, seconds: float) -> AsyncIterator[dict[str, Came]]:
    """Ask the health endpoints all the while, by a new connection each time; yield what the tallies will be in."""
    tallies: dict[str, Came] = {}
    orders = Job(url, 1, seconds, anew=True, pause_s=_HEALTH_PAUSE_S)

    async def ask(path: str) -> None:
        tallies[path] = await asked(replace(orders, path=path))

    async with asyncio.TaskGroup() as group:
        for path in ("/livez", "/readyz"):
            group.create_task(ask(path), name=path)
        yield tallies


def shown(what: str, tally: Came, seconds: float) -> tuple[float, float]:
    """Print a tally; return the median and the 99th percentile of what was accepted, in milliseconds."""
    if tally.accepted is None:
        raise Broken(f"{what}: nothing was accepted, but {tally.statuses}")
    answers, p50, p99 = tally.accepted
    line = f"{what:<26} p50 {p50:7.2f} ms   p99 {p99:7.2f} ms   {answers / seconds:7.0f}/s accepted"
    if tally.refused is not None:
        line += f"   {tally.refused.answers / seconds:7.0f}/s refused (p50 {tally.refused.p50_ms:.0f} ms)"
    print(line, flush=True)
    return p50, p99


def only(tally: Came, *statuses: str) -> None:
    """Raise `Broken` unless nothing else was answered."""
    others = {status: count for status, count in tally.statuses.items() if status not in statuses}
    if others:
        raise Broken(f"there were answers that are none of {', '.join(statuses)}: {others}")


async def flood(server: Server, log: Path, clients: int, seconds: float) -> None:
    """Make the measurements; raise `Broken`."""
    ride = await a_ride(server.url)
    calm = Job(server.url, CLIENTS, seconds, ride, from_s=_SETTLING_S / 2)
    before = await asked(calm)
    only(before, "200")
    bounds = [TIMES * each for each in shown(f"{CLIENTS} clients", before, seconds - calm.from_s)]
    rss = server.rss_bytes()
    reads = Job(server.url, clients, seconds, ride, from_s=_SETTLING_S)
    loads = {
        "who ask again at once": reads,
        "who wait as they are told": replace(reads, polite=True),
        "who connect anew": replace(reads, clients=clients // 4, anew=True),
        "who ask for nothing": replace(reads, path="/nowhere"),
    }
    for name, orders in loads.items():
        other = replace(reads, clients=1, pause_s=0.01, polite=True)
        async with watched(server.url, seconds) as health, asyncio.TaskGroup() as group:
            asking = group.create_task(asked(other))
            came = await asked(orders)
        print(f"\n{orders.clients} {name}, for {seconds:g} s")
        only(came, "200", "503", "404")
        only(asking.result(), "200", "503")
        timed_s = seconds - _SETTLING_S
        judged = [shown("  accepted", came, timed_s)]
        if asking.result().accepted:
            judged.append(shown("  another client's reads", asking.result(), timed_s))
        # Who connects anew waits for that in the system's queue; who asks for nothing has no read accepted.
        served = judged[0] if orders.path == ride and not orders.anew else judged[-1]
        met = all(took <= bound for took, bound in zip(served, bounds, strict=True))
        print(f"  reads within {TIMES:g} times the unloaded: {'yes' if met else 'NO'}")
        for path, answers in sorted(health.items()):
            only(answers, "200")
            shown(f"  {path}", answers, timed_s)
        grown = server.rss_bytes() - rss
        print(f"  resident memory {(rss + grown) / _MIB:.0f} MiB ({grown / _MIB:+.0f})")
        if grown > _RSS_GROWTH_BYTES:
            raise Broken("the memory grew without bound")
        after = await asked(replace(calm, seconds=2.0))
        only(after, "200")
        shown(f"  {CLIENTS} clients after it", after, 2.0 - calm.from_s)
    if errors := errors_in(log):
        raise Broken("\n".join(errors[:5]))


async def main(clients: int, seconds: float) -> int:
    """Run the flood; return the exit code."""
    with reserved_core() as settle:
        async with running_api(REPLICAS, settle) as (server, log):
            try:
                await flood(server, log, clients, seconds)
            except Broken as broken:
                print(f"BROKEN: {broken}")
                return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.lab.fuzz.flood", description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=8.0)
    given = parser.parse_args()
    sys.exit(run(main(given.clients, given.seconds)))
