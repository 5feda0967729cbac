"""Each rule: a history that breaks it is convicted by it, and its nearest innocent neighbour is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rocket.lab.checker.check import check
from rocket.lab.checker.history import Fault, History, Op, Outcome, Request, Role
from rocket.lab.checker.verdict import Judgement, Rule
from tests.lab.checker.stories import (
    FRAME,
    HEALED_AT,
    RUN,
    failed,
    join,
    on_primary,
    op,
    page,
    promotion,
    read,
    story,
    token,
    write,
)

LOST = "A promotion may have lost writes of this session."


def convicted(history: History, rule: Rule, *ops: Op) -> None:
    """Check that one rule was broken, once, and that the excerpt shows just these operations."""
    verdict = check(history)
    assert Judgement.VIOLATED is verdict.judgement
    assert {rule: 1} == dict(verdict.counts or {})
    assert [ops] == [violation.ops for violation in verdict.violations]


def held(history: History) -> None:
    """Check that nothing is wrong with a history, nor missing in it."""
    verdict = check(history)
    assert (Judgement.HELD, (), ()) == (verdict.judgement, verdict.reasons, verdict.violations)


def test_the_frame_holds() -> None:
    """What tests add is all that can convict."""
    held(story())


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

    convicted(story(*ops, stale), Rule.READ_YOUR_WRITES, written, stale)


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

    held(story(written, newer, fresh))


def test_without_tokens_a_read_shows_what_the_user_wrote_in_any_session() -> None:
    """The user's own row stands in for the token."""
    written, stale = write("s1", 1.0, 7, 0.7), read("bare1", 2.0, 7, None)

    convicted(story(written, stale), Rule.READ_YOUR_WRITES, written, stale)
    held(story(written, replace(stale, distance=0.7, status=200)))


def test_without_tokens_a_read_need_not_show_what_is_acknowledged_after_it_began() -> None:
    """Nor what another user wrote."""
    held(story(write("s1", 1.0, 7, 0.7, done=2.005), read("bare1", 2.0, 7, None)))
    held(story(write("s2", 1.0, 7, 0.7), read("bare1", 2.0, 7, None)))


# --- monotonic reads ---


@pytest.mark.parametrize("seen", [read("s1", 2.0, 7, 0.7), page("s1", 2.0, (7, 0.7))], ids=["single", "page"])
@pytest.mark.parametrize("gone", [read("s1", 3.0, 7, None), page("s1", 3.0)], ids=["single", "page"])
def test_a_session_sees_again_what_it_saw(seen: Op, gone: Op) -> None:
    """Also what others wrote."""
    written = write("other1", 1.0, 7, 0.7)

    convicted(story(written, seen, gone), Rule.MONOTONIC_READS, written, seen, gone)
    held(story(written, replace(seen, session="third1"), gone))


def test_without_tokens_reads_may_go_back() -> None:
    """As long as the write was not acknowledged."""
    unknown = failed(write("other1", 1.0, None, 0.7), Outcome.UNKNOWN, 504)

    held(story(unknown, read("bare1", 2.0, 7, 0.7), read("bare1", 3.0, 7, None)))


def test_the_read_that_saw_it_last_is_in_the_excerpt() -> None:
    """The shortest way to follow it."""
    written, again, gone = write("other1", 1.0, 7, 0.7), read("s1", 3.0, 7, 0.7), read("s1", 4.0, 7, None)

    convicted(story(written, read("s1", 2.0, 7, 0.7), again, gone), Rule.MONOTONIC_READS, written, again, gone)


def test_a_write_of_unknown_outcome_may_show_late_or_never_but_not_go_again() -> None:
    """Once seen, it is there."""
    unknown = failed(write("s1", 1.0, None, 0.7), Outcome.UNKNOWN, 504)
    before, seen, gone = read("s1", 2.0, 7, None), read("s1", 3.0, 7, 0.7), read("s1", 4.0, 7, None)

    held(story(unknown, before))
    held(story(unknown, before, seen))
    convicted(story(unknown, before, seen, gone), Rule.MONOTONIC_READS, unknown, seen, gone)


# --- lost by a promotion ---


