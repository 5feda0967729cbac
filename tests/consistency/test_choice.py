"""A read goes only to a replica that is fit, and to one of them if there is any."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rocket.consistency import (
    Board,
    Choice,
    Epoch,
    Incarnation,
    Lsn,
    Policy,
    PrimaryStatus,
    Reason,
    ReplicaStatus,
    SessionToken,
    choose,
    worth_waiting_for,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

NOW = 20.0
UNBOUNDED = Policy(lease_s=5.0, max_lag_bytes=None)

NAMES = ["replica0", "replica1", "replica2", "replica3", "replica4"]

modest = settings(max_examples=150)


class Question(NamedTuple):
    """All that the decision is made from."""

    floor: Lsn
    board: Board
    policy: Policy
    start: int
    load: Mapping[str, int]
    without: frozenset[str]

    def choice(self) -> Choice:
        """Return the answer of the code under test."""
        return choose(
            wrote(self.floor),
            self.board,
            self.policy,
            now=NOW,
            start=self.start,
            load=self.load.__getitem__,
            without=self.without,
        )

    def heard(self) -> list[ReplicaStatus]:
        """Return the replicas heard of within the lease, said as plainly as can be."""
        return [status for status in self.board.replicas if status.observed_at + self.policy.lease_s >= NOW]

    def near(self) -> list[ReplicaStatus]:
        """Return those of them that are within the bounds on lag."""
        return [status for status in self.heard() if self._near_in_bytes(status) and self._near_in_seconds(status)]

    def true(self) -> list[ReplicaStatus]:
        """Return those of them that follow the primary: it was not seen behind them since."""
        return [status for status in self.near() if self._follows(status)]

    def fit(self) -> list[ReplicaStatus]:
        """Return those of them that have surely replayed the floor and have not failed this read."""
        return [
            status
            for status in self.true()
            if vouched(status) >= max(self.floor, self.board.covered_lsn) and status.name not in self.without
        ]

    def _follows(self, status: ReplicaStatus) -> bool:
        primary = self.board.primary
        if primary is None:
            return True
        return primary.observed_at < status.answered_at or int(primary.flush_lsn) >= int(status.replay_lsn)

    def _near_in_bytes(self, status: ReplicaStatus) -> bool:
        bound = self.policy.max_lag_bytes
        furthest = max((int(seen.replay_lsn) for seen in self.board.replicas), default=0)
        flush_lsn = furthest if self.board.primary is None else int(self.board.primary.flush_lsn)
        return bound is None or flush_lsn <= int(status.replay_lsn) + bound

    def _near_in_seconds(self, status: ReplicaStatus) -> bool:
        bound, lag_s = self.policy.max_lag_s, self.board.lag_seconds(status, NOW)
        return bound is None or lag_s is None or lag_s <= bound


# Small numbers, so that positions, moments and bounds often meet exactly; and often enough some replica is fit.
SMALL = st.integers(0, 12)
LSNS = SMALL.map(Lsn)
MOMENTS = st.integers(8, 20).map(float)
BOUNDS = st.none() | SMALL
POLICIES = st.builds(
    Policy,
    lease_s=st.sampled_from([0.0, 3.0, 6.0, 9.0, 12.0, 12.0]),
    max_lag_bytes=BOUNDS,
    max_lag_s=BOUNDS.map(lambda bound: None if bound is None else float(bound)),
)


@st.composite
def boards(draw: st.DrawFn) -> Board:
    """Draw a board with up to five replicas that stream or not, and with or without a primary."""
    board = Board()
    for name in draw(st.permutations(NAMES))[: draw(st.sampled_from([0, 1, 2, 3, 4, 5, 5, 5]))]:
        observed_at = draw(MOMENTS)
        board.publish(
            ReplicaStatus(
                name,
                draw(LSNS),
                Incarnation("first life"),
                observed_at,
                answered_at=observed_at + draw(st.sampled_from([0.0, 0.0, 3.0])),
                streaming=draw(st.sampled_from([True, True, False])),
                streamed_lsn=draw(st.none() | LSNS | LSNS),
                epoch=EPOCH,
            )
        )
    sights = draw(st.lists(st.tuples(LSNS, MOMENTS), min_size=draw(st.sampled_from([0, 1, 1, 2])), max_size=3))
    for flush_lsn, observed_at in zip(*map(sorted, zip(*sights, strict=True)), strict=True):
        covered_lsn = draw(st.just(Lsn(0)) | st.integers(0, flush_lsn).map(Lsn))
        board.publish_primary(PrimaryStatus("primary", flush_lsn, observed_at, EPOCH, covered_lsn=covered_lsn))
    return board


def vouched(status: ReplicaStatus) -> int:
    """Return how far a replica is known to have replayed its epoch's WAL, said as plainly as can be."""
    if status.streaming:
        return int(status.replay_lsn)
    if status.streamed_lsn is None:
        return 0
    return min(int(status.replay_lsn), int(status.streamed_lsn))


