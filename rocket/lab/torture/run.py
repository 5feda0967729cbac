"""The commands `torture` and `check`: one run with clients and faults, recorded in a history, which is judged."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import json
import logging
import random
import socket
import time
from abc import ABC, abstractmethod
from itertools import cycle, islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

import psutil

from rocket.lab import app, logs
from rocket.lab.checker.availability import failover_targets, missed_targets
from rocket.lab.checker.check import Judgement, Verdict, check
from rocket.lab.checker.coverage import NEVER_STALE
from rocket.lab.checker.history import (
    READS,
    End,
    GarbledHistory,
    Healed,
    HistoryWriter,
    Request,
    Run,
    read_history,
)
from rocket.lab.checker.report import as_json, report
from rocket.lab.patroni.cluster import PatroniSettings, patroni_cluster
from rocket.lab.settings import Settings
from rocket.lab.shutdown import ShutdownStack, background, shutdown_on_signals
from rocket.lab.shutdown import run as run_to_its_end
from rocket.lab.torture import clients
from rocket.lab.torture.faults import Target
from rocket.lab.torture.nemesis import Nemesis
from rocket.lab.torture.patroni_faults import PARTITION, PROXY_HOSTS, Links, PatroniNemesis
from rocket.lab.torture.proxy import Proxy, socket_path
from rocket.lab.torture.settings import TortureSettings
from rocket.lab.torture.workload import Job
from rocket.schema import schema_sql

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AsyncExitStack

    import asyncpg

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.checker.availability import Target as FailoverTarget
    from rocket.lab.patroni.cluster import PatroniCluster
    from rocket.lab.shutdown import Shutdown
    from rocket.lab.torture.clients import Clients
    from rocket.lab.workers import Worker

_ONE_LINE_PER_READ = ("rocket.api", "rocket.router")
"""Loggers of which only errors are shown beside torture's own."""
CLIENT_PROCESSES = 2
OBSERVERS = 2
"""Processes that only observe, beside those of an API that has several."""
_PROGRESS_S = 5.0
_LEAK_S = 2.0
"""How long processes and tasks that are ending may take to be gone."""

_log = logging.getLogger("rocket.torture")


async def torture(settings: TortureSettings) -> None:
    """Run it and record it; the history of a run that is interrupted lacks its end.

    Raise any error that keeps the system from running.
    """
    zero = time.monotonic()
    traces = Traces()
    system: System = PatroniSystem(settings) if settings.patroni else LocalSystem(settings)
    run = Run(
        seed=settings.seed,
        duration_s=settings.duration,
        routing=settings.routing,
        sessions=settings.sessions,
        faults=tuple(sorted(set(system.faults))),
        nodes=system.nodes,
        processes=settings.processes,
        library=system.has_library_clients,
        freshness=settings.freshness,
        started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )
    with HistoryWriter.create(settings.history, run) as history:
        finished = False
        with shutdown_on_signals() as shutdown:
            async with ShutdownStack(shutdown) as stack:
                traces.url, traces.run_dir = await system.start(shutdown, stack)
                if settings.processes == 1:
                    _log.info("inspector: %s/inspector", traces.url)
                running = await stack.enter_async_context(
                    clients.running(_jobs(settings, system, traces.url, zero))
                )
                traces.clients = running.pids
                await stack.enter_async_context(background(running.watch(), "clients"))
                nemesis = system.nemesis(running, history, zero)
                await stack.enter_async_context(background(_log_progress(nemesis, running, zero), "progress"))
                await running.have_read()
                outcome = await nemesis.run()
                healed_at = time.monotonic() - zero
                history.add(Healed(at=round(healed_at, 6)))
                _log.info("%6.1f s  %s: %g s of calm", healed_at, outcome, settings.calm)
                await asyncio.sleep(settings.calm)
                finished = True
        leaked = tuple(await traces.left())
        for what in leaked:
            _log.error("left behind: %s", what)
        if finished:  # a history without an end is void
            history.add(End(at=round(time.monotonic() - zero, 6), leaked=leaked))


async def _log_progress(nemesis: AnyNemesis, running: Clients, zero: float) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_S)
        counts = running.counts
        reads, writes = (
            sum(count for what, count in counts.items() if what.split()[0] in requests)
            for requests in (READS, {Request.WRITE})
        )
        _log.info(
            "%6.1f s  %d reads, %d writes; not answered: %d; faults: %s",
            time.monotonic() - zero,
            reads,
            writes,
            sum(count for what, count in counts.items() if not what.endswith(" ok")),
            ", ".join(nemesis.under_way) or "none",
        )


