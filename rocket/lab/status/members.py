"""The members of a running system, as its API and its cluster describe them at one moment. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from rocket.consistency import Epoch, timeline_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PRIMARY, REPLICA, OLD_PRIMARY = "primary", "replica", "old primary"
"""Roles; an old primary is the cluster's primary while the API follows another node."""
HEALTHY_STATES = frozenset({"up", "streaming"})
"""States that need no attention."""


# --- what the API says ---


@dataclass(frozen=True, slots=True)
class Reads:
    """Reads that a process of the API has answered."""

    pid: int
    by_node: Counter[str]
    reasons: Counter[str]
    fallbacks: Counter[str]
    """Reads that the primary answered, by reason."""
    unavailable: int
    """Reads that no node could answer."""
    span_s: float | None = None
    """The seconds over which they were counted; None: since the process started."""

    @property
    def total(self) -> int:
        """The number of reads answered."""
        return self.by_node.total()

    @property
    def by_replicas(self) -> int:
        """The number of reads answered by replicas."""
        return self.total - self.fallbacks.total()

    def since(self, before: Reads | None, span_s: float) -> Reads:
        """Return the reads counted after `before`; all of them if another process counted `before`."""
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
    """What the API says of itself and of the nodes by name: the response to `GET /replicas`."""

    routing: str
    primary: Mapping[str, Any]
    """Empty while no primary is known."""
    replicas: Mapping[str, Mapping[str, Any]]
    connections: Mapping[str, Mapping[str, int]]
    """Of every node, in the cluster's order."""
    findings: Sequence[Mapping[str, str]]
    """What is missing, and what makes reads or writes slower: each a code and a text."""
    reads: Reads

    @classmethod
    def read(cls, body: Any) -> Self:
        """Parse the decoded JSON body; raise `ValueError` if it is not from rocket's API."""
        try:
            reads = Reads(
                pid=int(body["pid"]),
                by_node=Counter(body["reads"]),
                reasons=Counter(body["reasons"]),
                fallbacks=Counter(body["fallbacks"]),
                unavailable=int(body["reads_unavailable"]),
            )
            return cls(
                routing=str(body["routing"]),
                primary=body["primary"] or {},
                replicas={status["name"]: status for status in body["replicas"]},
                connections=body["connections"],
                findings=[{key: str(each[key]) for key in ("code", "text")} for each in body["findings"]],
                reads=reads,
            )
        except (KeyError, TypeError):
            raise ValueError("not what rocket's API answers") from None

    @property
    def current_primary(self) -> str | None:
        """The name of the primary, if it answered the latest status query."""
        return None if self.primary.get("lost", True) else self.primary["name"]


# --- one node ---


@dataclass(frozen=True, slots=True)
class Member:
    """One node; None stands for what is unknown, or does not apply to its role."""

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
    """How long the replica's startup process has been running."""
    reads: int | None
    reads_percent: float | None
    """The share of all reads; None if there were none."""
    connections_in_use: int | None
    connections_idle: int | None


def members(
    api: ApiStatus | None, nodes: Sequence[Mapping[str, Any]], reads: Reads | None, now: float
) -> tuple[Member, ...]:
    """Combine what the API and the cluster say of the nodes; either may be missing.

    The cluster queries its servers now, while the API reports what the observer saw last: where both know
    something, the cluster's value is used. `now` is in seconds since 1970.
    """
    by_name = {node["name"]: node for node in nodes}
    names = dict.fromkeys([*by_name, *(api.connections if api else ()), *(api.replicas if api else ())])
    primary = _primary_name(api, nodes)
    return tuple(_member(name, primary, api, by_name.get(name, {}), reads=reads, now=now) for name in names)


