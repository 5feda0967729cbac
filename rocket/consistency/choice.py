"""The decision where a read goes: a pure function of token, board and policy, and of what is preferred."""

from __future__ import annotations

import enum
import math
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from rocket.consistency.lsn import Lsn
from rocket.consistency.status import ReplicaStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from rocket.consistency.board import Board
    from rocket.consistency.status import PrimaryStatus
    from rocket.consistency.token import SessionToken


class Reason(enum.StrEnum):
    """Why a read went where it went; the words of the header `Rocket-Route-Reason`."""

    CAUGHT_UP = "caught-up"
    """To a replica that has replayed the session's last write."""
    WAITED = "caught-up-after-wait"
    """To a replica that has replayed it while the read waited."""
    RETRIED = "retried"
    """To a caught-up replica, after another one had failed."""
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
    zone: str | None = None
    """The router's own zone: reads prefer replicas whose `Node.zone` it is; None: no preference."""


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
    load: Callable[[str], float] = lambda _name: 0,
    without: Collection[str] = (),
    unreachable: Collection[str] = (),
    leaning: Leaning | None = None,
    ring: Sequence[ReplicaStatus] | None = None,
) -> Choice:
    """Choose a replica of the token's epoch, the current one, that has replayed all WAL up to its floor there.

    And up to the epoch's highest cover.

    Walks the replicas from number `start` (any integer; random, to spread reads) and takes the less busy of the
    first two that are fit. The first is the session's own replica if that is fit, and it is left only for one that
    is considerably less busy. The cost does not grow with the number of replicas as long as most are fit. `load`
    returns how busy a replica is; those in `without` have already failed this read, and to those in `unreachable`
    no connection can be opened at the moment. Without a token any replica that was observed lately will do.
    `leaning` prefers some to others, and `ring` is the replicas to walk in place of all.
    """
    if leaning is not None:
        return leaning.choose(
            token, board, policy, now=now, start=start, load=load, without=without, unreachable=unreachable
        )
    fit = Reason.RETRIED if without else Reason.CAUGHT_UP if token is not None else Reason.UNCHECKED
    best, lead = None, 0
    node = None if token is None else token.node
    own = None if node is None or node in without or node in unreachable else board.replica(node)
    if own is not None and obstacle(own, token, board, policy, now) is None:
        best, lead = own, _LOYALTY
        if load(own.name) <= lead:
            return Choice(own, fit)  # no other can be less busy by more than that
    ring = board.replicas if ring is None else ring
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

# --- zones, weights and speed ---

_OTHER_ZONE = 16
"""How much busier than a replica elsewhere those of the own zone must be before a read leaves it."""
_ALIKE = 2.0
"""A replica that takes up to this many times as long as the fastest one counts as being as fast."""
_READ_S = 0.001
"""What a read takes besides the way: where all ways are shorter than that, they hardly matter."""
_MEMORY_S = 5.0
"""The time constant of the mean of what was measured."""
_LEAST_SHARE = 1 / 64
"""How often a walk starts at a slow replica at the least, compared to a fast one of its weight."""
_ANYWAY = 4
"""One of this many walks takes a slow replica for a fast one where it starts."""
_BITS = 32
_GOLDEN = 2654435769  # 2**32 divided by the golden ratio: multiples of it spread evenly


