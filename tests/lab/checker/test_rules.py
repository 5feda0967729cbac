"""Rules on single answers: rides, tokens and statuses that break one, and the nearest that do not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from rocket.lab.checker.findings import Rule
from rocket.lab.checker.history import TAKEN_BY_ANOTHER, Fault, Op, Outcome
from tests.support.histories import convicted, failed, held, history_of, join, page, promotion, read, token, write

# --- what work finds, and what another cluster gets ---


def test_work_finds_nothing_that_other_work_has_left() -> None:
    """Whatever it showed besides."""
    tenants = read("s1", 2.0, 7, None, work="tenant")
    found = replace(tenants, left="the role torture_tenant")

    held(history_of(tenants))
    convicted(history_of(found), Rule.STATE_LEFT_OVER, found)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_server_of_another_cluster_is_given_nothing(rows: int) -> None:
    """Not even where no read shows it."""
    visit = Fault(name="foreign-cluster", node="replica1", at=2.0, until=3.0, detail={TAKEN_BY_ANOTHER: rows})

    if rows:
        convicted(history_of(visit), Rule.TAKEN_BY_ANOTHER_CLUSTER)
    else:
        held(history_of(visit))


@pytest.mark.parametrize("name", ["restored-snapshot", "signal-removed"])
def test_a_primary_that_lacks_what_was_written_may_lose_it_with_a_notice(name: str) -> None:
    """As a promotion may."""
    written, fault = write("s1", 1.0, 7, 0.7), Fault(name=name, node="primary", at=2.0, until=3.0)
    notified, silent = page("s1", 4.0, lost="may be lost"), page("s1", 4.0)

    held(history_of(written, fault, notified))
    convicted(history_of(written, fault, silent), Rule.LOSS_NOT_REPORTED, written, silent)


# --- where rides come from ---


def test_a_ride_that_was_never_written_is_invented() -> None:
    """It is known by its distance."""
    shown = page("s1", 2.0, (7, 0.7))

    convicted(history_of(shown), Rule.FOREIGN_OR_INVENTED, shown)
    held(history_of(write("other1", 1.0, 7, 0.7), shown))


def test_a_ride_of_another_user_is_foreign() -> None:
    """Users see their own."""
    written, shown = write("s2", 1.0, 7, 0.7), read("s1", 2.0, 7, 0.7)

    convicted(history_of(written, shown), Rule.FOREIGN_OR_INVENTED, written, shown)


def test_a_ride_shown_before_it_was_written_is_invented() -> None:
    """It may show while the write is under way."""
    shown = read("s1", 1.0, 7, 0.7)
    written = write("other1", 1.5, 7, 0.7)

    convicted(history_of(written, shown), Rule.FOREIGN_OR_INVENTED, shown, written)
    held(history_of(write("other1", 1.005, 7, 0.7), shown))


def test_a_ride_that_one_answer_shows_in_time_another_may_still_show_too_early() -> None:
    """Whichever of them was asked for first."""
    slow, early = page("third1", 0.5, (7, 0.7), done=3.0), read("s1", 1.0, 7, 0.7)
    written = write("other1", 1.5, 7, 0.7)

    convicted(history_of(slow, written, early), Rule.FOREIGN_OR_INVENTED, early, written)


@pytest.mark.parametrize("unknown", [False, True])
def test_a_ride_keeps_its_id(unknown: bool) -> None:
    """The one that it was given, or was shown with first."""
    written, shown = write("other1", 1.0, 7, 0.7), page("s1", 3.0, (8, 0.7))
    first = page("third1", 2.0, (7, 0.7))
    if unknown:
        written = failed(written, Outcome.UNKNOWN)
        convicted(history_of(written, first, shown), Rule.FOREIGN_OR_INVENTED, written, first, shown)
        held(history_of(written, shown))
    else:
        convicted(history_of(written, first, shown), Rule.FOREIGN_OR_INVENTED, written, shown)


def test_a_ride_is_on_a_page_once() -> None:
    """Twice, it was written twice."""
    written, shown = write("s1", 1.0, 7, 0.7), page("s1", 2.0, (7, 0.7), (7, 0.7))

    convicted(history_of(written, shown), Rule.FOREIGN_OR_INVENTED, shown)


def test_a_write_reported_as_failed_never_shows() -> None:
    """One of unknown outcome may."""
    written, shown = write("s1", 1.0, None, 0.7), page("s1", 2.0, (7, 0.7))
    refused, unknown = failed(written, Outcome.FAIL, 503), failed(written, Outcome.UNKNOWN, 504)

    convicted(history_of(refused, shown), Rule.FAILED_YET_THERE, refused, shown)
    held(history_of(unknown, shown))


# --- tokens ---

PENDING = "FFFFFFFF/FFFFFFFF"


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (token("0/10"), token("0/F")),
        (token("0/10", "0/20"), token("0/10", "0/1F")),
        (token("0/10", "0/9"), token("0/A", "0/20")),
        (token(PENDING, "0/20"), token("0/5", "0/10")),
        (token("0/10"), token("0/9", PENDING)),
    ],
)
def test_floors_do_not_go_back_within_an_epoch(sent: str, got: str) -> None:
    """Neither that of writes nor the higher of both; compared as numbers, never as text."""
    answer = page("s1", 1.0, sent=sent, got=got)

    convicted(history_of(answer), Rule.FLOORS_GO_BACK, answer)


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (token("0/9"), token("0/10")),
        (token("0/10", "0/20"), token("0/20", "0/10")),
        (token(PENDING, "0/20"), token("0/5", "0/20")),
        (token("0/10", PENDING), token("0/10", "0/11")),
        (token("0/10", "0/20"), token("0/10", PENDING)),
        (token("0/10"), token("0/1", epoch="2-bbbbbbbb")),
        (token("0/10"), None),
        ("nonsense", token("0/1")),
    ],
)
def test_floors_may_rise_or_become_known_or_begin_anew(sent: str, got: str | None) -> None:
    """A pending floor may become any LSN, and another epoch counts anew."""
    held(history_of(page("s1", 1.0, sent=sent, got=got)))


def test_a_sessions_timeline_does_not_go_back() -> None:
    """Whatever it sent; several processes may answer a session that sends no token."""
    first = page("s1", 1.0, got=token("0/1", epoch="10-aaaaaaaa"))
    second = page("s1", 2.0, got=token("0/9", epoch="9-bbbbbbbb"))

    convicted(history_of(first, second), Rule.FLOORS_GO_BACK, first, second)
    held(history_of(second, replace(first, at=3.0, done=3.1)))
    held(history_of(first, replace(second, session="other1")))
    held(history_of(*(replace(one, session="bare1", tokens=False) for one in (first, second))))


def test_a_token_given_to_a_client_is_well_formed() -> None:
    """Also if the client never sends it back."""
    answer = page("bare1", 1.0, got="1~nonsense")

    convicted(history_of(answer), Rule.MALFORMED_TOKEN, answer)


def test_tokens_of_several_epochs_count_by_the_latest() -> None:
    """A session has them after a promotion until a read has shown what is left; each has to be well-formed."""
    older, later = token("0/9", epoch="9-bbbbbbbb"), token("0/1", epoch="10-aaaaaaaa")
    both = page("s1", 1.0, got=f"{older},{later}")
    back = page("s1", 2.0, got=older)

    held(history_of(both))
    convicted(history_of(both, back), Rule.FLOORS_GO_BACK, both, back)
    torn = page("s1", 1.0, got=f"{later},1~nonsense")
    convicted(history_of(torn), Rule.MALFORMED_TOKEN, torn)


# --- answers ---


@pytest.mark.parametrize("status", [500, 400, 422, 418, 504])
def test_an_answer_that_is_not_documented_is_unexpected(status: int) -> None:
    """Whatever the client takes it for."""
    answer = failed(page("s1", 1.0), Outcome.FAIL, status)

    convicted(history_of(answer), Rule.UNEXPECTED_ANSWER, answer)


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
    held(history_of(answer))


def test_a_user_who_joined_is_known() -> None:
    """Unless a promotion lost that, or it had not been acknowledged yet."""
    joined, refused = join("s1", 1.0), failed(page("s1", 4.0), Outcome.FAIL, 401)

    convicted(history_of(joined, refused), Rule.UNEXPECTED_ANSWER, joined, refused)
    held(history_of(joined, promotion(2.0, 3.0), refused))
    held(history_of(join("other1", 3.5, done=4.001), refused))
    held(history_of(joined, promotion(2.0, 3.0), page("s1", 3.5), refused))  # perhaps from the old epoch
    known = page("s1", 9.0)
    later = replace(refused, at=10.0, done=10.1)
    convicted(history_of(joined, promotion(2.0, 3.0), known, later), Rule.UNEXPECTED_ANSWER, known, later)
