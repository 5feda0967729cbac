"""What the board remembers, and the lag that it tells, in virtual time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.consistency import Board, Epoch, Incarnation, Lsn, PrimaryStatus, ReplicaStatus

EPOCH = Epoch("2-aaaaaaaaaa")
TWIN = Epoch("2-bbbbbbbbbb")
"""Another epoch on the same timeline: the two promotions knew nothing of each other."""
EARLIER = Epoch("1-zzzzzzzzzz")
LATER = Epoch("10-aaaaaaaaaa")
"""Later as a number; as text it would come first."""
LEASE_S = 5.0


def replica(
    name: str = "replica0", *, replay_lsn: int = 0, observed_at: float = 0.0, epoch: Epoch | None = EPOCH
) -> ReplicaStatus:
    """Return a replica's status, seen in its first life, while it streams."""
    return ReplicaStatus(
        name,
        Lsn(replay_lsn),
        Incarnation("first life"),
        observed_at,
        answered_at=observed_at,
        streaming=True,
        epoch=epoch,
    )


def primary(
    name: str = "primary", *, flush_lsn: int = 0, observed_at: float = 0.0, epoch: Epoch = EPOCH
) -> PrimaryStatus:
    """Return a primary's status."""
    return PrimaryStatus(name, Lsn(flush_lsn), observed_at, epoch)


def board_of(*advances: tuple[int, float]) -> Board:
    """Return a board that saw the primary's flush LSN at these moments."""
    board = Board()
    for flush_lsn, observed_at in advances:
        board.publish_primary(primary(flush_lsn=flush_lsn, observed_at=observed_at))
    return board


def notified_by(board: Board) -> list[str]:
    """Return a list that is going to hold the nodes found in another role."""
    names: list[str] = []
    board.on_new_role.append(names.append)
    return names


# --- what it remembers ---


def test_an_empty_board_knows_nothing() -> None:
    """Before the observer's first look there is neither replica nor primary."""
    board = Board()

    assert list(board.replicas) == []
    assert board.replica("replica0") is None
    assert board.primary is None
    assert board.epoch is None
    assert board.current_primary(0.0, LEASE_S) is None


def test_published_statuses_stand_in_the_order_in_which_they_were_first_seen() -> None:
    """A newer status of a replica takes its old place."""
    board = Board()
    for name in ("replica2", "replica0", "replica1", "replica0"):
        board.publish(replica(name))

    assert [status.name for status in board.replicas] == ["replica2", "replica0", "replica1"]


def test_a_newer_status_replaces_the_older_one() -> None:
    """Only the last status counts, also when it is behind the one before: the replica has crashed since."""
    board = Board()
    board.publish(replica(replay_lsn=9))
    seen_before = list(board.replicas)
    crashed = replica(replay_lsn=3)
    board.publish(crashed)

    assert [crashed] == list(board.replicas)
    assert crashed == board.replica("replica0")
    assert seen_before != list(board.replicas)


def test_a_forgotten_replica_is_gone() -> None:
    """A replica that is out of reach has no status at all, and the others keep theirs."""
    board = Board()
    board.publish(replica("replica0"))
    board.publish(replica("replica1"))
    board.forget("replica0")

    assert board.replica("replica0") is None
    assert [replica("replica1")] == list(board.replicas)


def test_forgetting_a_replica_that_was_never_seen_is_harmless() -> None:
    """The observer forgets at every failure, whether there was a status or not."""
    board = Board()
    board.publish(replica("replica0"))
    board.forget("replica7")

    assert [replica("replica0")] == list(board.replicas)


def test_a_forgotten_replica_can_come_back() -> None:
    """A replica that is heard of again has a status again."""
    board = Board()
    board.publish(replica(replay_lsn=9))
    board.forget("replica0")
    board.publish(replica(replay_lsn=5))

    assert [replica(replay_lsn=5)] == list(board.replicas)


