"""A model of a whole cluster under virtual time: servers, the observers of two processes, and their clients.

It knows what the core does not: which commits each node really shows. It takes every step at random from a seed,
so that a failure names the seed and happens again. A commit is one bit, and what a node shows, what a session
must see, and what a history holds are sets of bits. What processes do in `rocket.routing` they do here in small;
all that they decide is decided by the core, or by the `Rules` under test.
"""

# ruff: noqa: ARG002, D102 - rules look at less than they are given, and say what they do in their classes

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

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
    merged,
    rank_of,
    switch_point,
    timeline_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

STEPS = 500
"""In the life of one cluster."""
REPLICAS_TRIED = 2


class Stale(AssertionError):
    """The guarantee is broken."""


# --- the cluster ---


class History:
    """The WAL that a node has applied: commits in the order of their LSNs, and where it came from."""

    def __init__(self, timeline: int, parent: History | None = None, fork_lsn: int = 0) -> None:
        kept = 0 if parent is None else bisect_right(parent.lsns, fork_lsn)
        self.timeline = timeline
        self.lsns: list[int] = [] if parent is None else parent.lsns[:kept]
        self.shows: list[int] = [0] if parent is None else parent.shows[: kept + 1]
        """What a node shows that shows this many commits."""
        self.rows: list[Epoch | None] = [None] if parent is None else parent.rows[: kept + 1]
        """The newest epoch whose row it shows then."""
        self.parent, self.fork_lsn = parent, fork_lsn
        self.checkpoints: list[int] = []
        """Of this timeline."""
        self.spliced: History | None = None
        """Where the WAL beyond the fork was taken from, although that is not what the parent's led to."""
        self.page_lsn = 0
        """From here on that has the page of the newest epoch's row written whole, be it for a hint bit."""

    def commit(self, lsn: int, bit: int = 0, row: Epoch | None = None) -> None:
        """Append a commit, of a session's write or of an epoch's row."""
        self.lsns.append(lsn)
        self.shows.append(self.shows[-1] | bit)
        self.rows.append(row or self.rows[-1])

    def up_to(self, lsn: int) -> int:
        """Return how many commits lie at or below an LSN."""
        return bisect_right(self.lsns, lsn)

    def holds(self, other: History, lsn: int) -> bool:
        """Return whether another history is the same as this one up to an LSN."""
        history: History | None = self
        while history is not None and history is not other:
            if lsn > history.fork_lsn:
                return False
            history = history.parent
        return history is not None

    def lineage(self) -> Iterator[History]:
        """Go through this history and those that it came from."""
        history: History | None = self
        while history is not None:
            yield history
            history = history.parent

    def has_a_twin_of(self, timeline: int, other: History) -> bool:
        """Return whether a timeline of this history has the number of another one, which another history has."""
        return any(own.timeline == timeline and own not in other.lineage() for own in self.lineage())

    def rows_at(self, lsn: int) -> list[Epoch | None]:
        """Return the epochs whose rows were written up to an LSN."""
        return self.rows[1 : self.up_to(lsn) + 1]

    def is_last_of_its_timeline(self, epoch: Epoch) -> bool:
        """Return whether no later epoch of the same timeline was written here."""
        return not any(
            row is not None and timeline_of(row) == timeline_of(epoch) and rank_of(row) > rank_of(epoch)
            for row in self.rows
        )

    def knows(self, epoch: Epoch) -> bool:
        """Return whether the row of an epoch was ever written here."""
        return epoch in self.rows

    def timeline_at(self, lsn: int) -> int:
        """Return the timeline that a node applies which has replayed up to an LSN.

        It enters a timeline with the record at its fork. A foreign tail does without that, and stays in its own.
        """
        history = self
        while history.parent is not None and lsn <= history.fork_lsn:
            history = history.parent
        return history.timeline

    def file(self) -> str:
        """Return the timeline's history file, as Postgres writes it."""
        lines: list[str] = []
        history = self
        while history.parent is not None:
            if history.parent.timeline != history.timeline:  # else it was set back: that is written nowhere
                fork_lsn = Lsn(history.fork_lsn)
                lines.append(f"{history.parent.timeline}\t{fork_lsn}\tno recovery target specified")
            history = history.parent
        return "\n".join(reversed(lines))

    # A node with a foreign tail that ends where a record of another history begins may go on with that.

    def take_over(self, lsn: int) -> None:
        """Append what the other history has beyond the splice, up to an LSN."""
        other = self.spliced
        if other is not None:
            done = max(self.lsns[-1] if self.lsns else 0, self.fork_lsn)
            before = other.rows[other.up_to(done)]
            for number in range(other.up_to(done), other.up_to(lsn)):
                row, lsn_of_it = other.rows[number + 1], other.lsns[number]
                self.commit(
                    lsn_of_it,
                    other.shows[number + 1] & ~other.shows[number],
                    row if row != before or lsn_of_it >= self.page_lsn else None,
                )
                before = row

    @property
    def leads_astray(self) -> bool:
        """Whether it goes on with WAL of a timeline that was never entered, of which the node knows the number."""
        return self.spliced is not None and self.spliced.timeline != self.timeline

    @property
    def fatal_lsn(self) -> int | None:
        """The checkpoint that a node with a foreign tail dies of: it names a timeline that was never entered."""
        if self.spliced is None or not self.leads_astray:
            return None
        return next((lsn for lsn in self.spliced.checkpoints if lsn > self.fork_lsn), None)


@dataclass(slots=True, eq=False)
class Node:
    """A server as it really is."""

    name: str
    history: History
    incarnation: Incarnation
    """Of its startup process; on a primary of its server. Outlives a promotion, as connections do (F14)."""
    system_id: int = 1
    started: int = 0
    """When its server was started."""
    had: int = 0
    """What it had then."""
    is_quiet: bool = False
    """Whether nothing is written there until it was observed."""
    have: int = 0
    """End of the WAL on its disk; on a primary the flush LSN."""
    replay: int = 0
    shown: int = 0
    """How many commits are visible; one more than lie below the replay LSN while the next is being replayed."""
    base: int = 0
    """The minimum recovery point, as its control file notes it: after a crash it shows nothing before this."""
    noted_timeline: int = 1
    """The timeline that it applied then."""
    receive: int | None = None
    upstream: Node | None = None
    """The server that it streams from."""
    received_timeline: int = 0
    """The timeline that it last asked for."""
    newest_timeline: int = 1
    """Of which it has a history file."""
    paused: bool = False
    in_recovery: bool = True
    up: bool = True
    frozen: bool = False
    epoch: Epoch | None = None
    """Of a primary, once it has a name."""
    in_flight: int = 0
    """What is flushed on a primary, so that replicas may show it, and not visible there yet (F13)."""

    @property
    def is_replica(self) -> bool:
        return self.up and self.in_recovery

    @property
    def works(self) -> bool:
        return self.up and not self.frozen

    @property
    def takes_writes(self) -> bool:
        return self.works and not self.in_recovery

    @property
    def has_replayed_all(self) -> bool:
        return self.replay == self.have and self.shown == self.history.up_to(self.have)

    @property
    def applied(self) -> int:
        """End of the last record that it has begun to apply."""
        return max(self.replay, self.history.lsns[self.shown - 1] if self.shown else 0)

    @property
    def row(self) -> Epoch | None:
        """The newest epoch whose row it shows."""
        return self.history.rows[self.shown]

    @property
    def streamed_timeline(self) -> int | None:
        """What pg_stat_wal_receiver shows as received_tli, while it streams."""
        return None if self.upstream is None else self.received_timeline

    @property
    def understands(self) -> bool:
        """Whether what it streams goes on from what it has; else its replay stands still."""
        return self.upstream is not None and self.upstream.history in (self.history, self.history.spliced)


