"""What one process of the API does: observe, route and serve."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rocket.lab.comparison import ComparisonRouter, Routing
from rocket.lab.shutdown import background
from rocket.topology.nodes_file import follow

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Mapping

    from rocket import Policy
    from rocket.lab.inspector.targets import Targets
    from rocket.lab.shutdown import Shutdown


@dataclass(frozen=True, slots=True)
class Service:
    """What a process of the API has to know."""

    nodes: Mapping[str, str] = field(repr=False)
    """DSNs by name, whatever the nodes' roles are; they may hold passwords."""
    routing: Routing
    policy: Policy
    observer_interval_s: float
    observe: bool
    """Whether replicas are observed, or nothing but roles."""
    allowed_hosts: tuple[str, ...]
    request_ids: bool = False
    """Whether each request has an id, and a log line of its own."""
    nodes_file: str | None = None
    """Where the nodes are read from, again and again; None if they stay as they are."""
    patroni: tuple[str, ...] = ()
    """The REST APIs that tell which nodes there are; none if the nodes stay as they are."""
    patroni_dsn: str = ""
    """The template of their DSNs."""
    patroni_ca: str | None = None
    patroni_cert: str | None = None
    """Files, for asking them by TLS."""
    no_inspector: str = "The inspector is off."
    """What is answered where the inspector is not served."""


@contextlib.asynccontextmanager
async def serving(
    service: Service, listener: socket.socket | None, ending: Shutdown, reach: Targets | None = None
) -> AsyncIterator[None]:
    """Serve for as long as the context lasts, once everything is ready; without a listener only observe.

    `reach` is the inspector's; without it there is none. At SIGHUP a file of nodes is read again. The end
    comes in reverse: server, observer, pools.
    """
    # To import aiohttp takes as long as to make a cluster: who has one to make need not wait for that first.
    from rocket.lab.api.app import build_app, leave_out, serve  # noqa: PLC0415
    from rocket.lab.api.users import UserFloors  # noqa: PLC0415

    async with contextlib.AsyncExitStack() as stack:
        topology = None
        if service.patroni:
            from rocket.topology.patroni import Topology  # noqa: PLC0415 - the same
            from rocket.topology.patroni_tls import Tls  # noqa: PLC0415 - the same

            tls = Tls(service.patroni_ca, service.patroni_cert)
            topology = await stack.enter_async_context(
                Topology(service.patroni, service.patroni_dsn, service.nodes, tls)
            )
        router = await stack.enter_async_context(
            await ComparisonRouter.open(
                service.nodes,
                UserFloors(),
                policy=service.policy,
                observe=service.observe,
                observer_interval_s=service.observer_interval_s,
                may_be_primary=None if topology is None else topology.may_be_primary,
            )
        )
        await router.switch(service.routing)
        await stack.enter_async_context(background(router.observing(), "observer"))
        inspector = None
        if reach is not None:
            from rocket.lab.inspector.inspector import Inspector  # noqa: PLC0415 - the same

            inspector = Inspector(router, reach, tuple(service.nodes), service.observer_interval_s)
        if topology is not None:
            topology.attend(router)
            await topology.look()  # so that nobody is read from who takes no reads
        if service.nodes_file is not None:
            at_once = asyncio.Event()
            ending.on_hangup.append(at_once.set)
            following = follow(Path(service.nodes_file), service.nodes, router, at_once)
            await stack.enter_async_context(background(following, "nodes file"))
        if topology is not None:
            await stack.enter_async_context(background(topology.run(), "topology"))
        if listener is not None:
            audience = None if inspector is None else inspector.journal.audience
            app = build_app(
                router,
                allowed_hosts=service.allowed_hosts,
                audience=audience,
                request_ids=service.request_ids,
            )
            if inspector is not None:
                await stack.enter_async_context(inspector.serving(app))
            else:
                leave_out(app, "/inspector", service.no_inspector)
            await stack.enter_async_context(serve(app, listener))
        yield
