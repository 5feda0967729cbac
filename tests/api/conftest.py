"""The API as a server on a socket of its own, for those who write to it byte by byte."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, TypeAlias

import pytest_asyncio

from rocket.api.app import build_app, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Router

    Door: TypeAlias = tuple[str, int]


@pytest_asyncio.fixture
async def door(router: Router[str]) -> AsyncIterator[Door]:
    """Run a server that also answers to the name Rides.Example, and return its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        async with serve(build_app(router, allowed_hosts=["", "Rides.Example"]), listening):
            yield listening.getsockname()
