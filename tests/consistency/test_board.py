"""What the board remembers, and the lag that it tells, in virtual time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rocket.consistency import Board, Epoch, Incarnation, Lsn, PrimaryStatus, ReplicaStatus, SessionToken

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
    """The newest status of the primary is kept, even if an answer to an earlier question comes later."""
    board = board_of((8, 1.0), (9, 2.0), (8, 1.5))

    assert primary(flush_lsn=8, observed_at=1.5) == board.primary


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
    """It is current for sessions that can read there; of primaries none is followed that is older."""
    board = Board()
    board.publish(replica(epoch=EARLIER))
    board.publish(replica("replica1", epoch=LATER))

    assert LATER == board.epoch
    assert board.current_primary(0.0, LEASE_S) is None
    assert not board.is_current_epoch(LATER, 0.0, LEASE_S)
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


@given(covers=st.lists(st.tuples(st.sampled_from([EARLIER, EPOCH, LATER]), st.integers(0, 20))))
@settings(max_examples=100)
def test_a_cover_only_grows_within_its_epoch(covers: list[tuple[Epoch, int]]) -> None:
    """And a new epoch begins with none but its own."""
    board, expected, epoch = Board(), 0, None
    for number, (named, covered_lsn) in enumerate(covers):
        status = replace(
            primary(flush_lsn=100 + number, observed_at=number, epoch=named), covered_lsn=Lsn(covered_lsn)
        )
        if board.publish_primary(status):
            expected = max(covered_lsn, expected if named == epoch else 0)
            epoch = named
        assert expected == board.covered_lsn


def test_a_cover_ends_with_its_cluster() -> None:
    """Another one has taken its place, of which only replicas are known."""
    board = Board()
    board.publish_primary(replace(primary(flush_lsn=9), covered_lsn=Lsn(9), system_id=1))
    assert Lsn(9) == board.covered_lsn
    board.forget("primary")
    assert board.publish(replace(replica("primary", epoch=TWIN), system_id=2))
    assert (None, TWIN, Lsn(0)) == (board.primary, board.epoch, board.covered_lsn)


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

    assert board.publish_primary(primary(flush_lsn=5, observed_at=2.0))
    assert primary(flush_lsn=5, observed_at=2.0) == board.current_primary(2.0, LEASE_S)


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
        (EPOCH, 49, True, False),  # another server: a copy, or a failover without a timeline of its own
        (EPOCH, 51, True, False),
    ],
)
def test_of_two_primaries_on_one_timeline_the_first_stays_while_it_answers(
    epoch: Epoch, flush_lsn: int, lost: bool, accepted: bool
) -> None:
    """Nothing says which of them was meant; an epoch belongs to the server that has held it."""
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
@example(steps=[("a", "primary", EARLIER, 0), ("a", "replica", LATER, 0), ("b", "primary", EPOCH, 0)])
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


# --- which cluster, and what was lost ---

OURS, OTHER = 7, 8
"""System identifiers."""
ANEW = Epoch("2.1-aaaaaaaaaa")
"""Begun by the primary of `EPOCH` after it had lost WAL."""


def ours_with_a_primary() -> Board:
    """Return a board that knows our primary and a replica of it."""
    board = Board()
    board.publish_primary(replace(primary(flush_lsn=50), system_id=OURS, started=1))
    board.publish(replace(replica(replay_lsn=50), system_id=OURS))
    return board


def test_nodes_of_another_cluster_take_nothing() -> None:
    """Neither the epoch nor the office, whatever their timeline; they are named as long as they answer."""
    board = ours_with_a_primary()
    for _ in range(2):
        assert not board.publish(replace(replica("r7", epoch=LATER), system_id=OTHER))
        assert not board.publish_primary(replace(primary("q", observed_at=1.0, epoch=LATER), system_id=OTHER))
    board.forget("primary")
    assert not board.has_lost(replace(primary("q", observed_at=1.0), system_id=OTHER))
    assert not board.publish_primary(replace(primary("q", observed_at=1.0, epoch=LATER), system_id=OTHER))

    assert EPOCH == board.epoch
    assert ["replica0"] == [status.name for status in board.replicas]
    assert {"q", "r7"} == set(board.refused)
    assert board.publish_primary(replace(primary(flush_lsn=50, observed_at=2.0), system_id=OURS, started=1))
    board.remove("q")
    board.remove("r7")
    assert {} == board.refused


def test_another_cluster_takes_the_place_of_ours_once_no_node_of_ours_answers() -> None:
    """Under the primary's own name; under another, once none is left that was of ours when it last answered."""
    made_anew = replace(primary(observed_at=1.0, epoch=EARLIER), system_id=OTHER)
    board = ours_with_a_primary()
    board.forget("primary")
    assert not board.publish_primary(made_anew)
    board.forget("replica0")
    assert not board.publish_primary(replace(made_anew, name="q"))
    assert board.publish_primary(made_anew)
    assert (EARLIER, {EPOCH}) == (board.epoch, board.abandoned)

    board = ours_with_a_primary()
    board.forget("primary")
    board.remove("replica0")
    assert not board.publish_primary(replace(made_anew, name="q"))
    board.remove("primary")
    assert board.publish_primary(replace(made_anew, name="q"))


