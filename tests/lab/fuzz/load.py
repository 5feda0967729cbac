"""Clients that ask as fast as they are answered, a process of them: `python -m tests.lab.fuzz.load JOB`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from random import random as chance
from typing import NamedTuple
from urllib.parse import urlsplit

from rocket.errors import describe
from rocket.lab.bench.figures import percentile
from rocket.lab.bench.http import BadResponse, Connection
from rocket.lab.shutdown import run

REFUSED = 503
_SAME_PLACE_S = 0.01


@dataclass(frozen=True, slots=True)
class Job:
    """What the clients do."""

    url: str
    clients: int
    seconds: float
    path: str = ""
    """What they ask for; nothing: a ride of their own, with the latest token."""
    polite: bool = False
    """Whether they wait as `Retry-After` says, and up to as long again, each as chance has it."""
    anew: bool = False
    """Whether each request has a connection of its own."""
    from_s: float = 0.0
    """Answers that came before are not timed: the server has to find out first."""
    pause_s: float = 0.0
    """Between an answer and the next request."""


@dataclass(slots=True)
class Tally:
    """What came of it."""

    statuses: Counter[str] = field(default_factory=Counter)
    """How often each status came, or each way to fail."""
    accepted_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)


class Times(NamedTuple):
    """How long answers took that are of one kind."""

    answers: int
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, samples_ms: list[float]) -> Times | None:
        """Return what samples come to; None for none."""
        ordered = sorted(samples_ms)
        return cls(len(ordered), percentile(ordered, 50), percentile(ordered, 99)) if ordered else None


async def load(job: Job) -> Tally:
    """Let the clients ask until the time is up; return what came of it."""
    tally = Tally()
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(job.clients):
            group.create_task(_client(job, tally, began), name=f"client {number}")
    return tally


async def _client(job: Job, tally: Tally, began: float) -> None:
    address = urlsplit(job.url)
    connection = Connection(address.hostname or "", address.port or 0)
    who, _, ride = job.path.rpartition(" ")
    token = ""
    try:
        while (now := time.monotonic()) - began < job.seconds:
            credentials = f"Authorization: {who}\r\n" if who else ""
            session = f"Rocket-Session: {token}\r\n" if token else ""
            request = f"GET {ride} HTTP/1.1\r\nHost: {address.netloc}\r\n{credentials}{session}\r\n"
            try:
                answer = await connection.send(request.encode())
            except (OSError, TimeoutError, BadResponse) as error:
                tally.statuses[f"{type(error).__name__}: {describe(error)}"] += 1
                await asyncio.sleep(_SAME_PLACE_S)
                continue
            token = answer.header("Rocket-Session") or token
            _count(tally, answer.status, now, timed=now - began >= job.from_s)
            if job.anew:
                connection.close()
            if answer.status == REFUSED and job.polite:
                await asyncio.sleep(float(answer.header("Retry-After") or 0) * (1 + chance()))
            elif job.pause_s:
                await asyncio.sleep(job.pause_s)
    finally:
        connection.close()


def _count(tally: Tally, status: int, asked: float, *, timed: bool) -> None:
    tally.statuses[str(status)] += 1
    if timed:
        took_ms = (time.monotonic() - asked) * 1000
        (tally.refused_ms if status == REFUSED else tally.accepted_ms).append(took_ms)


if __name__ == "__main__":
    made = run(load(Job(**json.loads(sys.argv[1]))))
    print(json.dumps([made.statuses, Times.of(made.accepted_ms), Times.of(made.refused_ms)]))
