"""The command `bench`: on one cluster, the variants of each measure take turns, round after round."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import platform
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import rocket
from rocket.lab import logs
from rocket.lab.bench.figures import Figures, Row
from rocket.lab.bench.library import reads_process, scale
from rocket.lab.bench.load import Job, Kind, load_process
from rocket.lab.bench.measures import (
    BARE,
    IDLE,
    MAX_WAIT_MS,
    MEASURES,
    NEVER_STALE,
    SOAK,
    WRITERS,
    LibraryMeasure,
    Pace,
    Turn,
    users_of,
    with_memory,
    with_queries_per_read,
)
from rocket.lab.bench.report import as_json, report, stale_reads
from rocket.lab.bench.settings import load as load_settings
from rocket.lab.bench.testbed import attached_testbed, own_testbed, reserved_core, serving
from rocket.lab.shutdown import ShutdownStack, shutdown_on_signals
from rocket.lab.shutdown import run as run_to_its_end

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from rocket.lab.bench.load import LoadProcess
    from rocket.lab.bench.measures import Measure, Variant
    from rocket.lab.bench.settings import BenchSettings
    from rocket.lab.bench.testbed import Server, Testbed
    from rocket.lab.shutdown import Shutdown

_API = ("rocket", "run-all", "--no-cluster", "--no-simulator", "--host", "127.0.0.1", "--api-port", "0")
_SOAK_PARTS = 10

OK, FAILED = 0, 1
"""Exit codes: measured, whatever the figures; a part failed, or a read of never-stale was stale."""

_CPU_INFO = Path("/proc/cpuinfo")
_UNSAID = {"json", "data_dir", "postgres_bin", "against", "given"}
"""Settings that say nothing about the figures: paths on this machine, and which of the others were given."""

_log = logging.getLogger("rocket.bench")


class Bench:
    """Takes the measures on one testbed, with one load process."""

    def __init__(
        self,
        settings: BenchSettings,
        testbed: Testbed,
        load: LoadProcess,
        before_exec: Callable[[], None] | None,
    ) -> None:
        self._settings = settings
        self._testbed = testbed
        self._load = load
        self._before_exec = before_exec

    async def register_users(self) -> None:
        """Register the users of all variants that use the cluster, each with a ride."""
        async with self._serving(NEVER_STALE) as server:
            for users in (users_of(NEVER_STALE), WRITERS):
                await self._register(server, users)
        await self._testbed.wait_for_catchup()

    async def compare(self, measure: Measure | LibraryMeasure, figures: Figures) -> None:
        """Take a measure of every variant."""
        variants = [each for each in measure.variants if each.name in self._settings.only or each is IDLE]
        if isinstance(measure, LibraryMeasure):
            await self._compare_reads(measure, variants, figures)
            return
        if (python := self._settings.against) is not None:
            variants += [each.of_other_build(python) for each in variants if each not in {IDLE, BARE}]
        if measure.pace is Pace.ONCE:
            rows: list[Row] = []
            try:
                for variant in variants:
                    taken = await self._alone(measure, variant)
                    rows.append(Row(1, measure.name, variant.name, taken))
            finally:  # also the rows of a run that is interrupted
                for row in with_queries_per_read(rows):
                    figures.add(row)
                    _log.info("one round       %s", _short(row))
            return
        rounds, seconds = self._settings.phases(measure.pace)
        async with contextlib.AsyncExitStack() as stack:
            turns = deque([await self._ready(variant, seconds, stack) for variant in variants])
            for number in range(1, rounds + 1):
                for turn in turns:
                    row = Row(number, measure.name, turn.variant.name, await measure.take(turn))
                    figures.add(row)
                    _log.info("round %d of %d  %s", number, rounds, _short(row))
                turns.rotate(-1)  # another variant begins the next round

    async def _compare_reads(self, measure: LibraryMeasure, variants: Sequence[Variant], figures: Figures) -> None:
        """Take a measure of reads by a single router, which ask for one thing after the other."""
        rounds, seconds = self._settings.phases(Pace.QUICK)
        async with reads_process(self._testbed.nodes, self._before_exec) as process:
            turns = deque(variants)
            for variant in turns:
                await process.take(measure, variant, self._settings.warm_up_s)
            for number in range(1, rounds + 1):
                for variant in turns:
                    taken = await process.take(measure, variant, seconds)
                    row = Row(number, measure.name, variant.name, taken)
                    figures.add(row)
                    _log.info("round %d of %d  %s", number, rounds, _short(row))
                turns.rotate(-1)

    async def soak(self, reads: int, figures: Figures) -> None:
        """Have one server answer that many reads, and measure its memory after each tenth of them."""
        async with self._serving(NEVER_STALE) as server:
            for part in range(1, _SOAK_PARTS + 1):
                job = Job(
                    Kind.READS,
                    server.url,
                    sessions=self._settings.connections,
                    tokens=True,
                    requests=reads // _SOAK_PARTS,
                )
                tally = await self._load.run(job)
                row = Row(part, SOAK, NEVER_STALE.name, with_memory(tally, server.rss_bytes()))
                figures.add(row)
                _log.info("%d of %d reads  %s", part * job.requests, reads, _short(row))

    async def _ready(self, variant: Variant, seconds: float, stack: contextlib.AsyncExitStack) -> Turn:
        """Start a variant's server and warm it up, so that its connections are open and its code is cached."""
        server = await stack.enter_async_context(self._serving(variant))
        if variant is BARE:
            await self._register(server, users_of(variant))
        turn = Turn(variant, server, self._load, self._testbed, self._settings.connections, seconds)
        if variant is not IDLE:
            await replace(turn, seconds=self._settings.warm_up_s).load(Kind.READS)
        return turn

    async def _alone(self, measure: Measure, variant: Variant) -> dict[str, float]:
        """Measure a variant with no other server up, and count the primary's transactions from start to stop."""
        sessions, transactions = await self._testbed.sessions(), await self._testbed.transactions()
        _, seconds = self._settings.phases(measure.pace)
        async with self._serving(variant) as server:
            turn = Turn(variant, server, self._load, self._testbed, self._settings.connections, seconds)
            figures = await measure.take(turn)
        await self._testbed.wait_for_sessions(sessions)
        return {**figures, "primary_transactions": await self._testbed.transactions() - transactions}

    async def _register(self, server: Server, users: str) -> None:
        await self._load.register(
            Job(Kind.REGISTER, server.url, users=users, sessions=self._settings.connections, tokens=True)
        )

    def _serving(self, variant: Variant) -> contextlib.AbstractAsyncContextManager[Server]:
        log = self._testbed.logs / f"{variant.name}.log"
        return serving(self.command(variant), log, self._before_exec, variant.python)

    def command(self, variant: Variant) -> list[str]:
        """Return the module to run, and its arguments."""
        if variant.routing is None:
            return ["rocket.lab.bench.testbed"]
        return [
            *_API,
            *("--routing", variant.routing, *variant.flags),
            *("--data-dir", self._testbed.data_dir),
            *("--postgres-port", str(self._testbed.port)),
            *("--max-wait", f"{MAX_WAIT_MS:g}ms"),
            *("--log-format", "text"),
        ]


