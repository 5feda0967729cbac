"""Puts the parts together: cluster, API, observer and simulator as one program."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from rocket import Board, Observer, Policy, Router, Routing
from rocket.api.app import build_app, serve
from rocket.api.users import UserFloors
from rocket.ending import Ending, Unwinding, background, ended_by_signals
from rocket.errors import InvalidSetting, PortInUse
from rocket.postgres import control, directories, server_logs
from rocket.postgres.cluster import ClusterSettings, LocalCluster, local_cluster
from rocket.postgres.supervisor import supervise
from rocket.simulator import Simulator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rocket.config import Settings

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


async def run_all(settings: Settings, parts: Parts) -> int:
    """Run the parts until a signal, `duration`, or the failure of one of them; return the exit code.

    Raise `SetupError` where the machine does not allow it, and whatever a part died of.
    """
    if not any((parts.cluster, parts.api, parts.observer, parts.simulator)):
        raise InvalidSetting("there is nothing left to run")
    simulator = None
    with ended_by_signals() as ending:
        async with Unwinding(ending) as stack:
            began = time.monotonic()
            # Bound before anything is started: a port in use is known at once.
            listening = stack.enter_context(_bound(settings)) if parts.api else None
            url = _url(settings, listening)
            if parts.cluster or parts.api or parts.observer:
                addresses = await _addresses(settings, parts, ending, stack)
                await _serve_and_observe(settings, parts, addresses, listening, stack)
            if listening is not None:
                _log.info("ready after %.2f s: %s (routing: %s)", time.monotonic() - began, url, settings.routing)
            if parts.simulator:
                simulator = Simulator(url, rate=settings.simulator_rate)
                await stack.enter_async_context(background(simulator.run(), "simulator"))
            await _until_the_end(settings, ending)
    if simulator is None:
        return OK
    for line in simulator.tally.lines():
        logging.getLogger("rocket.simulator").info("%s", line)
    return STALE if simulator.tally.stale else OK


async def run_cluster(settings: Settings) -> int:
    """Run the cluster alone until a signal or `duration`; return the exit code."""
    with ended_by_signals() as ending:
        async with Unwinding(ending) as stack:
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


async def whole_system(
    settings: Settings, ending: Ending, stack: contextlib.AsyncExitStack
) -> tuple[LocalCluster, str]:
    """Bring up cluster, API and observer, for `stack` to take down; return the cluster and the API's URL."""
    listening = stack.enter_context(_bound(settings))
    cluster = await _cluster(settings, ending, stack)
    addresses = Addresses({name: node.dsn(DATABASE) for name, node in cluster.nodes.items()})
    await _serve_and_observe(settings, Parts(), addresses, listening, stack)
    return cluster, _url(settings, listening)


async def _serve_and_observe(
    settings: Settings,
    parts: Parts,
    addresses: Addresses,
    listening: socket.socket | None,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Begin what needs the database; the end comes in reverse: server, observer, pools."""
    board = Board()
    observer = Observer(
        addresses.nodes, board, interval_s=settings.observer_interval, roles_only=not parts.observer
    )
    router = await stack.enter_async_context(
        await Router.open(
            addresses.nodes,
            UserFloors(),
            board,
            policy=Policy(
                lease_s=settings.lease,
                max_lag_bytes=settings.max_lag.bytes,
                max_lag_s=settings.max_lag.seconds,
                max_wait_s=settings.max_wait,
                primary_lease_s=settings.primary_lease,
            ),
            waiting=observer.waiting,
            routing=Routing(settings.routing),
        )
    )
    if not parts.observer:
        _log.warning("without an observer no replica is known: every never-stale read goes to the primary")
    stack.callback(observer.close)
    await observer.run_once()  # so that the first reads find a board
    await stack.enter_async_context(background(observer.run(), "observer"))
    if listening is not None:
        app = build_app(router, allowed_hosts=[settings.host, *settings.allowed_hosts.split(",")])
        await stack.enter_async_context(serve(app, listening))


async def _until_the_end(settings: Settings, ending: Ending) -> None:
    if settings.duration is not None:
        await asyncio.sleep(settings.duration)
        ending.ask(f"{settings.duration:g} s are over")
    await asyncio.Event().wait()  # the end comes as a cancellation


async def _addresses(
    settings: Settings, parts: Parts, ending: Ending, stack: contextlib.AsyncExitStack
) -> Addresses:
    """Start the cluster, or find the one that is running."""
    if parts.cluster:
        cluster = await _cluster(settings, ending, stack)
        return Addresses({name: node.dsn(DATABASE) for name, node in cluster.nodes.items()})
    run_dir = control.find(settings.data_dir, settings.port_asked_for)
    return Addresses(**await control.ask(run_dir, "addresses"))


async def _cluster(settings: Settings, ending: Ending, stack: contextlib.AsyncExitStack) -> LocalCluster:
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
    ending.on_hurry.append(cluster.hurry)
    await stack.enter_async_context(background(supervise(cluster), "supervisor"))
    await stack.enter_async_context(control.listening(cluster, lambda: ending.ask("down was asked for")))
    if settings.server_logs:
        await stack.enter_async_context(background(server_logs.forward(cluster), "server logs"))
    return cluster


@contextlib.contextmanager
def _bound(settings: Settings) -> Iterator[socket.socket]:
    """Hold the API's address; nobody can connect until it listens."""
    where = f"{settings.host}, port {settings.api_port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.api_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InvalidSetting(f"cannot listen on {where}: {error}") from None
    with socket.socket(family, kind) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
            listening.listen(0)  # a second bind would go unnoticed without
        except OSError as error:
            who = directories.port_holder(settings.api_port) if error.errno == errno.EADDRINUSE else ""
            raise PortInUse(f"cannot listen on {where}: {error.strerror}{who}") from None
        yield listening


def _url(settings: Settings, listening: socket.socket | None) -> str:
    port = settings.api_port if listening is None else listening.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104 - no bind
    return f"http://[{host}]:{port}" if ":" in host and "[" not in host else f"http://{host}:{port}"


def schema_sql() -> str:
    """Return the text of `schema.sql`: beside the package in a checkout, inside it once installed."""
    beside = Path(__file__).parent.parent / "schema.sql"
    if beside.is_file():
        return beside.read_text()
    return resources.files("rocket").joinpath("schema.sql").read_text()
