"""What the load process is told, and what it tells: one JSON object a line, both ways."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """What a load is made of."""

    JOIN = "join"
    """Each session becomes a user and writes the ride that it will read: once, before all else."""
    READS = "reads"
    """Each session reads its ride."""
    WRITES = "writes"
    """Each session writes rides."""
    PAIRS = "pairs"
    """A session writes a ride and reads it at once; the time is that of the read."""
    PLAIN_PAIRS = "plain-pairs"
    """One of the crowd beside writes a ride, and a session reads at once, but its own; timed as above."""


@dataclass(frozen=True, slots=True)
class Job:
    """One load: it ends when either bound is reached."""

    kind: Kind
    url: str
    crowd: str = "cluster"
    """Whose sessions: they are kept from load to load."""
    sessions: int = 8
    """Each with a connection of its own, and one request at a time."""
    tokens: bool = False
    seconds: float = 3600.0
    requests: int = 2**62
    per_s: float | None = None
    """The pace of all sessions together, kept whatever the answers take; None: a closed loop."""
    beside: str | None = None
    """A crowd that writes meanwhile, at its own pace; in plain pairs, before each read."""
    beside_per_s: float = 100.0


@dataclass(frozen=True, slots=True)
class Tally:
    """How a load went."""

    requests: int
    """Answered as they should be; only these are timed."""
    seconds: float
    p50_ms: float | None
    """None where nothing was answered."""
    p99_ms: float | None
    by_replicas: int
    """Requests that a replica answered."""
    stale: int
    """Reads that did not show an acknowledged ride."""
    failed: int
    failures: tuple[str, ...]
    """What the first few said."""
    beside: int
    """Rides that the crowd beside has written."""
    cpu_s: float
    """What the load process itself took."""
