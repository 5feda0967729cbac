"""The guarantee, tried in a model of a whole cluster under virtual time; and wrong rules, each of them convicted.

The model knows what the core does not: which commits each node really shows. It takes every step at random from
a seed, so that a failure names the seed and happens again. A commit is one bit, and what a node shows, what a
session is owed, and what a history holds are sets of bits.
"""

# ruff: noqa: ARG002, D102 - wrong rules look at less than they are given, and say what they do in their classes

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import pytest

from rocket.consistency import (
    Board,
    Epoch,
    Incarnation,
    Lsn,
    Policy,
    PrimaryStatus,
    ReplicaStatus,
    SessionToken,
    choose,
    timeline_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

STEPS = 500
"""In the life of one cluster."""
REPLICAS_TRIED = 2


class Stale(AssertionError):
    """The guarantee is broken."""


# --- the cluster ---


class History:
    """The commits that one primary's WAL holds, in the order of their LSNs."""

    def __init__(self, parent: History | None = None, fork_lsn: int = 0) -> None:
        kept = 0 if parent is None else bisect_right(parent.lsns, fork_lsn)
        self.lsns: list[int] = [] if parent is None else parent.lsns[:kept]
        self.shows: list[int] = [0] if parent is None else parent.shows[: kept + 1]
        """What a node shows that shows the first so many commits."""
        self.epochs: list[Epoch | None] = [None] if parent is None else parent.epochs[: kept + 1]
        """The newest epoch whose row it shows then."""
        self.parent, self.fork_lsn = parent, fork_lsn

    def commit(self, lsn: int, bit: int = 0, epoch: Epoch | None = None) -> None:
        """Append a commit, of a session's write or of an epoch's row."""
        self.lsns.append(lsn)
        self.shows.append(self.shows[-1] | bit)
        self.epochs.append(epoch or self.epochs[-1])

    def up_to(self, lsn: int) -> int:
        """Return how many commits lie at or below an LSN."""
        return bisect_right(self.lsns, lsn)

    def holds(self, other: History, lsn: int) -> bool:
        """Tell whether another history is the same as this one up to an LSN."""
        history: History | None = self
        while history is not None and history is not other:
            if lsn > history.fork_lsn:
                return False
            history = history.parent
        return history is not None


@dataclass(slots=True, eq=False)
class Node:
    """A server as it really is."""

    name: str
    history: History
    incarnation: Incarnation
    have: int = 0
    """End of the WAL on its disk."""
    replay: int = 0
    shown: int = 0
    """How many commits are visible; one more than lie below the replay LSN while the next is being replayed."""
    base: int = 0
    """Where replay begins anew at the earliest."""
    receive: int | None = None
    streaming: bool = False
    paused: bool = False
    in_recovery: bool = True
    up: bool = True

    @property
    def is_replica(self) -> bool:
        return self.up and self.in_recovery

    @property
    def has_replayed_all(self) -> bool:
        return self.replay == self.have and self.shown == self.history.up_to(self.have)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A token that a client holds, and what it is owed for it."""

    token: SessionToken
    wrote: int
    """Its acknowledged writes."""
    saw: int
    """What its reads were shown."""


@dataclass(slots=True, eq=False)
class Session:
    """A client; it sends all the tokens that it holds with each of its requests, of which several may be on."""

    held: list[Held] = field(default_factory=list)

    def answered(self, carried: list[Held], held: Held) -> None:
        """Hold the token of an answer, as text, instead of those that its request brought."""
        sent = replace(held, token=SessionToken.parse(str(held.token)))
        self.held = [*(old for old in self.held if old not in carried), sent]


@dataclass(slots=True, eq=False)
class Request:
    """A read or a write on its way."""

    session: Session
    token: SessionToken | None
    carried: list[Held]
    failed: set[str] = field(default_factory=set)
    status: ReplicaStatus | None = None
    node: Node | None = None
    incarnation: Incarnation | None = None
    """Of the connection at work."""
    shown: int | None = None
    """What the read was shown; None until it was."""
    bit: int = 0
    lsn_inside: int = 0
    """The primary's LSN when the write was about to commit."""


# --- the rules under test: those of the core, and how routing applies them ---


class Rules:
    """What `rocket` does; those that are wrong override one of its parts."""

    weather: ClassVar[Mapping[str, float]] = {}
    """What happens more often, or less, in worlds that shall bring out something rare."""

    def token(self, token: SessionToken, *, retried: bool) -> SessionToken:
        """As the choice is made by it."""
        return token

    def board(self, board: Board, token: SessionToken) -> Board:
        """As the choice sees it."""
        return board

    def policy(self, policy: Policy) -> Policy:
        """As the choice follows it."""
        return policy

    def lsn(self, value: int) -> Lsn:
        """As it stands in a status."""
        return Lsn(value)

    def vouches_for(self, status: ReplicaStatus, incarnation: Incarnation) -> bool:
        return status.vouches_for(incarnation)

    def bound(self, replica: Node) -> int | None:
        """Taken after the read on the same connection, as in design fact F6."""
        if replica.receive is not None and replica.receive >= replica.replay and replica.streaming:
            return replica.receive
        return None

    def is_of(self, token: SessionToken, epoch: Epoch | None) -> bool:
        """Asked with the bound: within one incarnation a replica may have gone on to the next reign."""
        return token.epoch == epoch

    def after_replica_read(
        self, token: SessionToken, node: str, incarnation: Incarnation, bound: Lsn | None
    ) -> SessionToken:
        return token.after_replica_read(node, incarnation, bound)

    def merged(self, one: SessionToken, other: SessionToken) -> SessionToken:
        return one.merged_with(other)

    def waits_for_writes(self, token: SessionToken) -> bool:
        """A replica may have shown what the primary does not yet (F13)."""
        return token.node is not None

    def write_floor(self, *, inside: int, after: int) -> int:
        assert inside <= after
        return after


# --- the model ---


class World:
    """A cluster, an observer and some clients, each of which takes its steps at random."""

    def __init__(self, seed: int, rules: Rules) -> None:
        self.rules = rules
        self.events: Counter[str] = Counter()
        self._seed = seed
        self._step = 0
        self._random = random.Random(seed)
        self._now = 0.0
        self._policy = Policy(
            lease_s=self._random.choice([1.0, 5.0]),
            max_lag_bytes=self._random.choice([None, None, 40, 8]),
            max_lag_s=self._random.choice([None, None, 2.0]),
        )
        self._patience = self._random.choice([0.3, 0.8, 0.9])
        self._lives = 0
        self._bits = 0
        self._history = History()
        # Where the texts of LSNs become longer, and where their lower half is full.
        self._flush = self._random.choice([0x4, 0xE0, 0xFFFF_FFE0])
        self._epoch = self._begin_reign(1)
        self._primary_life = 0
        """Counts the lives of primaries: a connection is good for one."""
        self._in_flight = 0
        """What is flushed on the primary, so that replicas may show it, and not visible there yet (F13)."""
        self._primary = Node("node0", self._history, self._life(), in_recovery=False)
        self._nodes = [self._primary, *(self._new_replica(f"node{number}") for number in range(1, 4))]
        self._board = Board()
        self._on_the_way: dict[str, ReplicaStatus] = {}
        self._primary_on_the_way: PrimaryStatus | None = None
        self._seen_flush: int | None = None
        self._sessions = [Session() for _ in range(3)]
        self._reads: list[Request] = []
        self._writes: list[Request] = []

    def run(self, steps: int) -> None:
        """Live for some steps; raise `Stale`."""
        weights = [
            weight * self.rules.weather.get(action.__name__.strip("_"), 1.0) for action, weight in self._ACTIONS
        ]
        for action, _ in self._random.choices(self._ACTIONS, weights, k=steps):
            self._step += 1
            action(self)

    def _fail(self, what: str) -> None:
        raise Stale(f"seed {self._seed}, step {self._step}: {what}")

    def _some_replica(self) -> Node | None:
        replicas = [node for node in self._nodes if node.is_replica]
        return self._random.choice(replicas) if replicas else None

    def _some_nodes(self) -> list[Node]:
        chosen = self._random.getrandbits(len(self._nodes))
        return [node for number, node in enumerate(self._nodes) if chosen >> number & 1]

    def _life(self) -> Incarnation:
        self._lives += 1
        return Incarnation(f"{self._lives}@{1_700_000_000_000_000 + self._lives}")

    def _new_replica(self, name: str) -> Node:
        start = self._random.randint(max(0, self._flush - 30), self._flush)
        return Node(
            name,
            self._history,
            self._life(),
            have=start,
            replay=start,
            shown=self._history.up_to(start),
            base=start,
        )

    # The primary.

    def _begin_reign(self, timeline: int) -> Epoch:
        """Write the row of a new epoch, which is the first that rocket writes on a new primary."""
        self._epoch = Epoch(f"{timeline}-{self._random.getrandbits(40):010d}")
        self._flush += self._random.randint(1, 6)
        self._history.commit(self._flush, epoch=self._epoch)
        return self._epoch

    def _other_wal(self) -> None:
        if self._primary.up:
            self._flush += self._random.choice([1, 1, 2, 5, 20])

    def _lose_primary(self) -> None:
        self._primary.up = False
        self._primary_life += 1
        self._writes.clear()
        self._in_flight = 0
        for node in self._nodes:
            node.streaming = False

    def _restart_primary(self) -> None:
        if self._primary.up:
            if self._random.random() < 0.15:
                self._lose_primary()
        else:
            self._primary.up = True
            self.events["primary restarted"] += 1

    def _promote(self) -> None:
        node = self._some_replica()
        if node is None or node.history is not self._history or self._random.random() < 0.7:
            return
        self._lose_primary()
        self._primary = node
        self._flush = node.have  # it replays all that it has first
        self._history = node.history = History(self._history, node.have)
        node.in_recovery = False  # connections outlive this, and with them their incarnation (F14)
        node.receive = None
        self._begin_reign(timeline_of(self._epoch) + 1)
        self.events["promoted"] += 1

    # The replicas.

    def _receive(self) -> None:
        for node in self._some_nodes():
            if node.is_replica and node.streaming and node.receive is not None:
                least = min(node.receive, self._flush)
                node.receive = self._random.choice([self._flush, self._random.randint(least, self._flush)])
                node.have = max(node.have, node.receive)

    def _replay(self) -> None:
        for node in self._some_nodes():
            if node.is_replica and not node.paused:
                self._replay_on(node)

    def _replay_on(self, node: Node) -> None:
        lsns = node.history.lsns
        in_progress = node.shown > node.history.up_to(node.replay)
        if not in_progress and node.shown < node.history.up_to(node.have) and self._random.random() < 0.5:
            # A commit becomes visible before the replay LSN moves over it (F6).
            node.replay = self._random.choice(
                [node.replay, self._random.randint(node.replay, lsns[node.shown] - 1)]
            )
            node.shown += 1
            self.events["visible early"] += 1
        else:
            least = lsns[node.shown - 1] if in_progress else node.replay
            node.replay = self._random.choice([least, node.have, self._random.randint(least, node.have)])
            node.shown = max(node.shown, node.history.up_to(node.replay))

    def _pause_or_resume(self) -> None:
        node = self._some_replica()
        if node:
            node.paused = not node.paused and self._random.random() < 0.2

    def _crash_replica(self) -> None:
        """It comes back behind, in a new incarnation, and replays its own files first (F3)."""
        node = self._some_replica()
        if node:
            node.incarnation = self._life()
            node.receive, node.streaming, node.paused = None, False, False
            node.replay = self._random.choice(
                [node.base, node.replay, self._random.randint(node.base, node.replay)]
            )
            node.shown = node.history.up_to(node.replay)
            self.events["crashed"] += 1

    def _connect_or_lose_stream(self) -> None:
        node = self._some_replica()
        if node is None:
            return
        if node.streaming:
            node.streaming = self._random.random() < 0.96
        elif self._primary.up and node.has_replayed_all:
            if node.history is not self._history and self._random.random() < 0.8:
                # Else a diverged replica takes the new primary's WAL for its own, and shows none of it (F11).
                return
            node.streaming = True
            if node.receive is None:  # it begins with the segment
                node.receive = self._random.randint(max(0, node.have - 16), node.have)

    def _fetch_from_archive(self) -> None:
        """A replica whose stream breaks off goes on with what was archived; its receive LSN stays."""
        node = self._some_replica()
        if node and node.history is self._history and (not node.streaming or self._random.random() < 0.2):
            node.streaming = False
            node.have = self._random.randint(min(node.have, self._flush), self._flush)

    def _follow(self) -> None:
        """A replica is pointed to the promoted one, without a restart, if it has no WAL beyond the fork."""
        node = self._some_replica()
        if node and node.history is not self._history and self._history.holds(node.history, node.have):
            node.history = self._history
            node.receive, node.streaming = None, False
            self.events["followed"] += 1

    def _rebuild(self) -> None:
        """A lost primary, a diverged replica, or any other is made anew under its name."""
        node = self._random.choice(self._nodes)
        if node is not self._primary and self._primary.up and self._random.random() < 0.5:
            self._nodes[self._nodes.index(node)] = self._new_replica(node.name)
            self.events["rebuilt"] += 1

    # The observer.

    def _pass_time(self) -> None:
        self._now += self._random.choice([0.01, 0.05, 0.2, 0.5])

    def _observe(self) -> None:
        """Ask some nodes; what they answer is on its way until it is published, and may be late."""
        for node in self._some_nodes():
            if not node.is_replica:
                self._on_the_way.pop(node.name, None)
                self._board.forget(node.name)
            elif node.name not in self._on_the_way:
                self._on_the_way[node.name] = ReplicaStatus(
                    node.name,
                    self.rules.lsn(node.replay),
                    node.incarnation,
                    self._now,
                    None if node.receive is None else Lsn(node.receive),
                    node.streaming,
                    node.history.epochs[node.shown],
                )

    def _publish(self) -> None:
        for node in self._some_nodes():
            if node.name in self._on_the_way:
                self._board.publish(self._on_the_way.pop(node.name))

    def _observe_primary(self) -> None:
        if self._primary_on_the_way is not None:
            self._board.publish_primary(self._primary_on_the_way)
            self._seen_flush = int(self._primary_on_the_way.flush_lsn)
            self._primary_on_the_way = None
        elif self._primary.up:
            self._primary_on_the_way = PrimaryStatus(Lsn(self._flush), self._now, self._epoch)

    # The clients.

    def _request(self, session: Session) -> Request:
        """Return a request with all tokens that the session holds, of which those of the latest reign count."""
        carried = list(session.held)
        token: SessionToken | None = None
        latest = max((held.token.timeline for held in carried), default=0)
        for held in carried:
            if held.token.timeline == latest:
                token = held.token if token is None else self.rules.merged(token, held.token)
        if len(carried) > 1:
            self.events["merged"] += 1
        return Request(session, token, carried)

    def _begin_write(self) -> None:
        if not self._primary.up or len(self._writes) > 2:
            return
        write = self._request(self._random.choice(self._sessions))
        write.lsn_inside = self._flush
        write.bit = 1 << self._bits
        self._bits += 1
        self._flush += self._random.choice([1, 1, 2, 3, 9])
        self._history.commit(self._flush, write.bit)
        self._in_flight |= write.bit
        self._writes.append(write)

    def _end_write(self) -> None:
        if not self._writes:
            return
        write = self._writes.pop(self._random.randrange(len(self._writes)))
        self._in_flight &= ~write.bit
        floor = Lsn(self.rules.write_floor(inside=write.lsn_inside, after=self._flush))
        if self._random.random() < 0.05:
            floor = Lsn.UNKNOWN  # the connection was lost before it was told
        token = write.token
        if token is None or token.epoch != self._epoch:
            token = SessionToken(self._epoch, floor)
        else:
            if token.is_beyond(Lsn(self._flush)):
                self._fail(f"{token} is refused")
            token = token.after_write(floor)
        wrote, saw = _owed(write.carried)
        write.session.answered(write.carried, Held(token, wrote | write.bit, saw))
        self.events["written"] += 1

    def _begin_read(self) -> None:
        session = self._random.choice(self._sessions)
        if len(self._reads) < 4:
            self._reads.append(read := self._request(session))
            self._send(read)

    def _go_on_reading(self) -> None:
        if self._reads:
            read = self._random.choice(self._reads)
            if read.node is None or read.shown is not None:
                self._send(read) if read.node is None else self._end_read(read)
            elif read.status is None:
                self._show_on_primary(read)
            elif read.incarnation != read.node.incarnation:
                self._try_elsewhere(read)
            else:
                node = read.node
                read.shown = node.history.shows[-1 if node is self._primary else node.shown]

    def _send(self, read: Request) -> None:
        """Choose a node and take a connection to it."""
        read.shown = read.status = read.node = None
        if read.token is not None and len(read.failed) < REPLICAS_TRIED:
            read.status = choose(
                self.rules.token(read.token, retried=bool(read.failed)),
                self.rules.board(self._board, read.token),
                self.rules.policy(self._policy),
                now=self._now,
                start=self._random.getrandbits(8),
                load=lambda _name: self._random.randrange(12),
                without=read.failed,
            ).status
        if read.status is None:
            if read.token is not None and self._random.random() < self._patience:
                self.events["waited"] += 1  # for a replica
            elif self._primary.up:
                read.node, read.incarnation = self._primary, Incarnation(str(self._primary_life))
            else:
                self._reads.remove(read)  # a 503
            return
        self._check_age_and_lag(read.status)
        node = next(node for node in self._nodes if read.status.name == node.name)
        if node.up and self.rules.vouches_for(read.status, node.incarnation):
            read.node, read.incarnation = node, node.incarnation
        else:
            read.failed.add(node.name)
            self.events["not vouched for"] += 1

    def _check_age_and_lag(self, status: ReplicaStatus) -> None:
        if self._now - status.observed_at > self._policy.lease_s:
            self._fail(f"a read from {status.name}, which was not heard of within the lease")
        bound = self._policy.max_lag_bytes
        if bound is not None and self._seen_flush is not None and self._seen_flush - status.replay_lsn > bound:
            self._fail(f"a read from {status.name}, which lies beyond max_lag")

    def _show_on_primary(self, read: Request) -> None:
        if read.incarnation != str(self._primary_life):
            self._reads.remove(read)  # a 503
            return
        if read.token is not None and read.token.epoch != self._epoch:
            read.token = None  # exchanged
        if read.token is not None and self.rules.waits_for_writes(read.token):
            self._in_flight = 0
        read.shown = self._history.shows[-1] & ~self._in_flight

    def _try_elsewhere(self, read: Request) -> None:
        assert read.node is not None
        read.failed.add(read.node.name)
        self.events["retried"] += 1
        self._send(read)

    def _end_read(self, read: Request) -> None:
        """Take the bound on the same connection, answer, and judge the answer."""
        assert read.node is not None
        assert read.shown is not None
        if read.status is None:
            if read.incarnation != str(self._primary_life):
                self._reads.remove(read)  # a 503
                return
            token = read.token or SessionToken(self._epoch, Lsn(0))
            if token.is_beyond(Lsn(self._flush)):
                self._fail(f"{token} is refused")
            token = token.after_primary_read(Lsn(self._flush))
            self.events["read on the primary"] += 1
        else:
            node = read.node
            assert read.token is not None
            if (
                not node.is_replica
                or node not in self._nodes
                or read.incarnation != node.incarnation
                or not self.rules.is_of(read.token, node.history.epochs[node.shown])
            ):
                self._try_elsewhere(read)
                return
            bound = self.rules.bound(node)
            token = self.rules.after_replica_read(
                read.token, node.name, node.incarnation, None if bound is None else Lsn(bound)
            )
            self._count_read(read.token, token)
        self._reads.remove(read)
        wrote, saw = _owed(read.carried)
        self._judge(read, wrote, saw)
        read.session.answered(read.carried, Held(token, wrote, saw | read.shown))

    def _count_read(self, before: SessionToken, after: SessionToken) -> None:
        self.events["read on a replica"] += 1
        self.events["read without a bound"] += after.read_floor == Lsn.UNKNOWN
        if before.node is not None:
            same = (before.node, before.incarnation) == (after.node, after.incarnation)
            self.events["stayed" if same else "moved"] += 1

    def _judge(self, read: Request, wrote: int, saw: int) -> None:
        assert read.node is not None
        lacks = self._history.shows[-1] & ~(read.shown or 0)
        if lacks & wrote:
            self._fail(f"a read on {read.node.name} lacks a write of its session; its token was {read.token}")
        if lacks & saw:
            self._fail(f"a read on {read.node.name} lacks what its session saw; its token was {read.token}")

    _ACTIONS: tuple[tuple[Callable[[World], None], int], ...] = (
        (_other_wal, 4),
        (_restart_primary, 4),
        (_promote, 2),
        (_receive, 110),
        (_replay, 110),
        (_pause_or_resume, 12),
        (_crash_replica, 5),
        (_connect_or_lose_stream, 90),
        (_fetch_from_archive, 20),
        (_follow, 8),
        (_rebuild, 3),
        (_pass_time, 15),
        (_observe, 120),
        (_publish, 120),
        (_observe_primary, 25),
        (_begin_write, 16),
        (_end_write, 20),
        (_begin_read, 60),
        (_go_on_reading, 300),
    )


def _owed(carried: list[Held]) -> tuple[int, int]:
    wrote = saw = 0
    for held in carried:
        wrote |= held.wrote
        saw |= held.saw
    return wrote, saw


# --- the rules hold ---

WORLDS = 250
"""In each of eight tests: a million steps in all."""


def simulate(rules: Callable[[], Rules], seeds: Iterable[int]) -> Counter[str]:
    """Let a world live for each seed; return what happened in all of them, or raise `Stale`."""
    events: Counter[str] = Counter()
    for seed in seeds:
        world = World(seed, rules())
        world.run(STEPS)
        events += world.events
    return events


@pytest.mark.parametrize("first", range(0, 8 * WORLDS, WORLDS))
def test_no_read_is_stale_in_any_of_many_worlds(first: int) -> None:
    """Whatever happens, a read lacks nothing that its session wrote or saw and that is still there."""
    events = simulate(Rules, range(first, first + WORLDS))

    # Nothing that the model is for has stayed away.
    rare = {
        "merged": 1_000,
        "written": 500,
        "read on a replica": 2_000,
        "read on the primary": 1_000,
        "read without a bound": 200,
        "waited": 1_000,
        "stayed": 1_000,
        "moved": 250,
        "retried": 50,
        "not vouched for": 100,
        "visible early": 1_000,
        "crashed": 250,
        "rebuilt": 50,
        "promoted": 25,
        "followed": 10,
        "primary restarted": 10,
    }
    assert {} == {event: events[event] for event, least in rare.items() if events[event] < least}


def test_the_same_seed_makes_the_same_world() -> None:
    """What is found once is found again."""
    assert simulate(Rules, [7]) == simulate(Rules, [7])
    assert simulate(Rules, [7]) != simulate(Rules, [8])


# --- and wrong rules do not: the model can fail ---


class StatusKeptAcrossARestart(Rules):
    """The status of a replica's earlier life vouches for connections of the next one."""

    def vouches_for(self, status: ReplicaStatus, incarnation: Incarnation) -> bool:
        return True


class ReadsRaiseNoFloor(Rules):
    """Read-your-writes alone."""

    def after_replica_read(
        self,
        token: SessionToken,
        node: str,
        incarnation: Incarnation,
        bound: Lsn | None,
    ) -> SessionToken:
        return replace(token, node=node, incarnation=incarnation)


class NoBoundIsNoFloor(Rules):
    """What could not be bounded is taken for nothing new."""

    def after_replica_read(
        self, token: SessionToken, node: str, incarnation: Incarnation, bound: Lsn | None
    ) -> SessionToken:
        return token.after_replica_read(node, incarnation, token.read_floor if bound is None else bound)


class BoundIsTheReplayLsn(Rules):
    """A commit that is visible before the replay LSN moves over it escapes (F6)."""

    def bound(self, replica: Node) -> int | None:
        return replica.replay


class BoundWithoutAStream(Rules):
    """The receive LSN stays where the stream has ended, and replay goes on with what was archived."""

    weather: ClassVar = {
        "fetch_from_archive": 8,
        "replay": 0.4,
        "begin_write": 2,
        "end_write": 2,
        "promote": 0,
        "crash_replica": 0.3,
    }

    def bound(self, replica: Node) -> int | None:
        return replica.receive if replica.receive is not None and replica.receive >= replica.replay else None


class BoundBelowTheReplayLsn(Rules):
    """A stream begins before what a replica has replayed of its own files."""

    weather: ClassVar = {"crash_replica": 3, "receive": 0.2, "promote": 0}

    def bound(self, replica: Node) -> int | None:
        return replica.receive if replica.streaming else None


class MergeKeepsTheLife(Rules):
    """What was read elsewhere does not bind on the replica of one of the two."""

    def merged(self, one: SessionToken, other: SessionToken) -> SessionToken:
        return replace(one.merged_with(other), node=one.node, incarnation=one.incarnation)


class MergeDropsTheNode(Rules):
    """Nothing tells any more that replicas were read, so nobody waits on the primary."""

    def merged(self, one: SessionToken, other: SessionToken) -> SessionToken:
        merged = one.merged_with(other)
        return merged if merged.incarnation else replace(merged, node=None)


class EpochIgnored(Rules):
    """An LSN of one history is compared with one of another."""

    def board(self, board: Board, token: SessionToken) -> Board:
        blind = Board()
        for status in board.replicas:
            blind.publish(replace(status, epoch=token.epoch))
        if board.primary is not None:
            blind.publish_primary(board.primary)
        return blind

    def is_of(self, token: SessionToken, epoch: Epoch | None) -> bool:
        return True


class EpochOfTheStatusAlone(Rules):
    """A replica may have gone on to the next reign since its last status, without a restart."""

    weather: ClassVar = {"promote": 4, "follow": 10, "observe": 0.5, "rebuild": 0.3}

    def is_of(self, token: SessionToken, epoch: Epoch | None) -> bool:
        return True


class FloorDroppedOnRetry(Rules):
    """Any replica will do when the first has failed."""

    def token(self, token: SessionToken, *, retried: bool) -> SessionToken:
        return SessionToken(token.epoch, Lsn(0)) if retried else token


class OffByOne(Rules):
    """A byte before the floor is thought to be enough."""

    def token(self, token: SessionToken, *, retried: bool) -> SessionToken:
        return replace(
            token, write_floor=self._before(token.write_floor), read_floor=self._before(token.read_floor)
        )

    def _before(self, floor: Lsn) -> Lsn:
        return floor if floor in {0, Lsn.UNKNOWN} else Lsn(floor - 1)


class LeaseAndLagIgnored(Rules):
    """However old a status is, and however far behind its replica, it serves."""

    def policy(self, policy: Policy) -> Policy:
        return Policy(lease_s=float("inf"), max_lag_bytes=None)


class TextLsn(Lsn):
    """An LSN that compares as its text does."""

    __slots__ = ()

    def __lt__(self, other: int) -> bool:
        return str(self) < str(Lsn(other))


class LsnsComparedAsText(Rules):
    """`0/9` is thought to be beyond `0/10`."""

    def lsn(self, value: int) -> Lsn:
        return TextLsn(value)


class FallbackWithoutWaiting(Rules):
    """A replica has shown what the primary does not yet (F13)."""

    def waits_for_writes(self, token: SessionToken) -> bool:
        return False


class FloorTakenInsideTheTransaction(Rules):
    """As published: it lies before the commit record (F1)."""

    def write_floor(self, *, inside: int, after: int) -> int:
        return inside


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        (StatusKeptAcrossARestart, "lacks"),
        (ReadsRaiseNoFloor, "lacks what its session saw"),
        (NoBoundIsNoFloor, "lacks what its session saw"),
        (BoundIsTheReplayLsn, "lacks what its session saw"),
        (BoundWithoutAStream, "lacks what its session saw"),
        (BoundBelowTheReplayLsn, "lacks what its session saw"),
        (MergeKeepsTheLife, "lacks what its session saw"),
        (MergeDropsTheNode, "lacks what its session saw"),
        (EpochIgnored, "lacks"),
        (EpochOfTheStatusAlone, "lacks what its session saw"),
        (FloorDroppedOnRetry, "lacks"),
        (OffByOne, "lacks"),
        (LeaseAndLagIgnored, "beyond max_lag|within the lease"),
        (LsnsComparedAsText, "lacks"),
        (FallbackWithoutWaiting, "lacks what its session saw"),
        (FloorTakenInsideTheTransaction, "lacks a write of its session"),
    ],
)
def test_wrong_rules_are_convicted(wrong: type[Rules], verdict: str) -> None:
    """In one of the first few thousand worlds at the latest a read is stale."""
    with pytest.raises(Stale, match=verdict):
        simulate(wrong, range(8_000))


@pytest.mark.parametrize(
    "weather",
    [BoundWithoutAStream.weather, BoundBelowTheReplayLsn.weather, EpochOfTheStatusAlone.weather],
)
def test_right_rules_are_acquitted_in_any_weather(weather: Mapping[str, float]) -> None:
    """It is the wrong rule that was convicted, not its world."""

    class UnderThatWeather(Rules):
        pass

    UnderThatWeather.weather = weather
    assert simulate(UnderThatWeather, range(WORLDS))["read on a replica"] > 100