class Preferences:
    """What makes a router prefer some replicas: their zones and weights, as given, and their speed, as measured.

    The speed is how long the observer's question takes: the way there and back, and how promptly the server
    answers. It is the same question everywhere, so that no replica is condemned for the long reads that it was
    given, and it is asked of all, whether they are read from or not, so that a recovery is found out. What it does
    not see, a slow disk or a full pool, shows in the load: how many reads are at work on a replica.

    Has no clock: it goes by the times of statuses. Only a change of them is work, a read takes what is ready.
    """

    def __init__(self) -> None:
        self._given: dict[str, tuple[str | None, float]] = {}
        self._speeds: dict[str, _Speed] = {}  # of the replicas that have a status
        self._is_outdated = False
        self._fastest_s = 0.0
        self._zone: str | None = None
        self._leaning: Leaning | None = None

    def add(self, name: str, zone: str | None, weight: float) -> None:
        """Add a node, or change what is known of one."""
        self._given[name] = zone, weight
        self._is_outdated = True

    def remove(self, name: str) -> None:
        """Remove a node."""
        self._given.pop(name, None)
        self._speeds.pop(name, None)
        self._is_outdated = True

    def note(self, status: ReplicaStatus | PrimaryStatus) -> None:
        """Note how long a replica took to answer."""
        if not isinstance(status, ReplicaStatus):
            self.forget(status.name)
            return
        took_s = max(0.0, status.answered_at - status.observed_at)
        if (speed := self._speeds.get(status.name)) is None:
            self._speeds[status.name] = _Speed(took_s, status.answered_at)
            self._is_outdated = True
        elif speed.note(took_s, status.answered_at, self._fastest_s):
            self._is_outdated = True

    def forget(self, name: str) -> None:
        """Forget how fast a node is: it is no replica at the moment, or another server."""
        if self._speeds.pop(name, None) is not None:
            self._is_outdated = True

    def leaning(self, zone: str | None) -> Leaning | None:
        """Return what reads from `zone` prefer; None where no replica is better than another."""
        if self._is_outdated or zone != self._zone:
            self._is_outdated, self._zone = False, zone
            self._leaning = self._reckoned()
        return self._leaning

    def _reckoned(self) -> Leaning | None:
        given = {name: self._given[name] for name in self._speeds if name in self._given}
        weights = {name: weight for name, (_, weight) in given.items() if weight > 0}
        heaviest = max(weights.values(), default=1.0)
        is_zoned = self._zone is not None and self._zone in {given[name][0] for name in weights}
        means_s = [mean_s for name in given if (mean_s := self._speeds[name].mean_s) is not None]
        self._fastest_s = min(means_s, default=0.0)
        prices = {
            name: _Price(
                weight / heaviest,
                self._speeds[name].slowness(self._fastest_s),
                _OTHER_ZONE if is_zoned and given[name][0] != self._zone else 0,
            )
            for name, weight in weights.items()
        }
        resting = given.keys() - weights.keys()
        if not resting and all(price == _SAME for price in prices.values()):
            return None
        groups = ([name for name in weights if prices[name].handicap == each] for each in (0, _OTHER_ZONE))
        return Leaning([_Group(names, prices) for names in groups if names], prices, resting)


class _Speed:
    """The mean of what a replica took to answer; of two measurements in a row the lesser one counts.

    So a pause of this process, which is measured along, does not count, and a replica that has become slow counts
    from the second measurement on. The mean is weighted by time (exponentially), not by the number of statuses:
    there are many while reads wait.
    """

    __slots__ = ("_at", "_last_s", "_used_s", "mean_s")

    def __init__(self, took_s: float, at: float) -> None:
        self._last_s, self._at, self._used_s = took_s, at, 0.0
        self.mean_s: float | None = None
        """In seconds; None before the second measurement."""

    def note(self, took_s: float, at: float, fastest_s: float) -> bool:
        """Note a measurement; return whether what follows from the mean has changed noticeably."""
        lesser_s, weight = min(took_s, self._last_s), 1 - math.exp(min(0.0, self._at - at) / _MEMORY_S)
        self._last_s, self._at = took_s, at
        if self.mean_s is None:
            self.mean_s = lesser_s
            return True
        self.mean_s += weight * (lesser_s - self.mean_s)
        low_s, high_s = sorted((self.mean_s, self._used_s))
        return high_s - low_s > (low_s + _READ_S) / 8 and (
            low_s <= fastest_s or high_s + _READ_S > _ALIKE * (fastest_s + _READ_S)
        )

    def slowness(self, fastest_s: float) -> float:
        """Return how much slower it is than what counts as fast, 1.0 if it is not; use the mean for that."""
        if self.mean_s is None:
            return 1.0
        self._used_s = self.mean_s
        return max(1.0, (self.mean_s + _READ_S) / (_ALIKE * (fastest_s + _READ_S)))


