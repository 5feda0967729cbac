"""How many connections clients may have, and who has to go when there are too many."""

from __future__ import annotations

import contextlib
import heapq
import resource
import socket
from typing import TYPE_CHECKING

from aiohttp import web

from rocket.lab.api.limits import ClientGone

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

MOST_CONNECTIONS = 10_000
"""Each takes about 5 KB as long as it is idle."""
_RESERVED = 600
"""Descriptors for everything else: mostly Postgres, of whose nodes there may be 31 with 11 connections each."""
_UNSENT_BYTES = 16 * 1024
"""How much of its answers a connection may leave unread before nothing more is read from it."""
_UNREAD_S = 10
"""For how long a client may read nothing of what was sent to it."""


def room() -> int:
    """Return how many connections there may be; the process's limit on descriptors is raised if it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _RESERVED
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # a system may have bounds that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return min(MOST_CONNECTIONS, max(soft - _RESERVED, soft // 2))


def end_unread(listening: socket.socket) -> None:
    """Have the system end connections, also closed ones, whose clients take nothing of what was sent to them."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; those that are accepted inherit it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_S * 1000)


class Protocol(web.RequestHandler):
    """One connection of a client."""

    __slots__ = ("manners",)

    def __init__(self, *arguments: object, **settings: object) -> None:
        super().__init__(*arguments, **settings)  # type: ignore[arg-type]
        self.manners = ClientGone()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin it."""
        transport.set_write_buffer_limits(high=_UNSENT_BYTES)  # type: ignore[attr-defined]
        super().connection_made(transport)

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request, or for its client to read an answer."""
        return self._waiter is not None or self.writing_paused

    @property
    def used_at(self) -> float:
        """When it was made, or had its latest answer, in the loop's seconds and plus something."""
        return self._next_keepalive_close_time

    def end(self) -> None:
        """Give it up at once."""
        if self.transport is not None:
            self.transport.abort()


def make_room(connections: Iterable[web.RequestHandler], count: int) -> int:
    """End so many connections that do nothing, those first that have done nothing for longest; return how many."""
    idle = (each for each in connections if isinstance(each, Protocol) and each.is_idle)
    ended = heapq.nsmallest(count, idle, key=lambda each: each.used_at)
    for each in ended:
        each.end()
    return len(ended)
