"""Puts the parts together: cluster, API, observer and simulator as one program."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket import Policy, Routing
from rocket.cluster import control
from rocket.cluster.cluster import ClusterSettings, LocalCluster
from rocket.cluster.supervisor import forward_logs, local_cluster, supervise
from rocket.errors import InvalidSetting
from rocket.lab.listeners import listeners, url_of
from rocket.lab.serving import Service, serving
from rocket.lab.settings import flag
from rocket.lab.shutdown import Shutdown, ShutdownStack, background, shutdown_on_signals
from rocket.lab.workers.processes import working
from rocket.schema import schema_sql
from rocket.topology import nodes_file

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rocket.lab.inspector.targets import Targets
    from rocket.lab.settings import Settings
    from rocket.lab.simulator import Simulator
    from rocket.lab.workers.processes import Workers

DATABASE = "rocket-rides-scalable"
OK, STALE = 0, 1
"""Exit codes of a run that came to its end: as it should, or with stale reads seen."""

_log = logging.getLogger("rocket.run")


@dataclass(frozen=True, slots=True)
class Parts:
    """Which parts of the system run in this program."""

    cluster: bool = True
    api: bool = True
    observer: bool = True
    simulator: bool = True


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the nodes are, as DSNs."""

    nodes: Mapping[str, str]
    """By name, whatever their roles are."""
    cluster: LocalCluster | None = None
    """The cluster, if it is this program's own."""


async def run_all(settings: Settings, parts: Parts) -> int:
    """Run the parts until a signal, `duration`, or the failure of one of them; return the exit code.

    Raise `SetupError` where the machine does not allow it, and whatever a part died of.
    """
    if not any((parts.cluster, parts.api, parts.observer, parts.simulator)):
        raise InvalidSetting("there is nothing left to run")
    simulator: Simulator | None = None
    with shutdown_on_signals() as ending:
        async with ShutdownStack(ending) as stack:
            began = time.monotonic()
            # Before anything is started: a port in use is known at once.
            held = stack.enter_context(listeners(settings)) if parts.api else []
            url = url_of(settings, held)
            api = _api(url, held)
            if parts.simulator:
                from rocket.lab.simulator import Simulator  # noqa: PLC0415 - as in rocket.lab.serving

                simulator = Simulator(url, rate=settings.simulator_rate, reconnect=len(held) > 1)
            _must_agree(settings, parts)
            if parts.cluster or parts.api or parts.observer:
                addresses = await _addresses(settings, parts, ending, stack, api)
                service = _service(settings, addresses, observe=parts.observer)
                reach = _reach(settings, url, addresses.cluster, simulator)
                await stack.enter_async_context(_served(service, held, settings, ending, reach))
            if held:
                workers = f", {len(held)} workers" if len(held) > 1 else ""
                _log.info(
                    "ready after %.2f s: %s (routing: %s%s)",
                    time.monotonic() - began, url, settings.routing, workers,
                )  # fmt: skip
                _log.info("inspector: %s", f"{url}/inspector" if reach is not None else _no_inspector(settings))
            if simulator is not None:
                await stack.enter_async_context(background(simulator.run(), "simulator"))
            await _until_the_end(settings, ending)
    if simulator is None:
        return OK
    for line in simulator.tally.lines():
        logging.getLogger("rocket.simulator").info("%s", line)
    return STALE if simulator.tally.stale else OK


def _import_http() -> None:
    """Import what is not needed before there is a cluster, in the time that others take to make one."""
    with contextlib.suppress(Exception):  # whoever needs it is told again
        import rocket.lab.api.app  # noqa: PLC0415
        import rocket.lab.inspector.inspector  # noqa: PLC0415
        import rocket.lab.simulator  # noqa: PLC0415, F401


async def run_cluster(settings: Settings) -> int:
    """Run the cluster alone until a signal or `duration`; return the exit code."""
    with shutdown_on_signals() as ending:
        async with ShutdownStack(ending) as stack:
            cluster = await _cluster(settings, ending, stack)
            primary = cluster.primary
            _log.info("connect:  psql -h %s -p %d -U postgres %s", cluster.socket_dir, primary.port, DATABASE)
            _log.info(
                "or by TCP:  PGPASSFILE=%s psql -h 127.0.0.1 -p %d -U postgres %s",
                cluster.password_file, primary.port, DATABASE,
            )  # fmt: skip
            _log.info(
                "replicas on ports %s; Ctrl-C ends it",
                ", ".join(f"{node.port}" for node in cluster.replicas) or "(none)",
            )
            await _until_the_end(settings, ending)
    return OK


