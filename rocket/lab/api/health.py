"""Answers for whoever watches the API."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from http import HTTPStatus

from aiohttp import web

from rocket.health import Finding, examine
from rocket.lab.api.keys import DRAINING, METRICS, ROUTER

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_DRAINING = Finding("draining", "the server is shutting down")


async def alive(_request: web.Request) -> web.Response:
    """`GET /livez`: the event loop turns."""
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
    """`GET /replicas`: what the observer saw of each replica, how long ago, and who was read from how often.

    What is counted, this process has counted since its start; `pid` tells it from others that share its port.
    """
    router = request.app[ROUTER]
    now = time.monotonic()
    primary = router.board.primary
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
            **request.app[METRICS].counts(),
            "connections": {pool.name: {"in_use": pool.in_use, "idle": pool.idle} for pool in router.pools},
        }
    )


async def metrics(request: web.Request) -> web.Response:
    """`GET /metrics`: Prometheus' text format."""
    return web.Response(body=request.app[METRICS].text(), headers={"Content-Type": _METRICS_TYPE})