QUESTIONS = st.builds(
    Question,
    floor=LSNS | LSNS | st.integers(0, 4).map(Lsn) | st.just(Lsn.PENDING),
    board=boards(),
    policy=POLICIES,
    start=st.integers(-7, 2**40),
    load=st.fixed_dictionaries(dict.fromkeys(NAMES, st.integers(0, 2))),
    without=st.just(frozenset[str]()) | st.frozensets(st.sampled_from(NAMES), max_size=2),
)


EPOCH = Epoch("1-aaaaaaaaaa")


def wrote(floor: int) -> SessionToken:
    """Return the token of a session that wrote up to `floor` and has read nothing."""
    return SessionToken(EPOCH, Lsn(floor))


def replica(
    name: str = "replica0", replay_lsn: int = 100, observed_at: float = NOW, incarnation: str | None = "first life"
) -> ReplicaStatus:
    """Return a replica's status as it is seen now, if nothing else is said."""
    return ReplicaStatus(
        name,
        Lsn(replay_lsn),
        None if incarnation is None else Incarnation(incarnation),
        observed_at,
        answered_at=observed_at,
        streaming=True,
        epoch=EPOCH,
    )


def board_of(
    *statuses: ReplicaStatus,
    flush_lsn: int | None = None,
    seen_at: float | None = None,
    epoch: Epoch | None = EPOCH,
) -> Board:
    """Return a board with these replicas and their primary, which none lags behind unless stated otherwise."""
    board = Board()
    for status in statuses:
        board.publish(status)
    if epoch is not None:
        if flush_lsn is None:  # seen long ago, when it had written nothing
            board.publish_primary(PrimaryStatus("primary", Lsn(0), -1.0, epoch))
        else:
            board.publish_primary(
                PrimaryStatus("primary", Lsn(flush_lsn), NOW if seen_at is None else seen_at, epoch)
            )
    return board


# --- what holds for every board, policy and floor ---


@given(question=QUESTIONS)
@modest
def test_a_chosen_replica_is_always_fit(question: Question) -> None:
    """It has replayed floor and cover, was heard of within the lease, is within both bounds, and has not failed.

    And it is of the current epoch, and not beyond what its primary had flushed afterwards.
    """
    status = question.choice().status

    if status is not None:
        assert vouched(status) >= question.floor
        assert vouched(status) >= question.board.covered_lsn
        assert status.name not in question.without
        assert NOW - status.observed_at <= question.policy.lease_s
        if question.policy.max_lag_bytes is not None and question.board.primary is not None:
            assert question.board.primary.flush_lsn - status.replay_lsn <= question.policy.max_lag_bytes
        if question.policy.max_lag_s is not None:
            assert (question.board.lag_seconds(status, NOW) or 0.0) <= question.policy.max_lag_s
        assert status == question.board.replica(status.name)
        assert status.epoch == question.board.epoch == EPOCH
        assert not question.board.has_diverged(status)


@given(question=QUESTIONS)
@modest
def test_if_any_replica_is_fit_one_is_chosen(question: Question) -> None:
    """The primary is never troubled while a replica can serve."""
    assert (question.fit() != []) == (question.choice().status is not None)


@given(question=QUESTIONS)
@modest
def test_the_reason_is_as_documented(question: Question) -> None:
    """The reason says how far the search came: heard of, within bounds, of the epoch, caught up, not failed."""
    if question.fit():
        expected = Reason.RETRIED if question.without else Reason.CAUGHT_UP
    elif question.without:
        expected = Reason.REPLICAS_FAILED
    elif not question.heard():
        expected = Reason.NO_STATUS
    elif not question.near():
        expected = Reason.TOO_FAR_BEHIND
    elif not question.true():
        expected = Reason.DIVERGED
    else:
        expected = Reason.NOT_CAUGHT_UP

    assert expected == question.choice().reason


@given(question=QUESTIONS)
@modest
def test_the_less_busy_of_the_first_two_from_the_start_is_chosen(question: Question) -> None:
    """Of two equally busy ones it is the first; the third is not even looked at."""
    replicas = list(question.board.replicas)
    turn = question.start % len(replicas) if replicas else 0
    in_turn = [status for status in replicas[turn:] + replicas[:turn] if status in question.fit()]
    expected = min(in_turn[:2], key=lambda status: question.load[status.name], default=None)

    assert expected == question.choice().status


