"""A real Patroni and a real etcd, where they are installed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket.cluster.process import server_account
from rocket.lab.app import DATABASE
from rocket.lab.patroni import programs
from rocket.lab.patroni.cluster import PatroniSettings, patroni_cluster
from rocket.schema import schema_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.lab.patroni.cluster import PatroniCluster


@pytest_asyncio.fixture(scope="module")
async def patroni() -> AsyncIterator[PatroniCluster]:
    """Three members that Patroni runs; the third never becomes the leader, and takes no reads."""
    try:
        programs.find(server_account())
    except programs.ProgramsNotFound as missing:
        if os.environ.get("PATRONI_REQUIRED"):
            raise
        pytest.skip(str(missing))
    settings = PatroniSettings(
        port=0,
        database=DATABASE,
        schema=schema_sql(),
        tags={"node3": {"nofailover": True, "noloadbalance": True}},
    )
    async with patroni_cluster(settings) as cluster:
        yield cluster