def test_an_acknowledged_write_is_not_lost_without_a_promotion() -> None:
    """The primary does not have it, nor does it ever come back; but one that comes back was only shown late."""
    written, gone = write("s1", 1.0, 7, 0.7), on_primary(read("s1", 2.0, 7, None), "not-caught-up")

    convicted(story(written, gone), Rule.ACKNOWLEDGED_WRITE_LOST, written, gone)
    convicted(story(written, gone, read("s1", 3.0, 7, 0.7)), Rule.READ_YOUR_WRITES, written, gone)


def test_a_notice_without_a_promotion_is_no_excuse() -> None:
    """And is wrong by itself."""
    written, gone = write("s1", 1.0, 7, 0.7), read("s1", 2.0, 7, None, lost=LOST)

    verdict = check(story(written, gone))

    assert {Rule.READ_YOUR_WRITES: 1, Rule.LOSS_INVENTED: 1} == dict(verdict.counts or {})


def test_a_notice_needs_a_promotion_before_it() -> None:
    """A promotion yet to come has lost nothing."""
    told = page("s1", 1.0, lost=LOST)

    convicted(story(promotion(2.0, 3.0), told), Rule.LOSS_INVENTED, told)
    held(story(promotion(0.5, 0.9), told))


@pytest.mark.parametrize("lossy", [True, False])
def test_a_session_is_told_what_a_promotion_lost(lossy: bool) -> None:
    """With the answer that lacks it, or before."""
    written, gone = write("s1", 1.0, 7, 0.7), read("s1", 4.0, 7, None)
    promoted, told = promotion(2.0, 3.0, lossy=lossy), page("s1", 3.5, lost=LOST)

    convicted(story(written, promoted, gone), Rule.LOSS_NOT_REPORTED, written, gone)
    held(story(written, promoted, replace(gone, lost=LOST)))
    held(story(written, promoted, told, gone, replace(gone, at=5.0, done=5.01)))


def test_a_notice_covers_only_what_came_before_it() -> None:
    """A write that was acknowledged by the very answer, or later, has to stay."""
    written, gone = write("s1", 4.0, 7, 0.7, lost=LOST), read("s1", 5.0, 7, None)

    convicted(story(promotion(2.0, 4.5), written, gone), Rule.LOSS_NOT_REPORTED, written, gone)


def test_a_stale_read_after_a_promotion_is_not_taken_for_a_loss() -> None:
    """What is shown later has not been lost."""
    written, stale, fresh = write("s1", 1.0, 7, 0.7), read("s1", 4.0, 7, None), read("s1", 5.0, 7, 0.7)

    convicted(story(written, promotion(2.0, 3.0), stale, fresh), Rule.READ_YOUR_WRITES, written, stale)


def test_a_promotion_before_the_write_has_not_lost_it() -> None:
    """Even if the session was told of a loss meanwhile."""
    written, gone = write("s1", 4.0, 7, 0.7), read("s1", 5.0, 7, None, lost=LOST)

    convicted(story(promotion(2.0, 3.9), written, gone), Rule.READ_YOUR_WRITES, written, gone)
    held(story(promotion(2.0, 4.1), written, gone))


def test_what_is_shown_again_after_it_was_lost_stays() -> None:
    """It was not lost after all."""
    written, lost = write("s1", 1.0, 7, 0.7), read("s1", 4.0, 7, None, lost=LOST)
    back, gone = read("s1", 5.0, 7, 0.7), read("s1", 6.0, 7, None)

    held(story(written, promotion(2.0, 3.0), lost, back))
    convicted(story(written, promotion(2.0, 3.0), lost, back, gone), Rule.MONOTONIC_READS, written, back, gone)


def test_what_the_notice_itself_shows_was_not_lost() -> None:
    """That answer came from the new reign."""
    written, told = write("s1", 1.0, 7, 0.7), page("s1", 4.0, (7, 0.7), lost=LOST)
    gone = page("s1", 5.0)

    convicted(story(written, promotion(2.0, 3.0), told, gone), Rule.READ_YOUR_WRITES, written, gone)


def test_an_answer_from_the_old_reign_does_not_vouch_for_the_new_one() -> None:
    """A router may take a moment to notice; the session is told as soon as it does."""
    written, old = write("s1", 1.0, 7, 0.7), read("s1", 3.5, 7, 0.7)

    held(story(written, promotion(2.0, 3.0), old, read("s1", 4.0, 7, None, lost=LOST)))