@given(question=QUESTIONS)
@modest
def test_reads_spread_over_all_fit_replicas(question: Question) -> None:
    """As the start varies, and all are equally busy, every fit replica has its turn, and no other."""
    idle = dict.fromkeys(NAMES, 0)
    choices = [question._replace(start=start, load=idle).choice() for start in range(len(NAMES) * 12)]

    assert {status.name for status in question.fit()} == {
        choice.status.name for choice in choices if choice.status
    }


@given(question=QUESTIONS, higher=SMALL)
@modest
def test_a_higher_floor_never_makes_a_replica_fit(question: Question, higher: int) -> None:
    """What cannot serve a session cannot serve one that has seen more."""
    further = question._replace(floor=Lsn(min(question.floor + higher, Lsn.PENDING)))

    assert question.choice().status is not None or further.choice().status is None


@given(question=QUESTIONS)
@modest
def test_an_unknown_commit_lsn_is_served_by_no_replica(question: Question) -> None:
    """A write in progress binds its session to the primary, however far the replicas are."""
    assert question._replace(floor=Lsn.PENDING).choice().status is None


# --- the edges, one by one ---


@pytest.mark.parametrize(("replay_lsn", "fit"), [(99, False), (100, True), (101, True)])
def test_replayed_exactly_up_to_the_floor_is_fit(replay_lsn: int, fit: bool) -> None:
    """The floor is where the commit ends: a replica exactly there shows it, one byte less does not."""
    status = replica(replay_lsn=replay_lsn)
    expected = Choice(status, Reason.CAUGHT_UP) if fit else Choice(None, Reason.NOT_CAUGHT_UP)

    assert expected == choose(wrote(100), board_of(status), UNBOUNDED, now=NOW)


def test_the_floor_is_compared_as_a_number() -> None:
    """As text `0/9` would be beyond `0/10`."""
    behind = replica(replay_lsn=Lsn.parse("0/9"))

    assert Choice(None, Reason.NOT_CAUGHT_UP) == choose(
        wrote(Lsn.parse("0/10")), board_of(behind), UNBOUNDED, now=NOW
    )


@pytest.mark.parametrize(("replay_lsn", "fit"), [(99, False), (100, True), (101, True)])
def test_replayed_exactly_up_to_the_cover_is_fit(replay_lsn: int, fit: bool) -> None:
    """Also where the session has been reading, and has written less; a read that asks for nothing goes there."""
    status = replica(replay_lsn=replay_lsn)
    board = board_of(status)
    board.publish_primary(PrimaryStatus("primary", Lsn(0), NOW - 1, EPOCH, covered_lsn=Lsn(100)))
    token = wrote(1).after_replica_read(status.name, status.incarnation, Lsn(50))
    expected = Choice(status, Reason.CAUGHT_UP) if fit else Choice(None, Reason.NOT_CAUGHT_UP)

    assert expected == choose(token, board, UNBOUNDED, now=NOW)
    assert ([] if fit else ["replica0"]) == worth_waiting_for(token, board, UNBOUNDED, now=NOW)
    assert Choice(status, Reason.UNCHECKED) == choose(None, board, UNBOUNDED, now=NOW)


@pytest.mark.parametrize(("age_s", "fit"), [(4.5, True), (5.0, True), (5.5, False)])
def test_a_status_as_old_as_the_lease_still_serves(age_s: float, fit: bool) -> None:
    """Only a replica unheard of for longer than the lease serves no read."""
    status = replica(observed_at=NOW - age_s)
    expected = Choice(status, Reason.CAUGHT_UP) if fit else Choice(None, Reason.NO_STATUS)

    assert expected == choose(wrote(1), board_of(status), UNBOUNDED, now=NOW)


@pytest.mark.parametrize(("flush_lsn", "fit"), [(149, True), (150, True), (151, False)])
def test_a_replica_exactly_at_the_bound_in_bytes_still_serves(flush_lsn: int, fit: bool) -> None:
    """Only further behind than `max_lag` is too far, whether the floor is replayed or not."""
    status = replica(replay_lsn=100)
    expected = Choice(status, Reason.CAUGHT_UP) if fit else Choice(None, Reason.TOO_FAR_BEHIND)

    board = board_of(status, flush_lsn=flush_lsn)
    assert expected == choose(wrote(1), board, Policy(max_lag_bytes=50), now=NOW)


@pytest.mark.parametrize(("lag_s", "fit"), [(1.5, True), (2.0, True), (2.5, False)])
def test_a_replica_exactly_at_the_bound_in_seconds_still_serves(lag_s: float, fit: bool) -> None:
    """The same bound in time, counted from when the primary was first seen beyond the replica."""
    status = replica(replay_lsn=100)
    expected = Choice(status, Reason.CAUGHT_UP) if fit else Choice(None, Reason.TOO_FAR_BEHIND)

    board = board_of(status, flush_lsn=101, seen_at=NOW - lag_s)
    assert expected == choose(wrote(1), board, Policy(max_lag_bytes=None, max_lag_s=2.0), now=NOW)


