"""Whether a router can serve now, and if not, what is missing: as text, and as stable codes."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rocket.consistency import Lsn, Reason, SessionToken, obstacle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket.consistency import Board, Policy
    from rocket.routing.router import Router


class Code(enum.StrEnum):
    """Findings, for alerts."""

    PRIMARY_UNKNOWN = "primary-unknown"
    """No primary has been found yet."""
    PRIMARY_LOST = "primary-lost"
    """The primary does not answer the observer, or is no primary any more, and no other primary is known."""
    PRIMARY_SILENT = "primary-silent"
    """The observer knows the primary, which does not answer this process."""
    OBSERVER_SILENT = "observer-silent"
    """The observer has not seen the primary for longer than the lease: it does not run, or is stuck."""
    PRIMARY_READ_ONLY = "primary-read-only"
    """The primary takes no writes, by its own setting; reads go on."""
    NO_REPLICA_FIT = "no-replica-fit"
    """No replica may serve, or none is listed: every read goes to the primary."""
    REPLICA_UNFIT = "replica-unfit"
    """Some replicas may not serve, and others do."""
    READS_ON_PRIMARY = "reads-on-primary"
    """Nearly all reads of the last seconds went to the primary, though a replica may serve."""
    NODE_BUSY = "node-busy"
    """Reads or writes wait for a connection to a node: all that there may be are in use."""
    NODE_CLOSED = "node-closed"
    """A node is observed, and lets no further connection in, or takes long to: reads go elsewhere."""
    NODE_REFUSED = "node-refused"
    """A node answers and is left alone: it is of another cluster, or claims to be the primary and is not."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem."""

    code: str
    """A `Code`."""
    text: str
    """The same as text, with names and times."""


@dataclass(frozen=True, slots=True)
class Health:
    """All findings."""

    missing: Sequence[Finding] = ()
    """Why reads and writes cannot be carried out."""
    degraded: Sequence[Finding] = ()
    """What makes them slower, and not wrong."""


_FEW_READS = 10
"""Of no more than these nothing is concluded."""
_NEARLY_ALL = 0.9


async def examine(router: Router) -> Health:
    """Check what the router knows, and whether the primary answers within `Limits.attempt_s`.

    A primary whose connections are all in use is not asked, since waiting for one would prove nothing. The
    observer has a connection of its own.
    """
    health = known(router)
    if health.missing or _all_at_work(router) or await router.primary_answers():
        return health
    primary = router.board.primary
    name = "" if primary is None else f", {primary.name},"
    silent = Finding(Code.PRIMARY_SILENT, f"the primary{name} does not answer")
    return Health((silent,), known(router).degraded)


def known(router: Router) -> Health:
    """Return the same without asking the primary: only what the router knows already. Another thread may ask."""
    now = time.monotonic()
    missing = _of_primary(router.board, router.policy, now)
    replicas = _of_replicas(router, now)
    degraded = (
        _of_read_only(router.board),
        replicas,
        _of_refused(router.board),
        _of_left_alone(router),
        _of_busy(router),
        _of_reads(router, now) if replicas is None or replicas.code != Code.NO_REPLICA_FIT else None,
    )
    return Health(
        () if missing is None else (missing,), tuple(finding for finding in degraded if finding is not None)
    )


def _of_primary(board: Board, policy: Policy, now: float) -> Finding | None:
    """Return why the board's primary may not be used; None if it may."""
    primary = board.primary
    if primary is None:
        return Finding(Code.PRIMARY_UNKNOWN, "no primary has been found yet")
    if board.current_primary(now, policy.primary_lease_s) is not None:
        return None
    age_s = now - primary.observed_at
    if board.primary_is_lost:
        return Finding(
            Code.PRIMARY_LOST,
            f"the primary, {primary.name}, was last in reach {age_s:.1f} s ago; no other is known",
        )
    if board.epoch is None:
        return Finding(
            Code.PRIMARY_LOST, f"{primary.name} is no longer the primary, and its successor has not been found"
        )
    return Finding(
        Code.OBSERVER_SILENT, f"the observer has said nothing of the primary, {primary.name}, for {age_s:.1f} s"
    )


