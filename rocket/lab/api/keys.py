"""What the application holds for its handlers."""

from __future__ import annotations

import asyncio

from aiohttp import web

from rocket.lab.api.metrics import Metrics
from rocket.lab.comparison import ComparisonRouter

ROUTER = web.AppKey("router", ComparisonRouter)
METRICS = web.AppKey("metrics", Metrics)
DRAINING = web.AppKey("draining", asyncio.Event)
"""Set as soon as the server has begun to stop."""
