"""What each reader must be shown: a history that lacks it is convicted, its nearest innocent neighbour is not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from rocket.lab.checker.check import check
from rocket.lab.checker.findings import Rule
from rocket.lab.checker.history import Op, Outcome
from tests.support.histories import (
    LOST,
    convicted,
    failed,
    held,
    history_of,
    on_primary,
    page,
    promotion,
    read,
    write,
)


def test_the_frame_holds() -> None:
    """What tests add is all that can convict."""
    held(history_of())


# --- read-your-writes ---


@pytest.mark.parametrize(
    "stale",
    [
        read("s1", 2.0, 7, None),
        page("s1", 2.0),
        page("s1", 2.0, (6, 0.6), complete=False),
    ],
    ids=["single", "complete page", "page that covers the id"],
)
def test_a_session_reads_its_own_write(stale: Op) -> None:
    """A read that began after the write was acknowledged shows it."""
    older, written = write("s1", 0.5, 6, 0.6), write("s1", 1.0, 7, 0.7)
    ops = [older, written] if stale.rides else [written]

    convicted(history_of(*ops, stale), Rule.READ_YOUR_WRITES, written, stale)


@pytest.mark.parametrize(
    "fresh",
    [
        read("s1", 2.0, 7, 0.7),
        read("s1", 2.0, 8, None),
        page("s1", 2.0, (7, 0.7)),
        page("s1", 2.0, (8, 0.8), complete=False),
        page("s1", 2.0, complete=False),
        failed(read("s1", 2.0, 7, None), Outcome.FAIL, 503),
        read("other1", 2.0, 7, None),
        page("other1", 2.0),
    ],
    ids=["shown", "other id", "page", "page of newer", "page of none", "refused", "other session", "its page"],
)
def test_an_answer_that_does_not_cover_the_write_need_not_show_it(fresh: Op) -> None:
    """Nor need one to another session of the same user, if that sends tokens."""
    written, newer = write("s1", 1.0, 7, 0.7), write("more1", 1.5, 8, 0.8)

    held(history_of(written, newer, fresh))


def test_without_tokens_a_read_shows_what_the_user_wrote_in_any_session() -> None:
    """The user's own row stands in for the token."""
    written, stale = write("s1", 1.0, 7, 0.7), read("bare1", 2.0, 7, None)

    convicted(history_of(written, stale), Rule.READ_YOUR_WRITES, written, stale)
    held(history_of(written, replace(stale, distance=0.7, status=200)))


# --- what reads ask for ---


def fresh(made: Op, freshness: str) -> Op:
    """Return a read that asks for something else than what its session has written and seen."""
    return replace(made, freshness=freshness)


def test_a_global_read_shows_what_was_acknowledged_to_any_session() -> None:
    """Of the same user, before it began."""
    written, stale = write("s1", 1.0, 7, 0.7), fresh(read("other1", 2.0, 7, None), "global")

    convicted(history_of(written, stale), Rule.GLOBAL_READS, written, stale)
    held(history_of(written, replace(stale, distance=0.7, status=200)))
    held(history_of(replace(written, done=2.5), stale))
    held(history_of(written, stale, promotion(1.5, 1.8)))


def test_global_reads_on_replicas_do_not_go_back_behind_each_other() -> None:
    """Whichever sessions they are of; on the primary they may."""
    unknown = failed(write("s1", 0.5, 7, 0.7), Outcome.UNKNOWN, 504)
    shown = fresh(read("s1", 2.0, 7, 0.7), "global")
    later = fresh(read("other1", 3.0, 7, None), "global")

    convicted(history_of(unknown, shown, later), Rule.GLOBAL_READS, unknown, shown, later)
    held(history_of(unknown, shown, on_primary(later)))
    held(history_of(unknown, shown, replace(later, at=shown.done - 0.001)))
    held(history_of(unknown, shown, read("other1", 3.0, 7, None)))


def test_a_read_within_some_seconds_may_miss_what_its_session_wrote() -> None:
    """So it is still monotonic."""
    written, late = write("s1", 1.0, 7, 0.7), fresh(read("s1", 3.0, 7, None), "within 10s")
    seen = read("s1", 2.0, 7, 0.7)
    others = failed(write("more1", 0.5, 8, 0.8), Outcome.UNKNOWN, 504)

    held(history_of(written, late))
    held(history_of(written, seen, replace(late, distance=0.7, status=200)))
    shown, back = read("s1", 2.0, 8, 0.8), fresh(read("s1", 3.0, 8, None), "within 10s")
    convicted(history_of(others, shown, back), Rule.MONOTONIC_READS, others, shown, back)


