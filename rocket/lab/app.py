"""The whole system as one program: cluster, API, observer and simulator."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.cluster import control
from rocket.cluster.cluster import ClusterSettings, LocalCluster
from rocket.cluster.supervisor import forward_logs, local_cluster, supervise
from rocket.consistency import Freshness
from rocket.errors import InvalidSetting
from rocket.lab.serving import check_usable, inspector_off, listeners, patroni_client, serving, url_of
from rocket.lab.settings import flag
from rocket.lab.shutdown import Shutdown, ShutdownStack, background, shutdown_on_signals
from rocket.schema import schema_sql
from rocket.topology import nodes_file
from rocket.topology.patroni import Topology

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from rocket.lab.settings import Settings
    from rocket.lab.simulator import Simulator
    from rocket.lab.workers import Workers

DATABASE = "rocket-rides-scalable"
OK, STALE = 0, 1
"""Exit codes of a run that was not cut short by a failure: without stale reads, or with some."""

_log = logging.getLogger("rocket.run")


@dataclass(frozen=True, slots=True)
class Parts:
    """Which parts of the system run in this program."""

    cluster: bool = True
    api: bool = True
    observer: bool = True
    simulator: bool = True


async def run_all(settings: Settings, parts: Parts) -> int:
    """Run the parts until a signal, `duration`, or the failure of one of them; return the exit code.

    Raise `SetupError` where the machine does not allow it, and whatever error ended a part.
    """
    if not any((parts.cluster, parts.api, parts.observer, parts.simulator)):
        raise InvalidSetting("there is nothing left to run")
    simulator: Simulator | None = None
    with shutdown_on_signals() as shutdown:
        async with ShutdownStack(shutdown) as stack:
            began = time.monotonic()
            held = stack.enter_context(listeners(settings)) if parts.api else []
            url = url_of(settings, held)
            api = _api(url, held)
            if parts.simulator:
                from rocket.lab.simulator import Simulator  # noqa: PLC0415 - it imports aiohttp, see `_import_http`

                simulator = Simulator(
                    url,
                    rate=settings.simulator_rate,
                    reconnect=len(held) > 1,
                    freshness=Freshness.parse(settings.freshness),
                )
            _check_parts(settings, parts)
            if parts.cluster or parts.api or parts.observer:
                nodes, cluster = await _nodes(settings, parts, shutdown, stack, api)
                _warn(settings, observe=parts.observer)
                await stack.enter_async_context(
                    _serving(
                        settings, nodes, held, shutdown,
                        cluster=cluster, simulator=simulator, observe=parts.observer,
                    )
                )  # fmt: skip
            if held:
                workers = f", {len(held)} workers" if len(held) > 1 else ""
                _log.info(
                    "ready after %.2f s: %s (routing: %s%s)",
                    time.monotonic() - began, url, settings.routing, workers,
                )  # fmt: skip
                _log.info("inspector: %s", inspector_off(settings) or f"{url}/inspector")
            if simulator is not None:
                await stack.enter_async_context(background(simulator.run(), "simulator"))
            await _until_asked_to_end(settings, shutdown)
    if simulator is None:
        return OK
    for line in simulator.tally.lines():
        logging.getLogger("rocket.simulator").info("%s", line)
    return STALE if simulator.tally.stale else OK


def _import_http() -> None:
    """Import what is not needed before there is a cluster, while the cluster starts."""
    with contextlib.suppress(Exception):  # the import that needs it raises it again
        import rocket.lab.api.app  # noqa: PLC0415
        import rocket.lab.inspector.inspector  # noqa: PLC0415
        import rocket.lab.simulator  # noqa: PLC0415, F401


async def run_cluster(settings: Settings) -> int:
    """Run the cluster alone until a signal or `duration`; return the exit code."""
    with shutdown_on_signals() as shutdown:
        async with ShutdownStack(shutdown) as stack:
            cluster = await _cluster(settings, shutdown, stack)
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
            await _until_asked_to_end(settings, shutdown)
    return OK


async def run_patroni(settings: Settings) -> int:
    """Run a cluster of Patroni's alone until a signal or `duration`; return the exit code."""
    from rocket.lab.patroni.cluster import (  # noqa: PLC0415 - imports aiohttp, which this command alone needs
        MEMBERS,
        PatroniSettings,
        patroni_cluster,
    )

    if settings.data_dir is not None:
        raise InvalidSetting("a cluster of Patroni's is not kept: leave out --data-dir")
    asked_for = PatroniSettings(
        members=settings.replicas + 1 if "replicas" in settings.given else MEMBERS,
        port=settings.postgres_port,
        postgres_bin=settings.postgres_bin,
        database=DATABASE,
        schema=schema_sql(),
    )
    with shutdown_on_signals() as shutdown:
        async with ShutdownStack(shutdown) as stack:
            cluster = await stack.enter_async_context(patroni_cluster(asked_for))
            shutdown.on_force.append(cluster.kill_all)
            await stack.enter_async_context(background(cluster.supervise(), "supervisor"))
            for line in cluster.how_to_use():
                _log.info("%s", line)
            await _until_asked_to_end(settings, shutdown)
    return OK


async def whole_system(
    settings: Settings,
    shutdown: Shutdown,
    stack: contextlib.AsyncExitStack,
    observers: int = 0,
    addresses: Callable[[LocalCluster], Awaitable[Mapping[str, str]]] | None = None,
) -> tuple[LocalCluster, str, Workers | None]:
    """Start cluster, API and observer, for `stack` to take down; return the cluster and the API's URL.

    The third is the API's workers, if it has several; among them are `observers` more, which only observe. They
    use the servers' own addresses, or those that `addresses` returns.
    """
    held = stack.enter_context(listeners(settings))
    url = url_of(settings, held)
    cluster = await _cluster(settings, shutdown, stack, _api(url, held))
    nodes = _dsns(cluster) if addresses is None else await addresses(cluster)
    serve = _serving(settings, nodes, held, shutdown, cluster=cluster, observers=observers)
    return cluster, url, await stack.enter_async_context(serve)