def test_sixteen_mebibytes_bound_the_lag_by_default() -> None:
    """The default policy refuses a replica one byte further behind."""
    status = replica(replay_lsn=1)

    assert choose(wrote(1), board_of(status, flush_lsn=1 + 2**24), Policy(), now=NOW).status == status
    assert choose(wrote(1), board_of(status, flush_lsn=2 + 2**24), Policy(), now=NOW).status is None


def test_without_a_primary_seen_the_lag_bounds_nothing() -> None:
    """There is nothing to lag behind but another replica."""
    policy = Policy(max_lag_bytes=0, max_lag_s=0.0)
    board = board_of(replica("replica0", 99), epoch=None)
    assert Choice(replica("replica0", 99), Reason.CAUGHT_UP) == choose(wrote(99), board, policy, now=NOW)
    board.publish(replica("replica1", 100))

    assert Choice(None, Reason.NOT_CAUGHT_UP) == choose(wrote(101), board, policy, now=NOW)
    assert Choice(None, Reason.REPLICAS_FAILED) == choose(wrote(99), board, policy, now=NOW, without={"replica1"})


def test_a_primary_out_of_reach_keeps_no_replica_from_serving() -> None:
    """Where it is now is unknown, but what its epoch was is known, and the replica has replayed the floor."""
    board = board_of(replica(), flush_lsn=100, seen_at=NOW - 1e6)
    board.forget("primary")

    assert Choice(replica(), Reason.CAUGHT_UP) == choose(wrote(100), board, Policy(), now=NOW)


def test_an_empty_board_has_no_status() -> None:
    """Before the observer's first look every read goes to the primary."""
    assert Choice(None, Reason.NO_STATUS) == choose(wrote(0), Board(), Policy(), now=NOW)


def test_one_replica_near_but_not_caught_up_is_the_reason() -> None:
    """Of replicas too far behind and replicas not caught up the nearer ones give the reason."""
    board = board_of(replica("replica0", 1), replica("replica1", 90), flush_lsn=110)

    assert choose(wrote(100), board, Policy(max_lag_bytes=50), now=NOW).reason == Reason.NOT_CAUGHT_UP


# --- after a failure ---


def test_a_replica_that_failed_is_not_asked_again() -> None:
    """The read is retried on another replica that has replayed the same floor."""
    board = board_of(replica("replica0"), replica("replica1"))

    assert Choice(replica("replica1"), Reason.RETRIED) == choose(
        wrote(100), board, UNBOUNDED, now=NOW, without={"replica0"}
    )


def test_a_retry_keeps_the_floor() -> None:
    """A replica behind the floor is no way out when the one that was caught up has failed."""
    board = board_of(replica("replica0", 100), replica("replica1", 99))

    assert Choice(None, Reason.REPLICAS_FAILED) == choose(
        wrote(100), board, UNBOUNDED, now=NOW, without={"replica0"}
    )


def test_a_replica_that_cannot_be_reached_is_no_attempt() -> None:
    """Another one serves as if it were not there; where none can yet, one is waited for."""
    caught_up, late = replica("replica0", 100), replica("replica1", 99)
    board = board_of(caught_up, late, replica("replica2", 100))

    def chosen(*unreachable: str, floor: int = 100) -> Choice:
        return choose(wrote(floor), board, UNBOUNDED, now=NOW, unreachable=unreachable)

    assert Choice(caught_up, Reason.CAUGHT_UP) == chosen("replica2")
    assert Choice(None, Reason.NOT_CAUGHT_UP) == chosen("replica0", "replica2")
    assert ["replica1"] == worth_waiting_for(wrote(100), board, UNBOUNDED, now=NOW, unreachable=["replica0"])
    assert [] == worth_waiting_for(wrote(100), board, UNBOUNDED, now=NOW, unreachable=["replica1"])
    assert Choice(None, Reason.UNREACHABLE) == chosen("replica0", "replica1", "replica2", floor=99)


# --- how busy they are ---


@pytest.mark.parametrize(
    ("busy", "asked"),
    [(0, {"replica3"}), (1, {"replica3", "replica4"})],
    ids=["the first is idle", "all are busy"],
)
def test_only_two_replicas_are_asked_how_busy_they_are(busy: int, asked: set[str]) -> None:
    """The cost does not grow with the number of replicas."""
    seen: Counter[str] = Counter()

    def load(name: str) -> int:
        seen[name] += 1
        return busy

    choose(wrote(1), board_of(*map(replica, NAMES)), UNBOUNDED, now=NOW, start=3, load=load)

    assert asked == set(seen)
    assert max(seen.values()) <= 2


