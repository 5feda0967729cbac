"""An API with its inspector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.support.inspected import QUICK, inspecting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.comparison import ComparisonRouter
    from rocket.lab.inspector.inspector import Limits
    from rocket.routing.observer import Observer
    from tests.support.inspected import Inspected


@pytest.fixture
def limits() -> Limits:
    """The times and limits of `inspected`; a test sets others by parametrizing it."""
    return QUICK


@pytest_asyncio.fixture
async def inspected(
    router: ComparisonRouter,
    observer: Observer,
    cluster: LocalCluster,
    aiohttp_client: AiohttpClient,
    limits: Limits,
) -> AsyncIterator[Inspected]:
    """An API on the cluster of the tests, which takes commands; its observer has run once."""
    await observer.run_once()
    async with inspecting(router, cluster, aiohttp_client, limits=limits) as inspected:
        yield inspected
