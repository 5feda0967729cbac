"""What is measured, of whom, and how."""

from __future__ import annotations

import asyncio
import enum
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.lab.bench.contenders import ARTICLE, BARE, IDLE, NEVER_STALE, PRIMARY, RANDOM, TOKENLESS, UNSEEN
from rocket.lab.bench.orders import Job, Kind, Tally

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rocket.lab.bench.contenders import Variant
    from rocket.lab.bench.processes import Client, Server
    from rocket.lab.bench.stage import Testbed

MAX_WAIT_MS = 20.0
"""What every API is told to wait at the most."""
PAIRS_PER_S = 40.0
"""Writes with their reads, of all sessions together: far from what the machine can do."""
_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Turn:
    """A contender whose server is up, and how long it gets a load."""

    contender: Variant
    server: Server
    client: Client
    stage: Testbed
    connections: int
    seconds: float

    async def load(self, kind: Kind, per_s: float | None = None, *, beside: str | None = None) -> Tally:
        """Make a load."""
        return await self.client.load(
            Job(
                kind,
                self.server.url,
                crowd=crowd_of(self.contender),
                sessions=self.connections,
                tokens=self.contender.tokens,
                seconds=self.seconds,
                per_s=per_s,
                beside=beside,
            )
        )


def crowd_of(contender: Variant) -> str:
    """Return whose sessions ask it: what has no database knows none of its users."""
    return BARE.name if contender is BARE else "cluster"


async def _reads(turn: Turn) -> dict[str, float]:
    """Read, each session its own ride, as fast as the answers come."""
    cpu_s = turn.server.cpu_s()
    tally = await turn.load(Kind.READS)
    cpu_s = turn.server.cpu_s() - cpu_s
    return {
        "reads_per_s": tally.requests / tally.seconds,
        **_latencies(tally),
        **_per_read(tally, cpu_s),
        **({} if turn.contender is BARE else {"replica_share_percent": _share(tally)}),
        **_trouble(tally),
    }


async def _queries(turn: Turn) -> dict[str, float]:
    """Read in the same way; of `idle`, let it be for as long."""
    if turn.contender is IDLE:
        cpu_s, began = turn.server.cpu_s(), time.monotonic()
        await asyncio.sleep(turn.seconds)
        return {"cpu_percent": 100 * (turn.server.cpu_s() - cpu_s) / (time.monotonic() - began)}
    tally = await turn.load(Kind.READS)
    return {"reads": tally.requests, **_trouble(tally)}


async def _reads_while_writing(turn: Turn) -> dict[str, float]:
    """Read in the same way while other users write 100 rides a second."""
    tally = await turn.load(Kind.READS, beside=WRITERS)
    return {
        "reads_per_s": tally.requests / tally.seconds,
        **_latencies(tally),
        "replica_share_percent": _share(tally),
        "writes_beside_per_s": tally.beside / tally.seconds,
        **_trouble(tally),
    }


async def _read_after_write(turn: Turn) -> dict[str, float]:
    """Write rides and read each at once, at a moderate pace; before that, read right after others have written."""
    plain = await turn.load(Kind.PLAIN_PAIRS, PAIRS_PER_S, beside=WRITERS)
    pairs = await turn.load(Kind.PAIRS, PAIRS_PER_S)
    figures = {**_latencies(pairs), "replica_share_percent": _share(pairs)}
    for name, value in _latencies(plain).items():
        figures[f"plain_{name}"] = value
    return {**figures, **_trouble(plain, pairs)}


async def _read_after_write_paused(turn: Turn) -> dict[str, float]:
    """Write a ride and read it at once, while no replica replays anything."""
    async with turn.stage.paused():
        pairs = await turn.load(Kind.PAIRS, PAIRS_PER_S)
    return {**_latencies(pairs), "replica_share_percent": _share(pairs), **_trouble(pairs)}