def test_a_list_of_replicas_once_taken_does_not_change() -> None:
    """A walk over the replicas is not disturbed by what the observer publishes meanwhile."""
    board = Board()
    board.publish(replica("replica0"))
    taken = board.replicas
    board.publish(replica("replica1"))
    board.forget("replica0")

    assert [replica("replica0")] == list(taken)


def test_the_primary_is_the_one_last_seen() -> None:
    """The newest status of the primary is kept, even if its flush LSN went back."""
    board = board_of((8, 1.0), (5, 2.0))

    assert primary(flush_lsn=5, observed_at=2.0) == board.primary


@given(
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 9)), max_size=12),
)
@settings(max_examples=50)
def test_the_board_holds_exactly_what_was_published_and_not_forgotten(steps: list[tuple[str, int | None]]) -> None:
    """List and look-up agree with each other after any publishing and forgetting (None)."""
    board = Board()
    expected: dict[str, ReplicaStatus] = {}
    for name, replay_lsn in steps:
        if replay_lsn is None:
            board.forget(name)
            expected.pop(name, None)
        else:
            board.publish(replica(name, replay_lsn=replay_lsn))
            expected[name] = replica(name, replay_lsn=replay_lsn)

        assert list(expected.values()) == list(board.replicas)
        assert [expected.get(name) for name in "abc"] == [board.replica(name) for name in "abc"]


# --- the epoch and its primary ---


def test_the_epoch_is_that_of_the_primary() -> None:
    """Whatever replicas show of it, or of an earlier one."""
    board = board_of((5, 1.0))
    board.publish(replica("replica0", epoch=None))
    board.publish(replica("replica1", epoch=EARLIER))
    board.publish(replica("replica2", epoch=TWIN))

    assert EPOCH == board.epoch


@pytest.mark.parametrize(("epoch", "current"), [(LATER, None), (EPOCH, EPOCH), (EARLIER, EPOCH), (None, EPOCH)])
def test_a_replica_that_shows_a_later_epoch_ends_the_present_one(
    epoch: Epoch | None, current: Epoch | None
) -> None:
    """Its primary is not known yet, and that it is over stays known when the replica is gone."""
    board = board_of((5, 1.0))
    board.publish(replica(epoch=epoch))
    board.forget("replica0")

    assert current == board.epoch
    assert board.current_primary(1.0, LEASE_S) == (None if current is None else board.primary)
    assert board.is_current_epoch(EPOCH, 1.0, LEASE_S) == (current is not None)
    assert not board.is_current_epoch(LATER, 1.0, LEASE_S)


def test_an_epoch_that_only_replicas_show_has_no_primary() -> None:
    """Without a primary there is none; one of the timeline that they show becomes current when it is found."""
    board = Board()
    board.publish(replica(epoch=LATER))
    none = board.epoch

    assert none is None
    assert not board.publish_primary(primary())
    assert board.publish_primary(primary(epoch=LATER))
    assert LATER == board.epoch


@pytest.mark.parametrize(("now", "current"), [(4.0, True), (6.0, True), (6.5, False)])
def test_an_epoch_holds_as_long_as_the_lease(now: float, current: bool) -> None:
    """Counted from when the question was sent: a later primary may have been promoted after that."""
    board = board_of((5, 0.0), (5, 1.0))

    assert current == board.is_current_epoch(EPOCH, now, LEASE_S)
    assert (board.primary if current else None) == board.current_primary(now, LEASE_S)


@pytest.mark.parametrize("epoch", [TWIN, EARLIER, LATER, None])
def test_no_other_epoch_is_the_present_one(epoch: Epoch | None) -> None:
    """Not even on the same timeline."""
    assert not board_of((5, 1.0)).is_current_epoch(epoch, 1.0, LEASE_S)


def test_an_unknown_epoch_is_not_the_present_one_even_if_that_is_unknown() -> None:
    """None equals nothing here."""
    board = board_of((5, 1.0))
    board.publish(replica(epoch=LATER))

    assert not Board().is_current_epoch(None, 0.0, LEASE_S)
    assert not board.is_current_epoch(None, 1.0, LEASE_S)


