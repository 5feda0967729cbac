"""How a member of a cluster of Patroni's is cut off: by links of its own to etcd, and of the others to it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from rocket.lab.patroni.member import HOST
from rocket.lab.torture.proxy import Mode, TcpProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from rocket.lab.patroni.cluster import PatroniCluster
    from rocket.lab.patroni.member import PatroniNode

DETOURS: Mapping[str, str] = {f"node{number}": f"127.0.0.{10 + number}" for number in range(1, 4)}
"""An address of this machine for each member; Linux has all of 127.0.0.0/8."""


class Links:
    """What is between the members, and between each of them and etcd; clients are not bound to it."""

    def __init__(self) -> None:
        self._links: dict[str, list[TcpProxy]] = {}

    @contextlib.asynccontextmanager
    async def around(self, cluster: PatroniCluster) -> AsyncIterator[None]:
        """Pass everything on for as long as the context lasts, unless a member is cut off."""
        async with contextlib.AsyncExitStack() as stack:
            for node in cluster.nodes.values():
                ports = (cluster.etcd_port, node.port, node.rest_port)
                self._links[node.name] = [TcpProxy(DETOURS[node.name], port, HOST) for port in ports]
                for link in self._links[node.name]:
                    await stack.enter_async_context(link.listening())
            yield

    @contextlib.contextmanager
    def cut(self, node: PatroniNode) -> Iterator[None]:
        """Let nothing through between a member and etcd, nor from the others to it."""
        for link in self._links[node.name]:
            link.turn(Mode.SILENT)
        try:
            yield
        finally:
            for link in self._links[node.name]:
                link.turn(Mode.PASS)