def _of_read_only(board: Board) -> Finding | None:
    if board.primary is None or not board.primary.read_only:
        return None
    why = "default_transaction_read_only is on there"
    return Finding(Code.PRIMARY_READ_ONLY, f"the primary, {board.primary.name}, takes no writes: {why}")


def _of_replicas(router: Router, now: float) -> Finding | None:
    """Return why no replica may serve, or not each of them."""
    board = router.board
    if board.primary is None:
        return None  # without a primary, no node is known to be a replica
    against = {
        pool.name: obstacle_of(pool.name, board, router.policy, now)
        for pool in router.pools
        if pool.name != board.primary.name and pool.node.weight > 0
    }
    unfit = {name: reason for name, reason in against.items() if reason is not None}
    if against and not unfit:
        return None
    why = ", ".join(f"{name}: {reason}{_failure(router, name)}" for name, reason in unfit.items())
    if len(unfit) < len(against):
        return Finding(Code.REPLICA_UNFIT, f"some replicas may not serve ({why})")
    why = why or "none is listed"
    return Finding(Code.NO_REPLICA_FIT, f"no replica may serve, so that every read goes to the primary ({why})")


def _failure(router: Router, name: str) -> str:
    why = router.unobserved.get(name)
    return "" if why is None else f" ({why})"


def _of_busy(router: Router) -> Finding | None:
    """Return for which nodes requests wait: they are answered later, or not at all."""
    busy = [f"{pool.name}: {pool.limiter.waiting}" for pool in router.pools if pool.limiter.waiting]
    if router.primary_reads_waiting:
        busy.append(f"to read on the primary: {router.primary_reads_waiting}")
    if not busy:
        return None
    return Finding(Code.NODE_BUSY, f"requests wait for a connection ({', '.join(busy)})")


def _of_reads(router: Router, now: float) -> Finding | None:
    """Return why nearly all reads of late went to the primary."""
    by_replicas, to_primary = router.recent_reads.look(now)
    fallbacks = to_primary.total()
    if fallbacks < max(_FEW_READS, _NEARLY_ALL * (fallbacks + by_replicas)):
        return None
    why = ", ".join(f"{reason}: {count}" for reason, count in to_primary.most_common())
    return Finding(
        Code.READS_ON_PRIMARY,
        f"{fallbacks} of the last {fallbacks + by_replicas} reads went to the primary ({why})",
    )


def _of_refused(board: Board) -> Finding | None:
    if not board.refused:
        return None
    why = "; ".join(f"{name}: {reason}" for name, reason in board.refused.copy().items())
    return Finding(Code.NODE_REFUSED, f"some nodes are left alone ({why})")


def _of_left_alone(router: Router) -> Finding | None:
    observed = {name: why for name, why in router.left_alone.items() if router.board.replica(name) is not None}
    if not observed:
        return None
    why = "; ".join(f"{name}: {reason}" for name, reason in observed.items())
    return Finding(Code.NODE_CLOSED, f"some nodes let no further connection in ({why})")


def obstacle_of(name: str, board: Board, policy: Policy, now: float) -> Reason | None:
    """Return why a replica may not even serve a session that has written nothing; None if it may."""
    status, epoch = board.replica(name), board.epoch
    if status is None:
        return Reason.NO_STATUS
    if epoch is None:
        return Reason.OTHER_EPOCH
    return obstacle(status, SessionToken(epoch, Lsn(0)), board, policy, now)


def _all_at_work(router: Router) -> bool:
    primary = router.board.primary
    return any(
        primary is not None and pool.name == primary.name and pool.in_use >= pool.limiter.width
        for pool in router.pools
    )
