"""What the API and the cluster answer about the nodes, for tests of `status` that run neither."""

from __future__ import annotations

from typing import Any

NOW = 2_000.0
EPOCH = "1-aaaaaaaaaa"


def node(name: str, **others: object) -> dict[str, Any]:
    """Return what the cluster says of a node: of a streaming replica, unless `others` say otherwise."""
    role = "primary" if name == "primary" else "replica"
    return {
        "name": name, "role": role, "state": "up", "pid": 1, "port": 5433, "timeline": 1, "lsn": "0/20",
        "lag_bytes": None if role == "primary" else 0, "paused": False, "delay_ms": 0,
        "receiver": None if role == "primary" else "streaming",
    } | others  # fmt: skip


def replica_status(name: str, **others: object) -> dict[str, Any]:
    """Return what the API says of a replica."""
    return {
        "name": name, "replay_lsn": "0/10", "streaming": True, "incarnation": "7@1990000000", "epoch": EPOCH,
        "lag_bytes": 16, "lag_seconds": 0.5,
    } | others  # fmt: skip


def api_body(*replicas: dict[str, Any], primary: str | None = "primary", lost: bool = False) -> dict[str, Any]:
    """Return the body of `GET /replicas`, with the primary and two replicas among its nodes."""
    return {
        "pid": 1,
        "routing": "never-stale",
        "primary": None
        if primary is None
        else {"name": primary, "flush_lsn": "0/18", "epoch": EPOCH, "lost": lost},
        "replicas": list(replicas),
        "findings": [],
        "reads": {"replica0": 3, "primary": 1},
        "reasons": {"caught-up": 3, "not-caught-up": 1},
        "fallbacks": {"not-caught-up": 1},
        "reads_unavailable": 2,
        "connections": {name: {"in_use": 1, "idle": 2} for name in ("primary", "replica0", "replica1")},
    }