def _primary_name(api: ApiStatus | None, nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the primary's name: the API asks every server for its role, the cluster knows which it promoted."""
    promoted = next((node["name"] for node in nodes if node["role"] == PRIMARY), None)
    if api is None:
        return promoted
    return api.current_primary or promoted or api.primary.get("name")


def _member(
    name: str,
    primary: str | None,
    api: ApiStatus | None,
    node: Mapping[str, Any],
    *,
    reads: Reads | None,
    now: float,
) -> Member:
    status: Mapping[str, Any] = {}
    connections: Mapping[str, int] = {}
    if api is not None:
        connections = api.connections.get(name, {})
        status = api.replicas.get(name, {})
        if name == primary:
            status = api.primary if api.primary.get("name") == name else {}
    role = _role(name, primary, status, node)
    incarnation = status.get("incarnation")
    epoch = status.get("epoch")
    return Member(
        name=name,
        port=node.get("port"),
        role=role,
        state=_state(role, status, node),
        timeline=node.get("timeline") or (timeline_of(Epoch(epoch)) if epoch else None),
        lsn=node.get("lsn") or status.get("flush_lsn") or status.get("replay_lsn"),
        lag_bytes=status.get("lag_bytes") if node.get("lag_bytes") is None else node["lag_bytes"],
        lag_seconds=_rounded(status.get("lag_seconds")),
        incarnation=incarnation,
        incarnation_age_seconds=None if incarnation is None else _rounded(max(0.0, now - began_at(incarnation))),
        reads=None if reads is None else reads.by_node[name],
        reads_percent=_rounded(100 * reads.by_node[name] / reads.total) if reads and reads.total else None,
        connections_in_use=connections.get("in_use"),
        connections_idle=connections.get("idle"),
    )


def _role(name: str, primary: str | None, status: Mapping[str, Any], node: Mapping[str, Any]) -> str | None:
    if name == primary:
        return PRIMARY
    if status:
        return REPLICA
    return OLD_PRIMARY if node.get("role") == PRIMARY else node.get("role")


def _state(role: str | None, status: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Return the node's state in a word or two; the cluster, which runs the server, knows it best."""
    if node and node["state"] != "up":
        return str(node["state"])
    if not status and not node.get("lsn"):
        return "no answer" if node else "not seen"
    if node.get("paused"):
        return "paused"
    if node.get("delay_ms"):
        return f"{node['delay_ms']} ms late"
    if role == REPLICA:
        streaming = node["receiver"] == "streaming" if node.get("lsn") else status.get("streaming")
        return "streaming" if streaming else "not streaming"
    return "lost" if status.get("lost") and not node else "up"


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)


def began_at(incarnation: str) -> float:
    """Return when an incarnation, `pid@microseconds`, began, in seconds since 1970."""
    return int(incarnation.partition("@")[2]) / 1e6


# --- the whole system ---


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the API and the cluster answered at one moment; an error stands for a missing answer."""

    at: float
    """Seconds since 1970."""
    url: str
    """The API's address."""
    workers: int | None
    """The number of processes that share it; None if unknown."""
    api: ApiStatus | None
    api_error: str | None
    nodes: Sequence[Mapping[str, Any]] | None
    cluster_error: str | None
    """None also if no cluster was asked."""

    @property
    def is_empty(self) -> bool:
        """Whether neither answered."""
        return self.api is None and self.nodes is None

    @property
    def why_empty(self) -> str:
        """Why neither answered."""
        cluster = f", and {self.cluster_error}" if self.cluster_error else ""
        return f"no API at {self.url} ({self.api_error}){cluster}"


@dataclass(frozen=True, slots=True)
class Overview:
    """A running system as it is shown to people and programs."""

    snapshot: Snapshot
    members: tuple[Member, ...]
    reads: Reads | None
    """The reads from which shares are computed."""

    @classmethod
    def of(cls, snapshot: Snapshot, reads: Reads | None) -> Overview:
        """Combine a snapshot with the reads of the period to show."""
        return cls(snapshot, members(snapshot.api, snapshot.nodes or (), reads, snapshot.at), reads)

    @property
    def epoch(self) -> str | None:
        """The primary's epoch, if the API knows it."""
        return None if self.snapshot.api is None else self.snapshot.api.primary.get("epoch")

    @property
    def timeline(self) -> int | None:
        """The primary's timeline."""
        return next((member.timeline for member in self.members if member.role == PRIMARY), None)

    def as_json(self) -> dict[str, Any]:
        """Return the overview for programs; unknown values are null."""
        snapshot, reads = self.snapshot, self.reads
        return {
            "at": snapshot.at,
            "api": {"url": snapshot.url, "workers": snapshot.workers, "error": snapshot.api_error},
            "cluster": {"found": snapshot.nodes is not None, "error": snapshot.cluster_error},
            "routing": None if snapshot.api is None else snapshot.api.routing,
            "epoch": self.epoch,
            "timeline": self.timeline,
            "findings": None if snapshot.api is None else snapshot.api.findings,
            "members": [asdict(member) for member in self.members],
            "reads": None
            if reads is None
            else {
                "span_seconds": reads.span_s,
                "total": reads.total,
                "by_replicas": reads.by_replicas,
                "by_node": reads.by_node,
                "reasons": reads.reasons,
                "fallbacks": reads.fallbacks,
                "unavailable": reads.unavailable,
            },
        }