def _jobs(settings: TortureSettings, system: System, url: str, zero: float) -> list[Job]:
    """Return what each client process does."""
    return [
        Job(
            url=url,
            history=str(settings.history),
            zero=zero,
            seed=settings.seed,
            process=number,
            processes=CLIENT_PROCESSES,
            sessions=len(range(number, settings.sessions, CLIENT_PROCESSES)),
            freshness=settings.freshness,
            reconnecting=settings.processes > 1,
            nodes=dict(system.dsns),
            patroni=tuple(system.patroni),
            patroni_dsn=system.patroni_dsn,
        )
        for number in range(CLIENT_PROCESSES)
    ]


# --- what is tortured ---


class System(ABC):
    """A cluster with the API and an observer, and the faults that are injected into it."""

    nodes: tuple[str, ...]
    faults: tuple[str, ...]
    """Names of the faults that will happen."""
    has_library_clients = False
    dsns: Mapping[str, str] = MappingProxyType({})
    """The nodes, for clients that use the library itself."""
    patroni: Sequence[str] = ()
    """The addresses of Patroni's REST APIs, which name the nodes to them."""
    patroni_dsn = ""
    """The DSN of a member, with `{host}` and `{port}` in it."""

    @abstractmethod
    async def start(self, shutdown: Shutdown, stack: AsyncExitStack) -> tuple[str, Path]:
        """Start it, for `stack` to take down; return the API's URL, and the cluster's directory."""

    @abstractmethod
    def nemesis(self, running: Clients, history: HistoryWriter, zero: float) -> AnyNemesis:
        """Return the nemesis that will inject all faults, and record them."""


class AnyNemesis(Protocol):
    """Injects faults."""

    under_way: list[str]
    """The faults that are on, each with the node that it hits."""

    async def run(self) -> str:
        """Inject all faults, and return when all are healed; the result is a phrase for the log."""


class LocalSystem(System):
    """Our own cluster, with proxies before each node, for replicas and clients; its faults follow a schedule."""

    def __init__(self, settings: TortureSettings) -> None:
        self.nodes = ("primary", *(f"replica{number}" for number in range(settings.replicas)))
        self.faults = settings.faults
        self._settings = settings
        self._cluster: LocalCluster
        self._links: dict[str, Proxy] = {}
        self._accesses: dict[str, Proxy] = {}
        self._addresses: dict[str, str] = {}
        self._processes: list[Worker] = []
        self.has_library_clients = settings.routing == NEVER_STALE

    async def start(self, shutdown: Shutdown, stack: AsyncExitStack) -> tuple[str, Path]:
        """Start it, and let the replicas follow through the proxies."""
        self._cluster, url, workers = await app.whole_system(
            Settings(
                replicas=self._settings.replicas,
                postgres_port=0,
                api_port=0,
                api_workers=self._settings.processes,
                routing=self._settings.routing,
                postgres_bin=self._settings.postgres_bin,
            ),
            shutdown,
            stack,
            observers=OBSERVERS if self._settings.processes > 1 else 0,
            addresses=functools.partial(self._start_accesses, stack),
        )
        self._processes = list(workers or ())
        if self.has_library_clients:
            self.dsns = self._addresses
            await _prepare_tenants(await self._cluster.primary.connect(app.DATABASE))
        await self._start_links(stack)
        return url, self._cluster.run_dir

    async def _start_accesses(self, stack: AsyncExitStack, cluster: LocalCluster) -> Mapping[str, str]:
        """Put a proxy between clients and each node; return its addresses."""
        directory = cluster.run_dir / "access"
        directory.mkdir(mode=0o700)
        own = quote(str(cluster.socket_dir), safe="")
        for name, node in cluster.nodes.items():
            server = socket_path(cluster.socket_dir, node.port)
            self._accesses[name] = Proxy(socket_path(directory, node.port), functools.partial(Path, server))
            await stack.enter_async_context(self._accesses[name].listening())
            dsn = node.dsn(app.DATABASE)
            self._addresses[name] = dsn.replace(f"host={own}&", f"host={quote(str(directory), safe='')}&")
        return self._addresses

    async def _start_links(self, stack: AsyncExitStack) -> None:
        """Put a proxy before every node, since any node may come to follow another one."""
        cluster = self._cluster

        def primary_socket() -> Path:
            return socket_path(cluster.socket_dir, cluster.primary.port)

        for port, name in enumerate(cluster.nodes, start=1):
            self._links[name] = Proxy(socket_path(cluster.socket_dir, port), primary_socket)
            await stack.enter_async_context(self._links[name].listening())
            cluster.upstream_overrides[name] = port
        for node in cluster.replicas:
            node.reconfigure(cluster.upstream_port(node))

    def nemesis(self, running: Clients, history: HistoryWriter, zero: float) -> Nemesis:
        """Return the nemesis that carries out the schedule."""
        target = Target(self._cluster, self._links, self._accesses, running, self._processes, zero)
        return Nemesis(target, self._settings.schedule, history)


