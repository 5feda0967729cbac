"""A torture run on a cluster that Patroni runs: failovers, one after the other, under traffic."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import random
import time
from itertools import cycle, islice
from typing import TYPE_CHECKING, NamedTuple

from rocket import orchestrator
from rocket.config import Settings
from rocket.consistency import Lsn
from rocket.ending import Unwinding, background, ended_by_signals
from rocket.patroni.cluster import PatroniSettings
from rocket.patroni.making import patroni_cluster
from rocket.schema import schema_sql
from rocket.torture import clients, leaders
from rocket.torture.figures import READS
from rocket.torture.history import End, Fault, Healed, HistoryWriter, Outcome, Request, Role, Run
from rocket.torture.run import CLIENT_PROCESSES, Traces
from rocket.torture.workload import Orders

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

    from rocket.ending import Ending
    from rocket.patroni.cluster import PatroniCluster
    from rocket.torture.clients import Clients
    from rocket.torture.history import History, Op
    from rocket.torture.settings import TortureSettings

_BREATH_S = 3.0
"""All is well for so long between two failovers."""
_BACK_WITHIN_S = 1.0
"""So soon after Patroni's own promotion a write has to be acknowledged."""
_ANSWERED = 0.999
"""The share of the reads with tokens that has to be answered, where a replica may."""

_GIVEN_UP = ("hung up", "cut off")
"""How the error of a request begins whose client did not want to wait."""

_log = logging.getLogger("rocket.torture")


async def torture_failovers(settings: TortureSettings) -> None:
    """Run it and record it; the history of a run that is interrupted lacks its end.

    Raise whatever keeps the system from running.
    """
    zero = time.monotonic()
    traces = Traces()
    planned = _planned(settings)
    run = Run(
        seed=settings.seed,
        duration_s=settings.duration_s,
        routing=settings.routing,
        sessions=settings.sessions,
        faults=tuple(sorted(set(planned))),
        nodes=("node1", "node2", "node3"),
        started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )
    with HistoryWriter.create(settings.history, run) as history:
        finished = False
        with ended_by_signals() as ending:
            async with Unwinding(ending) as stack:
                cluster, running = await _start(settings, zero, traces, ending, stack)
                await running.at_work()
                for number, name in enumerate(planned, start=1):
                    await asyncio.sleep(_BREATH_S)
                    _log.info("%6.1f s  %d of %d: %s", time.monotonic() - zero, number, len(planned), name)
                    history.add(await _fault(name, cluster, zero))
                history.add(Healed(at=round(time.monotonic() - zero, 6)))
                await asyncio.sleep(settings.calm_s)
                finished = True
        leaked = tuple(await traces.left())
        for what in leaked:
            _log.error("left behind: %s", what)
        if finished:
            history.add(End(at=round(time.monotonic() - zero, 6), leaked=leaked))


def _planned(settings: TortureSettings) -> list[str]:
    """Return which failovers there will be: all kinds in turn, in an order that the seed decides."""
    names = random.Random(settings.seed).sample(settings.faults, len(settings.faults))  # noqa: S311 - to be repeated
    return list(islice(cycle(names), settings.failovers))


async def _fault(name: str, cluster: PatroniCluster, zero: float) -> Fault:
    at = time.monotonic()
    wall_s = time.time() - (at - zero)
    before, detail = await leaders.bring_about(name, cluster)
    promoted = [{"leader": one["leader"], "at": round(one["wall_s"] - wall_s, 3)} for one in detail["promoted"]]
    thawed = {"thawed": round(detail["thawed_wall_s"] - wall_s, 3)} if "thawed_wall_s" in detail else {}
    return Fault(
        name=name,
        node=before.name,
        at=round(at - zero, 6),
        until=round(time.monotonic() - zero, 6),
        detail={"promoted": promoted, "leader": detail["leader"], **thawed},
    )


async def _start(
    settings: TortureSettings, zero: float, traces: Traces, ending: Ending, stack: contextlib.AsyncExitStack
) -> tuple[PatroniCluster, Clients]:
    """Bring up cluster, API and clients; `stack` takes them down."""
    cluster = await stack.enter_async_context(
        patroni_cluster(
            PatroniSettings(
                port=0,
                postgres_bin=settings.postgres_bin,
                database=orchestrator.DATABASE,
                schema=schema_sql(),
            )
        )
    )
    traces.run_dir = cluster.password_file.parent
    ending.on_hurry.append(cluster.kill_all)
    await stack.enter_async_context(background(cluster.supervise(), "supervisor"))
    url = await orchestrator.attached(
        Settings(
            api_port=0,
            routing=settings.routing,
            patroni=tuple(cluster.urls),
            patroni_dsn=cluster.dsn_template,
        ),
        ending,
        stack,
    )
    traces.url = url
    _log.info("inspector: %s/inspector", url)
    running = await stack.enter_async_context(clients.running(_orders(settings, url, zero)))
    traces.clients = running.pids
    await stack.enter_async_context(background(running.watch(), "clients"))
    return cluster, running


def _orders(settings: TortureSettings, url: str, zero: float) -> list[Orders]:
    return [
        Orders(
            url=url,
            history=str(settings.history),
            zero=zero,
            seed=settings.seed,
            process=number,
            processes=CLIENT_PROCESSES,
            sessions=len(range(number, settings.sessions, CLIENT_PROCESSES)),
        )
        for number in range(CLIENT_PROCESSES)
    ]


# --- what a history of failovers shows beyond the checker's rules ---


class Finding(NamedTuple):
    """One line about a run, and whether it is as it should be."""

    words: str
    good: bool
    promised: bool = False
    """Whether the guarantee has it so; the others are goals, which a slow machine misses."""


def findings(history: History) -> Iterator[Finding]:
    """Yield for each failover when writes were back, and what the old leader did; then the share of reads."""
    writes = [op for op in history.ops if op.request is Request.WRITE and op.outcome is Outcome.OK]
    for fault in history.faults:
        for promoted in fault.detail.get("promoted", ()):
            back = min((op.done for op in writes if op.at >= promoted["at"] - 1 and op.node == promoted["leader"]
                        and op.done >= promoted["at"]), default=None)  # fmt: skip
            after_s = None if back is None else back - promoted["at"]
            words = "never" if after_s is None else f"{after_s:.2f} s after"
            yield Finding(
                f"{fault.name} of {fault.node}: writes back {words} Patroni's promotion of {promoted['leader']}",
                after_s is not None and after_s <= _BACK_WITHIN_S,
            )
        if (thawed := fault.detail.get("thawed")) is not None:
            old = [op for op in history.ops if op.node == fault.node and op.role is Role.PRIMARY
                   and op.outcome is Outcome.OK and thawed <= op.done and op.at <= fault.until]  # fmt: skip
            yield Finding(f"thawed old leader {fault.node}: answered {len(old)} as the primary", not old, True)
    reads = [op for op in history.ops if op.request in READS and _counts(op)]
    share = sum(op.outcome is Outcome.OK for op in reads) / max(1, len(reads))
    yield Finding(
        f"reads answered, with tokens that a replica may answer: {share:.3%} of {len(reads)}", share >= _ANSWERED
    )


def _counts(op: Op) -> bool:
    """Tell whether a read brought a token that a replica may answer, and its client waited for the answer.

    With a floor that is not known, only a primary may.
    """
    given_up = op.outcome is Outcome.UNKNOWN and op.status is None and (op.error or "").startswith(_GIVEN_UP)
    return op.tokens and not given_up and str(Lsn.UNKNOWN) not in (op.sent or "")