async def _writes(turn: Turn) -> dict[str, float]:
    """Write rides as fast as the answers come."""
    tally = await turn.load(Kind.WRITES)
    return {"writes_per_s": tally.requests / tally.seconds, **_latencies(tally), **_trouble(tally)}


def with_memory(tally: Tally, rss_bytes: int) -> dict[str, float]:
    """Return the figures of one part of a soak."""
    return {
        "reads_per_s": tally.requests / tally.seconds,
        "resident_mib": rss_bytes / 2**20,
        **_latencies(tally),
        **_trouble(tally),
    }


def _latencies(tally: Tally) -> dict[str, float]:
    both = {"p50_ms": tally.p50_ms, "p99_ms": tally.p99_ms}
    return {name: value for name, value in both.items() if value is not None}


def _per_read(tally: Tally, cpu_s: float) -> dict[str, float]:
    if not tally.requests:
        return {}
    return {
        "cpu_us_per_read": _US * cpu_s / tally.requests,
        "client_cpu_us_per_read": _US * tally.cpu_s / tally.requests,
    }


def _share(tally: Tally) -> float:
    """Return which part of all reads that were answered replicas have served, in percent."""
    answered = tally.requests + tally.stale
    return 100 * tally.by_replicas / answered if answered else 0.0


def _trouble(*tallies: Tally) -> dict[str, float]:
    """Return what went wrong."""
    return {
        "stale_reads": sum(tally.stale for tally in tallies),
        "failed_requests": sum(tally.failed for tally in tallies),
    }


class Pace(enum.Enum):
    """How the contenders of a measure take turns, all of their servers being up at the same time."""

    QUICK = enum.auto()
    """Quickly, so that what drifts hits all alike."""
    STEADY = enum.auto()
    """Longer, and not as often: what is asked at a moderate pace takes its time to be enough."""
    ONCE = enum.auto()
    """Once, each with a server that is up alone, since something is counted that does not say whose it is."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is measured."""

    name: str
    what: str
    contenders: tuple[Variant, ...]
    take: Callable[[Turn], Awaitable[dict[str, float]]]
    pace: Pace = Pace.QUICK


WRITERS = "writers"
"""The crowd that writes beside."""

READS = Measure(
    "reads",
    "closed loop, each session reads its own ride",
    (BARE, PRIMARY, RANDOM, ARTICLE, NEVER_STALE, TOKENLESS),
    _reads,
)
QUERIES = Measure(
    "queries",
    "what the same reads ask of the primary, by its own count; and what nothing costs",
    (IDLE, PRIMARY, RANDOM, ARTICLE, NEVER_STALE, TOKENLESS),
    _queries,
    Pace.ONCE,
)
READS_WHILE_WRITING = Measure(
    "reads-while-writing",
    "the same, while other users write 100 rides a second",
    (RANDOM, NEVER_STALE),
    _reads_while_writing,
)
READ_AFTER_WRITE = Measure(
    "read-after-write",
    f"{PAIRS_PER_S:g} rides a second, each read at once; plain: another one, not just written, is read",
    (PRIMARY, RANDOM, ARTICLE, NEVER_STALE, TOKENLESS),
    _read_after_write,
    Pace.STEADY,
)
PAUSED = Measure(
    "read-after-write-paused",
    "the same, while no replica replays",
    (PRIMARY, NEVER_STALE),
    _read_after_write_paused,
    Pace.STEADY,
)
WRITES = Measure("writes", "closed loop", (PRIMARY, ARTICLE, NEVER_STALE), _writes)
INSPECTOR = Measure(
    "inspector",
    "reads in a closed loop, with the inspector's journal, at which nobody looks, and without",
    (NEVER_STALE, UNSEEN),
    _reads,
)

MEASURES = {
    measure.name: measure
    for measure in (READS, READS_WHILE_WRITING, INSPECTOR, QUERIES, READ_AFTER_WRITE, PAUSED, WRITES)
}
