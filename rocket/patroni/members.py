"""What Patroni says of its cluster: `GET /cluster`, read. A hint where the nodes are, and proof of nothing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

NAME = re.compile("[A-Za-z0-9_.-]{1,63}")
"""What a session token can hold."""

_LEADERS = {"leader", "master", "standby_leader"}
"""`master` was its word until version 3."""
_LARGEST_PORT = 65535
_POSTGRES_PORT = 5432


@dataclass(frozen=True, slots=True)
class Member:
    """One member, as Patroni lists it."""

    name: str
    role: str
    """`leader`, `standby_leader`, `sync_standby`, `quorum_standby` or `replica`."""
    state: str
    """`running`, `streaming`, `starting`, `stopped`, `creating replica`, and more."""
    host: str
    port: int
    """Where its Postgres is to be reached."""
    api_url: str
    timeline: int | None = None
    lag_bytes: int | None = None
    takes_reads: bool = True
    """Whether it lacks the tag `noloadbalance`."""

    @property
    def leads(self) -> bool:
        """Whether Patroni takes it for the leader."""
        return self.role in _LEADERS


def parse_cluster(text: str) -> tuple[Member, ...]:
    """Read what `GET /cluster` answers: its members that have an address, and a name that a token can hold.

    Raise `ValueError` for what is no such answer. What a member does not tell is left open.
    """
    said = json.loads(text)
    if not isinstance(said, dict) or not isinstance(said.get("members"), list):
        raise ValueError("it is no answer of Patroni's /cluster")  # noqa: TRY004 - wrong text, not a wrong type
    return tuple(_member(one) for one in said["members"] if _has_address(one))


def _has_address(one: Any) -> bool:
    """Tell whether there is somewhere to go: a member that is being made may have no address yet."""
    return (
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and NAME.fullmatch(one["name"]) is not None
        and isinstance(one.get("host"), str)
        and one["host"] != ""
        and _whole(one.get("port", _POSTGRES_PORT)) in range(1, _LARGEST_PORT + 1)
    )


def _member(one: dict[str, Any]) -> Member:
    tags = one.get("tags")
    return Member(
        name=one["name"],
        role=str(one.get("role", "")),
        state=str(one.get("state", "")),
        host=one["host"],
        port=one.get("port", _POSTGRES_PORT),
        api_url=str(one.get("api_url", "")),
        timeline=_whole(one.get("timeline")),
        lag_bytes=_whole(one.get("lag")),  # "unknown", where it does not know
        takes_reads=not (isinstance(tags, dict) and tags.get("noloadbalance")),
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