def test_a_single_fit_replica_serves_however_busy() -> None:
    """How busy a replica is never sends a read to the primary."""
    board = board_of(replica("replica0", 99), replica("replica1", 100))
    choice = choose(wrote(100), board, UNBOUNDED, now=NOW, load=lambda _name: 10**9)

    assert replica("replica1") == choice.status


def test_a_stuck_replica_is_left_alone() -> None:
    """Reads that do not end make a replica the busier one wherever it is met, so that new ones go elsewhere."""
    board = board_of(*map(replica, NAMES))
    load = {**dict.fromkeys(NAMES, 0), "replica2": 100}
    served = [
        choose(wrote(1), board, UNBOUNDED, now=NOW, start=start, load=load.__getitem__).status
        for start in range(10)
    ]

    assert {"replica0", "replica1", "replica3", "replica4"} == {status.name for status in served if status}


# --- which connections a status speaks for ---


@pytest.mark.parametrize(
    ("seen", "connected", "vouches"),
    [
        ("first life", "first life", True),
        ("second life", "first life", False),
        ("first life", "second life", False),
        ("first life", None, False),
        (None, "first life", False),
        (None, None, False),
    ],
)
def test_a_status_vouches_only_for_its_own_incarnation(
    seen: str | None, connected: str | None, vouches: bool
) -> None:
    """A status of another life says nothing about a connection, and an unknown one equals not even itself."""
    incarnation = None if connected is None else Incarnation(connected)

    assert vouches == replica(incarnation=seen).vouches_for(incarnation)


@pytest.mark.parametrize(("read_floor", "fit"), [(100, True), (101, False)])
def test_on_a_replica_that_hides_its_incarnation_both_floors_bind(read_floor: int, fit: bool) -> None:
    """It may have another life by now than when the session read there: that is unknown, even to the replica."""
    hidden = replace(replica(replay_lsn=100), incarnation=None)
    token = replace(read_on("replica0", 100, read_floor), incarnation=None)
    expected = Choice(hidden, Reason.CAUGHT_UP) if fit else Choice(None, Reason.NOT_CAUGHT_UP)

    assert expected == choose(token, board_of(hidden), UNBOUNDED, now=NOW)


# --- whose history it follows ---

OTHER_EPOCHS = [Epoch("1-bbbbbbbbbb"), Epoch("2-aaaaaaaaaa"), None]


@pytest.mark.parametrize("epoch", OTHER_EPOCHS)
@pytest.mark.parametrize("floor", [0, 100])
def test_a_replica_of_another_epoch_is_never_chosen(floor: int, epoch: Epoch | None) -> None:
    """Its positions are places in another history; without the row of any epoch it is unknown in which."""
    board = board_of(replace(replica(), epoch=epoch))

    assert Choice(None, Reason.OTHER_EPOCH) == choose(wrote(floor), board, UNBOUNDED, now=NOW)


@pytest.mark.parametrize("epoch", OTHER_EPOCHS)
def test_not_even_the_own_replica_serves_once_it_shows_another_epoch(epoch: Epoch | None) -> None:
    """Within one life a replica may go on from one epoch to the next, and the floors do not."""
    board = board_of(replace(replica(), epoch=epoch))

    assert Choice(None, Reason.OTHER_EPOCH) == choose(read_on("replica0", 0, 100), board, UNBOUNDED, now=NOW)


@given(
    question=QUESTIONS,
    others=st.frozensets(st.sampled_from(NAMES)),
    epoch=st.sampled_from([Epoch("1-bbbbbbbbbb"), None]),
)
@modest
def test_replicas_of_another_epoch_count_for_nothing(
    question: Question, others: frozenset[str], epoch: Epoch | None
) -> None:
    """The choice is that among the replicas of the session's own epoch; nothing else makes it fail."""
    assume(question.board.primary is not None)  # else an epoch that replicas show may become the current one
    mixed, own = Board(), Board()
    for status in question.board.replicas:
        if status.name in others:
            mixed.publish(replace(status, epoch=epoch))
        else:
            mixed.publish(status)
            own.publish(status)
    if question.board.primary is not None:
        for board in (mixed, own):
            board.publish_primary(question.board.primary)
    question = question._replace(policy=replace(question.policy, max_lag_s=None), without=frozenset())
    choice = question._replace(board=mixed).choice()

    assert choice.status is None or choice.status.epoch == EPOCH
    assert (choice.status is None) == (question._replace(board=own).choice().status is None)


