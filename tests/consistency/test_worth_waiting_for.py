"""Which replicas a read may sensibly wait for, in virtual time."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.consistency import (
    Board,
    Epoch,
    Incarnation,
    Lsn,
    Policy,
    PrimaryStatus,
    ReplicaStatus,
    SessionToken,
    worth_waiting_for,
)

EPOCH = Epoch("1-aaaaaaaaaa")
LIFE = Incarnation("1@1")
NOW = 100.0
POLICY = Policy(max_wait_s=0.02)
WROTE = SessionToken(EPOCH, Lsn(200))

near = ReplicaStatus(
    "near", Lsn(150), LIFE, NOW - 0.1, answered_at=NOW - 0.1, receive_lsn=Lsn(150), streaming=True, epoch=EPOCH
)


def board_of(*statuses: ReplicaStatus, seen: tuple[tuple[int, float], ...] = ((150, NOW - 1.0),)) -> Board:
    """Return a board with these replicas, whose primary was seen at these flush LSNs and times."""
    board = Board()
    for flush_lsn, seen_at in seen:
        board.publish_primary(PrimaryStatus("primary", Lsn(flush_lsn), seen_at, EPOCH))
    for status in statuses:
        board.publish(status)
    return board


def test_replica_that_was_level_when_seen_is_worth_waiting_for() -> None:
    """It lacks only what was written since."""
    assert worth_waiting_for(WROTE, board_of(near), POLICY, now=NOW) == ["near"]


def test_replica_that_was_late_already_is_not() -> None:
    """It was a second behind the primary when it was seen: it will not be there in 20 ms."""
    board = board_of(near, seen=((150, NOW - 2.0), (190, NOW - 1.1)))

    assert worth_waiting_for(WROTE, board, POLICY, now=NOW) == []


def test_replica_that_does_not_stream_is_not() -> None:
    """Nothing new reaches it, even if all that it has replayed was streamed."""
    cut_off = replace(near, streaming=False, streamed_lsn=Lsn(150))

    assert worth_waiting_for(WROTE, board_of(cut_off), POLICY, now=NOW) == []


def test_replica_of_another_epoch_is_not() -> None:
    """What it replays belongs to another history."""
    other = replace(near, epoch=Epoch("1-bbbbbbbbbb"))

    assert worth_waiting_for(WROTE, board_of(other), POLICY, now=NOW) == []


def test_replica_of_an_epoch_that_is_over_is_not() -> None:
    """What it would catch up with, it would not be asked for any more."""
    board = board_of(near)
    board.publish(replace(near, name="further", epoch=Epoch("2-aaaaaaaaaa")))

    assert worth_waiting_for(WROTE, board, POLICY, now=NOW) == []


def test_replica_that_has_diverged_is_not() -> None:
    """It goes on beyond its primary, and what the primary writes does not follow."""
    board = board_of(near, seen=((149, NOW - 1.0), (149, NOW)))

    assert worth_waiting_for(WROTE, board, POLICY, now=NOW) == []


def test_no_read_waits_for_what_nothing_is_enough_for() -> None:
    """A floor that is not known is reached by no replica."""
    assert worth_waiting_for(SessionToken(EPOCH, Lsn.PENDING), board_of(near), POLICY, now=NOW) == []


def test_replica_that_is_caught_up_is_not_waited_for() -> None:
    """It can serve at once."""
    assert worth_waiting_for(SessionToken(EPOCH, Lsn(150)), board_of(near), POLICY, now=NOW) == []


@given(count=st.integers(0, 9), start=st.integers(0, 1000), most=st.integers(1, 4))
@settings(max_examples=100)
def test_no_more_are_named_than_asked_for_and_none_twice(count: int, start: int, most: int) -> None:
    """Each look costs a query: a few are enough."""
    names = [f"replica{number}" for number in range(count)]
    board = board_of(*(replace(near, name=name) for name in names))
    named = worth_waiting_for(WROTE, board, POLICY, now=NOW, start=start, most=most)

    assert len(named) == min(count, most)
    assert len(set(named)) == len(named)
    assert set(named) <= set(names)
