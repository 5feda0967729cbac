"""The measures, and the variants of the server that they compare."""

from __future__ import annotations

import asyncio
import enum
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rocket.lab.bench.load import Job, Kind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from pathlib import Path

    from rocket.lab.bench.figures import Row
    from rocket.lab.bench.load import LoadProcess, Tally
    from rocket.lab.bench.testbed import Server, Testbed

MAX_WAIT_MS = 20.0
"""`--max-wait` of every API."""
PAIRS_PER_S = 40.0
"""Writes, each with its read, of all sessions together: far below what the machine can do."""
OTHER_BUILD = " (other build)"
"""Ends the name of a variant of another build."""
WRITERS = "writers"
"""The users who write in the background."""
SCALE, SOAK = "scale", "soak"
"""Two measures that compare no variants; see `library.py` and `Bench.soak`."""

_TRANSACTIONS = "primary_transactions"
_US = 1_000_000


# --- variants ---


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to answer the same reads."""

    name: str
    what: str
    routing: str | None = None
    """The API's `--routing`; None: the server is not rocket's API."""
    tokens: bool = False
    """Whether clients send back their latest session token."""
    freshness: str | None = None
    """What reads ask to be shown; None: what their session has written and seen."""
    flags: tuple[str, ...] = ()
    """Further flags of the API."""
    python: Path | None = None
    """The Python interpreter of another build of rocket; None: this build's."""

    def of_other_build(self, python: Path) -> Variant:
        """Return the same variant of the build that an interpreter imports."""
        return replace(self, name=f"{self.name}{OTHER_BUILD}", python=python)


BARE = Variant("bare", "aiohttp alone: the same JSON from memory, no database")
IDLE = Variant("idle", "the never-stale API with its observer, and no requests", "never-stale")
PRIMARY = Variant("primary", "every read on the primary", "primary")
RANDOM = Variant("random", "any replica, no guarantee: the ceiling", "random")
ARTICLE = Variant("article", "the technique as published, with asyncpg's default pool", "article")
NEVER_STALE = Variant("never-stale", "clients send back their token", "never-stale", tokens=True)
TOKENLESS = Variant("never-stale-no-token", "the same, clients send no token", "never-stale")
NO_INSPECTOR = Variant(
    "never-stale-unseen", "without the inspector and its event log", "never-stale", tokens=True,
    flags=("--no-inspector",),
)  # fmt: skip

GLOBAL = Variant(
    "global", "clients send their token, and ask for all that is committed", "never-stale", tokens=True,
    freshness="global",
)  # fmt: skip
ANY = Variant("any", "clients ask for any node", "never-stale", tokens=True, freshness="any")

VARIANTS = {
    variant.name: variant
    for variant in (BARE, IDLE, PRIMARY, RANDOM, ARTICLE, NEVER_STALE, TOKENLESS, NO_INSPECTOR, GLOBAL, ANY)
}


def users_of(variant: Variant) -> str:
    """Return the users whose sessions load a variant: a server without the database has users of its own."""
    return BARE.name if variant is BARE else "cluster"


# --- taking a measure ---


@dataclass(frozen=True, slots=True)
class Turn:
    """A variant whose server is up, and the seconds for which it is measured."""

    variant: Variant
    server: Server
    load_process: LoadProcess
    testbed: Testbed
    connections: int
    seconds: float

    async def load(self, kind: Kind, per_s: float | None = None, *, background: str | None = None) -> Tally:
        """Load the server and return the tally."""
        return await self.load_process.run(
            Job(
                kind,
                self.server.url,
                users=users_of(self.variant),
                sessions=self.connections,
                tokens=self.variant.tokens,
                freshness=self.variant.freshness,
                seconds=self.seconds,
                per_s=per_s,
                background=background,
            )
        )


async def _reads(turn: Turn) -> dict[str, float]:
    """Read in a closed loop; each session reads its own ride."""
    cpu_s = turn.server.cpu_s()
    tally = await turn.load(Kind.READS)
    cpu_s = turn.server.cpu_s() - cpu_s
    return {
        "reads_per_s": tally.requests / tally.seconds,
        **_latencies(tally),
        **_per_read(tally, cpu_s),
        **({} if turn.variant is BARE else {"replica_share_percent": _share(tally)}),
        **_trouble(tally),
    }


async def _queries(turn: Turn) -> dict[str, float]:
    """Read in the same way; send `idle` nothing for the same time."""
    if turn.variant is IDLE:
        cpu_s, began = turn.server.cpu_s(), time.monotonic()
        await asyncio.sleep(turn.seconds)
        return {"cpu_percent": 100 * (turn.server.cpu_s() - cpu_s) / (time.monotonic() - began)}
    tally = await turn.load(Kind.READS)
    return {"reads": tally.requests, **_trouble(tally)}


async def _reads_while_writing(turn: Turn) -> dict[str, float]:
    """Read in the same way while other users write 100 rides a second."""
    tally = await turn.load(Kind.READS, background=WRITERS)
    return {
        "reads_per_s": tally.requests / tally.seconds,
        **_latencies(tally),
        "replica_share_percent": _share(tally),
        "writes_beside_per_s": tally.background_writes / tally.seconds,
        **_trouble(tally),
    }


