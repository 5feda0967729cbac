"""What the application holds for its handlers."""

from __future__ import annotations

from aiohttp import web

from rocket import Router
from rocket.api.metrics import Metrics

ROUTER = web.AppKey("router", Router[str])
METRICS = web.AppKey("metrics", Metrics)