async def _prepare_tenants(primary: asyncpg.Connection[Any]) -> None:
    """Make what tenants need, over a connection that is not used again."""
    try:
        await primary.execute(clients.TENANTS)
    finally:
        primary.terminate()


class PatroniSystem(System):
    """Three members that Patroni runs; its faults, most of them failovers, follow one another."""

    nodes = tuple(PROXY_HOSTS)

    def __init__(self, settings: TortureSettings) -> None:
        names = random.Random(settings.seed).sample(settings.faults, len(settings.faults))  # noqa: S311 - to be repeated
        self.faults = tuple(islice(cycle(names), settings.failovers))
        self._settings = settings
        self._cluster: PatroniCluster
        self._links = Links()
        self.has_library_clients = settings.routing == NEVER_STALE

    async def start(self, shutdown: Shutdown, stack: AsyncExitStack) -> tuple[str, Path]:
        """Start it, with proxies between the members if one is to be cut off."""
        cut = PARTITION in self._settings.faults
        settings = PatroniSettings(
            port=0,
            postgres_bin=self._settings.postgres_bin,
            database=app.DATABASE,
            schema=schema_sql(),
            proxy_hosts=PROXY_HOSTS if cut else None,
        )
        made = patroni_cluster(settings, self._links.around) if cut else patroni_cluster(settings)
        self._cluster = await stack.enter_async_context(made)
        shutdown.on_force.append(self._cluster.kill_all)
        await stack.enter_async_context(background(self._cluster.supervise(), "supervisor"))
        if self.has_library_clients:
            self.patroni, self.patroni_dsn = self._cluster.urls, self._cluster.dsn_template
            leader = await self._cluster.leader()
            await _prepare_tenants(await leader.connect(app.DATABASE))
        url = await app.attached(
            Settings(
                api_port=0,
                routing=self._settings.routing,
                patroni=tuple(self._cluster.urls),
                patroni_dsn=self._cluster.dsn_template,
            ),
            shutdown,
            stack,
        )
        return url, self._cluster.password_file.parent

    def nemesis(self, running: Clients, history: HistoryWriter, zero: float) -> PatroniNemesis:  # noqa: ARG002
        """Return the nemesis that injects one fault after the other."""
        return PatroniNemesis(self._cluster, self._links, self.faults, history, zero)


# --- what is left of it ---


class Traces:
    """What a run must not leave behind."""

    def __init__(self) -> None:
        self.url: str | None = None
        self.run_dir: Path | None = None
        self.clients: list[int] = []

    async def left(self) -> list[str]:
        """Return what is left, once what is ending has had a moment for it."""
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
                yield f"a server on {self.url}"


# --- the commands ---


def torture_and_judge(given: argparse.Namespace) -> int:
    """Torture as the command line says, and judge the history; return the exit code."""
    settings = TortureSettings.read(given)
    logs.configure("text")
    for name in _ONE_LINE_PER_READ:
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"seed {settings.seed}, history in {settings.history}", flush=True)
    run_to_its_end(torture(settings))
    targets: list[FailoverTarget] = []
    if settings.patroni:
        targets = list(failover_targets(read_history(settings.history)))
        print("\n".join(f"{'    ' if target.met else '  ! '}{target.text}" for target in targets), end="\n\n")
    exit_code = judge(settings.history, as_text=True)
    if exit_code == 0 and any(target.promised and not target.met for target in targets):
        exit_code = Judgement.VIOLATED.exit_code
    missed = missed_targets(targets)
    if exit_code == 0 and not settings.keeps_history and not missed:
        settings.history.unlink()
    else:
        print(f"\nThe history is in {settings.history}; the seed was {settings.seed}.")
    if missed:
        print("", *missed, sep="\n")
    return exit_code


def judge(file: Path, *, as_text: bool) -> int:
    """Judge a history and print the verdict; return the exit code."""
    try:
        verdict = check(read_history(file))
    except GarbledHistory as error:
        verdict = Verdict(Judgement.VOID, reasons=(str(error),))
    print(report(verdict) if as_text else json.dumps(as_json(verdict), indent=2))
    return verdict.judgement.exit_code