def test_without_tokens_a_promotion_excuses_a_loss_without_notice() -> None:
    """There is nobody to tell; but what came through it stays."""
    written, gone = write("bare1", 1.0, 7, 0.7), read("bare1", 9.0, 7, None)
    through = read("bare1", 6.0, 7, 0.7)

    held(story(written, promotion(2.0, 3.0), gone))
    convicted(story(written, promotion(2.0, 3.0), through, gone), Rule.READ_YOUR_WRITES, written, gone)


def test_without_tokens_what_is_shown_again_after_it_was_lost_stays() -> None:
    """Once the promotion is over for everybody."""
    written, lost = write("bare1", 1.0, 7, 0.7), read("bare1", 4.0, 7, None)
    soon, later = read("bare1", 4.5, 7, 0.7), read("bare1", 6.0, 7, 0.7)
    gone = read("bare1", 9.0, 7, None)

    held(story(written, promotion(2.0, 3.0), lost, soon, gone))
    convicted(story(written, promotion(2.0, 3.0), lost, later, gone), Rule.READ_YOUR_WRITES, written, gone)


def test_an_id_used_again_after_a_loss_is_another_ride() -> None:
    """The new one is owed, the old one is not."""
    lost, told = write("s1", 1.0, 7, 0.7), page("s1", 4.0, lost=LOST)
    again, gone = write("s1", 5.0, 7, 1.7), read("s1", 6.0, 7, None)

    held(story(lost, promotion(2.0, 3.0), told, again, read("s1", 6.0, 7, 1.7)))
    convicted(story(lost, promotion(2.0, 3.0), told, again, gone), Rule.READ_YOUR_WRITES, again, gone)


# --- where rides come from ---


def test_a_ride_that_nobody_wrote_is_invented() -> None:
    """It is known by its distance."""
    shown = page("s1", 2.0, (7, 0.7))

    convicted(story(shown), Rule.FOREIGN_OR_INVENTED, shown)
    held(story(write("other1", 1.0, 7, 0.7), shown))


def test_a_ride_of_another_user_is_foreign() -> None:
    """Users see their own."""
    written, shown = write("s2", 1.0, 7, 0.7), read("s1", 2.0, 7, 0.7)

    convicted(story(written, shown), Rule.FOREIGN_OR_INVENTED, written, shown)


def test_a_ride_shown_before_it_was_written_is_invented() -> None:
    """It may show while the write is under way."""
    shown = read("s1", 1.0, 7, 0.7)
    written = write("other1", 1.5, 7, 0.7)

    convicted(story(written, shown), Rule.FOREIGN_OR_INVENTED, shown, written)
    held(story(write("other1", 1.005, 7, 0.7), shown))


def test_a_ride_that_one_answer_shows_in_time_another_may_still_show_too_early() -> None:
    """Whichever of them was asked for first."""
    slow, early = page("third1", 0.5, (7, 0.7), done=3.0), read("s1", 1.0, 7, 0.7)
    written = write("other1", 1.5, 7, 0.7)

    convicted(story(slow, written, early), Rule.FOREIGN_OR_INVENTED, early, written)


@pytest.mark.parametrize("unknown", [False, True])
def test_a_ride_keeps_its_id(unknown: bool) -> None:
    """The one that it was given, or was shown with first."""
    written, shown = write("other1", 1.0, 7, 0.7), page("s1", 3.0, (8, 0.7))
    first = page("third1", 2.0, (7, 0.7))
    if unknown:
        written = failed(written, Outcome.UNKNOWN)
        convicted(story(written, first, shown), Rule.FOREIGN_OR_INVENTED, written, first, shown)
        held(story(written, shown))
    else:
        convicted(story(written, first, shown), Rule.FOREIGN_OR_INVENTED, written, shown)


def test_a_ride_is_on_a_page_once() -> None:
    """Twice, it was written twice."""
    written, shown = write("s1", 1.0, 7, 0.7), page("s1", 2.0, (7, 0.7), (7, 0.7))

    convicted(story(written, shown), Rule.FOREIGN_OR_INVENTED, shown)