# --- who is the primary ---


def test_a_primary_that_does_not_answer_is_not_current_and_keeps_its_epoch() -> None:
    """Nothing new is asked of it; what it has answered stands, and its replicas serve."""
    board = board_of((5, 1.0))
    board.publish(replica())
    board.forget("primary")

    assert board.current_primary(1.0, LEASE_S) is None
    assert board.primary_is_lost
    assert EPOCH == board.epoch
    assert board.is_current_epoch(EPOCH, 1.0, LEASE_S)
    assert primary(flush_lsn=5, observed_at=1.0) == board.primary


def test_a_replica_that_does_not_answer_leaves_the_primary_current() -> None:
    """Only the primary's own silence does."""
    board = board_of((5, 1.0))
    board.publish(replica())
    board.forget("replica0")

    assert board.primary == board.current_primary(1.0, LEASE_S) is not None


def test_a_primary_that_answers_again_is_current_again() -> None:
    """It has restarted, in the same epoch."""
    board = board_of((5, 1.0))
    board.forget("primary")

    assert board.publish_primary(primary(flush_lsn=4, observed_at=2.0))
    assert primary(flush_lsn=4, observed_at=2.0) == board.current_primary(2.0, LEASE_S)


def test_a_primary_that_answers_as_a_replica_is_not_current() -> None:
    """It was demoted, and rebuilt under its name; its connections were of its epoch."""
    board = board_of((5, 1.0))
    notified = notified_by(board)
    board.publish(replica("primary", epoch=None))

    assert board.current_primary(1.0, LEASE_S) is None
    assert notified == ["primary"]
    assert replica("primary", epoch=None) == board.replica("primary")

    board.publish(replica("primary", epoch=None))
    board.publish(replica("replica0"))
    assert notified == ["primary"]  # that is no news


def test_a_replica_that_answers_as_a_primary_is_no_replica_any_more() -> None:
    """What was opened to a replica shall not read from a primary (F14)."""
    board = Board()
    board.publish(replica("replica0", epoch=EARLIER))
    board.publish(replica("replica1", epoch=EARLIER))
    notified = notified_by(board)

    assert board.publish_primary(primary("replica0"))
    assert board.replica("replica0") is None
    assert [replica("replica1", epoch=EARLIER)] == list(board.replicas)
    assert notified == ["replica0"]


@pytest.mark.parametrize("lost", [True, False])
def test_the_primary_of_a_later_timeline_becomes_current(lost: bool) -> None:
    """Whether the old one still answers or not; the connections to both are of other roles than these now."""
    board = board_of((50, 1.0))
    notified = notified_by(board)
    if lost:
        board.forget("primary")

    assert board.publish_primary(primary("replica0", flush_lsn=5, observed_at=2.0, epoch=LATER))
    assert LATER == board.epoch
    assert primary("replica0", flush_lsn=5, observed_at=2.0, epoch=LATER) == board.current_primary(2.0, LEASE_S)
    assert {"primary", "replica0"} == set(notified)


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("name", ["primary", "replica0", "replica7"])
def test_the_primary_of_an_older_timeline_never_becomes_current(name: str, lost: bool) -> None:
    """A thawed one, say; not even if the later one is out of reach, and under no name."""
    board = board_of((50, 1.0))
    if lost:
        board.forget("primary")
    notified = notified_by(board)

    assert not board.publish_primary(primary(name, flush_lsn=99, observed_at=2.0, epoch=EARLIER))
    assert primary(flush_lsn=50, observed_at=1.0) == board.primary
    assert (None if lost else board.primary) == board.current_primary(2.0, LEASE_S)
    assert EPOCH == board.epoch
    assert notified == [name]  # its connections end