def test_of_several_clusters_at_the_start_ours_is_that_of_the_most_nodes() -> None:
    """Not that of the fastest."""
    board = Board()
    board.origins.settle({"r7": OTHER, "replica0": OURS, "replica1": OURS})

    assert not board.publish(replace(replica("r7"), system_id=OTHER))
    assert board.publish(replace(replica("replica1"), system_id=OURS))


def test_the_primary_that_is_left_is_followed_again_once_a_later_one_is_off_the_list() -> None:
    """A replica was promoted for another use, say. Its epoch is noted, for sessions that it has taken with it."""
    board = ours_with_a_primary()
    astray = replace(primary("replica0", flush_lsn=60, observed_at=1.0, epoch=LATER), system_id=OURS)
    left = replace(primary(flush_lsn=55, observed_at=2.0), system_id=OURS, started=1)
    assert board.publish_primary(astray)
    assert not board.publish_primary(left)
    assert {"primary"} == board.claimants
    board.remove("replica0")

    left_alone = board.epoch
    assert left_alone is None
    assert board.publish_primary(left)
    assert EPOCH == board.epoch
    assert {LATER} == board.abandoned


@pytest.mark.parametrize("evidence", ["its own", "its start", "of a write", "of a replica", "of a token"])
def test_a_primary_that_is_behind_its_own_past_has_lost(evidence: str) -> None:
    """It is not current until it has begun another epoch; an answer to an earlier question proves nothing."""
    back = replace(
        primary(flush_lsn=49 if evidence == "its own" else 59, observed_at=2.0),
        system_id=OURS, started=2, checkpoint_lsn=Lsn(60), restarted=evidence == "of a token",
    )  # fmt: skip
    board = ours_with_a_primary()
    if evidence == "its start":
        back = replace(back, flush_lsn=Lsn(99), checkpoint_lsn=Lsn(49))
        assert not board.has_lost(replace(back, started=1))  # any checkpoint
    elif evidence == "of a write":
        board.note_flush(EPOCH, Lsn(60), 1.0)
        board.note_flush(EARLIER, Lsn(99), 1.5)
    elif evidence == "of a replica":
        board.publish(replace(replica(replay_lsn=60, observed_at=1.0), system_id=OURS))
    elif evidence == "of a token":
        assert not board.note_claim(SessionToken(EPOCH, Lsn(60)))
        assert not board.has_lost(back)
        board.publish_primary(replace(back, observed_at=1.5))
        assert board.note_claim(SessionToken(EPOCH, Lsn(60)))

    assert board.has_lost(back)
    assert not board.publish_primary(back)
    assert evidence == "of a token" or not board.has_lost(replace(back, observed_at=-1.0))
    assert board.publish_primary(replace(back, epoch=ANEW))
    assert (ANEW, 0) == (board.epoch, len(board.abandoned))