async def attached(settings: Settings, shutdown: Shutdown, stack: contextlib.AsyncExitStack) -> str:
    """Start API and observer on an existing cluster, for `stack` to take down; return the API's URL."""
    held = stack.enter_context(listeners(settings))
    nodes = await nodes_of(settings)
    if nodes is None:
        raise InvalidSetting("no cluster is named")
    await stack.enter_async_context(_serving(settings, nodes, held, shutdown))
    return url_of(settings, held)


def _api(url: str, held: Sequence[socket.socket]) -> Mapping[str, object] | None:
    """Return what the control socket shows of the API, if this program serves one."""
    return {"url": url, "workers": len(held)} if held else None


def _dsns(cluster: LocalCluster) -> dict[str, str]:
    return {name: node.dsn(DATABASE) for name, node in cluster.nodes.items()}


def _warn(settings: Settings, *, observe: bool) -> None:
    """Log what makes the routing useless, although it is not wrong."""
    if not observe:
        _log.warning("without an observer no replica is known: every never-stale read goes to the primary")
    two_intervals_s = 2 * settings.observer_interval
    leases = {flag(name): getattr(settings, name) for name in ("lease", "primary_lease")}
    if too_short := [f"{name} {lease_s:g}s" for name, lease_s in leases.items() if lease_s < two_intervals_s]:
        _log.warning(
            "%s: shorter than two observer intervals (%gs), and one status may come late: now and then, reads and "
            "writes will find no usable node",
            ", ".join(too_short), two_intervals_s,
        )  # fmt: skip


def _serving(
    settings: Settings,
    nodes: Mapping[str, str],
    held: Sequence[socket.socket],
    shutdown: Shutdown,
    *,
    cluster: LocalCluster | None = None,
    simulator: Simulator | None = None,
    observe: bool = True,
    observers: int = 0,
) -> contextlib.AbstractAsyncContextManager[Workers | None]:
    """Observe, route and serve: in this process or, with several listeners, in one process for each."""
    if len(held) > 1:
        from rocket.lab.workers import working  # noqa: PLC0415 - most runs have one process

        return working(settings, nodes, held, shutdown, observe=observe, observers=observers)
    targets = None
    if inspector_off(settings) is None:
        from rocket.lab.inspector.controls import Targets  # noqa: PLC0415 - with the rest of what serves

        targets = Targets(url_of(settings, held), cluster, simulator, settings.inspector_token or None)
    return serving(settings, nodes, held[0] if held else None, shutdown, observe=observe, targets=targets)


async def _until_asked_to_end(settings: Settings, shutdown: Shutdown) -> None:
    if settings.duration is not None:
        await asyncio.sleep(settings.duration)
        shutdown.ask(f"{settings.duration:g} s are over")
    await asyncio.Event().wait()  # until it is cancelled


async def _nodes(
    settings: Settings,
    parts: Parts,
    shutdown: Shutdown,
    stack: contextlib.AsyncExitStack,
    api: Mapping[str, object] | None,
) -> tuple[Mapping[str, str], LocalCluster | None]:
    """Start the cluster, or find the one that runs; return the DSNs of its nodes, and it if it is our own."""
    if parts.cluster:
        # An import of the same module elsewhere waits until this one is done.
        threading.Thread(target=_import_http, name="imports").start()
        cluster = await _cluster(settings, shutdown, stack, api)
        return _dsns(cluster), cluster
    given = await nodes_of(settings)
    if given is None:
        run_dir = control.find(settings.data_dir, settings.port_asked_for)
        return (await control.ask(run_dir, "addresses"))["nodes"], None
    if given:
        await check_usable(given)
        _log.info("attached to %s", ", ".join(given))
    return given, None


async def nodes_of(settings: Settings) -> Mapping[str, str] | None:
    """Return the DSNs of an existing cluster, if one is named; raise `InvalidSetting`.

    They may be empty at first, where Patroni tells them and does not answer yet.
    """
    if settings.patroni:
        if settings.nodes or settings.nodes_file:
            raise InvalidSetting("the nodes are given twice: by --patroni, and by --primary or --nodes-file")
        async with patroni_client(settings) as client:
            found = await Topology(client, settings.patroni_dsn).find()
            return {name: node.dsn for name, node in found.items()}
    return settings.nodes if settings.nodes_file is None else nodes_file.read_nodes(settings.nodes_file)


def _check_parts(settings: Settings, parts: Parts) -> None:
    """Raise `InvalidSetting` where an existing cluster is named, and one of our own is asked for."""
    if parts.cluster and (settings.nodes or settings.nodes_file or settings.patroni):
        raise InvalidSetting(
            "an existing cluster is named (--primary, --nodes-file or --patroni, or the environment): "
            "give --no-cluster to use it"
        )


async def _cluster(
    settings: Settings,
    shutdown: Shutdown,
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
    shutdown.on_force.append(cluster.force_stop)
    await stack.enter_async_context(background(supervise(cluster), "supervisor"))
    listening = control.listening(cluster, lambda: shutdown.ask("down was asked for"), api=api)
    await stack.enter_async_context(listening)
    if settings.server_logs:
        await stack.enter_async_context(background(forward_logs(cluster), "server logs"))
    return cluster