def _short(row: Row) -> str:
    """Return the first two figures of a row, the most important ones."""
    first = "  ".join(f"{value:10.2f} {name}" for name, value in list(row.figures.items())[:2])
    return f"{row.measure:23}  {row.variant:20}  {first}"


async def bench(settings: BenchSettings, figures: Figures, about: dict[str, object]) -> bool:
    """Take all measures; return whether the run is complete, rather than stopped by a signal.

    The figures measured so far are in `figures`, also if the run is stopped or fails, and facts about the testbed
    in `about`.
    """
    complete = False
    with shutdown_on_signals() as shutdown:
        if settings.scale:
            await scale(figures)
            return True
        async with ShutdownStack(shutdown) as stack:
            before_exec = stack.enter_context(reserved_core())
            about["api_has_a_core"] = before_exec is not None
            testbed = await stack.enter_async_context(_testbed(settings, shutdown))
            about["postgres"], about["replicas"] = testbed.postgres_version, len(testbed.replicas)
            load = await stack.enter_async_context(load_process())
            run = Bench(settings, testbed, load, before_exec)
            await run.register_users()
            if settings.soak is not None:
                await run.soak(settings.soak, figures)
            else:
                for name in settings.measures:
                    await run.compare(MEASURES[name], figures)
            complete = True
    return complete


def _testbed(settings: BenchSettings, shutdown: Shutdown) -> contextlib.AbstractAsyncContextManager[Testbed]:
    if settings.attach:
        return attached_testbed(settings.data_dir, settings.postgres_port)
    return own_testbed(settings.replicas, settings.postgres_bin, shutdown)


# --- the command ---


def measure(given: argparse.Namespace) -> int:
    """Run the benchmark and print its report, also if it is interrupted; return the exit code."""
    settings = load_settings(given)
    logs.configure("text")
    logging.getLogger("rocket.control").setLevel(logging.WARNING)  # a measure pauses and resumes replicas itself
    figures, about = Figures(), _about(settings)
    complete = False
    try:
        complete = run_to_its_end(bench(settings, figures, about))
    finally:
        about["finished"] = complete
        if figures.rows:
            print(f"\n{report(figures, about)}")
        if settings.json is not None:
            settings.json.write_text(json.dumps(as_json(figures, about), indent=2) + "\n")
    return OK if complete and not stale_reads(figures) else FAILED


def _about(settings: BenchSettings) -> dict[str, object]:
    """Return what a reader of the figures needs to know of the machine and the run."""
    return {
        "rocket": rocket.__version__,
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cores": psutil.cpu_count() or 1,
        "cpu": _cpu(),
        "load_average_1_min": psutil.getloadavg()[0],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "settings": {name: value for name, value in asdict(settings).items() if name not in _UNSAID},
    }


def _cpu() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