# --- the clients ---


@dataclass(frozen=True, slots=True)
class Lost:
    """What a session learns of a lost tail."""

    writes: bool


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A token that a client holds, and what its reads have to show."""

    token: SessionToken
    wrote: int
    """Its acknowledged writes."""
    seen: int
    """What its reads were shown."""


@dataclass(slots=True, eq=False)
class Session:
    """A client; it sends all the tokens that it holds with each of its requests, of which several may be on."""

    held: list[Held] = field(default_factory=list)

    def forget(self, carried: list[Held]) -> None:
        """Do without tokens: they were refused."""
        self.held = [old for old in self.held if old not in carried]

    def answered(self, carried: list[Held], held: Held) -> None:
        """Hold the token of an answer, as text, instead of those that its request brought."""
        sent = replace(held, token=SessionToken.parse(str(held.token)))
        self.held = [*(old for old in self.held if old not in carried), sent]


@dataclass(slots=True, eq=False)
class Request:
    """A read or a write on its way."""

    session: Session
    process: Process
    carried: list[Held]
    tokens: Sequence[SessionToken]
    """The merged token of the latest epoch first."""
    failed: set[str] = field(default_factory=set)
    status: ReplicaStatus | None = None
    node: Node | None = None
    incarnation: Incarnation | None = None
    """Of the connection at work."""
    epoch: Epoch | None = None
    """The epoch of the primary at work."""
    lost: Lost | None = None
    shown: int | None = None
    """What the read was shown; None until it was."""
    bit: int = 0
    lsn_inside: int = 0
    """The primary's LSN when the write was about to commit."""
    is_global: bool = False
    """Whether a read must see all that was acknowledged; until `asked`, the primary has to say what that is."""
    asked: bool = False
    committed: int = 0
    """What was acknowledged when it began, to whichever session, and is known to the primary that was asked."""
    in_order: int = 0
    """What earlier ones have shown on replicas."""

    @property
    def token(self) -> SessionToken | None:
        return self.tokens[0] if self.tokens else None

    @property
    def is_connected(self) -> bool:
        """Whether its connection has not ended."""
        return self.node is not None and self.node.up and self.node.incarnation == self.incarnation


class Process:
    """One of several that route: a board, what its observer has on the way, and what the judge noted of it."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.replicas_on_the_way: dict[str, ReplicaStatus] = {}
        self.primaries_on_the_way: dict[str, PrimaryStatus] = {}
        self.streamed: dict[str, tuple[Incarnation, Epoch, Lsn]] = {}
        self.cut_off = ""
        """The node that the network keeps from it."""
        self.seen_rank = (0, 0)
        """Of the newest epoch that was published here."""
        self.seen_current: dict[Epoch, float] = {}
        self.seen_flush: int | None = None
        self.asked: int | None = None
        """What the primary has answered when it was asked last for all that is committed."""


# --- the rules under test: those of the core, and how routing applies them ---


class Rules:
    """What `rocket` does; those that are wrong override one of its parts."""

    weather: ClassVar[Mapping[str, float]] = {}
    """What happens more often, or less, in worlds that shall bring out something rare."""
    clients: ClassVar[int] = 3
    by_data: ClassVar[bool] = False
    """Whether only what reads lack is judged, and not already what would let a later one lack something."""

    # The observer.

    def new_board(self) -> Board:
        return Board()

    def system_id(self, node: Node) -> int | None:
        """As it stands in a status."""
        return node.system_id

    def started(self, node: Node) -> int | None:
        """As it stands in a status."""
        return node.started

    def has_lost(self, board: Board, status: PrimaryStatus) -> bool:
        """Asked before a primary's status is published: then it begins another epoch."""
        return board.has_lost(status)

    def is_observed(self, status: PrimaryStatus, node: Node) -> bool:
        """Whether a primary that is connected to runs as it did when it was observed."""
        return status.started == node.started

    def lsn(self, value: int) -> Lsn:
        """As it stands in a status."""
        return Lsn(value)

    def epoch(self, node: Node) -> Epoch | None:
        """Which epoch a replica is taken to follow."""
        return None if node.row is None or node.noted_timeline != timeline_of(node.row) else node.row

    def streamed_lsn(self, node: Node) -> Lsn | None:
        """Remembered of a replica that streams the epoch's timeline."""
        return Lsn(node.replay)

    # The choice.

    def token(self, token: SessionToken, *, retried: bool) -> SessionToken:
        """As the choice is made by it."""
        return token

    def board(self, board: Board, token: SessionToken) -> Board:
        """As the choice sees it."""
        return board

    def policy(self, policy: Policy) -> Policy:
        """As the choice follows it."""
        return policy

    def vouches_for(self, status: ReplicaStatus, incarnation: Incarnation) -> bool:
        return status.vouches_for(incarnation)

    def all_committed(self, process: Process, primary: Node) -> int:
        """Asked after a read began which must see all that was acknowledged."""
        return primary.have

    # After a read.

    def bound(self, replica: Node) -> int | None:
        """Taken after the read on the same connection, as in design fact F6."""
        if replica.receive is not None and replica.receive >= replica.replay and replica.upstream is not None:
            return replica.receive
        return None

    def shows(self, replica: Node, epoch: Epoch) -> bool:
        """Asked with the bound, where it does not stream: it may have gone on to the next epoch."""
        return replica.streamed_timeline is not None or replica.row == epoch

    def streams(self, replica: Node, epoch: Epoch) -> bool:
        """Asked with it as well: the bound is an LSN of what is streamed."""
        return replica.streamed_timeline in (None, timeline_of(epoch))

    def after_replica_read(
        self, token: SessionToken, node: str, incarnation: Incarnation, bound: Lsn | None
    ) -> SessionToken:
        return token.after_replica_read(node, incarnation, bound)

    def still_current(self, board: Board, epoch: Epoch, now: float, lease_s: float) -> bool:
        """Asked after whatever a primary has done."""
        return board.is_current_epoch(epoch, now, lease_s)

    # Tokens.

    def merged(self, tokens: Iterable[SessionToken]) -> tuple[SessionToken, ...]:
        return merged(tokens)

    def is_of_later_epoch(self, token: SessionToken, epoch: Epoch) -> bool:
        """Then this is no primary any more."""
        return token.timeline > timeline_of(epoch)

    def knows(self, node: Node, epoch: Epoch) -> bool:
        """Whether a primary has the row of a token's epoch; else the token is refused."""
        return node.history.knows(epoch)

    def lost(self, token: SessionToken, history_file: str) -> Lost | None:
        """What is said to a session that brings a token of an earlier epoch, the last of its timeline."""
        switch_lsn = switch_point(history_file, token.timeline)
        if switch_lsn is not None and token.highest_floor <= switch_lsn:
            return None
        return Lost(bool(token.write_floor) and (switch_lsn is None or token.write_floor > switch_lsn))

    def lost_of_both(self, one: Lost | None, other: Lost | None) -> Lost | None:
        """What is said to a session that brings several tokens of earlier epochs."""
        if one is None or other is None:
            return one or other
        return Lost(one.writes or other.writes)

    def waits_for_writes(self, tokens: Iterable[SessionToken]) -> bool:
        """A replica may have shown what the primary does not yet (F13)."""
        return any(token.node is not None for token in tokens)

    def write_floor(self, *, inside: int, after: int) -> int:
        assert inside <= after
        return after


