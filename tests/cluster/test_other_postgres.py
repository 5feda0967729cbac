"""The cluster's tests once more, on another Postgres (14 or newer) where one is installed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import pytest_asyncio

from rocket.cluster.cluster import ClusterSettings, LocalCluster, local_cluster
from rocket.cluster.process import server_processes
from rocket.cluster.supervisor import supervise
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.schema import schema_sql

# Collected here again: `cluster` below takes the place of the one on the wheel's Postgres.
from tests.cluster.test_cluster import (  # noqa: F401
    test_delayed_replica_applies_late_and_catches_up_when_it_ends,
    test_doors_are_a_private_socket_directory_and_loopback_with_scram,
    test_frozen_server_can_be_killed_and_comes_back,
    test_killed_server_comes_back_with_its_data,
    test_kills_that_were_asked_for_never_end_the_supervision,
    test_replicas_stream_from_the_primary,
    test_servers_do_not_run_as_root,
    test_start_killed_before_its_lock_file_was_written_can_be_repeated,
    test_start_that_fails_by_hand_leaves_the_node_down,
    test_stop_during_a_start_leaves_the_program_alive,
    test_stopped_server_stays_down_until_it_is_started,
)
from tests.cluster.test_control import (  # noqa: F401
    downs,
    test_faults_come_and_go,
    test_killed_node_comes_back,
    test_status_describes_every_node,
)
from tests.routing.test_races import (  # noqa: F401
    test_floor_taken_inside_the_transaction_is_stale_and_ours_is_not,
    test_replica_that_comes_back_behind_is_read_stale_as_published_and_not_by_us,
)
from tests.support.servers import REPLICAS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def other_postgres() -> Path | None:
    """Return the programs of the newest Postgres that the system has, if it is new enough."""
    found = {int(path.parts[-3]): path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")}
    newest = max(found, default=0)
    return found[newest] if newest >= 14 else None


@pytest_asyncio.fixture(scope="module")
async def cluster() -> AsyncIterator[LocalCluster]:
    """A primary and two replicas on the other Postgres."""
    programs = other_postgres()
    if programs is None:
        pytest.skip("no other Postgres, 14 or newer, is installed on this machine")
    settings = ClusterSettings(
        replicas=REPLICAS, port=0, postgres_bin=programs, database=DATABASE, schema=schema_sql()
    )
    async with local_cluster(settings) as cluster, background(supervise(cluster), "supervisor"):
        yield cluster


async def test_it_is_another_postgres(cluster: LocalCluster) -> None:
    """What runs here runs on the system's programs, and not on the wheel's."""
    programs = other_postgres()
    for node in cluster.nodes.values():
        found = set()
        for process in server_processes(node.data_dir):
            with contextlib.suppress(psutil.NoSuchProcess):  # some come and go
                found.add(Path(process.exe()).parent)
        assert {programs} == found