def test_a_write_reported_as_failed_never_shows() -> None:
    """One of unknown outcome may."""
    written, shown = write("s1", 1.0, None, 0.7), page("s1", 2.0, (7, 0.7))
    refused, unknown = failed(written, Outcome.FAIL, 503), failed(written, Outcome.UNKNOWN, 504)

    convicted(story(refused, shown), Rule.FAILED_YET_THERE, refused, shown)
    held(story(unknown, shown))


# --- tokens ---

UNKNOWN = "FFFFFFFF/FFFFFFFF"


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (token("0/10"), token("0/F")),
        (token("0/10", "0/20"), token("0/10", "0/1F")),
        (token("0/10", "0/9"), token("0/A", "0/20")),
        (token(UNKNOWN, "0/20"), token("0/5", "0/10")),
        (token("0/10"), token("0/9", UNKNOWN)),
    ],
)
def test_floors_do_not_go_back_within_an_epoch(sent: str, got: str) -> None:
    """Neither that of writes nor the higher of both; compared as numbers, never as text."""
    answer = page("s1", 1.0, sent=sent, got=got)

    convicted(story(answer), Rule.FLOORS_GO_BACK, answer)


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (token("0/9"), token("0/10")),
        (token("0/10", "0/20"), token("0/20", "0/10")),
        (token(UNKNOWN, "0/20"), token("0/5", "0/20")),
        (token("0/10", UNKNOWN), token("0/10", "0/11")),
        (token("0/10", "0/20"), token("0/10", UNKNOWN)),
        (token("0/10"), token("0/1", epoch="2-bbbbbbbb")),
        (token("0/10"), None),
        ("nonsense", token("0/1")),
    ],
)
def test_floors_may_rise_be_found_out_or_begin_anew(sent: str, got: str | None) -> None:
    """An unknown floor may end anywhere, and another epoch counts anew."""
    held(story(page("s1", 1.0, sent=sent, got=got)))


def test_a_sessions_timeline_does_not_go_back() -> None:
    """Whatever it sent; a session that sends nothing may hear of it from several processes."""
    first = page("s1", 1.0, got=token("0/1", epoch="10-aaaaaaaa"))
    second = page("s1", 2.0, got=token("0/9", epoch="9-bbbbbbbb"))

    convicted(story(first, second), Rule.FLOORS_GO_BACK, first, second)
    held(story(second, replace(first, at=3.0, done=3.1)))
    held(story(first, replace(second, session="other1")))
    held(story(*(replace(one, session="bare1", tokens=False) for one in (first, second))))


def test_what_is_handed_out_as_a_token_is_one() -> None:
    """Also to those who never send it back."""
    answer = page("bare1", 1.0, got="1~nonsense")

    convicted(story(answer), Rule.MALFORMED_TOKEN, answer)


# --- answers ---


@pytest.mark.parametrize("status", [500, 400, 422, 418, 504])
def test_an_answer_that_is_not_documented_is_unexpected(status: int) -> None:
    """Whatever the client takes it for."""
    answer = failed(page("s1", 1.0), Outcome.FAIL, status)

    convicted(story(answer), Rule.UNEXPECTED_ANSWER, answer)


@pytest.mark.parametrize(
    "answer",
    [
        failed(page("s1", 1.0), Outcome.FAIL, 503),
        failed(write("s1", 1.0, None, 0.7), Outcome.UNKNOWN, 504),
        read("s1", 1.0, 7, None),
        failed(page("s1", 1.0), Outcome.UNKNOWN),
        failed(page("s1", 1.0), Outcome.FAIL, 401),
    ],
)
def test_refusals_and_what_is_not_there_are_ordinary_answers(answer: Op) -> None:
    """So is not to know a user who never joined."""
    held(story(answer))


def test_a_user_who_joined_is_known() -> None:
    """Unless a promotion lost that, or it had not been acknowledged yet."""
    joined, refused = join("s1", 1.0), failed(page("s1", 4.0), Outcome.FAIL, 401)

    convicted(story(joined, refused), Rule.UNEXPECTED_ANSWER, joined, refused)
    held(story(joined, promotion(2.0, 3.0), refused))
    held(story(join("other1", 3.5, done=4.001), refused))
    held(story(joined, promotion(2.0, 3.0), page("s1", 3.5), refused))  # perhaps from the old reign
    known = page("s1", 9.0)
    later = replace(refused, at=10.0, done=10.1)
    convicted(story(joined, promotion(2.0, 3.0), known, later), Rule.UNEXPECTED_ANSWER, known, later)