def test_an_old_primary_does_not_become_current_once_a_replica_shows_a_later_epoch() -> None:
    """Its successor has not been found, and it goes on answering."""
    board = board_of((50, 1.0))
    board.publish(replica(epoch=LATER))

    assert not board.publish_primary(primary(flush_lsn=51, observed_at=2.0))
    assert board.epoch is None
    assert board.current_primary(2.0, LEASE_S) is None


@pytest.mark.parametrize(
    ("epoch", "flush_lsn", "lost", "accepted"),
    [
        (TWIN, 99, False, False),
        (TWIN, 1, True, True),  # another history: its LSNs say nothing beside the other's
        (EPOCH, 99, False, False),
        (EPOCH, 49, True, False),  # a copy that has less than the primary had
        (EPOCH, 50, True, True),
        (EPOCH, 51, True, True),
    ],
)
def test_of_two_primaries_on_one_timeline_the_first_stays_while_it_answers(
    epoch: Epoch, flush_lsn: int, lost: bool, accepted: bool
) -> None:
    """Nothing says which of them was meant; a copy of the same epoch has to have as much."""
    board = board_of((50, 1.0))
    notified = notified_by(board)
    if lost:
        board.forget("primary")

    assert accepted == board.publish_primary(
        primary("replica0", flush_lsn=flush_lsn, observed_at=2.0, epoch=epoch)
    )
    assert (epoch if accepted else EPOCH) == board.epoch
    assert board.primary is not None
    assert board.primary.name == ("replica0" if accepted else "primary")
    assert ({"primary", "replica0"} if accepted else {"replica0"}) == set(notified)


def test_a_primary_that_was_refused_is_no_replica_either() -> None:
    """It had been one, and answers as a primary now."""
    board = board_of((50, 1.0))
    board.publish(replica())
    notified = notified_by(board)

    assert not board.publish_primary(primary("replica0", epoch=TWIN))
    assert board.replica("replica0") is None
    assert list(board.replicas) == []
    assert {"replica0"} == set(notified)


def test_a_primary_seen_again_is_no_news() -> None:
    """No connections end as long as it stays what it was, also after it was out of reach."""
    board = board_of((50, 1.0))
    notified = notified_by(board)
    board.publish_primary(primary(flush_lsn=60, observed_at=2.0))
    board.forget("primary")
    board.publish_primary(primary(flush_lsn=60, observed_at=3.0))

    assert notified == []


def test_the_same_node_in_another_epoch_is_news() -> None:
    """It was rebuilt and promoted, or is another cluster's under the same name."""
    board = board_of((50, 1.0))
    notified = notified_by(board)

    assert board.publish_primary(primary(observed_at=2.0, epoch=TWIN))
    assert TWIN == board.epoch
    assert {"primary"} == set(notified)


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from(["forget", "replica", "primary"]),
            st.sampled_from([EARLIER, EPOCH, TWIN, LATER]),
            st.integers(0, 3),
        ),
        max_size=16,
    )
)
@settings(max_examples=200)
def test_the_epoch_never_goes_back_to_an_older_timeline(steps: list[tuple[str, str, Epoch, int]]) -> None:
    """However nodes answer, the current timeline only rises, and no primary below one that was seen is current."""
    board = Board()
    newest = 0
    for moment, (name, what, epoch, lsn) in enumerate(steps):
        if what == "forget":
            board.forget(name)
        elif what == "replica":
            board.publish(replica(name, epoch=epoch))
            newest = max(newest, int(epoch.split("-")[0]))
        elif board.publish_primary(primary(name, flush_lsn=lsn, observed_at=float(moment), epoch=epoch)):
            assert int(epoch.split("-")[0]) >= newest
            assert epoch == board.epoch
            newest = int(epoch.split("-")[0])
        current = board.epoch
        current_primary = board.current_primary(float(moment), LEASE_S)

        assert current is None or int(current.split("-")[0]) == newest
        assert current_primary is None or current_primary.epoch == current
        assert current_primary is None or board.replica(current_primary.name) is None


# --- a replica that has diverged ---