# --- the model ---

_PATIENT = 0.5
"""How often a request that a frozen or lost server keeps waiting goes on waiting."""


class World:
    """A cluster, two processes and some clients, each of which takes its steps at random.

    A promotion takes any replica: one that has all of it or not, or follows an earlier epoch. Before it the old
    primary is fenced, or it is frozen and may be thawed after it; then it goes on answering as what it was. Tokens
    stand even that, with one exception, which happens only in the weather "unfenced": another client writes on the
    new primary before rocket has seen it, while the old one was not fenced. A replica that shows that write need
    not show whose it is.

    A replica may be promoted on its way to a new timeline, before it has reached the fork; it may enter one with
    WAL beyond the fork received, and not replayed; and one with a foreign tail may find that this ends where a
    record of the new timeline begins, and go on with that, until it dies of a checkpoint or does not start again.
    What stays away is that two timelines have one number in that: see `Played`.
    """

    def __init__(self, seed: int, rules: Rules) -> None:
        self.rules = rules
        self.events: Counter[str] = Counter()
        self._seed = seed
        self._step = 0
        self._random = random.Random(seed)
        self._now = 0.0
        self._policy = Policy(
            lease_s=self._random.choice([0.4, 1.0, 5.0]),
            max_lag_bytes=self._random.choice([None, None, 40, 8]),
            max_lag_s=self._random.choice([None, None, 2.0]),
            primary_lease_s=self._random.choice([0.4, 1.0, 5.0]),
        )
        self._patience = self._random.choice([0.3, 0.8, 0.95])
        self._shares_history_files = self._random.random() < 0.7
        """As with a shared archive: no two promotions make the same timeline."""
        self._incarnations = 0
        self._bits = 0
        # Where the texts of LSNs become longer, and where their lower half is full.
        start = self._random.choice([0x4, 0xE0, 0xFFFF_FFE0])
        self._histories: dict[Epoch, History] = {}
        """Of each epoch that has a name."""
        self._leader = Node("node0", History(1), self._life(), have=start, in_recovery=False)
        """The primary that was promoted last; others that answer as one are to be left alone."""
        self._name_epoch(self._leader)
        self._nodes = [self._leader, *(self._new_replica(f"node{number}") for number in range(1, 4))]
        for node in self._nodes:
            if node.in_recovery and self._chance(0.8):  # else it begins without the epoch's row
                node.have = node.replay = self._leader.have
                node.shown = node.history.up_to(node.have)
                self._connect(node, self._leader)
        self._foreign = [
            Node(f"foreign{number}", History(timeline), self._life(), system_id=2, have=start, in_recovery=replica)
            for number, (timeline, replica) in enumerate([(1, False), (2, False), (9, True)])
        ]
        for node in self._foreign:
            self._name_epoch(node)
            node.shown, node.noted_timeline = node.history.up_to(node.have), node.history.timeline
        self._processes = [Process(rules.new_board()) for _ in range(2)]
        found = {node.name: self.rules.system_id(node) for node in [*self._foreign, *self._nodes]}
        for process in self._processes:  # at the start every node is asked before any is believed
            process.board.origins.settle({name: its_id for name, its_id in found.items() if its_id is not None})
        self._sessions = [Session() for _ in range(rules.clients)]
        self._reads: list[Request] = []
        self._writes: list[Request] = []
        self._acknowledged = 0
        """All that was acknowledged."""
        self._shown_to_all = 0
        """What reads that must see all of that have shown on replicas."""

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

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _likely(self, what: str, probability: float) -> bool:
        return self._chance(probability * self.rules.weather.get(what, 1.0))

    def _node(self, name: str) -> Node:
        return next(node for node in [*self._nodes, *self._foreign] if node.name == name)

    def _some_process(self) -> Process:
        return self._processes[0] if self._chance(0.7) else self._processes[1]

    def _some_replica(self) -> Node | None:
        replicas = [node for node in self._nodes if node.is_replica]
        return self._random.choice(replicas) if replicas else None

    def _some_nodes(self) -> list[Node]:
        chosen = self._random.getrandbits(len(self._nodes))
        return [node for number, node in enumerate(self._nodes) if chosen >> number & 1]

    def _life(self) -> Incarnation:
        self._incarnations += 1
        return Incarnation(f"{self._incarnations}@{1_700_000_000_000_000 + self._incarnations}")

    def _new_replica(self, name: str) -> Node:
        history, flush = self._leader.history, self._leader.have
        start = self._random.randint(max(0, flush - 30), flush)
        return Node(
            name,
            history,
            self._life(),
            have=start,
            replay=start,
            shown=history.up_to(start),
            base=start,
            noted_timeline=history.timeline_at(start),
            newest_timeline=history.timeline,
        )

    # The primaries.

    def _name_epoch(self, node: Node) -> None:
        """Write the row of the epoch, if it has none yet, and remove a file with it."""
        if node.epoch is None:
            node.epoch = Epoch(f"{node.history.timeline}-{self._random.getrandbits(40):010d}")
            self._histories[node.epoch] = node.history
            self._commit_on(node, row=node.epoch)

    def _begin_epoch_anew(self, node: Node) -> None:
        """Write the row of one more epoch of the timeline: the primary has lost WAL."""
        assert node.epoch is not None
        timeline, generation = rank_of(node.epoch)
        node.epoch = Epoch(f"{timeline}.{generation + 1}-{self._random.getrandbits(40):010d}")
        self._histories[node.epoch] = node.history
        self._commit_on(node, row=node.epoch)
        node.is_quiet = False
        self.events["began anew"] += 1

    def _commit_on(self, node: Node, bit: int = 0, row: Epoch | None = None) -> None:
        node.have += self._random.choice([1, 1, 2, 3, 9])
        node.history.commit(node.have, bit, row)

    def _new_bit(self) -> int:
        self._bits += 1
        return 1 << (self._bits - 1)

    def _other_wal(self) -> None:
        for node in self._nodes:
            if node.takes_writes and not node.is_quiet and self._chance(0.7):
                node.have += self._random.choice([1, 1, 2, 5, 20])

    def _checkpoint(self) -> None:
        node = self._random.choice(self._nodes)
        if node.takes_writes and not node.is_quiet:
            node.have += self._random.randint(1, 3)
            node.history.checkpoints.append(node.have)

    def _stop(self, node: Node) -> None:
        node.up = node.frozen = False
        node.in_flight = 0
        self._end_writes_on(node)
        for other in self._nodes:
            if other.upstream is node:
                other.upstream = None

    def _end_writes_on(self, node: Node) -> None:
        self._writes = [write for write in self._writes if write.node is not node]

    def _restart_primary(self) -> None:
        if self._leader.up:
            if self._chance(0.15):
                self._stop(self._leader)
        else:
            self._start(self._leader)
            self.events["primary restarted"] += 1

    def _start(self, node: Node) -> None:
        self._now += 0.01
        node.up = True
        node.incarnation = self._life()
        node.started = self._incarnations
        node.had = node.have

    def _set_back(self) -> None:
        """The primary is set back to a snapshot, which is older than what each process has seen of it."""
        node = self._leader
        seen = [
            process.seen_flush
            for process in self._processes
            if process.seen_flush is not None
            and process.board.primary is not None
            and process.board.primary.epoch == node.epoch
        ]
        least = max(
            node.history.fork_lsn,
            max(
                (
                    lsn
                    for number, lsn in enumerate(node.history.lsns)
                    if node.history.rows[number + 1] == node.epoch and node.history.rows[number] != node.epoch
                ),
                default=0,
            ),
        )
        if not node.works or len(seen) < len(self._processes) or least >= min(seen) or self._chance(0.5):
            return
        self._stop(node)
        snapshot = self._random.randint(least, min(seen) - 1)
        node.history = History(node.history.timeline, node.history, snapshot)
        node.have = snapshot
        self._start(node)
        for process in self._processes:
            process.primaries_on_the_way.pop(node.name, None)
        node.is_quiet = True  # not promised: what others write there before it is observed
        self.events["set back"] += 1

    def _start_without_signal(self) -> None:
        """A replica becomes a primary without a timeline of its own, while the primary is down."""
        node = self._some_replica()
        if node is None or self._leader.up or node.history is not self._leader.history or self._chance(0.5):
            return
        if node.history.timeline_at(node.have) != node.history.timeline:
            return  # it would go on with the timeline before
        if self.events["started without a timeline"]:
            return  # not promised: one number for the timelines of two servers that know nothing of each other
        if not all(
            process.board.primary is not None and process.board.primary.name == self._leader.name
            for process in self._processes
        ):
            return  # to one that has never seen the primary it is as good
        self._stop(node)
        node.history = History(node.history.timeline, node.history, node.have)
        node.in_recovery = node.paused = False
        node.receive = None
        node.epoch = node.history.rows[-1]
        if node.epoch is None or timeline_of(node.epoch) != node.history.timeline:
            node.epoch = None
        self._start(node)
        self.events["started without a timeline"] += 1

    def _freeze_or_thaw(self) -> None:
        """A primary stands still, and goes on: perhaps after its successor was promoted."""
        for node in self._nodes:
            if node.frozen and self._chance(0.4):
                node.frozen = False
                self.events["thawed"] += node is not self._leader
            elif node.takes_writes and self._chance(0.05):
                node.frozen = True

    def _fence(self) -> None:
        """An old primary that still answers is stopped at last."""
        for node in self._nodes:
            if not node.in_recovery and node is not self._leader and self._chance(0.5):
                self._stop(node)

    def _promote(self) -> None:
        node, old = self._some_replica(), self._leader
        if node is None or not self._may_be_promoted(node) or self._chance(0.6):
            return
        if old.takes_writes and self._chance(0.4) and node.history is old.history:
            node.have = old.have  # a switchover: a primary that is stopped in order sends all that it has
            self.events["promoted cleanly"] += 1
        elif old.takes_writes and self._likely("frozen", 0.3):
            old.frozen = True  # which is why another one is promoted
        if not old.frozen:
            self._stop(old)
        self._count_promotion(node, old)
        self._begin_epoch_on(node)
        if self._likely("unseen", 0.2):  # no process here sees it for a while
            for process in self._processes:
                if self._chance(0.7):
                    process.cut_off = node.name
        may_write = not old.up or "unfenced" in self.rules.weather
        if may_write and self._likely("others", 0.3):  # another client writes before rocket does
            self._commit_on(node, bit=self._new_bit())

    def _may_be_promoted(self, node: Node) -> bool:
        if node.history.spliced is not None:
            return False
        epochs = [self._leader.epoch, *self._leader.history.rows]
        if any(
            epoch is not None and rank_of(epoch)[1] and epoch not in node.history.rows_at(node.have)
            for epoch in epochs
        ):
            return False  # not promised: what was lost with a primary that was set back is not known there
        return node.history is self._leader.history or self._chance(0.2)

    def _begin_epoch_on(self, node: Node) -> None:
        """Make a replica the primary of a timeline of its own."""
        newest = max(other.newest_timeline for other in self._nodes) if self._shares_history_files else 1
        timeline = max(newest, node.newest_timeline) + 1
        self._leader = node
        node.history = History(timeline, node.history, node.have)  # it replays all that it has first
        node.newest_timeline = timeline
        node.in_recovery = node.paused = False
        node.receive = node.upstream = node.epoch = None

    def _count_promotion(self, node: Node, old: Node) -> None:
        self.events["promoted"] += 1
        self.events["promoted before the fork"] += node.have < node.history.fork_lsn
        self.events["tail lost"] += node.history is old.history and node.history.up_to(node.have) < len(
            node.history.lsns
        )
        self.events["others past the fork"] += any(
            other.is_replica and other.history is node.history and other.have > node.have for other in self._nodes
        )

    # The replicas.

    def _receive(self) -> None:
        for node in self._some_nodes():
            upstream = node.upstream
            if upstream is not None and node.is_replica and upstream.works and node.receive is not None:
                least = min(node.receive, upstream.have)
                node.receive = self._random.choice([upstream.have, self._random.randint(least, upstream.have)])
                if node.understands:
                    node.have = max(node.have, node.receive)
                    node.history.take_over(node.have)

    def _replay(self) -> None:
        for node in self._some_nodes():
            if node.is_replica and not node.paused:
                fatal_lsn = node.history.fatal_lsn
                if fatal_lsn is None or node.have < fatal_lsn:
                    self._replay_on(node, node.have)
                elif self._chance(0.5):
                    self._replay_on(node, max(node.applied, fatal_lsn - 1))
                else:
                    self._stop(node)
                    self.events["died of a checkpoint"] += 1

    def _replay_on(self, node: Node, end: int) -> None:
        lsns = node.history.lsns
        done = node.history.up_to(node.replay)
        in_progress = node.shown > done
        if not in_progress and node.shown < node.history.up_to(end) and self._chance(0.5):
            # A commit becomes visible before the replay LSN moves over it (F6).
            node.replay = self._random.choice(
                [node.replay, self._random.randint(node.replay, lsns[node.shown] - 1)]
            )
            node.shown += 1
            self.events["visible early"] += 1
        else:
            least = lsns[node.shown - 1] if in_progress else node.replay
            node.replay = self._random.choice([least, end, self._random.randint(least, end)])
            node.shown = max(node.shown, node.history.up_to(node.replay))
        now_done = node.history.up_to(node.replay)
        if node.history.rows[done] != node.history.rows[now_done] or self._chance(0.02):
            # A commit that removes a file, as that of an epoch's row does, notes it, but after it became visible;
            # so does whatever writes a page that was changed.
            self._note(node)

    def _note(self, node: Node) -> None:
        node.base, node.noted_timeline = node.replay, node.history.timeline_at(node.applied)

    def _pause_or_resume(self) -> None:
        node = self._some_replica()
        if node:
            node.paused = not node.paused and self._chance(0.2)

    def _crash_replica(self) -> None:
        """It comes back behind, in a new incarnation, and replays its own files first (F3)."""
        node = self._some_replica()
        if node and self._starts_again(node):
            node.incarnation = self._life()
            node.receive = node.upstream = None
            node.paused = False
            node.replay = self._random.choice(
                [node.base, node.replay, self._random.randint(node.base, node.replay)]
            )
            node.shown = node.history.up_to(node.replay)
            self.events["crashed"] += 1

    def _starts_again(self, node: Node) -> bool:
        """Sort out a foreign tail that went on with another timeline's WAL: that timeline is what it aims at."""
        tail, other = node.history, node.history.spliced
        if not tail.leads_astray or other is None:
            return True
        assert tail.parent is not None
        if not other.holds(tail.parent, node.base):
            self._stop(node)  # its minimum recovery point is not in that timeline's history
            self.events["did not start again"] += 1
            return False
        node.history, node.have, node.replay = other, node.base, node.base  # nothing of the tail was kept
        self.events["lost its foreign tail"] += 1
        return True

    def _connect_or_lose_stream(self) -> None:
        node = self._some_replica()
        if node is None:
            return
        if node.upstream is not None:
            node.upstream = node.upstream if self._chance(0.96) else None
            return
        source = self._random.choice([self._leader, self._leader, *self._nodes])
        if source.takes_writes and node.has_replayed_all:
            if source.history in (node.history, node.history.spliced):
                self._connect(node, source)
            elif (
                source is self._leader and self._chance(0.3) and not source.history.holds(node.history, node.have)
            ):
                self._splice(node, source)
                self._connect(node, source)

    def _connect(self, node: Node, source: Node) -> None:
        timeline = source.history.timeline
        if node.receive is None or timeline != node.received_timeline:  # it begins with the segment
            node.receive = self._random.randint(max(0, node.have - 16), node.have)
        node.upstream, node.received_timeline = source, timeline
        node.newest_timeline = max(node.newest_timeline, timeline)

    def _splice(self, node: Node, source: Node) -> None:
        """A replica past the fork asks the new primary for its timeline (F11): it has not its history.

        Its replay stands still, unless its tail happens to end where a record of the new timeline begins.
        """
        self.events["past the fork, and streams"] += 1
        end, other = node.have, source.history
        is_twin = other.has_a_twin_of(node.history.timeline_at(end), node.history)
        if not is_twin and end < source.have and node.history.spliced is None and self._likely("splice", 0.5):
            self._align(node, other)
            self.events["spliced past the row"] += source.epoch in other.rows_at(end)

    def _align(self, node: Node, other: History) -> None:
        """Let a foreign tail end where a record of another history begins."""
        end = node.have
        node.history = History(node.history.timeline_at(end), node.history, end)
        node.history.spliced = other
        node.history.page_lsn = self._random.randint(end, end + 40)
        self.events["spliced"] += 1

    def _fetch_from_archive(self) -> None:
        """A replica whose stream breaks off goes on with what was archived; its receive LSN stays."""
        node = self._some_replica()
        flush = self._leader.have
        if node and node.history is self._leader.history and (node.upstream is None or self._chance(0.2)):
            node.upstream = None
            node.have = self._random.randint(min(node.have, flush), flush)

    def _follow(self) -> None:
        """A replica is pointed to the promoted one, without a restart, if it has replayed none beyond the fork."""
        node, history = self._some_replica(), self._leader.history
        if node is None or node.history is history or not self._leader.works:
            return
        if not history.holds(node.history, node.have) and history.holds(node.history, node.applied):
            node.have = node.applied
            self.events["followed with WAL not replayed"] += 1
        if history.holds(node.history, node.have):
            node.history = history
            node.upstream = None
            node.newest_timeline = max(node.newest_timeline, history.timeline)
            self.events["followed"] += 1

    def _come_back(self) -> None:
        """A primary that was fenced comes back as a replica, as it is, if it has no WAL beyond the fork."""
        for node in self._nodes:
            if not node.up and not node.in_recovery and self._leader.history.holds(node.history, node.have):
                node.history, node.incarnation = self._leader.history, self._life()
                node.up = node.in_recovery = True
                node.epoch = None
                node.replay = node.base = node.have
                node.noted_timeline = node.history.timeline_at(node.have)
                node.shown = node.history.up_to(node.have)
                node.newest_timeline = max(node.newest_timeline, node.history.timeline)
                self.events["came back as a replica"] += 1

    def _rebuild(self) -> None:
        """A lost primary, a diverged replica, or any other is made anew under its name."""
        node = self._random.choice(self._nodes)
        if node is not self._leader and self._leader.works and self._chance(0.5):
            self._stop(node)
            self._nodes[self._nodes.index(node)] = self._new_replica(node.name)
            self.events["rebuilt"] += 1
            self.events["rebuilt as a replica"] += not node.in_recovery

    # The observers.

    def _pass_time(self) -> None:
        self._now += self._random.choice([0.01, 0.05, 0.2, 0.5])

    def _cut_off_or_reach(self) -> None:
        process = self._some_process()
        process.cut_off = "" if process.cut_off and self._chance(0.5) else self._random.choice(self._nodes).name

    def _observe(self) -> None:
        """Ask some nodes; what they answer is on its way until it is published, and may be late."""
        for process in self._processes:
            for node in self._some_nodes():
                self._ask(process, node)
            if self._chance(0.1):
                self._ask(process, self._random.choice(self._foreign))

    def _ask(self, process: Process, node: Node) -> None:
        if not node.works or node.name == process.cut_off:
            if not node.frozen or self._chance(0.2):
                self._lose_sight(process, node)
        elif node.in_recovery:
            if node.name not in process.replicas_on_the_way:
                process.replicas_on_the_way[node.name] = self._replica_status(process, node)
        elif node.name not in process.primaries_on_the_way:
            if process.board.replica(node.name) is not None:
                self._lose_sight(process, node)  # what was opened to a replica is of no use any more
            self._name_epoch(node)
            assert node.epoch is not None
            process.primaries_on_the_way[node.name] = PrimaryStatus(
                node.name, Lsn(node.have), self._now, node.epoch,
                self.rules.system_id(node), self.rules.started(node), Lsn(node.had),
            )  # fmt: skip

    def _lose_sight(self, process: Process, node: Node) -> None:
        process.replicas_on_the_way.pop(node.name, None)
        process.primaries_on_the_way.pop(node.name, None)
        process.streamed.pop(node.name, None)
        process.board.forget(node.name)

    def _replica_status(self, process: Process, node: Node) -> ReplicaStatus:
        epoch = self.rules.epoch(node)
        streaming = epoch is not None and node.streamed_timeline == timeline_of(epoch)
        streamed_lsn = self.rules.streamed_lsn(node)
        if epoch is not None and streaming and streamed_lsn is not None:
            process.streamed[node.name] = (node.incarnation, epoch, streamed_lsn)
        remembered = process.streamed.get(node.name)
        return ReplicaStatus(
            node.name,
            self.rules.lsn(node.replay),
            node.incarnation,
            observed_at=self._now,
            answered_at=self._now,
            receive_lsn=None if node.receive is None else Lsn(node.receive),
            streaming=streaming,
            streamed_lsn=(
                remembered[2] if remembered is not None and remembered[:2] == (node.incarnation, epoch) else None
            ),
            epoch=epoch,
            system_id=self.rules.system_id(node),
        )

    def _publish(self) -> None:
        for process in self._processes:
            replicas, primaries = process.replicas_on_the_way, process.primaries_on_the_way
            for node in [*self._some_nodes(), *self._foreign]:
                if node.name in replicas or node.name in primaries:
                    self._publish_answers(process, node)

    def _publish_answers(self, process: Process, node: Node) -> None:
        replica = process.replicas_on_the_way.pop(node.name, None)
        if replica is not None:
            process.board.publish(replica)
            if replica.epoch is not None and node.system_id == 1:
                process.seen_rank = max(process.seen_rank, rank_of(replica.epoch))
        primary = process.primaries_on_the_way.pop(node.name, None)
        if primary is not None:
            if node.takes_writes and node.epoch is not None and self.rules.has_lost(process.board, primary):
                if node.epoch == primary.epoch:
                    self._begin_epoch_anew(node)
                primary = replace(primary, flush_lsn=Lsn(node.have), observed_at=self._now, epoch=node.epoch)
            if process.board.publish_primary(primary):
                process.seen_flush = int(primary.flush_lsn)
            else:
                self.events["refused an old primary" if node.system_id == 1 else "refused a foreign node"] += 1
            if node.system_id == 1 and node.name not in process.board.claimants:
                process.seen_rank = max(process.seen_rank, rank_of(primary.epoch))
            seen_at = process.seen_current.get(primary.epoch, 0.0)  # another server may claim it, too
            process.seen_current[primary.epoch] = max(seen_at, primary.observed_at)

    # The clients.

    def _request(self) -> Request:
        """Return a request with all tokens that a session holds."""
        session, process = self._random.choice(self._sessions), self._some_process()
        carried = list(session.held)
        tokens = self.rules.merged(held.token for held in carried)
        self.events["merged"] += len(carried) > 1
        return Request(session, process, carried, tokens)

    def _enter_primary(self, request: Request) -> bool:
        """Take a connection to the current primary, of its present epoch."""
        primary = request.process.board.current_primary(self._now, self._policy.primary_lease_s)
        if primary is None:
            return False
        node = self._node(primary.name)
        if not node.up or node.in_recovery or node.epoch != primary.epoch or node.name == request.process.cut_off:
            return False
        if not self.rules.is_observed(primary, node):
            self.events["restarted unobserved"] += 1
            return False
        if node.system_id != 1:
            self._fail(f"a request to {node.name}, of another cluster")
        request.node, request.incarnation, request.epoch = node, node.incarnation, primary.epoch
        return True

    def _stand(self, request: Request) -> bool:
        """Sort out what a session brings to a primary, as `resolve_tokens` does; return whether it is served."""
        node, epoch = request.node, request.epoch
        assert node is not None
        assert epoch is not None
        for token in request.tokens:
            if token.epoch == epoch:
                continue
            if self.rules.is_of_later_epoch(token, epoch):
                self.events["session ahead of its process"] += 1
                return False
            if not self.rules.knows(node, token.epoch):
                self.events["refused"] += 1
                request.session.forget(request.carried)
                return False
            self.events["exchanged"] += 1
            lost: Lost | None = Lost(bool(token.write_floor))
            if node.history.is_last_of_its_timeline(token.epoch):
                lost = self.rules.lost(token, node.history.file())
            request.lost = self.rules.lost_of_both(request.lost, lost)
        self.events["learned of a lost tail"] += request.lost is not None
        return True

    def _current(self, request: Request) -> SessionToken | None:
        token = request.token
        return token if token is not None and token.epoch == request.epoch else None

    def _begin_write(self) -> None:
        write = self._request() if len(self._writes) < 3 else None
        if write is None or not self._enter_primary(write):
            return
        node = write.node
        assert node is not None
        if not node.takes_writes or not self._stand(write):
            return
        write.lsn_inside = node.have
        write.bit = self._new_bit()
        self._commit_on(node, write.bit)
        node.in_flight |= write.bit
        self._writes.append(write)

    def _end_write(self) -> None:
        if not self._writes:
            return
        write = self._random.choice(self._writes)
        node, epoch = write.node, write.epoch
        assert node is not None
        assert epoch is not None
        if node.frozen:
            return
        self._writes.remove(write)
        node.in_flight &= ~write.bit
        if not self._still_current(write, epoch):
            self.events["outcome unknown"] += 1
            return
        floor = Lsn(self.rules.write_floor(inside=write.lsn_inside, after=node.have))
        write.process.board.note_flush(epoch, floor, self._now)
        if self._chance(0.05):
            floor = Lsn.PENDING  # the connection was lost before the answer came
        token = self._current(write)
        if token is None:
            token = SessionToken(epoch, floor)
        else:
            if token.is_beyond(Lsn(node.have)):
                self._fail(f"{token} is refused")
            token = token.after_write(floor)
        wrote, seen = self._required(write, node)
        self._answer(write, Held(token, wrote | write.bit, seen))
        self._acknowledged |= write.bit
        self.events["written"] += 1

    def _begin_read(self) -> None:
        read = self._request() if len(self._reads) < 4 else None
        if read is not None:
            read.is_global = not read.tokens or not self._step % 5
            read.committed, read.in_order = self._acknowledged, self._shown_to_all
            self._reads.append(read)
            self._send(read)

    def _go_on_reading(self) -> None:
        if not self._reads:
            return
        read = self._random.choice(self._reads)
        node = read.node
        if node is None:
            self._send(read)
        elif node.frozen:
            if not self._chance(_PATIENT):
                self._reads.remove(read)
        elif not read.is_connected:
            self._try_elsewhere(read)
        elif read.shown is not None:
            self._end_read(read)
        elif read.status is None:
            self._show_on_primary(read)
        else:
            read.shown = node.history.shows[node.shown if node.in_recovery else -1]

    def _send(self, read: Request) -> None:
        """Choose a node and take a connection to it."""
        read.shown = read.status = read.node = None
        if read.is_global and not read.asked and not self._ask_for_all_committed(read):
            self._reads.remove(read)  # a 503
            return
        token = read.token
        if token is not None and len(read.tokens) == 1 and len(read.failed) < REPLICAS_TRIED:
            busy = {status.name: self._random.randrange(12) for status in read.process.board.replicas}
            read.status = choose(
                self.rules.token(token, retried=bool(read.failed)),
                self.rules.board(read.process.board, token),
                self.rules.policy(self._policy),
                now=self._now,
                start=self._random.getrandbits(8),
                load=busy.__getitem__,
                without=read.failed,
            ).status
        if read.status is None:
            if token is not None and self._chance(self._patience):
                self.events["waited"] += 1  # for a replica
            elif not self._enter_primary(read):
                self._reads.remove(read)  # a 503
            return
        self._check_choice(read.status, read.process)
        node = self._node(read.status.name)
        if node.up and node.name != read.process.cut_off and self.rules.vouches_for(read.status, node.incarnation):
            read.node, read.incarnation = node, node.incarnation
            self._check_replica(read.status, node, token)
        else:
            read.failed.add(node.name)
            self.events["not vouched for"] += 1

    def _ask_for_all_committed(self, read: Request) -> bool:
        """Have the primary say what a read must see; return whether it does."""
        if not self._enter_primary(read):
            return False
        node, epoch = read.node, read.epoch
        assert node is not None
        assert epoch is not None
        if node.frozen:
            return False
        lsn = self.rules.all_committed(read.process, node)
        read.process.asked = node.have
        read.tokens = self.rules.merged((*read.tokens, SessionToken(epoch, Lsn(0), Lsn(lsn))))
        read.committed &= node.history.shows[-1]
        read.in_order &= node.history.shows[-1]
        read.asked, read.node, read.epoch = True, None, None
        return True

    def _check_choice(self, status: ReplicaStatus, process: Process) -> None:
        if self.rules.by_data:
            return
        if self._now - status.observed_at > self._policy.lease_s:
            self._fail(f"a read from {status.name}, which was not heard of within the lease")
        bound = self._policy.max_lag_bytes
        if bound is not None and process.seen_flush is not None and process.seen_flush - status.replay_lsn > bound:
            self._fail(f"a read from {status.name}, which lies beyond max_lag")
        if status.epoch is None or rank_of(status.epoch) != process.seen_rank:
            self._fail(f"a read from {status.name}, which follows an epoch that is over: {status.epoch}")

    def _check_replica(self, status: ReplicaStatus, node: Node, token: SessionToken | None) -> None:
        """Check that what the replica has applied up to the floor is the WAL of the token's epoch."""
        assert token is not None
        floor = token.floor_on(status.name, status.incarnation)
        if floor < Lsn.PENDING and not self.rules.by_data:
            if node.replay < floor:
                self._fail(f"{node.name} is not caught up with {token}")
            if not node.history.holds(self._histories[token.epoch], floor):
                self._fail(f"{node.name} is caught up with {token} in numbers only: its WAL is another")

    def _show_on_primary(self, read: Request) -> None:
        node = read.node
        assert node is not None
        if not self._stand(read):
            self._reads.remove(read)  # a 400 or 503
            return
        if self.rules.waits_for_writes(read.tokens):
            node.in_flight = 0
        read.shown = node.history.shows[-1] & ~node.in_flight

    def _try_elsewhere(self, read: Request) -> None:
        assert read.node is not None
        if read.status is None:
            self._reads.remove(read)  # a 503
            return
        read.failed.add(read.node.name)
        self.events["retried"] += 1
        self._send(read)

    def _end_read(self, read: Request) -> None:
        """Take the bound on the same connection, answer, and judge the answer."""
        token = self._end_read_on_primary(read) if read.status is None else self._end_read_on_replica(read)
        if token is None:
            self._try_elsewhere(read)
            return
        assert read.node is not None
        assert read.shown is not None
        self._reads.remove(read)
        wrote, seen = self._required(read, read.node)
        self._judge(read, wrote, seen)
        self._answer(read, Held(token, wrote, seen | read.shown))

    def _end_read_on_primary(self, read: Request) -> SessionToken | None:
        node, epoch = read.node, read.epoch
        assert node is not None
        assert epoch is not None
        if not self._still_current(read, epoch):
            return None
        flush_lsn = Lsn(node.have)
        token = self._current(read) or SessionToken(epoch, Lsn(0))
        if token.is_beyond(flush_lsn):
            self._fail(f"{token} is refused")
        self.events["read on the primary"] += 1
        return token.after_primary_read(flush_lsn)

    def _end_read_on_replica(self, read: Request) -> SessionToken | None:
        node, token = read.node, read.token
        assert node is not None
        assert token is not None
        if (
            not node.in_recovery
            or not self.rules.shows(node, token.epoch)
            or not self.rules.streams(node, token.epoch)
        ):
            return None
        bound = self.rules.bound(node)
        after = self.rules.after_replica_read(
            token, node.name, node.incarnation, None if bound is None else Lsn(bound)
        )
        assert read.shown is not None
        self._check_floor(read.shown, after)
        self.events["read on a replica"] += 1
        self.events["read without a bound"] += after.read_floor is None
        if token.node is not None:
            same = (token.node, token.incarnation) == (after.node, after.incarnation)
            self.events["stayed" if same else "moved"] += 1
        return after

    # The judge, who has notes of his own.

    def _still_current(self, request: Request, epoch: Epoch) -> bool:
        """Ask whether a primary's answer counts, and check that it may."""
        process, lease_s = request.process, self._policy.primary_lease_s
        if not self.rules.still_current(process.board, epoch, self._now, lease_s):
            return False
        if self.rules.by_data:
            return True
        if rank_of(epoch) != process.seen_rank:
            self._fail(f"an answer of the primary of {epoch}, which is not current: a later one was seen")
        if any(held.token.timeline > timeline_of(epoch) for held in request.carried):
            self._fail(f"an answer of the primary of {epoch}, whose session has seen a later one")
        if self._now - process.seen_current[epoch] > lease_s:
            self._fail(f"an answer of the primary of {epoch}, which is not current: it was not seen lately")
        return True

    def _required(self, request: Request, node: Node) -> tuple[int, int]:
        """Return what a session wrote and has seen, except for what it is now informed may be lost."""
        wrote = seen = 0
        for held in request.carried:
            kept = -1
            if held.token.epoch != request.epoch and request.lost is not None:
                kept = node.history.shows[-1]
            wrote |= held.wrote & kept if request.lost is None or request.lost.writes else held.wrote
            seen |= held.seen & kept
        return wrote, seen

    def _judge(self, read: Request, wrote: int, seen: int) -> None:
        assert read.node is not None
        assert read.shown is not None
        if wrote & ~read.shown:
            self._fail(f"a read on {read.node.name} lacks a write of its session; its token was {read.token}")
        if seen & ~read.shown:
            self._fail(f"a read on {read.node.name} lacks what its session had seen; its token was {read.token}")
        if read.is_global:
            kept = -1 if read.lost is None else read.node.history.shows[-1]
            self.events["saw all that was acknowledged"] += read.status is not None and bool(read.committed)
            if read.committed & kept & ~read.shown:
                self._fail(f"a read on {read.node.name} lacks what was acknowledged; its token was {read.token}")
            if read.status is not None:
                if read.in_order & kept & ~read.shown:
                    self._fail(f"a read on {read.node.name} goes back behind one that had ended; by {read.token}")
                self._shown_to_all |= read.shown

    def _check_floor(self, shown: int, token: SessionToken) -> None:
        """Check that a replica of the epoch which has replayed the read floor shows all that was shown."""
        history = self._histories[token.epoch]
        if token.read_floor is not None and not self.rules.by_data:
            covered = history.shows[history.up_to(token.highest_floor)]
            if shown & ~covered:
                self._fail(f"a read was shown what the floors of {token} do not cover")

    def _answer(self, request: Request, held: Held) -> None:
        """Give the answer, whose floors are not below those that the session came with."""
        after = held.token
        assert request.node is not None
        if request.status is None and held.wrote & ~request.node.history.shows[-1]:
            self._fail(f"a session lost a write with the primary of an earlier epoch, and learns {request.lost}")
        for before in (old.token for old in request.carried if old.token.epoch == after.epoch):
            fell = after.write_floor < before.write_floor < Lsn.PENDING or (
                before.read_floor is not None
                and after.read_floor is not None
                and after.read_floor < before.read_floor
            )
            if fell and not self.rules.by_data:
                self._fail(f"{before} went back to {after}")
        request.session.answered(request.carried, held)

    _ACTIONS: tuple[tuple[Callable[[World], None], int], ...] = (
        (_other_wal, 4),
        (_checkpoint, 16),
        (_restart_primary, 4),
        (_set_back, 3),
        (_start_without_signal, 10),
        (_freeze_or_thaw, 10),
        (_fence, 3),
        (_promote, 4),
        (_receive, 110),
        (_replay, 110),
        (_pause_or_resume, 12),
        (_crash_replica, 5),
        (_connect_or_lose_stream, 90),
        (_fetch_from_archive, 20),
        (_follow, 30),
        (_come_back, 3),
        (_rebuild, 6),
        (_pass_time, 15),
        (_cut_off_or_reach, 2),
        (_observe, 130),
        (_publish, 130),
        (_begin_write, 24),
        (_end_write, 24),
        (_begin_read, 60),
        (_go_on_reading, 340),
    )


