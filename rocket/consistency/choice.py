"""The decision where a read goes: a pure function of token, board and policy."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rocket.consistency.lsn import Lsn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from rocket.consistency.board import Board
    from rocket.consistency.status import ReplicaStatus
    from rocket.consistency.token import SessionToken


class Reason(enum.StrEnum):
    """Why a read went where it went; the words of the header `Rocket-Route-Reason`."""

    CAUGHT_UP = "caught-up"
    """To a replica that has replayed the session's last write."""
    WAITED = "caught-up-after-wait"
    """To a replica that has replayed it while the read waited."""
    RETRIED = "retried"
    """To a caught-up replica, after another one had failed."""
    NO_FLOOR = "no-floor"
    """To the primary: nothing is known of the session's last write."""
    WRITE_IN_PROGRESS = "write-in-progress"
    """To the primary: a write of the session has no known commit LSN yet."""
    NO_STATUS = "no-status"
    """To the primary: the observer has seen no replica lately."""
    TOO_FAR_BEHIND = "too-far-behind"
    """To the primary: every replica seen lies beyond `max_lag`."""
    OTHER_EPOCH = "other-epoch"
    """To the primary: no replica is known to follow it, or the session's floors are of an earlier epoch."""
    DIVERGED = "diverged"
    """To the primary: what the replicas have replayed is not all the primary's WAL."""
    NOT_CAUGHT_UP = "not-caught-up"
    """To the primary: no replica has replayed the session's last write."""
    UNREACHABLE = "replicas-unreachable"
    """To the primary: no connection can be opened to the replicas that are caught up."""
    REPLICAS_FAILED = "replicas-failed"
    """To the primary: each replica that was caught up failed while it was asked."""
    UNCHECKED = "unchecked"
    """To a replica that was not asked to show anything: `Freshness.ANY`, or a routing for comparison."""
    WRITE = "write"
    """To the primary, where every write goes."""
    ASKED = "asked"
    """To the primary, where the routing for comparison in force sends every read."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How old and how far behind a replica may be and still serve."""

    lease_s: float = 5.0
    """A replica that was not observed for longer serves no read."""
    max_lag_bytes: int | None = 16 * 1024 * 1024
    """A replica further behind the primary's last flush LSN known serves no read; None: no bound."""
    max_lag_s: float | None = 60.0
    """The same in seconds, which a replica that is cut off meets however little is written; None: no bound.

    Postgres by itself lets queries hold up replay for 30 s; a replica that follows is never further behind.
    """
    max_age_s: float | None = None
    """No replica serves what may be older; None: no bound. What it shows is as old as the last answer of the
    primary that it covers: this bound is met while the primary is away, too. See `Freshness.within`."""
    max_wait_s: float = 0.02
    """How long a read waits for a replica to catch up before it goes to the primary."""
    max_global_wait_s: float = 0.2
    """The same for a read that has to see everybody's commits: most of them have to wait for replication."""
    primary_lease_s: float = 5.0
    """A primary that was not confirmed for longer is not used: another one may have been promoted."""


class Choice(NamedTuple):
    """A replica that may serve the read, or the reason why none may."""

    status: ReplicaStatus | None
    reason: Reason