@pytest.mark.parametrize("start", [0, 1])
def test_no_replica_serves_once_a_later_epoch_was_seen(start: int) -> None:
    """Its primary is not known yet, and what the replicas of the earlier one have may be lost."""
    board = board_of(replica("replica0"), flush_lsn=100)
    board.publish(replace(replica("replica1"), epoch=Epoch("2-aaaaaaaaaa")))

    for token in (wrote(0), replace(wrote(0), epoch=Epoch("2-aaaaaaaaaa"))):
        assert Choice(None, Reason.OTHER_EPOCH) == choose(token, board, UNBOUNDED, now=NOW, start=start)


def test_a_replica_of_an_earlier_epoch_serves_not_even_its_own_sessions() -> None:
    """Status and token agree, but the epoch is over; beside it a replica of the current one serves its own."""
    earlier = replace(replica("replica0"), epoch=Epoch("1-bbbbbbbbbb"))
    board = board_of(earlier, replica("replica1"))

    assert Choice(None, Reason.OTHER_EPOCH) == choose(
        replace(wrote(1), epoch=Epoch("1-bbbbbbbbbb")), board, UNBOUNDED, now=NOW
    )
    assert Choice(replica("replica1"), Reason.CAUGHT_UP) == choose(wrote(1), board, UNBOUNDED, now=NOW)


@pytest.mark.parametrize(
    ("session", "status", "board", "fit"),
    [
        ("2-aaaaaaaaaa", "2-aaaaaaaaaa", "2-aaaaaaaaaa", True),
        ("2-bbbbbbbbbb", "2-aaaaaaaaaa", "2-aaaaaaaaaa", False),
        ("2-aaaaaaaaaa", "2-bbbbbbbbbb", "2-aaaaaaaaaa", False),
        ("2-aaaaaaaaaa", "2-aaaaaaaaaa", "2-bbbbbbbbbb", False),
        ("2-aaaaaaaaaa", None, "2-aaaaaaaaaa", False),
        ("2-aaaaaaaaaa", "2-aaaaaaaaaa", None, True),  # no primary was found yet
        ("2-bbbbbbbbbb", "2-aaaaaaaaaa", None, False),
    ],
)
def test_session_replica_and_primary_have_to_be_of_one_epoch(
    session: str, status: str | None, board: str | None, fit: bool
) -> None:
    """Two of the three say nothing about the third, not even with the same timeline."""
    seen = replace(replica(), epoch=None if status is None else Epoch(status))
    choice = choose(
        replace(wrote(1), epoch=Epoch(session)),
        board_of(seen, epoch=None if board is None else Epoch(board)),
        UNBOUNDED,
        now=NOW,
    )

    assert choice == (Choice(seen, Reason.CAUGHT_UP) if fit else Choice(None, Reason.OTHER_EPOCH))


def test_a_replica_of_the_own_epoch_that_is_not_caught_up_came_nearer() -> None:
    """The reason is that of the replica which came nearest to serving."""
    board = board_of(replace(replica("replica0"), epoch=None), replica("replica1", 99))

    assert Choice(None, Reason.NOT_CAUGHT_UP) == choose(wrote(100), board, UNBOUNDED, now=NOW)


def test_a_replica_of_another_epoch_came_nearer_than_one_too_far_behind() -> None:
    """It was heard of and is near; only what it follows is not known to be right."""
    board = board_of(replica("replica0", 1), replace(replica("replica1"), epoch=None), flush_lsn=100)

    assert Choice(None, Reason.OTHER_EPOCH) == choose(wrote(1), board, Policy(max_lag_bytes=10), now=NOW)


# --- whether it still follows its primary ---


@pytest.mark.parametrize(
    ("flush_lsn", "seen_at", "fit"),
    [
        (99, NOW, False),
        (99, NOW - 0.5, False),  # asked at the moment at which the replica's answer was there
        (99, NOW - 0.6, True),  # asked before: it has got what the primary wrote since
        (100, NOW, True),
        (101, NOW, True),
    ],
)
def test_a_replica_beyond_what_its_primary_had_later_is_never_chosen(
    flush_lsn: int, seen_at: float, fit: bool
) -> None:
    """What it has replayed is not all that primary's WAL, though the session asks for nothing."""
    status = replica(replay_lsn=100, observed_at=NOW - 0.5)
    expected = Choice(status, Reason.CAUGHT_UP) if fit else Choice(None, Reason.DIVERGED)

    board = board_of(status, flush_lsn=flush_lsn, seen_at=seen_at)
    assert expected == choose(wrote(0), board, UNBOUNDED, now=NOW)
    assert expected == choose(read_on("replica0", 0, 0), board, UNBOUNDED, now=NOW)


