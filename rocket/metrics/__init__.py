"""Prometheus metrics of a router and its nodes, for any registry."""

from rocket.metrics.router import RouterMetrics

__all__ = ["RouterMetrics"]