def test_what_a_session_wrote_stays_once_it_was_shown() -> None:
    """Also in reads that might have missed it before."""
    written, seen = write("s1", 1.0, 7, 0.7), page("s1", 2.0, (7, 0.7))
    late = fresh(read("s1", 3.0, 7, None), "within 10s")

    verdict = check(history_of(written, seen, late))
    assert {Rule.READ_YOUR_WRITES: 1} == verdict.counts
    held(history_of(written, fresh(seen, "any"), late))


def test_what_a_write_has_shown_counts_as_written() -> None:
    """The token does not tell the two apart; a read that may be old may miss both."""
    others = failed(write("more1", 0.5, 8, 0.8), Outcome.UNKNOWN, 504)
    in_write = on_primary(page("s1", 2.0, (8, 0.8)), "write")
    back = read("s1", 4.0, 8, None)

    held(history_of(others, in_write, fresh(back, "within 10s")))
    verdict = check(history_of(others, in_write, back))
    assert {Rule.MONOTONIC_READS: 1} == verdict.counts
    verdict = check(history_of(others, in_write, page("s1", 3.0, (8, 0.8)), fresh(back, "within 10s")))
    assert {Rule.MONOTONIC_READS: 1} == verdict.counts


def test_a_read_within_some_seconds_shows_what_is_older() -> None:
    """Whichever session wrote it; and what is younger it may miss."""
    written, late = write("s1", 1.0, 7, 0.7), fresh(read("other1", 5.0, 7, None), "within 3s")
    bare = fresh(read("bare1", 5.0, 7, None), "within 3s")

    convicted(history_of(written, late), Rule.TOO_OLD, written, late)
    convicted(history_of(written, bare), Rule.TOO_OLD, written, bare)
    held(history_of(replace(written, done=2.001), late))
    held(history_of(written, fresh(late, "within 10s")))
    held(history_of(written, late, promotion(1.5, 1.8)))
    held(history_of(written, replace(late, distance=0.7, status=200)))


def test_a_read_of_any_node_shows_anything_and_promises_nothing() -> None:
    """Of what there is; what it has shown need not be shown again."""
    written = write("s1", 1.0, 7, 0.7)
    others = failed(write("more1", 0.5, 8, 0.8), Outcome.UNKNOWN, 504)

    held(history_of(written, fresh(read("s1", 2.0, 7, None), "any")))
    held(history_of(others, fresh(read("s1", 2.0, 8, 0.8), "any"), read("s1", 3.0, 8, None)))
    held(history_of(written, fresh(read("bare1", 2.0, 7, None), "any")))


def test_without_tokens_a_read_need_not_show_what_is_acknowledged_after_it_began() -> None:
    """Nor what another user wrote."""
    held(history_of(write("s1", 1.0, 7, 0.7, done=2.005), read("bare1", 2.0, 7, None)))
    held(history_of(write("s2", 1.0, 7, 0.7), read("bare1", 2.0, 7, None)))


# --- monotonic reads ---


@pytest.mark.parametrize("seen", [read("s1", 2.0, 7, 0.7), page("s1", 2.0, (7, 0.7))], ids=["single", "page"])
@pytest.mark.parametrize("gone", [read("s1", 3.0, 7, None), page("s1", 3.0)], ids=["single", "page"])
def test_a_session_is_shown_again_what_it_was_shown(seen: Op, gone: Op) -> None:
    """Also what others wrote."""
    written = write("other1", 1.0, 7, 0.7)

    convicted(history_of(written, seen, gone), Rule.MONOTONIC_READS, written, seen, gone)
    held(history_of(written, replace(seen, session="third1"), gone))


def test_without_tokens_reads_may_go_back() -> None:
    """As long as the write was not acknowledged."""
    unknown = failed(write("other1", 1.0, None, 0.7), Outcome.UNKNOWN, 504)

    held(history_of(unknown, read("bare1", 2.0, 7, 0.7), read("bare1", 3.0, 7, None)))


