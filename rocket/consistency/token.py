"""Session tokens: what a client carries from answer to request, so that its reads never go back."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from rocket.consistency.lsn import Lsn
from rocket.consistency.status import Epoch, Incarnation, rank_of, timeline_of

if TYPE_CHECKING:
    from collections.abc import Iterable

NODE_NAME = re.compile("[A-Za-z0-9_.-]{1,63}")
"""The names that a node may have: a token has to hold them."""

_NOTHING = Lsn(0)
_LONGEST = 250
_EPOCH = r"[1-9][0-9]{0,9}(?:\.[1-9][0-9]{0,5})?-[0-9a-z]{8,32}"
_LSN = r"[0-9A-F]{1,8}/[0-9A-F]{1,8}"
_TOKEN = re.compile(
    rf"1~({_EPOCH})~({_LSN})~({_LSN})"
    rf"(?:~({NODE_NAME.pattern})~([0-9@]{{0,40}}))?"
)


@dataclass(frozen=True, slots=True)
class SessionToken:
    """The floors of one session.

    A replica may serve the session's next read once it has replayed all WAL up to the floor that holds for it:
    the write floor alone on the very replica, in the very incarnation, that served the last read (within one
    incarnation a replica never goes back), and the read floor as well on any other.
    """

    epoch: Epoch
    """The epoch that the LSNs below belong to."""
    write_floor: Lsn
    """Covers every write of the session that was acknowledged."""
    read_floor: Lsn | None = _NOTHING
    """Covers all that the session's reads may have shown; None if no bound for it is known."""
    node: str | None = None
    """The replica that served the last read; None after a read on the primary, or none at all."""
    incarnation: Incarnation | None = None
    """The incarnation of `node` at that time; None where it is unknown, or several have been read since."""
    _text: str | None = field(default=None, init=False, compare=False, repr=False)
    """Its text, kept once it was read or written."""

    @property
    def timeline(self) -> int:
        """The timeline that its epoch's primary writes."""
        return timeline_of(self.epoch)

    @property
    def highest_floor(self) -> Lsn:
        """The floor on a node that the session has not been reading from; `Lsn.PENDING` if there is no bound."""
        return Lsn.PENDING if self.read_floor is None else max(self.write_floor, self.read_floor)

    @property
    def has_read(self) -> bool:
        """Whether it covers any read."""
        return self.read_floor != _NOTHING

    def floor_on(self, node: str, incarnation: Incarnation | None) -> Lsn:
        """Return how much a replica, in an incarnation, must have replayed to serve the next read."""
        if incarnation is not None and incarnation == self.incarnation and node == self.node:
            return self.write_floor
        return self.highest_floor

    def after_write(self, flush_lsn: Lsn) -> SessionToken:
        """Return the token after a write that is flushed up to `flush_lsn`."""
        # An earlier write whose floor is not known yet is covered by what was flushed after it.
        earlier = _NOTHING if self.write_floor == Lsn.PENDING else self.write_floor
        return replace(self, write_floor=max(earlier, flush_lsn))

    def after_replica_read(self, node: str, incarnation: Incarnation | None, bound: Lsn | None) -> SessionToken:
        """Return the token after a read on a replica that cannot have shown more than `bound`.

        None says that no bound is known (design fact F6): then only the same incarnation of that replica, or the
        primary, may serve the next read.
        """
        read_floor: Lsn | None
        if bound is None or self.read_floor is None:
            # If an earlier read was unbounded, it was on this very replica, which has only gone on since.
            read_floor = bound
        else:
            read_floor = max(self.read_floor, bound)
            if read_floor == self.read_floor and incarnation == self.incarnation and node == self.node:
                return self
        return SessionToken(self.epoch, self.write_floor, read_floor, node, incarnation)

    def after_primary_read(self, flush_lsn: Lsn) -> SessionToken:
        """Return the token after a read on the primary, which shows nothing beyond its flush LSN.

        Nor can any replica of its epoch have shown more, and it shows every write that was acknowledged.
        """
        write_floor = flush_lsn if self.write_floor == Lsn.PENDING else self.write_floor
        return replace(self, write_floor=write_floor, read_floor=flush_lsn, node=None, incarnation=None)

    def is_beyond(self, flush_lsn: Lsn) -> bool:
        """Return whether it claims more than its primary has ever written: then no router gave it out."""
        floors = (self.write_floor, self.read_floor)
        return any(floor is not None and flush_lsn < floor < Lsn.PENDING for floor in floors)

    def merged_with(self, other: SessionToken) -> SessionToken:
        """Return a token that covers both; raise `ValueError` for tokens of different epochs.

        Unless both were read on the same incarnation of a replica, or one of them has read nothing, the
        incarnation is dropped, so that the read floor binds everywhere; a node still says that replicas were read.
        """
        if self.epoch != other.epoch:
            raise ValueError("tokens of different epochs say nothing about each other")
        node, incarnation = self.node, self.incarnation
        if (self.node, self.incarnation) != (other.node, other.incarnation) and other.has_read:
            node, incarnation = self.node or other.node, None
            if not self.has_read:
                node, incarnation = other.node, other.incarnation
        both = (self.read_floor, other.read_floor)
        return SessionToken(
            epoch=self.epoch,
            write_floor=max(self.write_floor, other.write_floor),
            read_floor=None if None in both else max(filter(None, both), default=_NOTHING),
            node=node,
            incarnation=incarnation,
        )

    def __str__(self) -> str:
        if self._text is not None:
            return self._text
        where = "" if self.node is None else f"~{self.node}~{self.incarnation or ''}"
        read_floor = Lsn.PENDING if self.read_floor is None else self.read_floor
        text = f"1~{self.epoch}~{self.write_floor}~{read_floor}{where}"
        object.__setattr__(self, "_text", text)
        return text

    @staticmethod
    def parse(text: str) -> SessionToken:
        """Read the form that `str` gives; raise `ValueError` for all else."""
        return _parsed(text)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> SessionToken:
    """Read a token; a page that sends one with a dozen requests has it read once."""
    match = _TOKEN.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise ValueError("not a session token")
    epoch, write_floor, read_text, node, incarnation = match.groups()
    read_floor = Lsn.parse(read_text)
    token = SessionToken(
        epoch=Epoch(epoch),
        write_floor=Lsn.parse(write_floor),
        read_floor=None if read_floor == Lsn.PENDING else read_floor,
        node=node,
        incarnation=Incarnation(incarnation) if incarnation else None,
    )
    object.__setattr__(token, "_text", text)
    return token


Tokens: TypeAlias = "SessionToken | Iterable[SessionToken] | None"
"""What a session brings: its token, or several where it has concurrent requests."""


def merged(tokens: Tokens) -> tuple[SessionToken, ...]:
    """Merge the tokens of one client: return one for the latest epoch, followed by the earlier ones.

    A node of the latest epoch has all that is left of the earlier ones; only a primary knows what was lost, and
    which of two epochs on one timeline is of another cluster, as one of them must be.
    """
    if tokens is None:
        return ()
    if isinstance(tokens, SessionToken):
        return (tokens,)
    given = tuple(tokens)
    if len(given) < 2:  # noqa: PLR2004 - nothing to merge
        return given
    if len(given) == 2 and given[0].epoch == given[1].epoch:  # noqa: PLR2004 - two of one epoch, as most are
        return (given[0].merged_with(given[1]),)
    latest: SessionToken | None = None
    others: list[SessionToken] = []
    for token in sorted(given, key=lambda token: (rank_of(token.epoch), token.epoch), reverse=True):
        if latest is None:
            latest = token
        elif token.epoch == latest.epoch:
            latest = latest.merged_with(token)
        else:
            others.append(token)
    return () if latest is None else (latest, *others)
