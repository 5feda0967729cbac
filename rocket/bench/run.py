"""A whole benchmark: a cluster, the contenders in turn, round after round."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from rocket.bench.contenders import BARE, IDLE, NEVER_STALE
from rocket.bench.figures import Row
from rocket.bench.goals import SOAK
from rocket.bench.measures import MAX_WAIT_MS, MEASURES, READS, WRITERS, Turn, crowd_of, with_memory
from rocket.bench.orders import Kind, Orders
from rocket.bench.processes import client, serving
from rocket.bench.queries import with_queries_per_read
from rocket.bench.scale import scale
from rocket.bench.stage import staged
from rocket.ending import Unwinding, ended_by_signals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rocket.bench.contenders import Contender
    from rocket.bench.figures import Figures
    from rocket.bench.measures import Measure
    from rocket.bench.processes import Client, Server
    from rocket.bench.settings import BenchSettings
    from rocket.bench.stage import Stage

_API = ("rocket", "run-all", "--no-cluster", "--no-simulator", "--host", "127.0.0.1", "--api-port", "0")
_TENTHS = 10

_log = logging.getLogger("rocket.bench")


class Bench:
    """Makes the measurements on one cluster, by one load process."""

    def __init__(self, settings: BenchSettings, stage: Stage, load: Client) -> None:
        self._settings = settings
        self._stage = stage
        self._load = load

    async def make_crowds(self) -> None:
        """Make the users, each with a ride."""
        async with serving(self.command(NEVER_STALE), self._stage.logs / "api.log") as server:
            for crowd in (crowd_of(NEVER_STALE), WRITERS):
                await self._join(server, crowd)
        await self._stage.caught_up()

    async def round(self, number: int, figures: Figures) -> None:
        """Let every contender have its turn in every measure."""
        for name in self._settings.measures:
            rows: list[Row] = []
            try:
                for contender in self._in_turn(MEASURES[name], number):
                    rows.append(Row(number, name, contender.name, await self._turn(MEASURES[name], contender)))
                    _log.info("round %d of %d  %s", number, self._settings.rounds, _in_short(rows[-1]))
            finally:  # also of a round that is cut off
                for row in with_queries_per_read(rows):
                    figures.add(row)

    async def soak(self, reads: int, figures: Figures) -> None:
        """Have one server answer so many reads, and see how its memory fares."""
        async with serving(self.command(NEVER_STALE), self._stage.logs / "api.log") as server:
            for tenth in range(1, _TENTHS + 1):
                orders = Orders(
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

    def _in_turn(self, measure: Measure, number: int) -> Sequence[Contender]:
        """Return who takes part, each round with another one at the beginning."""
        taking_part = deque(
            each for each in measure.contenders if each.name in self._settings.only or each is IDLE
        )
        taking_part.rotate(1 - number)
        return taking_part

    async def _turn(self, measure: Measure, contender: Contender) -> Mapping[str, float]:
        """Measure a contender on a server of its own.

        Of all of its life, its beginning and end included, the primary's transactions are counted.
        """
        sessions, transactions = await self._stage.sessions(), await self._stage.transactions()
        async with serving(self.command(contender), self._stage.logs / "api.log") as server:
            if contender is BARE:
                await self._join(server, crowd_of(contender))
            figures = await measure.take(Turn(contender, server, self._load, self._stage, self._settings))
        await self._stage.deserted(sessions)
        if measure is READS:
            figures["primary_transactions"] = await self._stage.transactions() - transactions
        return figures

    async def _join(self, server: Server, crowd: str) -> None:
        await self._load.join(Orders(Kind.JOIN, server.url, crowd, self._settings.connections, tokens=True))

    def command(self, contender: Contender) -> list[str]:
        """Return the module to run, and its arguments."""
        if contender.routing is None:
            return ["rocket.bench.bare"]
        return [
            *_API,
            *("--routing", contender.routing),
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
    with ended_by_signals() as ending:
        if settings.scale:
            await scale(figures)
            return True
        async with Unwinding(ending) as stack:
            stage = await stack.enter_async_context(staged(settings, ending))
            about["postgres"], about["replicas"] = stage.postgres_version, len(stage.replicas)
            load = await stack.enter_async_context(client())
            made = Bench(settings, stage, load)
            await made.make_crowds()
            if settings.soak is not None:
                await made.soak(settings.soak, figures)
            else:
                for number in range(1, settings.rounds + 1):
                    await made.round(number, figures)
            finished = True
    return finished
