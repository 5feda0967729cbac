"""What is compared: ways of routing, with the client's token and without."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to answer the same reads."""

    name: str
    what: str
    routing: str | None = None
    """What the API is told by `--routing`; None: it is not our API."""
    tokens: bool = False
    """Whether clients send back the session token that they were given."""
    flags: tuple[str, ...] = ()
    """What the API is told besides."""


BARE = Variant("bare", "aiohttp alone: the same JSON from memory, no database")
IDLE = Variant("idle", "the never-stale API with its observer, and nobody who asks", "never-stale")
PRIMARY = Variant("primary", "every read on the primary", "primary")
RANDOM = Variant("random", "any replica, no guarantee: the ceiling", "random")
ARTICLE = Variant("article", "the technique as published, on asyncpg's pool as it comes", "article")
NEVER_STALE = Variant("never-stale", "clients send back their token", "never-stale", tokens=True)
TOKENLESS = Variant("never-stale-no-token", "the same, clients send none", "never-stale")

UNSEEN = Variant(
    "never-stale-unseen", "no inspector, and so no journal for it", "never-stale", tokens=True,
    flags=("--no-inspector",),
)  # fmt: skip

CONTENDERS = {
    contender.name: contender
    for contender in (BARE, IDLE, PRIMARY, RANDOM, ARTICLE, NEVER_STALE, TOKENLESS, UNSEEN)
}
