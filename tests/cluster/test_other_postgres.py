"""Tests of the router's races once more, on another Postgres (14 or newer) where one is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

# Collected here again: `cluster` below takes the place of the one on the wheel's Postgres.
from tests.routing.test_races import (  # noqa: F401
    test_floor_taken_inside_the_transaction_is_stale_and_ours_is_not,
    test_replica_that_comes_back_behind_is_read_stale_as_published_and_not_by_us,
)

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster


@pytest.fixture
def cluster(system_cluster: LocalCluster) -> LocalCluster:
    """A primary and two replicas on the other Postgres."""
    return system_cluster
