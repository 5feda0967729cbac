"""One process of the API: its address, and what it does to observe, route and serve."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import TYPE_CHECKING, Any

from rocket import Policy
from rocket.cluster import directories
from rocket.cluster.errors import PortInUse
from rocket.errors import InvalidSetting
from rocket.lab.comparison import ComparisonRouter, Routing
from rocket.lab.shutdown import background
from rocket.topology import nodes_file
from rocket.topology.patroni import Topology

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from rocket.dsn import Node
    from rocket.lab.inspector.controls import Targets
    from rocket.lab.settings import Settings
    from rocket.lab.shutdown import Shutdown
    from rocket.topology.patroni_rest import RestClient

# --- the address ---


@contextlib.contextmanager
def listeners(settings: Settings) -> Iterator[list[socket.socket]]:
    """Bind and listen at the API's address, with a socket for each worker, before anything else is started.

    A client that connects waits until a worker accepts. Raise `InvalidSetting` for an address that is not usable,
    and `PortInUse`.
    """
    where = f"{settings.host}, port {settings.api_port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.api_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InvalidSetting(f"cannot listen on {where}: {error}") from None
    if settings.api_workers > 1 and not hasattr(socket, "SO_REUSEPORT"):
        raise InvalidSetting(f"--api-workers {settings.api_workers} needs SO_REUSEPORT, unknown to this system")
    with contextlib.ExitStack() as stack:
        try:
            exclusive = stack.enter_context(_listener(family, kind, address))
            if settings.api_workers == 1:
                held = [exclusive]
            else:
                # A socket that shares its port does not notice other programs that share it too. So the port was
                # taken exclusively first: that fails beside any listener, also between two programs that start.
                address = exclusive.getsockname()
                exclusive.close()
                held = [
                    stack.enter_context(_listener(family, kind, address, shared=True))
                    for _ in range(settings.api_workers)
                ]
        except OSError as error:
            holder = ""
            if error.errno == errno.EADDRINUSE:
                holder = f"{directories.port_holder(settings.api_port)}; --api-port 0 takes any free one"
            raise PortInUse(f"cannot listen on {where}: {error.strerror}{holder}") from None
        yield held


def _listener(
    family: socket.AddressFamily, kind: socket.SocketKind, address: Any, *, shared: bool = False
) -> socket.socket:
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(0)  # a second bind would go unnoticed without
    except OSError:
        listener.close()
        raise
    return listener


def url_of(settings: Settings, held: Sequence[socket.socket]) -> str:
    """Return the API's URL: that of these listeners or, without any, the one in the settings."""
    return settings.url(held[0].getsockname()[1] if held else settings.api_port)


# --- what a process does ---

_TABLES = {
    **nodes_file.ROCKET_TABLES,
    "replica_statuses": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "users": ("SELECT", "INSERT", "UPDATE"),
    "rides": ("SELECT", "INSERT"),
}


async def check_usable(nodes: Mapping[str, str | Node]) -> None:
    """Raise `InvalidSetting` for nodes that cannot serve the demonstration: see `nodes_file.check_usable`."""
    await nodes_file.check_usable(nodes, tables=_TABLES, command="python -m rocket schema --demo")


def inspector_off(settings: Settings) -> str | None:
    """Return why there is no inspector; None if there is one."""
    if settings.no_inspector:
        return "The inspector is off (--no-inspector)."
    if settings.api_workers > 1:
        return "The inspector is off: with --api-workers, each process sees its own requests only."
    return None


@contextlib.asynccontextmanager
async def serving(
    settings: Settings,
    nodes: Mapping[str, str],
    listener: socket.socket | None,
    shutdown: Shutdown,
    *,
    observe: bool = True,
    targets: Targets | None = None,
) -> AsyncIterator[None]:
    """Serve for as long as the context lasts, once everything is ready; without a listener only observe.

    `nodes` are DSNs by name, whatever the nodes' roles are. Without `observe` only roles are observed. `targets`
    are the inspector's; without them there is no inspector. At SIGHUP a file of nodes is read again. Everything
    is closed in reverse: server, observer, pools.
    """
    # To import aiohttp takes as long as to start a cluster: `run_all` does both at the same time.
    from rocket.lab.api.app import build_app, leave_out, serve  # noqa: PLC0415

    async with contextlib.AsyncExitStack() as stack:
        topology = None
        if settings.patroni:
            client = await stack.enter_async_context(patroni_client(settings))
            topology = Topology(client, settings.patroni_dsn, nodes)
        router = await stack.enter_async_context(
            await ComparisonRouter.open(
                nodes,
                policy=Policy(
                    lease_s=settings.lease,
                    max_lag_bytes=settings.max_lag.bytes,
                    max_lag_s=settings.max_lag.seconds,
                    max_wait_s=settings.max_wait,
                    primary_lease_s=settings.primary_lease,
                ),
                observe=observe,
                observer_interval_s=settings.observer_interval,
                record_statuses=True,
                may_be_primary=None if topology is None else topology.may_be_primary,
            )
        )
        await router.switch(Routing(settings.routing))
        await stack.enter_async_context(background(router.observing(), "observer"))
        inspector = None
        if targets is not None:
            from rocket.lab.inspector.inspector import Inspector  # noqa: PLC0415 - as above

            inspector = Inspector(router, targets, tuple(nodes), settings.observer_interval)
        if topology is not None:
            await topology.update(router)  # before the first read: a replica that takes no reads gets none
            await stack.enter_async_context(background(topology.follow(router), "topology"))
        if settings.nodes_file is not None:
            reread = asyncio.Event()
            shutdown.on_hangup.append(reread.set)
            following = nodes_file.follow(settings.nodes_file, nodes, router, reread, check=check_usable)
            await stack.enter_async_context(background(following, "nodes file"))
        if listener is not None:
            app = build_app(
                router,
                allowed_hosts=(settings.host, *settings.allowed_hosts.split(",")),
                recorder=None if inspector is None else inspector.event_log.recorder,
                request_ids=settings.log_format == "json",
            )
            if inspector is not None:
                await stack.enter_async_context(inspector.serving(app))
            else:
                leave_out(app, "/inspector", inspector_off(settings) or "The inspector is off.")
            await stack.enter_async_context(serve(app, listener))
        yield


def patroni_client(settings: Settings) -> RestClient:
    """Return the client that asks Patroni for the nodes."""
    from rocket.topology.patroni_rest import RestClient, Tls  # noqa: PLC0415 - it imports aiohttp

    return RestClient(settings.patroni, Tls(settings.patroni_ca, settings.patroni_cert))