# --- afterwards ---


def test_replica_reads_resume() -> None:
    """On all replicas, within ten seconds."""
    late = tuple(
        replace(one, at=HEALED_AT + 10.5, done=HEALED_AT + 10.6) if one.at == HEALED_AT + 2 else one
        for one in FRAME
    )
    never = tuple(one for one in FRAME if one.at != HEALED_AT + 2)

    convicted(story(frame=late), Rule.NOT_RESUMED, late[-2])
    convicted(story(frame=never), Rule.NOT_RESUMED)
    held(story(frame=never, run=replace(RUN, nodes=("primary", "replica0"))))


def test_too_little_traffic_after_the_faults_proves_nothing() -> None:
    """Replicas that have not served yet may still do so."""
    short = tuple(one for one in FRAME if one.at < HEALED_AT + 2)

    void(story(frame=short), "traffic for 1.0 s only")
    held(story(frame=tuple(one for one in FRAME if one.at <= HEALED_AT + 2)))


def test_a_run_leaves_nothing_behind() -> None:
    """Each thing that it does is a violation."""
    history = story()
    assert history.end is not None

    convicted(replace(history, end=replace(history.end, leaked=("a postgres process",))), Rule.LEAKED)


# --- void ---


def void(history: History, reason: str) -> None:
    """Check that a run proves nothing, for one reason."""
    verdict = check(history)
    assert Judgement.VOID is verdict.judgement
    (given,) = verdict.reasons
    assert reason in given


def without(*times: float) -> tuple[Op, ...]:
    """Return the frame without what happens at these times."""
    return tuple(one for one in FRAME if one.at not in times)


def test_a_replica_that_never_served_makes_a_run_void() -> None:
    """Of all nodes one is the primary, known by its name or by its number."""
    nodes = ("first", "replica0", "replica1")
    more = replace(RUN, nodes=("primary", "replica0", "replica1", "replica2"))
    unnamed = replace(RUN, nodes=("first", "second", "replica0", "replica1"))

    verdict = check(story(run=more))

    assert ("replica2 never served a read as a replica",) == verdict.reasons
    assert ("second never served a read as a replica",) == check(story(run=unnamed)).reasons
    held(story(run=replace(RUN, nodes=nodes)))
    held(story(run=replace(more, routing="primary")))


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ((0.4,), "fell back"),
        ((0.2,), "waited"),
    ],
)
def test_a_run_without_fallbacks_or_waits_is_void(missing: tuple[float, ...], reason: str) -> None:
    """But only with the routing that has them."""
    other = page("s8", 0.2)
    history = story(other, frame=without(*missing))

    void(history, reason)
    held(replace(history, run=replace(RUN, routing="random")))


def test_a_read_that_was_meant_for_the_primary_is_no_fallback() -> None:
    """The reason tells."""
    history = story(on_primary(page("s8", 0.4), "asked"), frame=without(0.4))

    void(history, "fell back")


def test_a_fault_that_never_happened_makes_a_run_void() -> None:
    """It was asked for."""
    void(story(run=replace(RUN, faults=("replay-paused", "crash"))), "'crash' was meant to happen")


def test_a_fault_that_met_no_request_makes_a_run_void() -> None:
    """Whichever of several of its kind it was."""
    history = story()
    fault = Fault(name="crash", at=50.0, until=51.0)
    request = op("s1", Request.LIST, 50.5, rides=(), complete=True)

    void(replace(history, faults=(*history.faults, fault)), "1 of 1 times no request met the fault 'crash'")
    held(story(fault, replace(request, session="s1")))


def test_a_run_without_an_end_is_void_and_one_without_healing_too() -> None:
    """It was cut off."""
    void(replace(story(), end=None), "no end")
    void(replace(story(), healed=None), "faults were over")


def test_a_run_without_writes_is_void() -> None:
    """Nothing can be stale."""
    frame = tuple(
        replace(one, distance=None, status=404) if one.request is Request.READ else one for one in without(0.1)
    )

    void(story(frame=frame), "no write was acknowledged")


