"""Gauges of a router's nodes: roles, lag, connections, and the age of each one's status."""

from __future__ import annotations

import os
import platform
import time
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from rocket import __version__
from rocket.health import Code, known, obstacle_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from rocket.consistency import Epoch, PrimaryStatus, ReplicaStatus
    from rocket.routing.router import Router


class NodeGauges:
    """Reads the router's board and pools when metrics are collected."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._began = time.monotonic()
        self._heard_at: dict[str, float] = {}
        self._epoch: Epoch | None = None
        self._epoch_changes = 0
        board = router.board
        for status in board.replicas:
            self._hear(status)
        if board.primary is not None:
            self._hear(board.primary)
        board.on_status.append(self._hear)

    def _hear(self, status: ReplicaStatus | PrimaryStatus) -> None:
        self._heard_at[status.name] = status.observed_at
        if status is self._router.board.primary and status.epoch != self._epoch:
            self._epoch_changes += self._epoch is not None
            self._epoch = status.epoch

    def close(self) -> None:
        """Listen no more."""
        self._router.board.on_status.remove(self._hear)

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges."""
        now = time.monotonic()
        yield from self._of_roles(now)
        yield from self._of_replicas(now)
        yield from self._of_pools()
        health = known(self._router)
        found = {finding.code for finding in (*health.missing, *health.degraded)}
        yield _gauge(
            "rocket_health_finding", "Whether something is missing, or slower than it may be: 1 or 0.", ["code"],
            {(code.value,): code in found for code in Code if code is not Code.PRIMARY_SILENT},
        )  # fmt: skip

    def _of_roles(self, now: float) -> Iterator[Metric]:
        board, policy = self._router.board, self._router.policy
        primary = board.primary
        yield GaugeMetricFamily(
            "rocket_primary_in_office",
            "Whether a primary is known that may be used: 1 or 0.",
            value=board.current_primary(now, policy.primary_lease_s) is not None,
        )
        yield _gauge(
            "rocket_node_primary", "Whether the node is the last primary seen: 1 or 0.", ["node"],
            {(name,): primary is not None and name == primary.name for name in self._names()},
        )  # fmt: skip
        yield CounterMetricFamily(
            "rocket_epoch_changes",
            "Promotions seen: another primary, or another epoch.",
            value=self._epoch_changes,
        )
        yield _gauge(
            "rocket_node_status_age_seconds",
            "Time since the node last said what and where it is, or else since the start.",
            ["node"],
            {(name,): now - self._heard_at.get(name, self._began) for name in self._names()},
        )

    def _of_replicas(self, now: float) -> Iterator[Metric]:
        board, policy = self._router.board, self._router.policy
        replicas = list(board.replicas)
        behind = {(status.name,): board.lag_bytes(status) for status in replicas}
        late = {(status.name,): board.lag_seconds(status, now) for status in replicas}
        yield _gauge("rocket_replica_lag_bytes", "WAL that the replica has yet to replay.", ["node"], behind)
        yield _gauge("rocket_replica_lag_seconds", "Age of the oldest WAL yet to be replayed.", ["node"], late)
        yield _gauge(
            "rocket_replica_fit", "Whether the replica may serve sessions that have written nothing: 1 or 0.",
            ["node"],
            {
                (name,): obstacle_of(name, board, policy, now) is None
                for name in self._names()
                if board.primary is None or name != board.primary.name
            },
        )  # fmt: skip

    def _of_pools(self) -> Iterator[Metric]:
        pools = self._router.pools
        connections = {(pool.name, "in_use"): pool.in_use for pool in pools}
        connections |= {(pool.name, "idle"): pool.idle for pool in pools}
        yield _gauge("rocket_pool_connections", "Connections by state.", ["node", "state"], connections)
        yield _gauge(
            "rocket_pool_connections_max", "Connections that there may be.", ["node"],
            {(pool.name,): pool.limiter.width for pool in pools},
        )  # fmt: skip
        yield _gauge(
            "rocket_pool_waiting", "Requests that wait for a connection.", ["node"],
            {(pool.name,): pool.limiter.waiting for pool in pools},
        )  # fmt: skip
        yield GaugeMetricFamily(
            "rocket_primary_reads_waiting",
            "Requests that wait until the primary may take them.",
            value=self._router.primary_reads_waiting,
        )

    def _names(self) -> list[str]:
        return [pool.name for pool in self._router.pools]


def of_process() -> Iterator[Metric]:
    """Yield what is not of one router."""
    yield _gauge(
        "rocket_build_info", "Always 1; the labels say what runs.", ["version", "python"],
        {(__version__, platform.python_version()): 1},
    )  # fmt: skip
    yield _gauge(
        "rocket_process_info", "Always 1; the label says which process this is.", ["pid"],
        {(str(os.getpid()),): 1},
    )  # fmt: skip


def _gauge(name: str, says: str, labels: list[str], values: dict[Any, Any]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, says, labels=labels)
    for label_values, value in values.items():
        if value is not None:
            family.add_metric(label_values, value)
    return family
