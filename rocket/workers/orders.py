"""What a worker is told at its start, as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from rocket import Policy, Routing
from rocket.serving import Service


@dataclass(frozen=True, slots=True)
class Orders:
    """Who a worker is, and what it does."""

    number: int
    """From 1; marks its log lines."""
    listener: int
    """The descriptor of its own listening socket, which it inherits."""
    log_format: str
    service: Service

    def line(self) -> bytes:
        """Return them as they are sent."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Self:
        """Return what `line` made a line of."""
        told = json.loads(line)
        service = told.pop("service")
        service |= {
            "routing": Routing(service["routing"]),
            "policy": Policy(**service["policy"]),
            "allowed_hosts": tuple(service["allowed_hosts"]),
            "patroni": tuple(service["patroni"]),
        }
        return cls(**told, service=Service(**service))
