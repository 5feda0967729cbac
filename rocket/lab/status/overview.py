"""A running system at one moment: what one look at it has brought."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rocket.lab.status.members import Member, members

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rocket.lab.status.members import ApiStatus, Reads


@dataclass(frozen=True, slots=True)
class Look:
    """What the two places that know something have said; of each, an error where it said nothing."""

    at: float
    """Seconds since 1970."""
    url: str
    """The API's address."""
    workers: int | None
    """Processes that share it; None where nobody knows."""
    api: ApiStatus | None
    api_error: str | None
    nodes: Sequence[Mapping[str, Any]] | None
    cluster_error: str | None
    """None also where no cluster was to be asked."""

    @property
    def is_blank(self) -> bool:
        """Whether nobody has said anything."""
        return self.api is None and self.nodes is None

    @property
    def why_blank(self) -> str:
        """Why nobody has."""
        cluster = f", and {self.cluster_error}" if self.cluster_error else ""
        return f"no API at {self.url} ({self.api_error}){cluster}"


@dataclass(frozen=True, slots=True)
class Overview:
    """The whole of it, for people and programs."""

    look: Look
    members: tuple[Member, ...]
    reads: Reads | None
    """Those that shares are told of."""

    @classmethod
    def of(cls, look: Look, reads: Reads | None) -> Overview:
        """Put a look together with the reads that it is to tell of."""
        return cls(look, members(look.api, look.nodes or (), reads, look.at), reads)

    @property
    def epoch(self) -> str | None:
        """The primary's reign, if the API knows it."""
        return None if self.look.api is None else self.look.api.primary.get("epoch")

    @property
    def timeline(self) -> int | None:
        """The primary's."""
        return next((member.timeline for member in self.members if member.role == "primary"), None)

    def as_json(self) -> dict[str, Any]:
        """Return it for programs; what is not known is null."""
        look, reads = self.look, self.reads
        return {
            "at": look.at,
            "api": {"url": look.url, "workers": look.workers, "error": look.api_error},
            "cluster": {"found": look.nodes is not None, "error": look.cluster_error},
            "routing": None if look.api is None else look.api.routing,
            "epoch": self.epoch,
            "timeline": self.timeline,
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
