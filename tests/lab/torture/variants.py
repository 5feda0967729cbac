"""Deliberately wrong variants of the router: the oracle is tried on them, and has to convict every one.

Each is a small patch of the real code, applied from outside: the product has no switch for any of them. Its
docstring names the wrong rule; the decorator above it names what convicts it: torture under conditions, or a
test that fails under the patch.

    python -m tests.lab.torture.variants NAME -- [flags of torture]     torture it
    python -m tests.lab.torture.variants NAME --pytest TEST...          run tests on it
    python -m tests.lab.torture.variants --all                          the campaign: convict them all

`unpatched` stands for the code without a patch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from rocket.consistency import (
    Board,
    Choice,
    Lsn,
    Reason,
    ReplicaStatus,
    SessionToken,
    choice,
    choose,
    merged,
    timeline_of,
)
from rocket.consistency.origins import Origins
from rocket.lab import cli, workers
from rocket.lab.torture import clients
from rocket.routing import epochs, heartbeat, pool, primary_reads, reads, writes
from rocket.routing.bound import ReadBound, ask_bound
from rocket.routing.catchup import FlushQuestion
from rocket.routing.commits import Commits
from rocket.routing.connection import NodeConnection, discard
from rocket.routing.failures import NotAsObserved
from rocket.routing.nodes import Nodes
from rocket.routing.pool import NodePool
from rocket.routing.primary_reads import PrimaryReads
from rocket.routing.reads import Reads
from rocket.routing.router import Router
from rocket.routing.session import Session
from rocket.routing.watch import NodeWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from asyncpg import Record

    from rocket.consistency import Epoch, Incarnation, Policy, PrimaryStatus, Tokens
    from rocket.routing.answer import Answer, Route
    from rocket.routing.connection import Connection
    from rocket.routing.epochs import Resolved
    from rocket.routing.limits import Place
    from rocket.routing.pool import Lease

UNPATCHED = "unpatched"

_SHOWN_ON_REPLICA = ReadBound.on_replica
"""The right rule, parts of which wrong ones leave out."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """The faults of the torture runs on a variant, and on the unpatched code."""

    faults: str
    duration_s: int
    replicas: int
    seeds: tuple[int, ...]
    """One conviction is enough; the unpatched code has to hold with the first."""
    processes: int = 1

    def flags(self, seed: int) -> list[str]:
        """Return torture's flags."""
        return [
            "--faults", self.faults, "--duration", f"{self.duration_s}s", "--replicas", str(self.replicas),
            "--seed", str(seed), "--calm", "3s", "--processes", str(self.processes),
        ]  # fmt: skip


LAG = Conditions("commit-stuck,replay-slow", duration_s=6, replicas=3, seeds=(1, 2, 3))
"""Replicas lag, and stand right before a commit record."""
LAG_AND_CRASHES = Conditions(
    "backend-killed,replay-paused,replica-killed", duration_s=6, replicas=3, seeds=(2, 1, 3)
)
"""One replica stands still while reads fail on another."""
LOST_TAIL = Conditions("promotion-lossy", duration_s=3, replicas=2, seeds=(1, 2, 3))
"""A promotion that loses acknowledged writes."""
SCHEMA_CHANGES = Conditions("schema-changes,replay-slow", duration_s=6, replicas=3, seeds=(1, 2, 3))
"""Statements that were prepared before are outdated, on a late replica as well."""
FOREIGN = Conditions("foreign-cluster", duration_s=6, replicas=3, seeds=(1, 2, 3))
"""A server of another cluster at the address of a replica."""
TAKEN = Conditions("signal-removed", duration_s=6, replicas=2, seeds=(1,))
RESTORED = Conditions("restored-snapshot", duration_s=6, replicas=2, seeds=(1, 2, 3))
"""A primary that is set back, while its replicas go on."""
SEVERAL_PROCESSES = Conditions(
    "writer-killed,writer-frozen,replay-slow", 6, replicas=2, seeds=(1, 2, 3), processes=2
)
"""The process that writes the table of statuses dies, or falls silent."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One wrong rule."""

    name: str
    apply: Callable[[pytest.MonkeyPatch], None]
    conditions: Conditions | None
    """Under which torture convicts it, in seconds; None if that takes luck."""
    tests: tuple[str, ...]
    """Each of which fails under it."""

    @property
    def rule(self) -> str:
        """The wrong rule, in a sentence."""
        return (self.apply.__doc__ or "").partition("\n")[0]