def test_the_read_that_showed_it_last_is_in_the_excerpt() -> None:
    """The shortest way to follow it."""
    written, again, gone = write("other1", 1.0, 7, 0.7), read("s1", 3.0, 7, 0.7), read("s1", 4.0, 7, None)

    convicted(
        history_of(written, read("s1", 2.0, 7, 0.7), again, gone), Rule.MONOTONIC_READS, written, again, gone
    )


def test_a_write_of_unknown_outcome_may_show_late_or_never_but_not_go_again() -> None:
    """Once seen, it is there."""
    unknown = failed(write("s1", 1.0, None, 0.7), Outcome.UNKNOWN, 504)
    before, seen, gone = read("s1", 2.0, 7, None), read("s1", 3.0, 7, 0.7), read("s1", 4.0, 7, None)

    held(history_of(unknown, before))
    held(history_of(unknown, before, seen))
    convicted(history_of(unknown, before, seen, gone), Rule.MONOTONIC_READS, unknown, seen, gone)


# --- lost by a promotion ---


def test_an_acknowledged_write_is_not_lost_without_a_promotion() -> None:
    """The primary does not have it, nor does it ever come back; but one that comes back was only shown late."""
    written, gone = write("s1", 1.0, 7, 0.7), on_primary(read("s1", 2.0, 7, None), "not-caught-up")

    convicted(history_of(written, gone), Rule.ACKNOWLEDGED_WRITE_LOST, written, gone)
    convicted(history_of(written, gone, read("s1", 3.0, 7, 0.7)), Rule.READ_YOUR_WRITES, written, gone)


def test_a_notice_without_a_promotion_is_no_excuse() -> None:
    """And is wrong by itself."""
    written, gone = write("s1", 1.0, 7, 0.7), read("s1", 2.0, 7, None, lost=LOST)

    verdict = check(history_of(written, gone))

    assert {Rule.READ_YOUR_WRITES: 1, Rule.LOSS_INVENTED: 1} == dict(verdict.counts or {})


def test_a_notice_needs_a_promotion_before_it() -> None:
    """A promotion yet to come has lost nothing."""
    notified = page("s1", 1.0, lost=LOST)

    convicted(history_of(promotion(2.0, 3.0), notified), Rule.LOSS_INVENTED, notified)
    held(history_of(promotion(0.5, 0.9), notified))


@pytest.mark.parametrize("lossy", [True, False])
def test_a_session_is_notified_of_what_a_promotion_lost(lossy: bool) -> None:
    """With the answer that lacks it, or before."""
    written, gone = write("s1", 1.0, 7, 0.7), read("s1", 4.0, 7, None)
    promoted, notified = promotion(2.0, 3.0, lossy=lossy), page("s1", 3.5, lost=LOST)

    convicted(history_of(written, promoted, gone), Rule.LOSS_NOT_REPORTED, written, gone)
    held(history_of(written, promoted, replace(gone, lost=LOST)))
    held(history_of(written, promoted, notified, gone, replace(gone, at=5.0, done=5.01)))


def test_a_notice_covers_only_what_came_before_it() -> None:
    """A write that was acknowledged by the very answer, or later, has to stay."""
    written, gone = write("s1", 4.0, 7, 0.7, lost=LOST), read("s1", 5.0, 7, None)

    convicted(history_of(promotion(2.0, 4.5), written, gone), Rule.LOSS_NOT_REPORTED, written, gone)


def test_a_stale_read_after_a_promotion_is_not_taken_for_a_loss() -> None:
    """What is shown later has not been lost."""
    written, stale, fresh = write("s1", 1.0, 7, 0.7), read("s1", 4.0, 7, None), read("s1", 5.0, 7, 0.7)

    convicted(history_of(written, promotion(2.0, 3.0), stale, fresh), Rule.READ_YOUR_WRITES, written, stale)


def test_a_promotion_before_the_write_has_not_lost_it() -> None:
    """Even if the session was notified of a loss meanwhile."""
    written, gone = write("s1", 4.0, 7, 0.7), read("s1", 5.0, 7, None, lost=LOST)

    convicted(history_of(promotion(2.0, 3.9), written, gone), Rule.READ_YOUR_WRITES, written, gone)
    held(history_of(promotion(2.0, 4.1), written, gone))


