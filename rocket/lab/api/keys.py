"""What the application holds for its handlers."""

from __future__ import annotations

import asyncio

from aiohttp import web

from rocket import Router
from rocket.lab.api.metrics import Metrics

ROUTER = web.AppKey("router", Router[str])
METRICS = web.AppKey("metrics", Metrics)
DRAINING = web.AppKey("draining", asyncio.Event)
"""Set as soon as the server has begun to stop."""