async def _read_after_write(turn: Turn) -> dict[str, float]:
    """Write rides at a moderate rate and read each at once; before that, read right after other users' writes."""
    plain = await turn.load(Kind.PLAIN_PAIRS, PAIRS_PER_S, background=WRITERS)
    pairs = await turn.load(Kind.PAIRS, PAIRS_PER_S)
    figures = {**_latencies(pairs), "replica_share_percent": _share(pairs)}
    for name, value in _latencies(plain).items():
        figures[f"plain_{name}"] = value
    return {**figures, **_trouble(plain, pairs)}


async def _read_after_write_paused(turn: Turn) -> dict[str, float]:
    """Write rides and read each at once, while replay is paused on every replica."""
    async with turn.testbed.paused():
        pairs = await turn.load(Kind.PAIRS, PAIRS_PER_S)
    return {**_latencies(pairs), "replica_share_percent": _share(pairs), **_trouble(pairs)}


async def _writes(turn: Turn) -> dict[str, float]:
    """Write rides in a closed loop."""
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


def with_queries_per_read(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows of one measure and one round, with the primary's transactions per read where they are known.

    The primary does not say whose transactions it counts. From those of a variant, counted over its server's whole
    life, the transactions of the idle API over the same time are subtracted: they are the observer's and those of
    start and stop.
    """
    every = list(rows)
    idle = next((row.figures.get(_TRANSACTIONS) for row in every if row.variant == IDLE.name), None)
    for row in every:
        counted, reads = row.figures.get(_TRANSACTIONS), row.figures.get("reads")
        if row.variant == BARE.name or idle is None or counted is None or not reads:
            yield row
        else:
            yield replace(row, figures={**row.figures, "primary_queries_per_read": (counted - idle) / reads})


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
    """Return the percentage of answered reads that replicas have answered."""
    answered = tally.requests + tally.stale
    return 100 * tally.by_replicas / answered if answered else 0.0


def _trouble(*tallies: Tally) -> dict[str, float]:
    """Return the number of stale reads and of failed requests."""
    return {
        "stale_reads": sum(tally.stale for tally in tallies),
        "failed_requests": sum(tally.failed for tally in tallies),
    }


# --- the measures ---


class Pace(enum.Enum):
    """How the variants of a measure take turns, with all their servers up at the same time."""

    QUICK = enum.auto()
    """Short turns, so that drift affects all variants alike."""
    STEADY = enum.auto()
    """Fewer and longer turns: at a moderate rate it takes longer to collect enough samples."""
    ONCE = enum.auto()
    """One turn, with no other server up, since the measure counts what cannot be attributed to a server."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One measurement of several variants."""

    name: str
    what: str
    variants: tuple[Variant, ...]
    take: Callable[[Turn], Awaitable[dict[str, float]]]
    pace: Pace = Pace.QUICK


@dataclass(frozen=True, slots=True)
class LibraryMeasure:
    """One measurement of reads that ask for different things, by one router, without an API."""

    name: str
    what: str
    readers: int
    writes_per_s: float = 0.0
    variants: tuple[Variant, ...] = (ANY, NEVER_STALE, GLOBAL)


READS = Measure(
    "reads",
    "closed loop, each session reads its own ride",
    (BARE, PRIMARY, RANDOM, ARTICLE, NEVER_STALE, TOKENLESS, GLOBAL),
    _reads,
)
QUERIES = Measure(
    "queries",
    "the primary's transactions per read, by its own count, and the cost of an idle API",
    (IDLE, PRIMARY, RANDOM, ARTICLE, NEVER_STALE, TOKENLESS, GLOBAL),
    _queries,
    Pace.ONCE,
)
READS_WHILE_WRITING = Measure(
    "reads-while-writing",
    "the same, while other users write 100 rides a second",
    (RANDOM, NEVER_STALE, GLOBAL),
    _reads_while_writing,
)
GLOBAL_READS = LibraryMeasure(
    "global-reads", "the library alone, 64 reads at a time, of what other programs have written", readers=64
)
GLOBAL_READS_WHILE_WRITING = LibraryMeasure(
    "global-reads-while-writing", "the same, while these write 200 rides a second", readers=64, writes_per_s=200.0
)
GLOBAL_READS_ALONE = LibraryMeasure("global-reads-alone", "the same, one read at a time, and no writes", readers=1)
READ_AFTER_WRITE = Measure(
    "read-after-write",
    f"{PAIRS_PER_S:g} rides a second, each read at once; plain: an older ride is read right after another write",
    (PRIMARY, RANDOM, ARTICLE, NEVER_STALE, TOKENLESS),
    _read_after_write,
    Pace.STEADY,
)
PAUSED = Measure(
    "read-after-write-paused",
    "the same, with replay paused on every replica",
    (PRIMARY, NEVER_STALE),
    _read_after_write_paused,
    Pace.STEADY,
)
WRITES = Measure("writes", "closed loop", (PRIMARY, ARTICLE, NEVER_STALE), _writes)
INSPECTOR = Measure(
    "inspector",
    "reads in a closed loop, with the inspector's event log, without a viewer, and without the log",
    (NEVER_STALE, NO_INSPECTOR),
    _reads,
)

_MEASURES: tuple[Measure | LibraryMeasure, ...] = (
    READS, READS_WHILE_WRITING, GLOBAL_READS, GLOBAL_READS_WHILE_WRITING, GLOBAL_READS_ALONE, INSPECTOR, QUERIES,
    READ_AFTER_WRITE, PAUSED, WRITES,
)  # fmt: skip
MEASURES = {measure.name: measure for measure in _MEASURES}