def test_what_is_shown_again_after_it_was_lost_stays() -> None:
    """It was not lost after all."""
    written, lost = write("s1", 1.0, 7, 0.7), read("s1", 4.0, 7, None, lost=LOST)
    back, gone = read("s1", 5.0, 7, 0.7), read("s1", 6.0, 7, None)

    held(history_of(written, promotion(2.0, 3.0), lost, back))
    convicted(
        history_of(written, promotion(2.0, 3.0), lost, back, gone), Rule.MONOTONIC_READS, written, back, gone
    )


def test_what_the_notice_itself_shows_was_not_lost() -> None:
    """That answer came from the new epoch."""
    written, notified = write("s1", 1.0, 7, 0.7), page("s1", 4.0, (7, 0.7), lost=LOST)
    gone = page("s1", 5.0)

    convicted(history_of(written, promotion(2.0, 3.0), notified, gone), Rule.READ_YOUR_WRITES, written, gone)


def test_an_answer_from_the_old_epoch_does_not_vouch_for_the_new_one() -> None:
    """A router may take a moment to notice; then it notifies the session."""
    written, old = write("s1", 1.0, 7, 0.7), read("s1", 3.5, 7, 0.7)

    held(history_of(written, promotion(2.0, 3.0), old, read("s1", 4.0, 7, None, lost=LOST)))


def test_without_tokens_a_promotion_excuses_a_loss_without_notice() -> None:
    """No session can be notified; but what survived it stays."""
    written, gone = write("bare1", 1.0, 7, 0.7), read("bare1", 9.0, 7, None)
    through = read("bare1", 6.0, 7, 0.7)

    held(history_of(written, promotion(2.0, 3.0), gone))
    convicted(history_of(written, promotion(2.0, 3.0), through, gone), Rule.READ_YOUR_WRITES, written, gone)


def test_without_tokens_what_is_shown_again_after_it_was_lost_stays() -> None:
    """Once every process has noticed the promotion."""
    written, lost = write("bare1", 1.0, 7, 0.7), read("bare1", 4.0, 7, None)
    soon, later = read("bare1", 4.5, 7, 0.7), read("bare1", 6.0, 7, 0.7)
    gone = read("bare1", 9.0, 7, None)

    held(history_of(written, promotion(2.0, 3.0), lost, soon, gone))
    convicted(history_of(written, promotion(2.0, 3.0), lost, later, gone), Rule.READ_YOUR_WRITES, written, gone)


def test_an_id_used_again_after_a_loss_is_another_ride() -> None:
    """The new one is expected, the old one is not."""
    lost, notified = write("s1", 1.0, 7, 0.7), page("s1", 4.0, lost=LOST)
    again, gone = write("s1", 5.0, 7, 1.7), read("s1", 6.0, 7, None)

    held(history_of(lost, promotion(2.0, 3.0), notified, again, read("s1", 6.0, 7, 1.7)))
    convicted(history_of(lost, promotion(2.0, 3.0), notified, again, gone), Rule.READ_YOUR_WRITES, again, gone)


# --- work that raises ---


@pytest.mark.parametrize("raised", ["error", "cancelled"])
def test_what_an_error_of_work_has_shown_is_shown_again(raised: str) -> None:
    """It counts as an answer: a later read of the session must not lack it."""
    written = write("other1", 1.0, 7, 0.7)
    shown = on_primary(page("s1", 2.0, (7, 0.7), work="raises", raised=raised), "write")
    stale = page("s1", 3.0, work="returns")

    convicted(history_of(written, shown, stale), Rule.MONOTONIC_READS, written, shown, stale)
    held(history_of(written, shown, replace(stale, rides=((7, 0.7),))))


def test_an_error_of_work_is_judged_itself() -> None:
    """That a ride is not there may be stale as well, if an error says so."""
    written = write("s1", 1.0, 7, 0.7)
    stale = read("s1", 2.0, 7, None, work="raises", raised="error")

    convicted(history_of(written, stale), Rule.READ_YOUR_WRITES, written, stale)


def test_a_write_whose_work_raised_never_shows() -> None:
    """It was rolled back."""
    refused = failed(write("s1", 1.0, None, 0.7, work="raises"), Outcome.FAIL)
    shown = page("s1", 2.0, (7, 0.7), work="returns")

    convicted(history_of(refused, shown), Rule.FAILED_YET_THERE, refused, shown)