class Played(World):
    """A schedule that is too rare to wait for, played step by step."""

    def write_and_lose_the_primary_before_it_is_replayed(self, *, promotion: bool) -> None:
        """Play this, and let the session read.

        1. A session writes on the primary. node1 has received the write, and its replay lags behind it; node2 has
           received nothing of it. The observer sees node1 streaming.
        2. The primary is lost. With `promotion` node2 becomes the next one, which the process cannot reach,
           writes on, and node1 enters the new timeline at its fork, which it has not replayed beyond.
        3. node1 replays all that it has, and has no WAL receiver when it is observed, and read from.
        """
        self._policy = Policy(max_lag_bytes=None)
        old, process, session = self._leader, self._processes[0], self._sessions[0]
        node, other = self._node("node1"), self._node("node2")
        for replica in (node, other):
            self._catch_up(replica, old)
        self._commit_on(old, bit := self._new_bit())
        assert old.epoch is not None
        session.held = [Held(SessionToken(old.epoch, Lsn(old.have)), bit, 0)]
        node.have = node.receive = old.have
        self._see(process, old, node)
        self._stop(old)
        self._now += 0.01  # it was asked earlier than node1 is going to answer, so it can have written more
        if promotion:
            self._begin_epoch_on(other)
            process.cut_off = other.name
            other.have += 100
            node.history, node.have = other.history, other.have
        node.replay, node.shown = node.have, node.history.up_to(node.have)
        self._see(process, node)
        self._read(session, process)

    def promote_twice_and_go_on_with_the_wal_of_the_other(self, *, twins: bool) -> None:
        """Play this, and let the session read.

        1. The primary is lost, and node1 becomes the next one. node3 follows it, and replays all that it writes.
        2. node1 is lost, too, and node2 becomes the next one, which has seen nothing of that; with `twins` it
           does not even know that the timeline's number is taken. A session writes there.
        3. node3 is pointed to it. Its tail happens to end where a record begins: it goes on with that, and gets
           the row of the epoch with its page. It is observed, and read from.
        """
        self._policy = Policy(max_lag_bytes=None)
        self._shares_history_files = not twins
        process, session = self._processes[0], self._sessions[0]
        first, second, node = (self._node(name) for name in ("node1", "node2", "node3"))
        for replica in (first, second, node):
            self._catch_up(replica, self._leader)
        self._stop(self._leader)
        self._begin_epoch_on(first)
        self._name_epoch(first)
        first.have += 100
        node.history = first.history
        self._catch_up(node, first)
        self._stop(first)
        self._begin_epoch_on(second)
        self._name_epoch(second)
        self._commit_on(second, bit := self._new_bit())
        assert second.epoch is not None
        session.held = [Held(SessionToken(second.epoch, Lsn(second.have)), bit, 0)]
        self._align(node, second.history)
        second.have += 200
        self._commit_on(second, self._new_bit())
        self._catch_up(node, second)
        self._see(process, second, node)
        self._read(session, process)

    def _catch_up(self, node: Node, source: Node) -> None:
        node.history.take_over(source.have)
        node.have = node.receive = node.replay = source.have
        node.shown = node.history.up_to(node.have)
        self._note(node)
        self._connect(node, source)

    def _see(self, process: Process, *nodes: Node) -> None:
        for node in nodes:
            self._ask(process, node)
            self._publish_answers(process, node)

    def _read(self, session: Session, process: Process) -> None:
        read = Request(session, process, list(session.held), tuple(held.token for held in session.held))
        self._reads = [read]
        while read in self._reads:
            self._step += 1
            self._go_on_reading()


def simulate(rules: Callable[[], Rules], seeds: Iterable[int], steps: int = STEPS) -> Counter[str]:
    """Let a world live for each seed; return what happened in all of them, or raise `Stale`."""
    events: Counter[str] = Counter()
    for seed in seeds:
        world = World(seed, rules())
        world.run(steps)
        events += world.events
    return events
