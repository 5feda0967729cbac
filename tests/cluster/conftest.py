"""An open control socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_asyncio

from rocket.cluster import control

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import LocalCluster


@pytest_asyncio.fixture
async def downs(cluster: LocalCluster) -> AsyncIterator[list[str]]:
    """The open control socket; the list grows with each request to end the program."""
    asked: list[str] = []
    async with control.listening(cluster, lambda: asked.append("down")):
        yield asked
