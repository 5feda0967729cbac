"""What a router does and what it knows of its nodes, in Prometheus' terms, for any registry."""

from rocket.metrics.router import RouterMetrics

__all__ = ["RouterMetrics"]
