"""An API with its inspector, and somebody who looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket.cluster import control
from rocket.lab.api.app import build_app
from rocket.lab.inspector import feed
from rocket.lab.inspector.inspector import Inspector
from rocket.lab.inspector.targets import Targets
from tests.support.inspected import Inspected

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import web
    from aiohttp.test_utils import TestClient
    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.comparison import ComparisonRouter
    from rocket.routing.observer import Observer

    Client = TestClient[web.Request, web.Application]


@pytest.fixture(autouse=True)
def _quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits a second for the figures."""
    monkeypatch.setattr(feed, "_TICK_S", 0.1)


@pytest_asyncio.fixture
async def inspected(
    router: ComparisonRouter, observer: Observer, cluster: LocalCluster, aiohttp_client: AiohttpClient
) -> AsyncIterator[Inspected]:
    """An API on the cluster of the tests, which takes commands; its observer has looked once."""
    inspector = Inspector(router, Targets("", cluster), list(cluster.nodes), 0.5)
    await observer.run_once()
    app = build_app(router, audience=inspector.journal.audience)
    async with control.listening(cluster, lambda: None), inspector.serving(app):
        yield Inspected(await aiohttp_client(app), inspector.journal)