def test_a_run_without_reads_is_void() -> None:
    """For all the reasons that there are."""
    verdict = check(story(frame=without(*(one.at for one in FRAME if one.request is Request.READ))))

    assert Judgement.VOID is verdict.judgement
    assert "no read was answered" in verdict.reasons


def test_a_violation_wins_over_void() -> None:
    """What was seen was seen."""
    written, stale = write("s1", 1.0, 7, 0.7), read("s1", 2.0, 7, None)

    verdict = check(replace(story(written, stale), end=None))

    assert Judgement.VIOLATED is verdict.judgement
    assert 1 == len(verdict.reasons)


@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        ((page("s1", 1.0, done=2.0), page("s1", 1.5)), "while its request of 1.000000 s was under way"),
        ((write("s1", 1.0, 7, 0.7), write("s2", 2.0, 8, 0.7)), "two writes of the distance 0.7"),
        ((page("s1", 1.0), page("s1", 2.0, user="else@example.com")), "several users"),
        ((page("s1", 1.0), page("s1", 2.0, tokens=False)), "only at times"),
    ],
)
def test_a_history_that_contradicts_itself_is_void(ops: tuple[Op, ...], reason: str) -> None:
    """Nothing follows from it, not even a violation."""
    void(story(*ops, read("s1", 9.0, 7, None)), reason)
    held(story(page("s1", 1.0, done=1.5), page("s1", 1.5)))


# --- excerpts ---


def test_all_violations_are_counted_and_a_handful_are_shown_the_shortest_first() -> None:
    """Of each rule at least one."""
    written = write("s1", 1.0, 7, 0.7)
    stale = [read("s1", 2.0 + number, 7, None) for number in range(50)]
    invented = page("s2", 60.0, (8, 0.8))

    verdict = check(story(written, *stale, invented))

    assert {Rule.READ_YOUR_WRITES: 50, Rule.FOREIGN_OR_INVENTED: 1} == dict(verdict.counts or {})
    assert [(written, stale[0]), (invented,)] == [violation.ops for violation in verdict.violations[:2]]
    assert 3 == len(verdict.violations)


def test_the_shortest_of_all_is_shown_first() -> None:
    """Not the first that was found."""
    long_ago, lately = write("s1", 1.0, 7, 0.7), write("s1", 20.0, 8, 0.8)
    stale, stale_soon = read("s1", 10.0, 7, None), read("s1", 20.5, 8, None)

    verdict = check(story(long_ago, stale, lately, stale_soon))

    assert [(lately, stale_soon), (long_ago, stale)] == [violation.ops for violation in verdict.violations]


def test_the_faults_meanwhile_are_in_the_excerpt() -> None:
    """Those that were on during one of its operations, and the promotions in between."""
    written, gone = write("s1", 1.0, 7, 0.7), read("s1", 9.0, 7, None)
    pause = Fault(name="replay-paused", at=8.0, until=9.005, node="replica0")
    over = Fault(name="replay-paused", at=5.0, until=6.0, node="replica0")
    promoted = promotion(2.0, 3.0)

    (violation,) = check(story(written, gone, pause, over, promoted)).violations

    assert (promoted, pause) == violation.faults


def test_the_figures_count_what_happened() -> None:
    """As the table shows it."""
    written = write("s1", 1.0, 7, 0.7)
    lost = read("s1", 4.0, 7, None, lost=LOST)

    figures = check(story(written, promotion(2.0, 3.0), lost, read("bare1", 5.0, 7, None))).figures

    assert figures is not None
    assert (1, 1) == (figures.lost_and_reported, figures.lost_without_token)
    assert {"not-caught-up": 1} == figures.fallbacks
    assert 1 == figures.waits
    assert 2 == figures.requests[Request.WRITE, Outcome.OK]
    assert 1 == figures.reads["primary", Role.PRIMARY]
    assert 2 == figures.reads["replica1", Role.REPLICA]
    assert (1, 1) == (figures.faults["promotion-lossy"].times, figures.faults["promotion-lossy"].ops_overlapped)
    assert 95.99 == pytest.approx(figures.longest_without_read_s, abs=0.02)
    assert 10 == pytest.approx(figures.read_p50_ms)