async def run_patroni(settings: Settings) -> int:
    """Run a cluster of Patroni's alone until a signal or `duration`; return the exit code."""
    from rocket.lab.patroni.cluster import MEMBERS, PatroniSettings  # noqa: PLC0415 - nobody else needs it
    from rocket.lab.patroni.making import patroni_cluster  # noqa: PLC0415 - the same

    if settings.data_dir is not None:
        raise InvalidSetting("a cluster of Patroni's is not kept: leave out --data-dir")
    asked_for = PatroniSettings(
        members=settings.replicas + 1 if "replicas" in settings.given else MEMBERS,
        port=settings.postgres_port,
        postgres_bin=settings.postgres_bin,
        database=DATABASE,
        schema=schema_sql(),
    )
    with shutdown_on_signals() as ending:
        async with ShutdownStack(ending) as stack:
            cluster = await stack.enter_async_context(patroni_cluster(asked_for))
            ending.on_force.append(cluster.kill_all)
            await stack.enter_async_context(background(cluster.supervise(), "supervisor"))
            for line in cluster.how_to_use():
                _log.info("%s", line)
            await _until_the_end(settings, ending)
    return OK


async def whole_system(
    settings: Settings, ending: Shutdown, stack: contextlib.AsyncExitStack, observers: int = 0
) -> tuple[LocalCluster, str, Workers | None]:
    """Bring up cluster, API and observer, for `stack` to take down; return the cluster and the API's URL.

    Then its workers, if it has several, and among them so many processes more that only observe.
    """
    held = stack.enter_context(listeners(settings))
    url = url_of(settings, held)
    cluster = await _cluster(settings, ending, stack, _api(url, held))
    addresses = Addresses({name: node.dsn(DATABASE) for name, node in cluster.nodes.items()})
    reach = _reach(settings, url, cluster, None)
    service = _service(settings, addresses)
    workers = await stack.enter_async_context(_served(service, held, settings, ending, reach, observers=observers))
    return cluster, url, workers


async def attached(settings: Settings, ending: Shutdown, stack: contextlib.AsyncExitStack) -> str:
    """Bring up API and observer on a cluster that is there, for `stack` to take down; return the API's URL."""
    held = stack.enter_context(listeners(settings))
    url = url_of(settings, held)
    nodes = await nodes_of(settings)
    if nodes is None:
        raise InvalidSetting("no cluster is named")
    reach = _reach(settings, url, None, None)
    await stack.enter_async_context(_served(_service(settings, Addresses(nodes)), held, settings, ending, reach))
    return url


def _api(url: str, held: Sequence[socket.socket]) -> Mapping[str, object] | None:
    """Return what others may know of the API, if this program serves one."""
    return {"url": url, "workers": len(held)} if held else None


def _service(settings: Settings, addresses: Addresses, *, observe: bool = True) -> Service:
    if not observe:
        _log.warning("without an observer no replica is known: every never-stale read goes to the primary")
    looks_s = 2 * settings.observer_interval
    short = {flag(name): getattr(settings, name) for name in ("lease", "primary_lease")}
    if too_short := [f"{name} {lease_s:g}s" for name, lease_s in short.items() if lease_s < looks_s]:
        _log.warning(
            "%s: shorter than two looks of the observer (%gs), of which one may come late: reads and writes will "
            "find nobody fit for a while, again and again",
            ", ".join(too_short), looks_s,
        )  # fmt: skip
    return Service(
        nodes=addresses.nodes,
        nodes_file=_absolute(settings.nodes_file),
        patroni=settings.patroni,
        patroni_dsn=settings.patroni_dsn,
        patroni_ca=_absolute(settings.patroni_ca),
        patroni_cert=_absolute(settings.patroni_cert),
        routing=Routing(settings.routing),
        policy=Policy(
            lease_s=settings.lease,
            max_lag_bytes=settings.max_lag.bytes,
            max_lag_s=settings.max_lag.seconds,
            max_wait_s=settings.max_wait,
            primary_lease_s=settings.primary_lease,
        ),
        observer_interval_s=settings.observer_interval,
        observe=observe,
        allowed_hosts=(settings.host, *settings.allowed_hosts.split(",")),
        request_ids=settings.log_format == "json",
        no_inspector=_no_inspector(settings),
    )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _reach(
    settings: Settings, url: str, cluster: LocalCluster | None, simulator: Simulator | None
) -> Targets | None:
    """Return what the inspector may reach; None if there is to be none."""
    if settings.no_inspector or settings.api_workers > 1:
        return None
    from rocket.lab.inspector.targets import Targets  # noqa: PLC0415 - with the rest of what serves

    return Targets(url, cluster, simulator, settings.inspector_token or None)