def test_a_replica_that_passed_the_beginning_of_an_epoch_without_its_row_is_never_of_it() -> None:
    """In the same incarnation: whatever it gets to show later, it got by going on with WAL that is not its own."""
    board = ours_with_a_primary()
    board.publish(replace(replica("ahead", replay_lsn=60, observed_at=1.0), system_id=OURS))
    board.publish(replace(replica("behind", replay_lsn=40, observed_at=1.0), system_id=OURS))
    board.publish_primary(replace(primary(flush_lsn=55, observed_at=2.0, epoch=ANEW), system_id=OURS))
    for name in ("ahead", "behind"):
        board.publish(replace(replica(name, replay_lsn=70, observed_at=3.0, epoch=ANEW), system_id=OURS))

    assert [None, ANEW] == [status.epoch for status in board.replicas if status.name != "replica0"]
    rebuilt = replace(replica("ahead", replay_lsn=70, epoch=ANEW), incarnation=Incarnation("second life"))
    board.publish(replace(rebuilt, system_id=OURS))
    assert rebuilt.epoch == board.replica("ahead").epoch  # type: ignore[union-attr]


def test_while_another_server_claims_the_epoch_only_what_was_replayed_before_is_of_it() -> None:
    """What is copied from that server, or follows it from now on, shows the epoch's row, and LSNs beyond all."""
    board = ours_with_a_primary()
    rival = replace(primary("rival", flush_lsn=99, observed_at=2.0), system_id=OURS, started=5)
    board.publish(replace(replica("left", replay_lsn=45, observed_at=1.0), system_id=OURS))
    board.publish(replace(replica("copied", replay_lsn=45, observed_at=1.0), system_id=OURS))
    board.forget("primary")
    assert not board.publish_primary(rival)

    def seen(name: str, life: str, observed_at: float) -> tuple[Epoch | None, int]:
        answer = replica(name, replay_lsn=90, observed_at=observed_at)
        board.publish(replace(answer, incarnation=Incarnation(life), system_id=OURS))
        counted = board.replica(name)
        assert counted is not None
        return counted.epoch, int(counted.vouched_lsn)

    for observed_at in (3.0, 4.0):
        assert (EPOCH, 45) == seen("left", "first life", observed_at)
        assert (None, 0) == seen("copied", "second life", observed_at)
        assert (None, 0) == seen("primary", "first life", observed_at)
        assert not board.publish_primary(replace(rival, observed_at=observed_at))

    board.forget("rival")
    assert board.publish_primary(replace(primary(flush_lsn=91, observed_at=5.0), system_id=OURS, started=1))
    assert [(EPOCH, 90), (None, 0)] == [seen("left", "first life", 6.0), seen("copied", "second life", 6.0)]
    assert (EPOCH, 90) == seen("copied", "third life", 7.0)


def test_a_replica_that_starts_anew_while_the_primary_is_lost_counts_once_there_is_one() -> None:
    """It may be the copy of a server that claims the epoch and was not seen yet; others go on replaying."""
    board = ours_with_a_primary()
    board.publish(replace(replica("left", replay_lsn=45, observed_at=1.0), system_id=OURS))
    board.publish(replace(replica("anew", replay_lsn=45, observed_at=1.0), system_id=OURS))
    board.forget("primary")
    board.forget("anew")
    board.publish(replace(replica("left", replay_lsn=50, observed_at=2.0), system_id=OURS))
    anew = replace(replica("anew", replay_lsn=50, observed_at=2.0), incarnation=Incarnation("2"), system_id=OURS)

    def epochs() -> list[Epoch | None]:
        board.publish(anew)
        return [status.epoch for status in board.replicas if status.name in {"left", "anew"}]

    assert [EPOCH, None] == epochs()
    assert Lsn(50) == board.replica("left").vouched_lsn  # type: ignore[union-attr]
    assert board.publish_primary(replace(primary(flush_lsn=60, observed_at=3.0), system_id=OURS, started=1))
    assert [EPOCH, EPOCH] == epochs()


