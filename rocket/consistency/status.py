"""What the observer last knew of a node, and when."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NewType, TypeAlias

from rocket.consistency.lsn import Lsn

Incarnation = NewType("Incarnation", str)
"""Names one run of a replica's startup process, the process that replays.

Within one incarnation the replay LSN never goes back; a crash ends it together with every connection, and the
next one may begin far behind (design fact F3).
"""

Epoch = NewType("Epoch", str)
"""Names the time during which one server is the primary: its timeline and a random part, `2-k3v9x2q7ab`.

A timeline alone is ambiguous: two promotions, each unaware of the other, both make timeline 2 (design fact F11).
A primary that has lost WAL goes on in a new epoch of the same timeline, `2.1-x0q4b7w1zz`.
"""

_START = Lsn(0)

Rank: TypeAlias = tuple[int, int]
"""Orders the epochs of one cluster: the timeline, and how many epochs there were before on it."""


@functools.lru_cache(maxsize=64)
def timeline_of(epoch: Epoch) -> int:
    """Return the timeline that an epoch's primary writes."""
    return int(epoch.partition("-")[0].partition(".")[0])


def rank_of(epoch: Epoch) -> Rank:
    """Return what orders epochs: whether one came after another one of the same cluster."""
    timeline, _, generation = epoch.partition("-")[0].partition(".")
    return int(timeline), int(generation or 0)


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica as the observer last saw it."""

    name: str
    replay_lsn: Lsn
    """All WAL up to here had been replayed, so every commit at or below it was visible."""
    incarnation: Incarnation | None
    """None where it is unknown: the status then vouches for no connection, and each read checks by itself."""
    observed_at: float
    """Monotonic seconds at which the question was sent: the status is at least as old as that says."""
    answered_at: float = 0.0
    """Monotonic seconds at which the answer was there."""
    receive_lsn: Lsn | None = None
    """End of the WAL received and flushed; None until streaming has begun since the server's start."""
    streaming: bool = False
    """Whether a WAL receiver was connected, and received WAL of `epoch`'s timeline."""
    streamed_lsn: Lsn | None = None
    """The replay LSN when it was last seen streaming, in this incarnation and epoch; None if it never was."""
    epoch: Epoch | None = None
    """The newest epoch whose row the replica shows, provided that the row proves which history it follows."""
    system_id: int | None = None
    """Names the cluster that it belongs to; None where that was not asked."""

    vouched_lsn: Lsn = field(init=False, compare=False, repr=False)
    """How far what it has replayed is known to be WAL of `epoch`.

    Without a WAL receiver it replays all the WAL it finds, so only what it had replayed while streaming is
    certain. What it had received by then is not: a fork may lie before the end of that.
    """

    def __post_init__(self) -> None:
        vouched = self.replay_lsn if self.streaming else min(self.replay_lsn, self.streamed_lsn or Lsn(0))
        object.__setattr__(self, "vouched_lsn", vouched)

    def vouches_for(self, incarnation: Incarnation | None) -> bool:
        """Return whether this status says anything about a connection opened in `incarnation`.

        Unknown equals nothing, itself included.
        """
        return incarnation is not None and incarnation == self.incarnation


@dataclass(frozen=True, slots=True)
class PrimaryStatus:
    """A primary as the observer last saw it."""

    name: str
    flush_lsn: Lsn
    observed_at: float
    """Monotonic seconds at which the question was sent."""
    epoch: Epoch
    """The primary's epoch."""
    system_id: int | None = None
    """Names the cluster that it belongs to; None where that was not asked."""
    started: int | None = None
    """When its server was started, in microseconds by its own clock: this tells two servers apart.

    None where that was not asked.
    """
    checkpoint_lsn: Lsn = _START
    """Its last checkpoint: at the latest the one with which its server was started, after all that it had then."""
    restarted: bool = False
    """Whether its server was started after its epoch was named: then it may have been set back to a snapshot."""
    read_only: bool = False
    """Whether its transactions are read-only by default: it is to take no writes."""
    covered_lsn: Lsn = _START
    """The highest cover of its epoch: every read has to see what was committed up to there."""
