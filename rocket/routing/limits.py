"""How long things may take, and how many there may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds, and how many connections there may be."""

    read_s: float = 5.0
    """A read, with all its attempts."""
    attempt_s: float = 1.0
    """One attempt on one replica."""
    replicas_tried: int = 2
    """How many replicas may fail a read before it goes to the primary."""
    write_s: float = 5.0
    """A write until its COMMIT is sent, with all its attempts."""
    commit_s: float = 5.0
    """A COMMIT, and the statement that settles the floor after it."""
    connections: int = 10
    """To each node, at the most."""
    queue: int = 100
    """How many may wait for a connection to a node; whoever comes on top is turned away at once."""
    primary_reads: int = 7
    """How many of the primary's connections reads may take: when all replicas lag, writes go on."""
    close_s: float = 2.0
    """Closing a pool gently."""
