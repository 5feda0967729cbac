"""A whole benchmark: a cluster, and in each measure the contenders in turn, round after round."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from rocket.lab.bench.contenders import BARE, IDLE, NEVER_STALE
from rocket.lab.bench.cores import shared_out
from rocket.lab.bench.figures import Row
from rocket.lab.bench.goals import SOAK
from rocket.lab.bench.measures import MAX_WAIT_MS, MEASURES, WRITERS, Pace, Turn, crowd_of, with_memory
from rocket.lab.bench.orders import Job, Kind
from rocket.lab.bench.processes import client, serving
from rocket.lab.bench.queries import with_queries_per_read
from rocket.lab.bench.scale import scale
from rocket.lab.bench.stage import staged
from rocket.lab.shutdown import ShutdownStack, shutdown_on_signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from rocket.lab.bench.contenders import Variant
    from rocket.lab.bench.figures import Figures
    from rocket.lab.bench.measures import Measure
    from rocket.lab.bench.processes import Client, Server
    from rocket.lab.bench.settings import BenchSettings
    from rocket.lab.bench.stage import Testbed

_API = ("rocket", "run-all", "--no-cluster", "--no-simulator", "--host", "127.0.0.1", "--api-port", "0")
_TENTHS = 10

_log = logging.getLogger("rocket.bench")


class Bench:
    """Makes the measurements on one cluster, by one load process."""

    def __init__(
        self, settings: BenchSettings, stage: Testbed, load: Client, settle: Callable[[], None] | None
    ) -> None:
        self._settings = settings
        self._stage = stage
        self._load = load
        self._settle = settle

    async def make_crowds(self) -> None:
        """Make the users, each with a ride."""
        async with self._serving(NEVER_STALE) as server:
            for crowd in (crowd_of(NEVER_STALE), WRITERS):
                await self._join(server, crowd)
        await self._stage.caught_up()

    async def compare(self, measure: Measure, figures: Figures) -> None:
        """Let every contender have its turns in a measure."""
        contenders = [each for each in measure.contenders if each.name in self._settings.only or each is IDLE]
        if measure.pace is Pace.ONCE:
            rows: list[Row] = []
            try:
                for contender in contenders:
                    taken = await self._alone(measure, contender)
                    rows.append(Row(1, measure.name, contender.name, taken))
            finally:  # also of one that is cut off
                for row in with_queries_per_read(rows):
                    figures.add(row)
                    _log.info("one round       %s", _in_short(row))
            return
        rounds, seconds = self._settings.phases(measure.pace)
        async with contextlib.AsyncExitStack() as stack:
            turns = deque([await self._ready(contender, seconds, stack) for contender in contenders])
            for number in range(1, rounds + 1):
                for turn in turns:
                    row = Row(number, measure.name, turn.contender.name, await measure.take(turn))
                    figures.add(row)
                    _log.info("round %d of %d  %s", number, rounds, _in_short(row))
                turns.rotate(-1)  # each round begins with another one

    async def soak(self, reads: int, figures: Figures) -> None:
        """Have one server answer so many reads, and see how its memory fares."""
        async with self._serving(NEVER_STALE) as server:
            for tenth in range(1, _TENTHS + 1):
                orders = Job(
                    Kind.READS,
                    server.url,
                    sessions=self._settings.connections,
                    tokens=True,
                    requests=reads // _TENTHS,
                )
                tally = await self._load.load(orders)
                row = Row(tenth, SOAK, NEVER_STALE.name, with_memory(tally, server.rss_bytes()))
                figures.add(row)
                _log.info("%d of %d reads  %s", tenth * orders.requests, reads, _in_short(row))

    async def _ready(self, contender: Variant, seconds: float, stack: contextlib.AsyncExitStack) -> Turn:
        """Bring up a contender's server, and warm it up: connections are opened, and code is warm."""
        server = await stack.enter_async_context(self._serving(contender))
        if contender is BARE:
            await self._join(server, crowd_of(contender))
        turn = Turn(contender, server, self._load, self._stage, self._settings.connections, seconds)
        if contender is not IDLE:
            await replace(turn, seconds=self._settings.warm_up_s).load(Kind.READS)
        return turn

    async def _alone(self, measure: Measure, contender: Variant) -> dict[str, float]:
        """Measure a contender while its server alone is up.

        Of all of its life, its beginning and end included, the primary's transactions are counted.
        """
        sessions, transactions = await self._stage.sessions(), await self._stage.transactions()
        _, seconds = self._settings.phases(measure.pace)
        async with self._serving(contender) as server:
            turn = Turn(contender, server, self._load, self._stage, self._settings.connections, seconds)
            figures = await measure.take(turn)
        await self._stage.deserted(sessions)
        return {**figures, "primary_transactions": await self._stage.transactions() - transactions}

    async def _join(self, server: Server, crowd: str) -> None:
        await self._load.join(Job(Kind.JOIN, server.url, crowd, self._settings.connections, tokens=True))

    def _serving(self, contender: Variant) -> contextlib.AbstractAsyncContextManager[Server]:
        return serving(self.command(contender), self._stage.logs / f"{contender.name}.log", self._settle)

    def command(self, contender: Variant) -> list[str]:
        """Return the module to run, and its arguments."""
        if contender.routing is None:
            return ["rocket.lab.bench.bare"]
        return [
            *_API,
            *("--routing", contender.routing, *contender.flags),
            *("--data-dir", self._stage.data_dir),
            *("--postgres-port", str(self._stage.port)),
            *("--max-wait", f"{MAX_WAIT_MS:g}ms"),
            *("--log-format", "text"),
        ]


def _in_short(row: Row) -> str:
    """Return the first two figures of a row, which are the ones that matter most."""
    first = "  ".join(f"{value:10.2f} {name}" for name, value in list(row.figures.items())[:2])
    return f"{row.measure:23}  {row.contender:20}  {first}"


async def bench(settings: BenchSettings, figures: Figures, about: dict[str, object]) -> bool:
    """Measure everything; tell whether it came to its end, and was not asked to stop before.

    What was measured is in `figures`, also of a run that was cut off or failed. Raise whatever keeps it from
    running.
    """
    finished = False
    with shutdown_on_signals() as ending:
        if settings.scale:
            await scale(figures)
            return True
        async with ShutdownStack(ending) as stack:
            settle = stack.enter_context(shared_out())
            about["api_has_a_core"] = settle is not None
            stage = await stack.enter_async_context(staged(settings, ending))
            about["postgres"], about["replicas"] = stage.postgres_version, len(stage.replicas)
            load = await stack.enter_async_context(client())
            made = Bench(settings, stage, load, settle)
            await made.make_crowds()
            if settings.soak is not None:
                await made.soak(settings.soak, figures)
            else:
                for name in settings.measures:
                    await made.compare(MEASURES[name], figures)
            finished = True
    return finished