@pytest.mark.parametrize(
    ("replay_lsn", "answered_at", "diverged"),
    [
        (101, 0.5, True),
        (101, 1.0, True),  # answered just when the primary was asked
        (101, 1.1, False),  # the primary may have written that since it was asked
        (100, 0.5, False),
        (99, 0.5, False),
    ],
)
def test_a_replica_beyond_what_the_primary_had_later_has_diverged(
    replay_lsn: int, answered_at: float, diverged: bool
) -> None:
    """Every byte that it replays was flushed on its primary before, if it is its primary."""
    status = replace(replica(replay_lsn=replay_lsn), answered_at=answered_at)

    assert diverged == board_of((50, 0.0), (100, 1.0)).has_diverged(status)


def test_without_a_primary_nothing_has_diverged() -> None:
    """There is nothing to compare with."""
    assert not Board().has_diverged(replica(replay_lsn=9))


def test_a_quick_answer_is_not_taken_for_a_divergence() -> None:
    """The question may have been sent before the primary was asked: when the answer was there is what counts."""
    status = replace(replica(replay_lsn=101, observed_at=0.5), answered_at=2.0)

    assert not board_of((100, 1.0)).has_diverged(status)


# --- lag in bytes ---


def test_lag_in_bytes_is_unknown_without_a_primary() -> None:
    """Nothing is known to measure against."""
    assert Board().lag_bytes(replica()) is None


@pytest.mark.parametrize(("replay_lsn", "lag_bytes"), [(70, 30), (99, 1), (100, 0), (101, 0)])
def test_lag_in_bytes_is_the_wal_yet_to_replay(replay_lsn: int, lag_bytes: int) -> None:
    """The distance to the primary's flush LSN; none for a replica that is beyond what was last seen of it."""
    board = board_of((50, 0.0), (100, 1.0))

    assert lag_bytes == board.lag_bytes(replica(replay_lsn=replay_lsn))


def test_lag_in_bytes_is_measured_against_a_primary_out_of_reach_as_well() -> None:
    """Against what it had when it was last seen."""
    board = board_of((100, 1.0))
    board.forget("primary")

    assert board.lag_bytes(replica(replay_lsn=70)) == 30


# --- lag in seconds ---


def test_lag_in_seconds_is_unknown_without_a_primary() -> None:
    """Nothing is known to measure against."""
    assert Board().lag_seconds(replica(), now=5.0) is None


@pytest.mark.parametrize(
    ("replay_lsn", "lag_s"),
    [(100, 0.0), (99, 3.0), (80, 3.0), (79, 5.0), (50, 5.0), (49, 10.0), (0, 10.0)],
)
def test_lag_in_seconds_counts_from_when_the_primary_was_first_beyond(replay_lsn: int, lag_s: float) -> None:
    """A replica at 80 lags since the primary was first seen beyond 80, not since it was seen at 80."""
    board = board_of((50, 0.0), (80, 5.0), (100, 7.0))

    assert lag_s == board.lag_seconds(replica(replay_lsn=replay_lsn), now=10.0)


def test_a_replica_level_with_a_quiet_primary_does_not_lag() -> None:
    """While nothing is written no time makes a replica late."""
    board = board_of((50, 0.0), (50, 3600.0))

    assert board.lag_seconds(replica(replay_lsn=50), now=7200.0) == 0.0


def test_a_replica_beyond_the_last_look_at_the_primary_does_not_lag() -> None:
    """The replica was asked after the primary, and saw more."""
    assert board_of((50, 0.0)).lag_seconds(replica(replay_lsn=60), now=9.0) == 0.0


def test_seeing_the_same_flush_lsn_again_does_not_make_the_lag_younger() -> None:
    """The first sight of a position counts, not the last."""
    board = board_of((50, 0.0), (80, 5.0), (80, 9.0))

    assert board.lag_seconds(replica(replay_lsn=50), now=10.0) == 5.0


