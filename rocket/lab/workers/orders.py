"""What a worker is told at its start, as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

from rocket import Policy
from rocket.lab.comparison import Routing
from rocket.lab.serving import Service

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Job:
    """Who a worker is, and what it does."""

    number: int
    """From 1; marks its log lines."""
    listener: int | None
    """The descriptor of its own listening socket, which it inherits; None: it only observes."""
    log_format: str
    log_levels: Mapping[str, int]
    """By logger, where the program that starts it has set one."""
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