def _no_inspector(settings: Settings) -> str:
    if settings.no_inspector:
        return "The inspector is off (--no-inspector)."
    return "The inspector is off: with --api-workers, each process sees its own requests only."


def _served(
    service: Service,
    held: Sequence[socket.socket],
    settings: Settings,
    ending: Shutdown,
    reach: Targets | None,
    *,
    observers: int = 0,
) -> contextlib.AbstractAsyncContextManager[Workers | None]:
    """Do what needs the database: in this process or, behind several listeners, in one for each."""
    if len(held) > 1:
        return working(service, held, settings.log_format, ending, observers)
    return serving(service, held[0] if held else None, ending, reach)


async def _until_the_end(settings: Settings, ending: Shutdown) -> None:
    if settings.duration is not None:
        await asyncio.sleep(settings.duration)
        ending.ask(f"{settings.duration:g} s are over")
    await asyncio.Event().wait()  # the end comes as a cancellation


async def _addresses(
    settings: Settings,
    parts: Parts,
    ending: Shutdown,
    stack: contextlib.AsyncExitStack,
    api: Mapping[str, object] | None,
) -> Addresses:
    """Start the cluster, or find the one that is running."""
    if parts.cluster:
        # Whoever imports the same before it is done waits for it.
        threading.Thread(target=_import_http, name="imports").start()
        cluster = await _cluster(settings, ending, stack, api)
        return Addresses({name: node.dsn(DATABASE) for name, node in cluster.nodes.items()}, cluster)
    given = await nodes_of(settings)
    if given is not None:
        if given:
            await nodes_file.check_usable(given)
            _log.info("attached to %s", ", ".join(given))
        return Addresses(given)
    run_dir = control.find(settings.data_dir, settings.port_asked_for)
    return Addresses(**await control.ask(run_dir, "addresses"))


async def nodes_of(settings: Settings) -> Mapping[str, str] | None:
    """Return the DSNs of a cluster that is there, if one is named; raise `InvalidSetting`.

    There may be none as yet, where Patroni is to tell them and is silent.
    """
    if settings.patroni:
        from rocket.topology import patroni  # noqa: PLC0415 - as in rocket.lab.serving
        from rocket.topology.patroni_tls import Tls  # noqa: PLC0415

        if settings.nodes or settings.nodes_file:
            raise InvalidSetting("the nodes are given twice: by --patroni, and by --primary or --nodes-file")
        tls = Tls(_absolute(settings.patroni_ca), _absolute(settings.patroni_cert))
        return await patroni.find(settings.patroni, settings.patroni_dsn, tls)
    return settings.nodes if settings.nodes_file is None else nodes_file.read_nodes(settings.nodes_file)


def _must_agree(settings: Settings, parts: Parts) -> None:
    """Raise `InvalidSetting` where a cluster that is there is named, and one of our own is asked for."""
    if parts.cluster and (settings.nodes or settings.nodes_file or settings.patroni):
        raise InvalidSetting(
            "a cluster that is there is named (--primary, --nodes-file or --patroni, or the environment): "
            "give --no-cluster to use it"
        )


async def _cluster(
    settings: Settings,
    ending: Shutdown,
    stack: contextlib.AsyncExitStack,
    api: Mapping[str, object] | None = None,
) -> LocalCluster:
    cluster = await stack.enter_async_context(
        local_cluster(
            ClusterSettings(
                replicas=settings.replicas,
                port=settings.postgres_port,
                data_dir=settings.data_dir,
                postgres_bin=settings.postgres_bin,
                database=DATABASE,
                schema=schema_sql(),
            )
        )
    )
    ending.on_force.append(cluster.force_stop)
    await stack.enter_async_context(background(supervise(cluster), "supervisor"))
    await stack.enter_async_context(control.listening(cluster, lambda: ending.ask("down was asked for"), api=api))
    if settings.server_logs:
        await stack.enter_async_context(background(forward_logs(cluster), "server logs"))
    return cluster