def choose(  # noqa: C901 - in one piece: every read comes through here
    token: SessionToken | None,
    board: Board,
    policy: Policy,
    *,
    now: float,
    start: int = 0,
    load: Callable[[str], int] = lambda _name: 0,
    without: Collection[str] = (),
    unreachable: Collection[str] = (),
) -> Choice:
    """Choose a replica of the token's epoch, the current one, that has replayed all WAL up to its floor there.

    Walks the replicas from number `start` (any integer; random, to spread reads) and takes the less busy of the
    first two that are fit. The first is the session's own replica if that is fit, and it is left only for one that
    is considerably less busy. The cost does not grow with the number of replicas as long as most are fit. `load`
    returns how busy a replica is; those in `without` have already failed this read, and to those in `unreachable`
    no connection can be opened at the moment. Without a token any replica that was observed lately will do.
    """
    fit = Reason.RETRIED if without else Reason.CAUGHT_UP if token is not None else Reason.UNCHECKED
    best, lead = None, 0
    own = None if token is None or (node := token.node) is None else board.replica(node)
    if own is not None and (node in without or node in unreachable):
        own = None
    if own is not None and obstacle(own, token, board, policy, now) is None:
        best, lead = own, _LOYALTY
        if load(own.name) <= lead:
            return Choice(own, fit)  # no other can be less busy by more than that
    ring = board.replicas
    nearest = Reason.NO_STATUS
    for step in range(len(ring)):
        if best is not None and load(best.name) <= lead:
            break  # as above
        status = ring[(start + step) % len(ring)]
        if status is best:
            continue
        found = obstacle(status, token, board, policy, now)
        if found is not None:
            nearest = max(nearest, found, key=_OBSTACLES.index)
        elif status.name in without:
            continue
        elif status.name in unreachable:
            nearest = max(nearest, Reason.UNREACHABLE, key=_OBSTACLES.index)
        elif best is None:
            best = status
        else:
            best = status if load(status.name) + lead < load(best.name) else best
            break
    if best is not None:
        return Choice(best, fit)
    return Choice(None, Reason.REPLICAS_FAILED if without else nearest)


_LOYALTY = 4
"""How many more connections than another replica's may be at work on a session's own before it moves."""


def worth_waiting_for(
    token: SessionToken,
    board: Board,
    policy: Policy,
    *,
    now: float,
    start: int = 0,
    most: int = 2,
    unreachable: Collection[str] = (),
) -> list[str]:
    """Return the names of at most `most` replicas that may well catch up with the token within `max_wait`.

    Excludes replicas that are not streaming or not to be reached, whose last known lag already exceeds `max_wait`,
    or for which the required LSN is unknown.
    """
    ring = board.replicas
    names: list[str] = []
    for step in range(len(ring)):
        status = ring[(start + step) % len(ring)]
        if (
            status.streaming
            and status.name not in unreachable
            and obstacle(status, token, board, policy, now) is Reason.NOT_CAUGHT_UP
            and token.floor_on(status.name, status.incarnation) < Lsn.PENDING
            and (board.lag_seconds(status, status.observed_at) or 0.0) <= policy.max_wait_s
        ):
            names.append(status.name)
            if len(names) == most:
                break
    return names


_OBSTACLES = (
    Reason.NO_STATUS,
    Reason.TOO_FAR_BEHIND,
    Reason.OTHER_EPOCH,
    Reason.DIVERGED,
    Reason.UNREACHABLE,
    Reason.NOT_CAUGHT_UP,
)
"""Why a replica may not serve a read; a later one is reported in preference to an earlier one."""


def obstacle(  # noqa: PLR0911 - in one piece: most reads come through here
    status: ReplicaStatus, token: SessionToken | None, board: Board, policy: Policy, now: float
) -> Reason | None:
    """Return why a replica may not serve a session's read, or one that asks for nothing; None if it may."""
    if now - status.observed_at > policy.lease_s:
        return Reason.NO_STATUS
    if token is None:
        return None
    epoch = status.epoch
    lag_bytes = board.flush_lsn - status.replay_lsn
    if policy.max_lag_bytes is not None and lag_bytes > policy.max_lag_bytes:
        return Reason.TOO_FAR_BEHIND
    if policy.max_age_s is not None and not _is_fresh(status, board, policy.max_age_s, now):
        return Reason.TOO_FAR_BEHIND
    if epoch is None or epoch != board.epoch:
        return Reason.OTHER_EPOCH
    if (
        lag_bytes > 0
        and policy.max_lag_s is not None
        and (board.lag_seconds(status, now) or 0.0) > policy.max_lag_s
    ):
        return Reason.TOO_FAR_BEHIND
    if lag_bytes < 0 and board.has_diverged(status):
        return Reason.DIVERGED
    if token.epoch != epoch:
        return Reason.OTHER_EPOCH
    if status.vouched_lsn < token.floor_on(status.name, status.incarnation):
        return Reason.NOT_CAUGHT_UP
    return None


def _is_fresh(status: ReplicaStatus, board: Board, max_age_s: float, now: float) -> bool:
    age_s = board.age_s(status, now)
    return age_s is not None and age_s <= max_age_s