def test_an_epoch_goes_to_another_server_only_once_its_own_is_off_the_list() -> None:
    """And not as it is: what the other one lacks of it is lost. The same server under another name goes on."""
    board = ours_with_a_primary()
    board.forget("primary")
    copy = replace(primary("copy", flush_lsn=99, observed_at=2.0), system_id=OURS, started=5)
    assert not board.has_lost(copy)
    assert not board.publish_primary(copy)
    board.remove("primary")
    assert board.has_lost(copy)
    assert not board.publish_primary(copy)
    renamed = replace(copy, name="renamed", started=1)
    assert not board.has_lost(renamed)
    assert board.publish_primary(renamed)


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
    [("replica0", LATER, 1.0), ("primary", TWIN, 1.0), ("primary", EPOCH, 6.0)],
)
def test_the_memory_ends_with_the_epoch(name: str, epoch: Epoch, lag_s: float) -> None:
    """What an earlier primary had written when says nothing of the present one's WAL."""
    board = board_of((50, 0.0), (80, 5.0))
    board.forget("primary")
    board.publish_primary(primary(name, flush_lsn=90, observed_at=10.0, epoch=epoch))

    assert lag_s == board.lag_seconds(replica(replay_lsn=60), now=11.0)


def test_a_primary_that_went_back_is_measured_anew() -> None:
    """In its next epoch where it was when it was further is forgotten."""
    board = board_of((50, 0.0), (80, 5.0))
    board.publish_primary(primary(flush_lsn=60, observed_at=9.0, epoch=ANEW))

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
    """The first sight of a primary is never forgotten."""
    board = board_of(*((number, float(number)) for number in range(1, 10_001)))

    assert board.lag_seconds(replica(replay_lsn=0), now=10_000.0) == 9_999.0
    assert board.lag_seconds(replica(replay_lsn=9_990), now=10_000.0) == 9.0


@given(
    interval_s=st.sampled_from([0.001, 0.05, 0.5, 60.0]),
    gaps=st.lists(st.floats(0.5, 1.5), min_size=1, max_size=50),
    stands_at=st.floats(0.0, 1.0),
)
@settings(max_examples=50)
def test_the_lag_of_a_replica_that_stands_still_is_known_however_often_the_primary_is_asked(
    interval_s: float, gaps: list[float], stands_at: float
) -> None:
    """After thousands of advances it is told a little too small, and never too great."""
    board, now = Board(), 0.0
    sights = []
    for flush_lsn, gap in zip(range(1, 5_001), itertools.cycle(gaps), strict=False):
        now += interval_s * gap
        sights.append((flush_lsn, now))
        board.publish_primary(primary(flush_lsn=flush_lsn, observed_at=now))
    replay_lsn = int(stands_at * 4_999)
    true = now - sights[replay_lsn][1]
    lag_s = board.lag_seconds(replica(replay_lsn=replay_lsn), now)

    assert lag_s is not None
    assert true * 7 / 8 <= lag_s <= true


def test_lag_in_seconds_stops_with_the_primary() -> None:
    """While it is lost, how much time passes says nothing of the replica that lacks the end of its WAL."""
    board = board_of((50, 0.0), (80, 5.0), (80, 7.0))
    board.forget("primary")

    assert board.lag_seconds(replica(replay_lsn=50), now=7_200.0) == 2.0
    board.publish_primary(primary(flush_lsn=80, observed_at=7_200.0))
    assert board.lag_seconds(replica(replay_lsn=50), now=7_200.0) == 7_195.0


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
