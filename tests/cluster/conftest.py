"""A cluster on the system's Postgres, and an open control socket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket.cluster import control
from rocket.cluster.cluster import ClusterSettings, LocalCluster
from rocket.cluster.supervisor import local_cluster, supervise
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.schema import schema_sql
from tests.support.servers import REPLICAS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture(scope="session")
def system_postgres() -> Path:
    """The programs of the newest Postgres that the system has, if it is new enough."""
    found = {int(path.parts[-3]): path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")}
    newest = max(found, default=0)
    if newest < 14:
        pytest.skip("no other Postgres, 14 or newer, is installed on this machine")
    return found[newest]


@pytest_asyncio.fixture(scope="session")
async def system_cluster(system_postgres: Path) -> AsyncIterator[LocalCluster]:
    """A primary and two replicas on the system's Postgres."""
    settings = ClusterSettings(
        replicas=REPLICAS, port=0, postgres_bin=system_postgres, database=DATABASE, schema=schema_sql()
    )
    async with local_cluster(settings) as cluster, background(supervise(cluster), "supervisor"):
        yield cluster


@pytest_asyncio.fixture
async def downs(cluster: LocalCluster) -> AsyncIterator[list[str]]:
    """The open control socket; the list grows with each request to end the program."""
    asked: list[str] = []
    async with control.listening(cluster, lambda: asked.append("down")):
        yield asked
