"""The members of a running system: what its API and its cluster say of each, side by side."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rocket.consistency import Epoch, timeline_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PRIMARY, REPLICA, OLD_PRIMARY = "primary", "replica", "old primary"
"""Roles; the last one is that of a node which the cluster holds for the primary, while the API follows another."""
IN_ORDER = frozenset({"up", "streaming"})
"""States that need no second look."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Reads that a process of the API has answered."""

    pid: int
    by_node: Counter[str]
    reasons: Counter[str]
    fallbacks: Counter[str]
    """Those that the primary answered, by reason."""
    unavailable: int
    """Those that nobody could answer."""
    span_s: float | None = None
    """In how many seconds; None: since the process began."""

    @property
    def total(self) -> int:
        """How many were answered."""
        return self.by_node.total()

    @property
    def by_replicas(self) -> int:
        """How many of them by replicas."""
        return self.total - self.fallbacks.total()

    def since(self, before: Reads | None, span_s: float) -> Reads:
        """Return what has come on top of what was counted before; if that was another process, all of it."""
        if before is None or before.pid != self.pid:
            return self
        return Reads(
            self.pid,
            self.by_node - before.by_node,
            self.reasons - before.reasons,
            self.fallbacks - before.fallbacks,
            max(0, self.unavailable - before.unavailable),
            span_s,
        )


@dataclass(frozen=True, slots=True)
class ApiStatus:
    """What the API says of itself, and of the nodes by name: the answer to `GET /replicas`."""

    routing: str
    primary: Mapping[str, Any]
    """Empty while none is known."""
    replicas: Mapping[str, Mapping[str, Any]]
    connections: Mapping[str, Mapping[str, int]]
    """Of every node, in the cluster's order."""
    reads: Reads

    @classmethod
    def read(cls, said: Any) -> Self:
        """Take the answer apart; raise `ValueError` if it is none of rocket's."""
        try:
            reads = Reads(
                pid=int(said["pid"]),
                by_node=Counter(said["reads"]),
                reasons=Counter(said["reasons"]),
                fallbacks=Counter(said["fallbacks"]),
                unavailable=int(said["reads_unavailable"]),
            )
            return cls(
                routing=str(said["routing"]),
                primary=said["primary"] or {},
                replicas={status["name"]: status for status in said["replicas"]},
                connections=said["connections"],
                reads=reads,
            )
        except (KeyError, TypeError):
            raise ValueError("not what rocket's API answers") from None

    @property
    def current_primary(self) -> str | None:
        """The name of the primary, if it answered when it was last asked."""
        return None if self.primary.get("lost", True) else self.primary["name"]


@dataclass(frozen=True, slots=True)
class Member:
    """One node; None stands for what nobody knows, or what has no meaning for it."""

    name: str
    port: int | None
    role: str | None
    state: str
    timeline: int | None
    lsn: str | None
    """The primary's flush LSN, a replica's replay LSN."""
    lag_bytes: int | None
    lag_seconds: float | None
    incarnation: str | None
    incarnation_age_seconds: float | None
    """How long this life of the replica's startup process has lasted."""
    reads: int | None
    reads_percent: float | None
    """Of all reads; None where there were none."""
    connections_in_use: int | None
    connections_idle: int | None


def members(
    api: ApiStatus | None, nodes: Sequence[Mapping[str, Any]], reads: Reads | None, now: float
) -> tuple[Member, ...]:
    """Put together what the API says and what the cluster says of its nodes; either may be missing.

    The cluster asks its servers at this moment, the API goes by what the observer saw last: what both tell is
    told as the cluster does. `now` is in seconds since 1970.
    """
    described = {node["name"]: node for node in nodes}
    names = dict.fromkeys([*described, *(api.connections if api else ()), *(api.replicas if api else ())])
    primary = _primary(api, nodes)
    return tuple(_member(name, primary, api, described.get(name), reads=reads, now=now) for name in names)


def _primary(api: ApiStatus | None, nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the primary's name. The API asks every server whether it is; the cluster knows whom it made one."""
    made = next((node["name"] for node in nodes if node["role"] == PRIMARY), None)
    if api is None:
        return made
    return api.current_primary or made or api.primary.get("name")


def _member(
    name: str,
    primary: str | None,
    api: ApiStatus | None,
    node: Mapping[str, Any] | None,
    *,
    reads: Reads | None,
    now: float,
) -> Member:
    seen: Mapping[str, Any] = {}
    connections: Mapping[str, int] = {}
    if api is not None:
        connections = api.connections.get(name, {})
        seen = api.replicas.get(name, {})
        if name == primary:
            seen = api.primary if api.primary.get("name") == name else {}
    told = node or {}
    role = _role(name, primary, seen, told)
    incarnation = seen.get("incarnation")
    epoch = seen.get("epoch")
    return Member(
        name=name,
        port=told.get("port"),
        role=role,
        state=_state(role, seen, told),
        timeline=told.get("timeline") or (timeline_of(Epoch(epoch)) if epoch else None),
        lsn=told.get("lsn") or seen.get("flush_lsn") or seen.get("replay_lsn"),
        lag_bytes=seen.get("lag_bytes") if told.get("lag_bytes") is None else told["lag_bytes"],
        lag_seconds=_rounded(seen.get("lag_seconds")),
        incarnation=incarnation,
        incarnation_age_seconds=None if incarnation is None else _rounded(max(0.0, now - began_at(incarnation))),
        reads=None if reads is None else reads.by_node[name],
        reads_percent=_rounded(100 * reads.by_node[name] / reads.total) if reads and reads.total else None,
        connections_in_use=connections.get("in_use"),
        connections_idle=connections.get("idle"),
    )


def _role(name: str, primary: str | None, seen: Mapping[str, Any], told: Mapping[str, Any]) -> str | None:
    if name == primary:
        return PRIMARY
    if seen:
        return REPLICA
    return OLD_PRIMARY if told.get("role") == PRIMARY else told.get("role")


def _state(role: str | None, seen: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """Say in a word or two how a node is: whoever runs the server knows best."""
    if told and told["state"] != "up":
        return str(told["state"])
    if not seen and not told.get("lsn"):
        return "no answer" if told else "not seen"
    if told.get("paused"):
        return "paused"
    if told.get("delay_ms"):
        return f"{told['delay_ms']} ms late"
    if role == REPLICA:
        streaming = told["receiver"] == "streaming" if told.get("lsn") else seen.get("streaming")
        return "streaming" if streaming else "not streaming"
    return "lost" if seen.get("lost") and not told else "up"


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)


def began_at(incarnation: str) -> float:
    """Return when an incarnation, `pid@microseconds`, began, in seconds since 1970."""
    return int(incarnation.partition("@")[2]) / 1e6