def test_a_replica_that_diverged_came_nearer_than_one_of_another_epoch() -> None:
    """It shows the right epoch; and one that is not caught up came nearer still."""
    other, diverged, behind = (
        replace(replica("replica0"), epoch=None),
        replica("replica1", 101),
        replica("replica2", 99),
    )

    for statuses, reason in (((other, diverged), Reason.DIVERGED), ((diverged, behind), Reason.NOT_CAUGHT_UP)):
        board = board_of(*statuses, flush_lsn=100)
        assert Choice(None, reason) == choose(wrote(100), board, UNBOUNDED, now=NOW)


@pytest.mark.parametrize(
    ("streaming", "streamed_lsn", "fit"),
    [
        (True, None, True),
        (True, 50, True),  # that was another time: now it streams
        (False, 101, True),
        (False, 100, True),
        (False, 99, False),
        (False, None, False),
    ],
)
def test_without_a_stream_a_replica_is_caught_up_only_with_what_it_has_streamed(
    streaming: bool, streamed_lsn: int | None, fit: bool
) -> None:
    """What it replays beyond that may be anything that it has found."""
    streamed = None if streamed_lsn is None else Lsn(streamed_lsn)
    status = replace(replica(replay_lsn=100), streaming=streaming, streamed_lsn=streamed)
    expected = Choice(status, Reason.CAUGHT_UP) if fit else Choice(None, Reason.NOT_CAUGHT_UP)

    assert expected == choose(wrote(100), board_of(status), UNBOUNDED, now=NOW)
    assert expected == choose(read_on("replica0", 100, 0), board_of(status), UNBOUNDED, now=NOW)


def test_a_session_without_floors_is_served_by_a_replica_that_has_never_streamed() -> None:
    """It asks for nothing; the epoch's row is there."""
    status = replace(replica(), streaming=False)

    assert Choice(status, Reason.CAUGHT_UP) == choose(wrote(0), board_of(status), UNBOUNDED, now=NOW)


@given(replay_lsn=LSNS, receive_lsn=st.none() | LSNS, streamed_lsn=st.none() | LSNS, streaming=st.booleans())
@modest
def test_a_replica_never_vouches_for_more_than_it_has_replayed(
    replay_lsn: Lsn, receive_lsn: Lsn | None, streamed_lsn: Lsn | None, streaming: bool
) -> None:
    """What was received is not there yet; without a stream, what was not streamed is not sure."""
    status = replace(
        replica(replay_lsn=replay_lsn), receive_lsn=receive_lsn, streamed_lsn=streamed_lsn, streaming=streaming
    )

    assert vouched(status) == status.vouched_lsn <= replay_lsn


# --- the session's own replica ---

OWN_LOAD = 3
LOYALTY = 4
"""This many more connections may be at work on the own replica; a matter of taste, and kept by these tests."""


def read_on(
    node: str | None, write_floor: int, read_floor: int | None, incarnation: str | None = "first life"
) -> SessionToken:
    """Return the token of a session that last read on a replica."""
    life = None if incarnation is None else Incarnation(incarnation)
    return SessionToken(EPOCH, Lsn(write_floor), None if read_floor is None else Lsn(read_floor), node, life)


@pytest.mark.parametrize(("replay_lsn", "fit"), [(49, False), (50, True), (99, True)])
def test_the_own_replica_serves_at_the_write_floor(replay_lsn: int, fit: bool) -> None:
    """What it has shown once it goes on showing, however far what it received lies ahead."""
    board = board_of(replica("replica0", replay_lsn), replica("replica1", replay_lsn))
    expected = (
        Choice(replica("replica0", replay_lsn), Reason.CAUGHT_UP) if fit else Choice(None, Reason.NOT_CAUGHT_UP)
    )

    for start in range(4):
        assert expected == choose(read_on("replica0", 50, 100), board, UNBOUNDED, now=NOW, start=start)


@pytest.mark.parametrize(("replay_lsn", "fit"), [(99, False), (100, True)])
def test_any_other_replica_serves_at_the_read_floor(replay_lsn: int, fit: bool) -> None:
    """It may have got less than the own one has shown."""
    status = replica("replica1", replay_lsn)
    expected = Choice(status, Reason.CAUGHT_UP) if fit else Choice(None, Reason.NOT_CAUGHT_UP)

    assert expected == choose(read_on("replica0", 50, 100), board_of(status), UNBOUNDED, now=NOW)


@pytest.mark.parametrize("seen", ["second life", None])
@pytest.mark.parametrize("remembered", ["first life", None])
def test_the_own_replica_is_not_recognised_in_another_life(remembered: str | None, seen: str | None) -> None:
    """After a crash it may lie behind what it has shown, like any other; an unknown life is never the same."""
    token = read_on("replica0", 50, 100, remembered)

    assert choose(token, board_of(replica("replica0", 99, incarnation=seen)), UNBOUNDED, now=NOW).status is None
    again = replica("replica0", 100, incarnation="second life")
    assert Choice(again, Reason.CAUGHT_UP) == choose(token, board_of(again), UNBOUNDED, now=NOW)


