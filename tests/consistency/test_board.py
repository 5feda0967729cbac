"""What the board remembers, and the lag that it tells, in virtual time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.consistency import Board, Incarnation, Lsn, PrimaryStatus, ReplicaStatus


def replica(name: str = "replica0", *, replay_lsn: int = 0, observed_at: float = 0.0) -> ReplicaStatus:
    """Return a replica's status, seen in its first life."""
    return ReplicaStatus(name, Lsn(replay_lsn), Incarnation("first life"), observed_at)


def board_of(*advances: tuple[int, float]) -> Board:
    """Return a board that saw the primary's flush LSN at these moments."""
    board = Board()
    for flush_lsn, observed_at in advances:
        board.publish_primary(PrimaryStatus(Lsn(flush_lsn), observed_at))
    return board


# --- what it remembers ---


def test_an_empty_board_knows_nothing() -> None:
    """Before the observer's first look there is neither replica nor primary."""
    board = Board()

    assert list(board.replicas) == []
    assert board.replica("replica0") is None
    assert board.primary is None


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
    """Whoever walks the replicas is not disturbed by what the observer publishes meanwhile."""
    board = Board()
    board.publish(replica("replica0"))
    taken = board.replicas
    board.publish(replica("replica1"))
    board.forget("replica0")

    assert [replica("replica0")] == list(taken)


def test_the_primary_is_the_one_last_seen() -> None:
    """The newest status of the primary is kept, even if its flush LSN went back."""
    board = board_of((8, 1.0), (5, 2.0))

    assert PrimaryStatus(Lsn(5), 2.0) == board.primary


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


# --- lag in bytes ---


def test_lag_in_bytes_is_unknown_without_a_primary() -> None:
    """Nothing is known to measure against."""
    assert Board().lag_bytes(replica()) is None


@pytest.mark.parametrize(("replay_lsn", "lag_bytes"), [(70, 30), (99, 1), (100, 0), (101, 0)])
def test_lag_in_bytes_is_the_wal_yet_to_replay(replay_lsn: int, lag_bytes: int) -> None:
    """The distance to the primary's flush LSN; none for a replica that is beyond what was last seen of it."""
    board = board_of((50, 0.0), (100, 1.0))

    assert lag_bytes == board.lag_bytes(replica(replay_lsn=replay_lsn))


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
