"""What Patroni says of its cluster: `GET /cluster`, read. A hint where the nodes are, and proof of nothing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

NAME = re.compile("[A-Za-z0-9_.-]{1,63}")
"""What a session token can hold."""
NAME_IN_WORDS = "1 to 63 of A-Z a-z 0-9 _ . -"
_HOST = re.compile(r"[A-Za-z0-9_.:%-]{1,255}")
"""What stands in a DSN for a host, and for nothing more."""

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


@dataclass(frozen=True, slots=True)
class Listing:
    """What Patroni says of its cluster as a whole."""

    members: tuple[Member, ...]
    """Those that have an address, and a name that a token can hold."""
    leader: str | None = None
    """The name of whoever leads, be it one of them or not."""
    unusable: tuple[str, ...] = ()
    """Names that a token cannot hold, of members that are nothing to us for that."""
    paused: bool = False
    """Whether it is in maintenance mode (`patronictl pause`): who leads may then do without a lock."""

    @property
    def timeline(self) -> int:
        """The newest that it knows of: by that, what is outdated is told."""
        return max((member.timeline or 0 for member in self.members), default=0)

    def allows_primary(self, name: str) -> bool:
        """Tell whether it takes a member for the leader; while paused, it may also take nobody for that."""
        return self.leader == name or (self.paused and self.leader is None)


def parse_cluster(text: str | bytes) -> Listing:
    """Read what `GET /cluster` answers; raise `ValueError` for what is no such answer.

    What a member does not tell is left open.
    """
    try:
        said = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(said, dict) or not isinstance(said.get("members"), list):
        raise ValueError("it is no answer of Patroni's /cluster")  # noqa: TRY004 - wrong text, not a wrong type
    named = [one for one in said["members"] if isinstance(one, dict) and isinstance(one.get("name"), str)]
    return Listing(
        tuple(_member(one) for one in named if _is_usable(one)),
        leader=next((one["name"] for one in named if one.get("role") in _LEADERS), None),
        unusable=tuple(one["name"] for one in named if not NAME.fullmatch(one["name"])),
        paused=said.get("pause") is True,
    )


def _is_usable(one: dict[str, Any]) -> bool:
    """Tell whether there is somewhere to go: a member that is being made may have no address yet."""
    return (
        NAME.fullmatch(one["name"]) is not None
        and isinstance(one.get("host"), str)
        and _HOST.fullmatch(one["host"]) is not None
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
