"""A torture run on a cluster that Patroni runs: failovers, one after the other, under traffic."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import random
import time
from itertools import cycle, islice
from typing import TYPE_CHECKING

from rocket.lab import app
from rocket.lab.checker.history import PARTITION, End, Fault, Healed, HistoryWriter, Run
from rocket.lab.patroni.cluster import PatroniSettings, patroni_cluster
from rocket.lab.settings import Settings
from rocket.lab.shutdown import ShutdownStack, background, shutdown_on_signals
from rocket.lab.torture import clients, patroni_faults
from rocket.lab.torture.partition import DETOURS, Links
from rocket.lab.torture.patroni_faults import Runner
from rocket.lab.torture.run import CLIENT_PROCESSES, Traces
from rocket.lab.torture.workload import Job
from rocket.schema import schema_sql

if TYPE_CHECKING:
    import contextlib

    from rocket.lab.shutdown import Shutdown
    from rocket.lab.torture.clients import Clients
    from rocket.lab.torture.settings import TortureSettings

_BREATH_S = 3.0
"""All is well for so long between two failovers."""

_WALL = "_wall_s"
"""How the name of a detail ends that is a moment by the wall clock."""

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
        with shutdown_on_signals() as ending:
            async with ShutdownStack(ending) as stack:
                stage, running = await _start(settings, zero, traces, ending, stack)
                await running.at_work()
                for number, name in enumerate(planned, start=1):
                    await asyncio.sleep(_BREATH_S)
                    _log.info("%6.1f s  %d of %d: %s", time.monotonic() - zero, number, len(planned), name)
                    history.add(await _fault(name, stage, zero))
                history.add(Healed(at=round(time.monotonic() - zero, 6)))
                await asyncio.sleep(settings.calm_s)
                finished = True
        leaked = tuple(await traces.left())
        for what in leaked:
            _log.error("left behind: %s", what)
        if finished:
            history.add(End(at=round(time.monotonic() - zero, 6), leaked=leaked))


def _planned(settings: TortureSettings) -> list[str]:
    """Return which faults there will be: all kinds in turn, in an order that the seed decides."""
    names = random.Random(settings.seed).sample(settings.faults, len(settings.faults))  # noqa: S311 - to be repeated
    return list(islice(cycle(names), settings.failovers))


async def _fault(name: str, stage: Runner, zero: float) -> Fault:
    at = time.monotonic()
    wall_s = time.time() - (at - zero)
    hit, detail = await patroni_faults.bring_about(name, stage)
    promoted = [
        {"leader": one["leader"], "at": round(one["wall_s"] - wall_s, 3), "fork": one["fork"]}
        for one in detail["promoted"]
    ]
    moments = {
        what.removesuffix(_WALL): round(moment - wall_s, 3)
        for what, moment in detail.items()
        if what.endswith(_WALL)
    }
    return Fault(
        name=name,
        node=hit.name,
        at=round(at - zero, 6),
        until=round(time.monotonic() - zero, 6),
        detail={"promoted": promoted, "leader": detail["leader"], **moments},
    )


async def _start(
    settings: TortureSettings, zero: float, traces: Traces, ending: Shutdown, stack: contextlib.AsyncExitStack
) -> tuple[Runner, Clients]:
    """Bring up cluster, API and clients; `stack` takes them down."""
    links = Links()
    cut = PARTITION in settings.faults
    described = PatroniSettings(
        port=0,
        postgres_bin=settings.postgres_bin,
        database=app.DATABASE,
        schema=schema_sql(),
        proxy_hosts=DETOURS if cut else None,
    )
    made = patroni_cluster(described, links.around) if cut else patroni_cluster(described)
    cluster = await stack.enter_async_context(made)
    traces.run_dir = cluster.password_file.parent
    ending.on_force.append(cluster.kill_all)
    await stack.enter_async_context(background(cluster.supervise(), "supervisor"))
    url = await app.attached(
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
    return Runner(cluster, links), running


def _orders(settings: TortureSettings, url: str, zero: float) -> list[Job]:
    return [
        Job(
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
