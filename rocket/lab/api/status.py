"""What the API says about itself: health, metrics, replicas, and its OpenAPI description."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
from collections import Counter
from dataclasses import asdict
from http import HTTPStatus
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from rocket import Role
from rocket.health import Finding, examine, known
from rocket.lab.comparison import ComparisonRouter
from rocket.metrics import RouterMetrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from rocket.lab.api.limits import Admission

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_DRAINING = Finding("draining", "the server is shutting down")


class Metrics(RouterMetrics):
    """The metrics of one application, for `GET /metrics` and `GET /replicas`."""

    def __init__(self, router: ComparisonRouter, admission: Admission) -> None:
        self._admission = admission
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        super().__init__(router, registry=self._registry)

    def counts(self) -> dict[str, Any]:
        """Return the counts since the start, as in `GET /replicas`; fallbacks are reads by the primary."""
        by_node: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        fallbacks: Counter[str] = Counter()
        for (node, role, reason), count in self.reads().items():
            by_node[node] += count
            reasons[reason] += count
            if role is Role.PRIMARY:
                fallbacks[reason] += count
        return {
            "reads": by_node,
            "reasons": reasons,
            "fallbacks": fallbacks,
            "reads_unavailable": self.reads_unavailable(),
            "writes": self.writes(),
        }

    def collect(self) -> Iterator[Metric]:
        """Yield the router's metrics, and those of admission."""
        yield from super().collect()
        yield CounterMetricFamily(
            "rocket_requests_refused",
            "Requests refused at once, since there were too many.",
            value=self._admission.refused,
        )
        yield GaugeMetricFamily("rocket_requests_inside", "Requests in hand.", value=self._admission.inside)

    def text(self) -> bytes:
        """Return all metrics in the text format."""
        return generate_latest(self._registry)


ROUTER = web.AppKey("router", ComparisonRouter)
METRICS = web.AppKey("metrics", Metrics)
DRAINING = web.AppKey("draining", asyncio.Event)
"""Set as soon as the server has begun to stop."""


async def alive(_request: web.Request) -> web.Response:
    """`GET /livez`: the event loop runs."""
    return web.json_response({"status": "alive"})


async def ready(request: web.Request) -> web.Response:
    """`GET /readyz`: whether requests can be answered now, what is missing if not, and what slows them down."""
    router = request.app[ROUTER]
    health = await examine(router)
    missing = list(health.missing)
    if request.app[DRAINING].is_set():
        missing.insert(0, _DRAINING)
    return web.json_response(
        {
            "ready": not missing,
            "missing": [asdict(finding) for finding in missing],
            "degraded": [asdict(finding) for finding in health.degraded],
            "replicas_observed": len(router.board.replicas),
        },
        status=HTTPStatus.SERVICE_UNAVAILABLE if missing else HTTPStatus.OK,
    )


async def replicas(request: web.Request) -> web.Response:
    """`GET /replicas`: the observer's latest statuses, what is wrong, and how many reads each node has answered.

    The counts are this process's since its start; `pid` identifies it among others that share its port.
    """
    router = request.app[ROUTER]
    now = time.monotonic()
    primary, health = router.board.primary, known(router)
    return web.json_response(
        {
            "pid": os.getpid(),
            "routing": router.routing,
            "primary": None
            if primary is None
            else {
                "name": primary.name,
                "flush_lsn": str(primary.flush_lsn),
                "epoch": primary.epoch,
                "lost": router.board.primary_is_lost,
                "status_age_seconds": round(now - primary.observed_at, 3),
            },
            "replicas": [
                {
                    "name": status.name,
                    "replay_lsn": str(status.replay_lsn),
                    "receive_lsn": None if status.receive_lsn is None else str(status.receive_lsn),
                    "streaming": status.streaming,
                    "incarnation": status.incarnation,
                    "epoch": status.epoch,
                    "lag_bytes": router.board.lag_bytes(status),
                    "lag_seconds": router.board.lag_seconds(status, now),
                    "status_age_seconds": round(now - status.observed_at, 3),
                }
                for status in router.board.replicas
            ],
            "findings": [asdict(finding) for finding in (*health.missing, *health.degraded)],
            **request.app[METRICS].counts(),
            "connections": {pool.name: {"in_use": pool.in_use, "idle": pool.idle} for pool in router.pools},
        }
    )


async def metrics(request: web.Request) -> web.Response:
    """`GET /metrics`: Prometheus' text format."""
    return web.Response(body=request.app[METRICS].text(), headers={"Content-Type": _METRICS_TYPE})


def description() -> dict[str, Any]:
    """Return the OpenAPI 3.1 description, which `openapi.json` holds, for this version."""
    described: dict[str, Any] = json.loads(resources.files("rocket.lab.api").joinpath("openapi.json").read_bytes())
    described["info"]["version"] = metadata.version("rocket-replicas")
    return described


@functools.cache
def _description_text() -> bytes:
    return json.dumps(description(), ensure_ascii=False).encode()


async def describe(_request: web.Request) -> web.Response:
    """`GET /openapi.json`: the API's description."""
    return web.Response(body=_description_text(), content_type="application/json", charset="utf-8")