def test_a_quiet_time_does_not_wear_out_the_memory() -> None:
    """Only advances are remembered: however often a quiet primary is seen, the old lag is still told exactly."""
    board = board_of((50, 0.0), (80, 5.0), *((80, float(moment)) for moment in range(6, 5_000)))

    assert board.lag_seconds(replica(replay_lsn=50), now=5_000.0) == 4_995.0


@pytest.mark.parametrize(
    ("name", "epoch", "lag_s"),
    [("replica0", LATER, 1.0), ("primary", TWIN, 1.0), ("replica0", EPOCH, 1.0), ("primary", EPOCH, 6.0)],
)
def test_the_memory_ends_with_the_epoch(name: str, epoch: Epoch, lag_s: float) -> None:
    """What an earlier primary had written when says nothing of the present one's WAL; nor does a copy's past."""
    board = board_of((50, 0.0), (80, 5.0))
    board.forget("primary")
    board.publish_primary(primary(name, flush_lsn=90, observed_at=10.0, epoch=epoch))

    assert lag_s == board.lag_seconds(replica(replay_lsn=60), now=11.0)


def test_a_primary_that_went_back_is_measured_anew() -> None:
    """Another cluster under the same name: where the earlier one was when is forgotten."""
    board = board_of((50, 0.0), (80, 5.0), (60, 9.0))

    assert board.lag_seconds(replica(replay_lsn=40), now=10.0) == 1.0
    assert board.lag_seconds(replica(replay_lsn=60), now=10.0) == 0.0


def test_lag_in_seconds_grows_with_the_time() -> None:
    """Paused replay lags by one second more every second."""
    board = board_of((50, 0.0), (80, 5.0))
    lags = [board.lag_seconds(replica(replay_lsn=50), now=now) for now in (5.0, 6.0, 7.5)]

    assert lags == [0.0, 1.0, 2.5]


def test_lag_in_seconds_is_never_negative() -> None:
    """A moment before the primary was seen (two readings of the clock crossed) is no lag."""
    assert board_of((50, 5.0)).lag_seconds(replica(), now=4.0) == 0.0


def test_what_lies_before_the_memory_counts_from_its_beginning() -> None:
    """After very many advances the lag of a replica that stands still is a lower bound, and never nothing."""
    board = board_of(*((number, float(number)) for number in range(1, 10_001)))
    lag_s = board.lag_seconds(replica(replay_lsn=0), now=10_000.0)

    assert lag_s is not None
    assert 100.0 < lag_s <= 10_000.0
    assert board.lag_seconds(replica(replay_lsn=9_990), now=10_000.0) == 9.0


@given(
    gaps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
    replay_lsn=st.integers(0, 60),
    since=st.integers(0, 9),
)
@settings(max_examples=100)
def test_lag_in_seconds_is_that_of_a_plain_search(
    gaps: list[tuple[int, int]], replay_lsn: int, since: int
) -> None:
    """The quick search through the memory finds what looking at every sight of the primary finds."""
    sights = list(itertools.accumulate(gaps, lambda sum_, gap: (sum_[0] + gap[0], sum_[1] + gap[1])))
    now = sights[-1][1] + since
    first_beyond = next((moment for flush_lsn, moment in sights if flush_lsn > replay_lsn), now)

    assert now - first_beyond == board_of(*sights).lag_seconds(replica(replay_lsn=replay_lsn), now)


# --- notifications ---


def test_listeners_are_notified_of_each_status_and_of_each_that_is_gone() -> None:
    """Each status once, as it is put up; a node that is gone once, and not again while it stays away."""
    board = Board()
    statuses: list[object] = []
    gone: list[str] = []
    board.on_status.append(statuses.append)
    board.on_gone.append(gone.append)
    first, second, leader = replica(replay_lsn=3), replica(replay_lsn=9), primary(flush_lsn=9)
    board.publish(first)
    board.publish_primary(leader)
    board.publish(second)
    for _ in range(2):
        board.forget("replica0")
        board.forget("primary")

    assert [first, leader, second] == statuses
    assert ["replica0", "primary"] == gone