def test_a_session_stays_with_its_own_replica() -> None:
    """While that is fit, and as busy as the others, it serves wherever the walk begins."""
    board = board_of(*map(replica, NAMES))
    served = {
        choose(read_on("replica3", 50, 100), board, UNBOUNDED, now=NOW, start=start).status for start in range(20)
    }

    assert {replica("replica3")} == served


@pytest.mark.parametrize(
    ("load", "name"),
    [(0, "replica0"), (OWN_LOAD + LOYALTY, "replica0"), (OWN_LOAD + LOYALTY + 1, "replica1"), (99, "replica1")],
)
def test_a_session_leaves_its_own_replica_when_that_is_much_busier(load: int, name: str) -> None:
    """A few connections more are borne; one beyond that sends it to the other."""
    board = board_of(replica("replica0"), replica("replica1"))
    loads = {"replica0": load, "replica1": OWN_LOAD}
    choice = choose(read_on("replica0", 50, 100), board, UNBOUNDED, now=NOW, load=loads.__getitem__)

    assert Choice(replica(name), Reason.CAUGHT_UP) == choice


def test_a_busy_own_replica_is_not_left_for_one_that_is_not_caught_up() -> None:
    """How busy it is never makes another one fit."""
    board = board_of(replica("replica0", 50), replica("replica1", 99))
    loads = {"replica0": 1_000, "replica1": 0}
    choice = choose(read_on("replica0", 50, 100), board, UNBOUNDED, now=NOW, load=loads.__getitem__)

    assert Choice(replica("replica0", 50), Reason.CAUGHT_UP) == choice


def test_the_own_replica_that_has_failed_is_left() -> None:
    """The retry goes elsewhere, and there both floors hold."""
    token = read_on("replica0", 50, 100)
    board = board_of(replica("replica0"), replica("replica1", 100), replica("replica2", 99))

    for start in range(6):
        assert Choice(replica("replica1", 100), Reason.RETRIED) == choose(
            token, board, UNBOUNDED, now=NOW, start=start, without={"replica0"}
        )


@pytest.mark.parametrize(
    ("status", "policy"),
    [
        (replica("replica0", observed_at=NOW - 6.0), UNBOUNDED),
        (replica("replica0", 89), Policy(max_lag_bytes=10)),
        (replica("replica0", 99), Policy(max_lag_bytes=None, max_lag_s=0.5)),
    ],
)
def test_the_own_replica_is_bound_by_lease_and_lag_like_any_other(status: ReplicaStatus, policy: Policy) -> None:
    """Loyalty makes no replica fit."""
    board = board_of(status, replica("replica1"), flush_lsn=100, seen_at=NOW - 1.0)

    assert Choice(replica("replica1"), Reason.CAUGHT_UP) == choose(
        read_on("replica0", 50, 60), board, policy, now=NOW
    )


def test_a_read_floor_that_is_unknown_allows_only_the_own_replica() -> None:
    """It is unknown which other one has replayed as much; without the own one the primary serves."""
    token = read_on("replica0", 50, None)
    ahead = replica("replica1", Lsn.PENDING - 1)

    for start in range(4):
        assert Choice(replica("replica0", 50), Reason.CAUGHT_UP) == choose(
            token,
            board_of(replica("replica0", 50), ahead),
            UNBOUNDED,
            now=NOW,
            start=start,
            load=lambda name: 1_000 if name == "replica0" else 0,
        )
    assert Choice(None, Reason.NOT_CAUGHT_UP) == choose(token, board_of(ahead), UNBOUNDED, now=NOW)


@given(question=QUESTIONS, node=st.none() | st.sampled_from(NAMES), read_floor=SMALL, life=st.sampled_from("12"))
@modest
def test_with_a_token_the_chosen_replica_has_replayed_the_floor_that_holds_there(
    question: Question, node: str | None, read_floor: int, life: str
) -> None:
    """Both floors, except on the own replica; and if any replica has, one is chosen, the own one at equal load."""
    incarnation = {"1": "first life", "2": "second life"}[life]
    token = read_on(node, min(question.floor, 12), read_floor, incarnation if node else None)
    choice = choose(
        token,
        question.board,
        question.policy,
        now=NOW,
        start=question.start,
        without=question.without,
    )
    fit = [
        status
        for status in question.true()
        if status.name not in question.without
        and vouched(status)
        >= max(
            int(token.write_floor),
            int(question.board.covered_lsn),
            0 if status.name == node and incarnation == "first life" else read_floor,
        )
    ]

    assert (choice.status is None) == (fit == [])
    assert choice.status is None or choice.status in fit
    assert choice.status is None or node not in {status.name for status in fit} or choice.status.name == node
