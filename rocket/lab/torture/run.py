"""A whole torture run: cluster, links, API, clients and nemesis; then the checker's word on what they recorded."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from rocket.lab import app
from rocket.lab.checker.history import End, Healed, HistoryWriter, Request, Run
from rocket.lab.settings import Settings
from rocket.lab.shutdown import ShutdownStack, background, shutdown_on_signals
from rocket.lab.torture import clients
from rocket.lab.torture.faults import Target
from rocket.lab.torture.nemesis import Nemesis
from rocket.lab.torture.proxy import Proxy, socket_path
from rocket.lab.torture.workload import Job

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.shutdown import Shutdown
    from rocket.lab.torture.settings import TortureSettings

CLIENT_PROCESSES = 2
OBSERVERS = 2
"""Processes that only observe, beside those of an API that has several."""
_PROGRESS_S = 5.0
_LEAK_S = 2.0
"""How long what is ending may take to be gone."""

_log = logging.getLogger("rocket.torture")


class Traces:
    """What a run must not leave behind."""

    def __init__(self) -> None:
        self.url: str | None = None
        self.run_dir: Path | None = None
        self.clients: list[int] = []

    async def left(self) -> list[str]:
        """Return what is left, after a moment for what is ending."""
        deadline = time.monotonic() + _LEAK_S
        while (found := list(self._found())) and time.monotonic() < deadline:  # noqa: ASYNC110 - all kinds of things
            await asyncio.sleep(0.05)
        return found

    def _found(self) -> Iterator[str]:
        yield from (
            f"task {task.get_name()}" for task in asyncio.all_tasks() if task is not asyncio.current_task()
        )
        yield from (f"client process {pid}" for pid in self.clients if psutil.pid_exists(pid))
        yield from (
            f"process {child.pid}" for child in psutil.Process().children() if child.pid not in self.clients
        )
        if self.run_dir is not None:
            if self.run_dir.exists():
                yield f"directory {self.run_dir}"
            for process in psutil.process_iter(["cwd", "name"]):
                if (process.info["cwd"] or "").startswith(f"{self.run_dir}/"):
                    yield f"process {process.pid} ({process.info['name']})"
        if self.url is not None:
            address = urlsplit(self.url)
            with contextlib.suppress(OSError), socket.create_connection((address.hostname, address.port), 0.2):
                yield f"somebody listens on {self.url}"


async def torture(settings: TortureSettings) -> None:
    """Run it and record it; the history of a run that is interrupted lacks its end.

    Raise whatever keeps the system from running.
    """
    zero = time.monotonic()
    traces = Traces()
    run = Run(
        seed=settings.seed,
        duration_s=settings.duration_s,
        routing=settings.routing,
        sessions=settings.sessions,
        faults=settings.faults,
        nodes=("primary", *(f"replica{number}" for number in range(settings.replicas))),
        processes=settings.processes,
        started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )
    with HistoryWriter.create(settings.history, run) as history:
        finished = False
        with shutdown_on_signals() as ending:
            async with ShutdownStack(ending) as stack:
                target = await _start(settings, zero, traces, ending, stack)
                nemesis = Nemesis(target, history, zero)
                await stack.enter_async_context(background(_progress(nemesis, target), "progress"))
                await target.clients.at_work()
                await nemesis.run(settings.schedule, time.monotonic())
                healed_at = time.monotonic() - zero
                history.add(Healed(at=round(healed_at, 6)))
                left_out = f"; {nemesis.left_out} that came too late were left out" if nemesis.left_out else ""
                done = f"the last fault is healed{left_out}" if settings.schedule else "there are no faults"
                _log.info("%6.1f s  %s: %g s of calm", healed_at, done, settings.calm_s)
                await asyncio.sleep(settings.calm_s)
                finished = True
        leaked = tuple(await traces.left())
        for what in leaked:
            _log.error("left behind: %s", what)
        if finished:  # a history without an end is void
            history.add(End(at=round(time.monotonic() - zero, 6), leaked=leaked))


async def _start(
    settings: TortureSettings, zero: float, traces: Traces, ending: Shutdown, stack: contextlib.AsyncExitStack
) -> Target:
    """Bring up everything that faults can hit; `stack` takes it down."""
    several = settings.processes > 1
    cluster, url, workers = await app.whole_system(
        Settings(
            replicas=settings.replicas,
            postgres_port=0,
            api_port=0,
            api_workers=settings.processes,
            routing=settings.routing,
            postgres_bin=settings.postgres_bin,
        ),
        ending,
        stack,
        observers=OBSERVERS if several else 0,
    )
    traces.run_dir, traces.url = cluster.run_dir, url
    if not several:
        _log.info("inspector: %s/inspector", url)
    links = await _links(cluster, stack)
    orders = [
        Job(
            url=url,
            history=str(settings.history),
            zero=zero,
            seed=settings.seed,
            process=number,
            processes=CLIENT_PROCESSES,
            sessions=len(range(number, settings.sessions, CLIENT_PROCESSES)),
            reconnecting=several,
        )
        for number in range(CLIENT_PROCESSES)
    ]
    running = await stack.enter_async_context(clients.running(orders))
    traces.clients = running.pids
    await stack.enter_async_context(background(running.watch(), "clients"))
    return Target(cluster, links, running, list(workers or ()), zero)


async def _links(cluster: LocalCluster, stack: contextlib.AsyncExitStack) -> dict[str, Proxy]:
    """Put a link before every node, since any may come to follow another one, and let the replicas use theirs."""

    def primary_socket() -> Path:
        return socket_path(cluster.socket_dir, cluster.primary.port)

    links = {}
    for port, name in enumerate(cluster.nodes, start=1):
        links[name] = Proxy(socket_path(cluster.socket_dir, port), primary_socket)
        await stack.enter_async_context(links[name].listening())
        cluster.upstream_overrides[name] = port
    for node in cluster.replicas:
        node.reconfigure(cluster.upstream_port(node))
    return links


async def _progress(nemesis: Nemesis, target: Target) -> None:
    """Say every few seconds how far it is."""
    while True:
        await asyncio.sleep(_PROGRESS_S)
        counts = target.clients.counts
        reads, writes = (
            sum(count for what, count in counts.items() if what.split()[0] in requests)
            for requests in ({Request.READ, Request.LIST}, {Request.WRITE})
        )
        _log.info(
            "%6.1f s  %d reads, %d writes; not answered: %d; faults: %s",
            time.monotonic() - target.zero,
            reads,
            writes,
            sum(count for what, count in counts.items() if not what.endswith(" ok")),
            ", ".join(nemesis.under_way) or "none",
        )