class _Price(NamedTuple):
    """What a read at a replica costs, compared to others."""

    weight: float
    """1.0: the highest."""
    slowness: float
    """1.0: as fast as the fastest."""
    handicap: float
    """Added to the load."""

    @property
    def share(self) -> float:
        """How often a walk starts there."""
        return self.weight * max(self.slowness**-4, _LEAST_SHARE)


_SAME = _Price(1.0, 1.0, 0)


class _Group:
    """Replicas that are equally near, and where in their ring reads start."""

    def __init__(self, names: Sequence[str], prices: Mapping[str, _Price]) -> None:
        self._names = names
        self._bounds = list(accumulate(prices[name].share for name in names))
        self._all: Sequence[ReplicaStatus] | None = None
        self._ring: Sequence[ReplicaStatus] = ()

    def start(self, where: float) -> int:
        """Return the place in the ring where a walk starts, for a number from 0.0 to 1.0."""
        return bisect(self._bounds, where * self._bounds[-1])

    def ring(self, board: Board) -> Sequence[ReplicaStatus]:
        """Return their statuses."""
        if self._all is not board.replicas:
            self._all = board.replicas
            self._ring = [status for name in self._names if (status := board.replica(name)) is not None]
        return self._ring


class Leaning:
    """What is preferred at the moment: zones by groups, and weight and speed by prices."""

    def __init__(self, groups: Sequence[_Group], prices: Mapping[str, _Price], resting: Collection[str]) -> None:
        self._groups = groups
        self._prices = prices
        self._resting = resting
        """Those that take no reads."""

    def choose(
        self,
        token: SessionToken | None,
        board: Board,
        policy: Policy,
        *,
        now: float,
        start: int,
        load: Callable[[str], float],
        without: Collection[str],
        unreachable: Collection[str],
    ) -> Choice:
        """Choose as the function `choose` does, and prefer what is near, fast and of great weight.

        The walk starts at a replica with a probability of its weight, and seldom at a slow one. The cost is how
        many reads are at work for its weight, and one more, times its slowness: as in Finagle's balancer
        `p2c_peak_ewma`. Where the walk starts an idle replica is taken, so that each gets its share of the reads,
        unless it is slow. A few reads do go to a slow one: thus its connections stay open, and its faults show
        before it is needed. One that was slow and is fast again gets no more than others do, and less where it is
        busy.

        Another zone's replica serves if none of the own zone is fit, or if those asked are considerably busier.
        """
        first, own = "", None if token is None else token.node
        if self._resting:
            unreachable = {*unreachable, *self._resting}

        def cost(name: str) -> float:
            weight, slowness, handicap = self._prices.get(name, _SAME)
            at_work = load(name) / weight
            if name == first and start % _ANYWAY == 0:
                return at_work + handicap
            # The share of reads is by weight where the walk starts; elsewhere the read would be one more.
            read = 1 if name in {first, own} else 1 / weight
            return (at_work + read) * slowness - 1 + handicap

        def chosen(start: int, ring: Sequence[ReplicaStatus]) -> Choice:
            return choose(
                token, board, policy,
                now=now, start=start, load=cost, without=without, unreachable=unreachable, ring=ring,
            )  # fmt: skip

        where = start * _GOLDEN % 2**_BITS / 2**_BITS
        best: Choice | None = None
        least = math.inf
        for group in self._groups:
            if not (ring := group.ring(board)):
                continue
            at = group.start(where) % len(ring)
            first = ring[at].name
            choice = chosen(at, ring)
            if choice.status is not None and (found := cost(choice.status.name)) < least:
                best, least = choice, found
            if least <= _OTHER_ZONE:
                break
        if best is not None:
            return best
        return chosen(start, [status for status in board.replicas if status.name not in self._resting])


# --- what may catch up, and what keeps a replica from serving ---


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
    vouched_lsn = status.vouched_lsn
    if vouched_lsn < board.covered_lsn or vouched_lsn < token.floor_on(status.name, status.incarnation):
        return Reason.NOT_CAUGHT_UP
    return None


def _is_fresh(status: ReplicaStatus, board: Board, max_age_s: float, now: float) -> bool:
    age_s = board.age_s(status, now)
    return age_s is not None and age_s <= max_age_s