VARIANTS: dict[str, Variant] = {}
"""Every variant, by name."""


def convicted_by(
    *tests: str, conditions: Conditions | None = None
) -> Callable[[Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]]:
    """Enter a patch into the table under its function's name, with what convicts it."""

    def enter(apply: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        name = apply.__name__.replace("_", "-")
        VARIANTS[name] = Variant(name, apply, conditions, tests)
        return apply

    return enter


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    """Apply a variant to the router for as long as the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        if name != UNPATCHED:
            VARIANTS[name].apply(patch)
            patch.setattr(workers, "COMMAND", ("tests.lab.torture.variants", name, "--worker"))
            patch.setattr(clients, "COMMAND", ("tests.lab.torture.variants", name, "--client"))
        yield


# --- several processes ---


@convicted_by(
    "tests/lab/test_takeover.py::test_another_observer_writes_when_the_one_that_did_is_halted",
    conditions=SEVERAL_PROCESSES,
)
def silent_writer_keeps_its_right(patch: pytest.MonkeyPatch) -> None:
    """The process that was elected to write the table of statuses stays so for as long as its connection lives."""

    async def elect(primary: Connection, lock: int, _beat_s: float) -> bool:
        return bool(await primary.fetchval("SELECT pg_try_advisory_lock($1)", lock))

    patch.setattr(heartbeat, "elect", elect)


@convicted_by(
    "tests/lab/test_takeover.py::test_another_observer_writes_when_the_one_that_did_is_halted",
    conditions=SEVERAL_PROCESSES,
)
def elected_once_and_for_all(patch: pytest.MonkeyPatch) -> None:
    """A process that is not elected on its first attempt never tries again."""
    elect, attempts = heartbeat.elect, iter([True])

    async def once(primary: Connection, lock: int, beat_s: float) -> bool:
        return next(attempts, False) and await elect(primary, lock, beat_s)

    patch.setattr(heartbeat, "elect", once)


# --- the floor of a write ---

_RACES = "tests/routing/test_races.py::"
_INSIDE = f"{_RACES}test_floor_taken_inside_the_transaction_is_stale_and_ours_is_not[never-stale-True-wheel]"


def _take_floor_before_commit(patch: pytest.MonkeyPatch, function: str) -> None:
    statements = Commits.statements
    take = f"SELECT set_config('rocket.floor', {function}()::text, false); COMMIT"

    def taking(self: Commits, subject: str | None) -> str:
        return statements(self, subject).replace("COMMIT", take)

    async def floor(_self: Commits, primary: Connection) -> Lsn:
        return Lsn.parse(await primary.fetchval("SELECT current_setting('rocket.floor')"))

    patch.setattr(Commits, "statements", taking)
    patch.setattr(Commits, "floor", floor)


@convicted_by(_INSIDE, conditions=LAG)
def floor_inside_the_transaction(patch: pytest.MonkeyPatch) -> None:
    """The floor is the write LSN, read inside the transaction: it lies before the commit record (F1)."""
    _take_floor_before_commit(patch, "pg_current_wal_lsn")


@convicted_by(_INSIDE, conditions=LAG)
def insert_lsn_before_commit(patch: pytest.MonkeyPatch) -> None:
    """The floor is the insert LSN, read right before COMMIT: it covers all but the commit record (F1)."""
    _take_floor_before_commit(patch, "pg_current_wal_insert_lsn")


# --- the check ---

_CHOICE = "tests/consistency/test_choice.py::"


@convicted_by(conditions=LAG)
def no_check(patch: pytest.MonkeyPatch) -> None:
    """Any replica that the observer sees will do."""

    def any_of(
        _token: SessionToken,
        board: Board,
        _policy: Policy,
        *,
        without: Iterable[str] = (),
        **_: object,
    ) -> Choice:
        seen = [status for status in board.replicas if status.name not in without]
        return Choice(random.choice(seen), Reason.CAUGHT_UP) if seen else Choice(None, Reason.NO_STATUS)

    patch.setattr(reads, "choose", any_of)


class _CheckedInTheStatement:
    """A connection whose reads bring the replay LSN along, taken in their own statement."""

    def __init__(self, connection: Connection, floor: Lsn) -> None:
        self._connection = connection
        self._floor = floor

    async def fetch(self, query: str, *arguments: object) -> list[Record]:
        rows = await self._connection.fetch(
            "SELECT answer.*, pg_last_wal_replay_lsn() AS replayed FROM (SELECT) AS one "  # noqa: S608
            f"LEFT JOIN (SELECT inner_query.*, true AS there FROM ({query}) AS inner_query) AS answer ON true",
            *arguments,
        )
        if Lsn.from_wire(rows[0]["replayed"]) < self._floor:
            raise NotAsObserved("the read has found it behind")
        return [row for row in rows if row["there"]]

    async def fetchrow(self, query: str, *arguments: object) -> Record | None:
        rows = await self.fetch(query, *arguments)
        return rows[0] if rows else None

    async def fetchval(self, query: str, *arguments: object) -> object:
        row = await self.fetchrow(query, *arguments)
        return None if row is None else row[0]


@convicted_by(f"{_RACES}test_a_read_that_began_before_the_write_was_replayed_is_not_believed")
def check_in_the_reads_own_statement(patch: pytest.MonkeyPatch) -> None:
    """The replay LSN is read in the read's own statement: later than that statement's snapshot (F5)."""
    read = Reads._read_on_replica  # noqa: SLF001

    def choose_any(token: SessionToken, board: Board, policy: Policy, **more: Any) -> Choice:
        return choose(replace(token, write_floor=Lsn(0), read_floor=Lsn(0)), board, policy, **more)

    async def checked(
        self: Reads, status: ReplicaStatus, lease: Lease, work: Any, route: Route
    ) -> tuple[Any, SessionToken | None]:
        floor = route.tokens[0].floor_on(status.name, status.incarnation)

        async def inside(node: Connection) -> Any:
            return await work(_CheckedInTheStatement(node, floor))

        return await read(self, status, lease, inside, route)

    patch.setattr(reads, "choose", choose_any)
    patch.setattr(Reads, "_read_on_replica", checked)


def _compare_differently(patch: pytest.MonkeyPatch, reaches: Callable[[Lsn, Lsn], bool]) -> None:
    obstacle = choice.obstacle

    def otherwise(
        status: ReplicaStatus, token: SessionToken | None, board: Board, policy: Policy, now: float
    ) -> Reason | None:
        found = obstacle(status, token, board, policy, now)
        if found not in {None, Reason.NOT_CAUGHT_UP} or token is None:
            return found
        floor = token.floor_on(status.name, status.incarnation)
        return None if reaches(status.vouched_lsn, floor) else Reason.NOT_CAUGHT_UP

    patch.setattr(choice, "obstacle", otherwise)


@convicted_by(f"{_CHOICE}test_the_floor_is_compared_as_a_number")
def lsns_compared_as_text(patch: pytest.MonkeyPatch) -> None:
    """LSNs are compared as text: 0/FFFFFF8 is beyond 0/10000000.

    Torture would have to write 256 MB of WAL to come to an LSN with another number of digits.
    """
    _compare_differently(patch, lambda replayed, floor: str(replayed) >= str(floor))


_COVER = "tests/routing/test_cover.py::"


@convicted_by(
    f"{_COVER}test_readers_of_other_routers_see_what_was_committed",
    f"{_COVER}test_a_deploy_whose_replicas_are_late",
    f"{_CHOICE}test_replayed_exactly_up_to_the_cover_is_fit[99-False]",
)
def cover_ignored(patch: pytest.MonkeyPatch) -> None:
    """Replicas that have replayed the session's floor serve it, whatever is covered.

    Torture covers nothing.
    """
    _compare_differently(patch, lambda replayed, floor: replayed >= floor)


@convicted_by(f"{_COVER}test_readers_of_other_routers_see_what_was_committed")
def cover_known_to_its_router_alone(patch: pytest.MonkeyPatch) -> None:
    """A cover holds in the process that has asked for it.

    Torture covers nothing.
    """

    async def untold(self: Router, *_: object, **_of_time: object) -> Lsn:
        answer = await self.write(lambda primary: primary.fetchval("SELECT 1"), subject=None)
        assert answer.token is not None
        self.board.covered_lsn = answer.token.write_floor
        return self.board.covered_lsn

    patch.setattr(Router, "cover", untold)


_COMMIT_RECORD_BYTES = 40
"""A plain one, with its padding: a bound that is off by fewer lies between no two records."""


@convicted_by(f"{_CHOICE}test_replayed_exactly_up_to_the_floor_is_fit")
def off_by_one_record(patch: pytest.MonkeyPatch) -> None:
    """A replica will do that has replayed up to where the last record before the floor begins, not ends.

    Torture would have to keep a replica right before the very record that a session's floor ends with.
    """
    _compare_differently(patch, lambda replayed, floor: replayed + _COMMIT_RECORD_BYTES >= floor)


# --- what a status is worth ---


@convicted_by(
    f"{_RACES}test_replica_that_comes_back_behind_is_read_stale_as_published_and_not_by_us[never-stale-True-wheel]"
)
def status_kept_across_a_restart(patch: pytest.MonkeyPatch) -> None:
    """What was seen of a replica counts until it is seen again, whichever life of its server that was in (F3).

    In torture a replica that restarts has little to replay, and has done it before anybody can connect.
    """
    forget = Board.forget

    def forget_primary_only(self: Board, name: str) -> None:
        if self.primary is not None and self.primary.name == name:
            forget(self, name)

    def vouches_for(_self: ReplicaStatus, _incarnation: Incarnation | None) -> bool:
        return True

    def floor_on(self: SessionToken, node: str, _incarnation: Incarnation | None) -> Lsn:
        return self.write_floor if node == self.node else self.highest_floor

    patch.setattr(Board, "forget", forget_primary_only)
    patch.setattr(ReplicaStatus, "vouches_for", vouches_for)
    patch.setattr(SessionToken, "floor_on", floor_on)


@convicted_by(conditions=LAG_AND_CRASHES)
def floor_dropped_on_retry(patch: pytest.MonkeyPatch) -> None:
    """After a replica has failed a read, any other will do."""
    choose_fit = Reads._choice  # noqa: SLF001

    def without_floor(self: Reads, route: Route) -> Choice:
        if route.failed:
            (token,) = route.tokens
            route.tokens = (replace(token, write_floor=Lsn(0), read_floor=Lsn(0)),)
        return choose_fit(self, route)

    patch.setattr(Reads, "_choice", without_floor)


# --- epochs ---

_PROMOTION = "tests/routing/test_promotion.py::"


def _bound_of_any_epoch(said: ReadBound, epoch: Epoch) -> Lsn | None:
    if said.is_replica:
        said = replace(said, timeline=said.timeline and timeline_of(epoch), epoch=epoch)
    return _SHOWN_ON_REPLICA(said, epoch)


def _see_the_current_epoch(patch: pytest.MonkeyPatch, is_of: Callable[[int | None, Epoch], bool]) -> None:
    """Take a replica for one of the current epoch if what it streams says so, whatever row it shows."""
    publish = NodeWatch._publish_replica  # noqa: SLF001

    async def as_it_says(self: NodeWatch, connection: NodeConnection, row: Any, asked_at: float) -> None:
        streamed, epoch = row["streamed_timeline"], self._board.epoch
        if epoch is not None and is_of(streamed, epoch):
            streamed = None if streamed is None else timeline_of(epoch)
            row = {**row, "epoch": epoch, "applied_timeline": timeline_of(epoch), "streamed_timeline": streamed}
        await publish(self, connection, row, asked_at)

    patch.setattr(NodeWatch, "_publish_replica", as_it_says)
    patch.setattr(ReadBound, "on_replica", _bound_of_any_epoch)


@convicted_by(conditions=LOST_TAIL)
def epochs_ignored(patch: pytest.MonkeyPatch) -> None:
    """One epoch is like another: LSNs of tokens and replicas are compared whatever their epochs are."""
    obstacle = choice.obstacle

    def of_any_epoch(
        status: ReplicaStatus, token: SessionToken, board: Board, policy: Policy, now: float
    ) -> Reason | None:
        epoch = board.epoch or token.epoch
        return obstacle(replace(status, epoch=epoch), replace(token, epoch=epoch), board, policy, now)

    async def resolve_tokens(
        tokens: Sequence[SessionToken],
        _primary: Connection,
        epoch: Epoch,
        *,
        is_last: bool,  # noqa: ARG001
    ) -> Resolved:
        return epochs.Resolved(replace(tokens[0], epoch=epoch) if tokens else None)

    def merged_as_one(tokens: Tokens) -> tuple[SessionToken, ...]:
        latest_first = sorted(merged(tokens), key=lambda token: token.timeline, reverse=True)
        return merged([replace(token, epoch=latest_first[0].epoch) for token in latest_first])

    _see_the_current_epoch(patch, lambda _streamed, _epoch: True)
    patch.setattr(choice, "obstacle", of_any_epoch)
    for module in (reads, writes):
        patch.setattr(module, "merged", merged_as_one)
    for module in (primary_reads, writes):
        patch.setattr(module, "resolve_tokens", resolve_tokens)


@convicted_by(f"{_PROMOTION}test_a_replica_past_the_fork_is_not_believed")
def received_tli_trusted(patch: pytest.MonkeyPatch) -> None:
    """A replica that streams the current timeline follows the current primary, whatever it has replayed (F11).

    Nor does it count that the replica has replayed more than its primary has written: that catches most of them.
    Torture never re-points a replica that has passed the fork without cloning or rewinding it first.
    """

    def has_diverged(_self: Board, _status: ReplicaStatus) -> bool:
        return False

    patch.setattr(Board, "has_diverged", has_diverged)
    _see_the_current_epoch(patch, lambda streamed, epoch: streamed == timeline_of(epoch))


@convicted_by(f"{_PROMOTION}test_what_a_promotion_lost_is_reported", conditions=LOST_TAIL)
def lost_tails_not_reported(patch: pytest.MonkeyPatch) -> None:
    """A token of an earlier epoch is exchanged without a notice."""

    async def nothing(_token: SessionToken, _primary: Connection, _epoch: Epoch) -> None:
        return None

    patch.setattr(epochs, "_loss_of", nothing)


@convicted_by(
    f"{_PROMOTION}test_a_thawed_old_primary_gets_nothing",
    f"{_PROMOTION}test_a_promotion_is_followed_and_the_old_primary_closed",
)
def old_primary_still_used(patch: pytest.MonkeyPatch) -> None:
    """The last server that says that it is the primary is believed, of whichever timeline.

    Torture's promotions fence the old primary, as the guarantee asks.
    """
    publish = Board.publish_primary

    def believe(self: Board, status: PrimaryStatus) -> bool:
        if status.epoch != self.epoch:
            self.origins, self.primary = Origins(), None
        return publish(self, status)

    patch.setattr(Board, "publish_primary", believe)


_FRESHNESS = "tests/routing/test_freshness.py::"
_SEES_ALL = f"{_FRESHNESS}TestGlobal::test_a_sessions_default_is_for_reads_that_say_nothing"


@convicted_by(_SEES_ALL)
def flush_lsn_of_the_board(patch: pytest.MonkeyPatch) -> None:
    """A global read goes by the primary's flush LSN as it was last observed."""

    async def observed(self: PrimaryReads) -> SessionToken:
        board = self._board
        assert board.epoch is not None
        return SessionToken(board.epoch, Lsn(0), board.flush_lsn)

    patch.setattr(PrimaryReads, "all_committed", observed)


@convicted_by(_SEES_ALL)
def flush_lsn_asked_before(patch: pytest.MonkeyPatch) -> None:
    """A global read goes by an answer that was there when it began."""
    ask, known = FlushQuestion.answer, dict[FlushQuestion, SessionToken]()

    async def earlier(self: FlushQuestion) -> SessionToken:
        if self not in known:
            known[self] = await ask(self)
        return known[self]

    patch.setattr(FlushQuestion, "answer", earlier)


@convicted_by(f"{_FRESHNESS}TestTheQuestion::test_who_comes_while_one_is_under_way_gets_the_next")
def flush_lsn_of_a_question_under_way(patch: pytest.MonkeyPatch) -> None:
    """A global read that begins while a question is under way gets its answer."""
    ask, under_way = FlushQuestion.answer, dict[FlushQuestion, asyncio.Task[SessionToken]]()

    async def joined(self: FlushQuestion) -> SessionToken:
        if self not in under_way or under_way[self].done():
            under_way[self] = asyncio.create_task(ask(self))
        return await asyncio.shield(under_way[self])

    patch.setattr(FlushQuestion, "answer", joined)


@convicted_by(f"{_PROMOTION}test_a_global_read_goes_by_the_primary_of_today")
def flush_lsn_of_an_old_primary(patch: pytest.MonkeyPatch) -> None:
    """A global read asks the primary that answered first, also when another one was promoted."""
    first: dict[PrimaryReads, str] = {}

    async def stuck(self: PrimaryReads) -> SessionToken:
        board, nodes = self._board, self._nodes
        assert board.epoch is not None
        assert board.primary is not None
        async with nodes.replica(first.setdefault(self, board.primary.name), None) as node:
            return SessionToken(board.epoch, Lsn(0), (await ask_bound(node)).lsn)

    patch.setattr(PrimaryReads, "all_committed", stuck)


_HISTORIES = "tests/routing/test_histories.py::"


@convicted_by(f"{_HISTORIES}test_servers_of_another_cluster_take_nothing", conditions=FOREIGN)
def system_identifier_ignored(patch: pytest.MonkeyPatch) -> None:
    """A server of any cluster is taken for one of ours: the later timeline wins."""

    def any_cluster(_self: Origins, _name: str, _system_id: int | None, _primary: str | None) -> bool:
        return True

    patch.setattr(Origins, "is_ours", any_cluster)


@convicted_by(f"{_HISTORIES}test_a_replica_that_was_promoted_for_another_use_is_left_once_it_is_off_the_list")
def removed_nodes_still_count(patch: pytest.MonkeyPatch) -> None:
    """What a node has shown counts when it is off the list as well."""
    patch.setattr(Board, "remove", Board.forget)


@convicted_by(f"{_HISTORIES}test_a_primary_set_back_to_a_snapshot_has_lost[seen]", conditions=RESTORED)
def lsns_may_fall(patch: pytest.MonkeyPatch) -> None:
    """A primary that was set back to a snapshot goes on in its epoch."""

    def never(_self: Board, _status: PrimaryStatus) -> bool:
        return False

    patch.setattr(Board, "has_lost", never)


@convicted_by(f"{_HISTORIES}test_a_server_that_takes_the_epoch_without_a_timeline_of_its_own_is_refused")
def an_epoch_is_any_servers(patch: pytest.MonkeyPatch) -> None:
    """Two servers that write one timeline are taken for one.

    Torture waits for an epoch that never begins, unless the second server lacks what was seen of the first.
    """

    def any_server(_self: Board, _status: PrimaryStatus, _before: PrimaryStatus) -> bool:
        return True

    patch.setattr(Board, "_is_holder", any_server)


@convicted_by(f"{_HISTORIES}test_a_copy_of_a_server_that_takes_the_epoch_is_not_taken_for_the_replica_that_it_was")
def a_copy_of_any_server_counts(patch: pytest.MonkeyPatch) -> None:
    """What is copied from a server that claims the epoch is taken for a replica of that epoch's primary."""
    counts = Board.as_it_counts

    def ignoring_the_rival(self: Board, status: ReplicaStatus) -> ReplicaStatus:
        self._forget_followers()
        return counts(self, status)

    patch.setattr(Board, "as_it_counts", ignoring_the_rival)


@convicted_by(f"{_PROMOTION}test_a_write_across_a_promotion_is_an_unknown_outcome")
def acknowledged_by_a_primary_that_was_replaced(patch: pytest.MonkeyPatch) -> None:
    """What a primary has answered counts, although another one is the primary by then.

    Torture's promotions end the old primary, and with it the write's connection, before there is another one.
    """

    def any_primary(_self: Nodes, _epoch: Epoch) -> None: ...

    patch.setattr(Nodes, "check_still_current", any_primary)


# --- the way back of connections ---

_GIVING_BACK = "tests/routing/test_giving_back.py::"
_LEFT = "tests/routing/test_left_behind.py::"


@convicted_by(
    f"{_LEFT}test_what_a_read_leaves_in_the_session_does_not_last",
    f"{_LEFT}test_a_tenant_does_not_see_the_rows_of_the_one_before",
    conditions=LAG,
)
def state_left_over(patch: pytest.MonkeyPatch) -> None:
    """A connection goes back with roles, temporary tables and what else RESET ALL leaves, to replicas with all."""

    async def reset_settings(self: NodeConnection) -> None:
        if not self.to_replica:
            await self.execute(self.get_reset_query())

    patch.setattr(NodeConnection, "reset_session", reset_settings)


@convicted_by(f"{_GIVING_BACK}test_commits_that_were_given_up_count_until_they_have_ended")
def give_up_not_counted(patch: pytest.MonkeyPatch) -> None:
    """The place of a COMMIT that is given up is free at once, though the server goes on with it (F22).

    Torture gives up COMMITs, and does not count the backends that they keep.
    """

    async def at_once(_self: NodePool, connection: NodeConnection, place: Place) -> None:
        connection.commits = connection.cut_off = False
        discard(connection)
        place.give_back()

    patch.setattr(NodePool, "_outlast", at_once)


@convicted_by(f"{_GIVING_BACK}test_a_write_that_fails_on_a_half_open_link_is_over_in_time")
def look_without_a_deadline(patch: pytest.MonkeyPatch) -> None:
    """What is awaited on a connection's way back may take as long as it likes.

    Torture's links are those between servers.
    """

    def never_due(_self: NodeConnection, _seconds: float) -> None: ...

    patch.setattr(NodeConnection, "due_after", never_due)


@convicted_by(
    "tests/routing/test_schema_changes.py::test_no_call_fails_because_the_schema_has_changed",
    conditions=SCHEMA_CHANGES,
)
def cached_plan_not_run_again(patch: pytest.MonkeyPatch) -> None:
    """An error of a statement that was prepared before the schema changed is raised as the caller's own."""

    def never(_error: Exception, _is_kept: object) -> bool:
        return False

    patch.setattr(pool, "may_be_outdated", never)


# --- what reads have shown ---

_SESSIONS = "tests/lab/api/test_sessions.py::"


@convicted_by(
    "tests/routing/test_foreign_histories.py::test_a_loss_is_reported_by_work_that_raises", conditions=LOST_TAIL
)
def loss_not_reported_by_errors(patch: pytest.MonkeyPatch) -> None:
    """A session learns of a loss with the next value alone, not by an error that may say what is not there."""
    take_over = Session._take_over  # noqa: SLF001 - it is what is patched

    def without_loss(self: Session, left: Answer[BaseException]) -> None:
        take_over(self, left._replace(lost=None))

    patch.setattr(Session, "_take_over", without_loss)


@convicted_by(
    f"{_SESSIONS}TestMonotonicReads::test_a_replica_behind_the_one_that_was_read_is_not_read", conditions=LAG
)
def token_not_raised_on_reads(patch: pytest.MonkeyPatch) -> None:
    """A read hands back the token that it was sent."""

    def as_before(self: SessionToken, _node: str, _incarnation: Incarnation, _bound: Lsn | None) -> SessionToken:
        return self

    patch.setattr(SessionToken, "after_replica_read", as_before)


@convicted_by(
    "tests/routing/test_outcomes.py::test_what_work_had_read_before_it_raised_is_never_taken_back", conditions=LAG
)
def token_not_raised_on_errors(patch: pytest.MonkeyPatch) -> None:
    """Work that raises has told nothing: the session goes on with the token that it had."""

    def as_before(_self: Session, _left: Answer[BaseException]) -> None: ...

    patch.setattr(Session, "_take_over", as_before)


@convicted_by(
    "tests/routing/test_own_transactions.py::test_what_runs_at_commit_does_not_take_back_that_it_is_flushed"
)
def deferred_triggers_run_at_the_commit(patch: pytest.MonkeyPatch) -> None:
    """A COMMIT is flushed because the session was set so before, whatever deferred triggers do since.

    Torture's tables have no triggers.
    """
    statements = Commits.statements

    def without_triggers(self: Commits, subject: str | None) -> str:
        return statements(self, subject).partition(";")[2]

    patch.setattr(Commits, "statements", without_triggers)


@convicted_by("tests/routing/test_bounds.py::test_read_that_cannot_be_bounded_ties_the_session_to_its_replica")
def read_floor_trusted_while_not_streaming(patch: pytest.MonkeyPatch) -> None:
    """What a read has shown ends at the greater of receive and replay LSN, also without a WAL receiver (F6)."""

    def greatest(said: ReadBound, epoch: Epoch) -> Lsn | None:
        _SHOWN_ON_REPLICA(said, epoch)
        return max(said.lsn, said.receive_lsn or Lsn(0))

    patch.setattr(ReadBound, "on_replica", greatest)


@convicted_by(f"{_SESSIONS}TestSeveralTokens::test_tokens_of_two_replicas_bind_everywhere")
def merge_keeps_the_node(patch: pytest.MonkeyPatch) -> None:
    """Two tokens of different replicas merge to one of the first of them, with all floors.

    Torture would have to bring a session back to a replica that has fallen behind, by an earlier token of its own.
    """
    merge = SessionToken.merged_with

    def keep(self: SessionToken, other: SessionToken) -> SessionToken:
        first = self if self.node is not None else other
        return replace(merge(self, other), node=first.node, incarnation=first.incarnation)

    patch.setattr(SessionToken, "merged_with", keep)


@convicted_by(
    f"{_SESSIONS}TestFallingBackToThePrimary::test_a_session_that_read_on_a_replica_waits_for_the_users_writes"
)
def fallback_without_the_lock(patch: pytest.MonkeyPatch) -> None:
    """The primary is read at once, also after a replica that may have shown a commit before it does (F13).

    Without faults that happens for a few in a thousand pairs of reads, for milliseconds.
    """

    async def wait_for_nobody(_self: Commits, _primary: Connection, _subject: str | None) -> None: ...

    patch.setattr(Commits, "wait", wait_for_nobody)


def main(arguments: Sequence[str] | None = None) -> int:  # noqa: PLR0911 - one for each way to be run
    """Run torture or tests on one variant, or the campaign; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.torture.variants", description=__doc__)
    parser.add_argument("name", nargs="?", choices=[UNPATCHED, *VARIANTS], metavar="NAME")
    parser.add_argument("--all", action="store_true", help="convict every variant")
    parser.add_argument("--worker", action="store_true", help="be a process of an API that has several")
    parser.add_argument("--client", action="store_true", help="be one of torture's client processes")
    parser.add_argument("--pytest", nargs="+", metavar="TEST", help="run these tests instead of torture")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        given = parser.parse_args(arguments[:end])
    except SystemExit as wrong_use:  # 2 is a verdict
        return cli.WRONG_USE_OF_JUDGES if wrong_use.code else 0
    if given.all:
        from tests.lab.torture import campaign  # noqa: PLC0415 - it imports this module

        return campaign.convict_all()
    if given.name is None:
        parser.print_usage()
        return cli.WRONG_USE_OF_JUDGES
    with applied(given.name):
        if given.worker:
            return workers.main()
        if given.client:
            return clients.main()
        if given.pytest:
            return int(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *given.pytest]))
        return cli.main(["torture", *arguments[end + 1 :]])


if __name__ == "__main__":
    # Under its own name, so that there is one table.
    from tests.lab.torture.variants import main as main_by_name

    raise SystemExit(main_by_name())
