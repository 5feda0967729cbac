"""What is said of a request and of the figures is what was measured."""

from __future__ import annotations

import pytest

from rocket import Answer, Lsn, Reason, Role
from rocket.errors import Unavailable
from rocket.lab.api.recorder import Asked, RequestRecord
from rocket.lab.comparison import Routing
from rocket.lab.inspector.figures import totals
from rocket.lab.inspector.told import Failure
from rocket.lab.inspector.words import words_of_read
from rocket.routing.explain import Candidate, sentences_of


def test_how_far_behind_a_replica_was_is_told_from_where_it_was_for_certain() -> None:
    """Without a WAL receiver, what it has replayed may be of another reign."""
    read = RequestRecord(
        Asked.READ, 0.0, 1.0, "a@example.com", (), 1, None, Failure(Unavailable("nobody answered"), Asked.READ)
    )
    sure = Candidate("replica0", Lsn(90), Lsn(90), 10, None)
    unsure = Candidate("replica1", Lsn(120), Lsn(80), 20, None)
    words = words_of_read(read, Routing.NEVER_STALE, Lsn(100), [unsure, sure])
    assert "replica0 was at 0/5A, 10 bytes behind." in words
    assert "replica1 was at 0/50 for certain (0/78 as it said itself), 20 bytes behind." in words


def test_one_more_replica_that_lay_behind_is_spoken_of_as_one() -> None:
    """And several as several."""
    behind = [Candidate(f"replica{number}", Lsn(90), Lsn(90), 10 + number, None) for number in range(4)]
    assert "1 more was further behind." in sentences_of(None, None, None, behind[:3])
    assert "2 more were further behind." in sentences_of(None, None, None, behind)


@pytest.mark.parametrize(("name", "subject"), [("primary", "the primary"), ("replica2", "replica2, the primary,")])
def test_a_primary_of_that_name_is_not_named_twice(name: str, subject: str) -> None:
    """Another one is."""
    answer = Answer(None, name, Role.PRIMARY, Reason.ASKED, None)
    assert [f"By this routing every read goes to the primary: {subject} served the read."] == sentences_of(
        answer, None, None, []
    )


def test_a_replica_of_that_name_is_not_taken_for_the_primary() -> None:
    """After a promotion it still has its name."""
    answer = Answer(None, "primary", Role.REPLICA, Reason.CAUGHT_UP, None)
    assert ["primary (now a replica) had replayed that far, and served the read."] == sentences_of(
        answer, None, None, []
    )


def test_a_request_that_was_wrong_in_itself_has_not_failed() -> None:
    """A write that was refused as such is counted as 'failed' by the API, and is no fault of a node."""
    writes = {"committed": 9, "unavailable": 2, "unknown": 1, "failed": 5}
    counts = {"reads": {}, "reasons": {}, "fallbacks": {}, "reads_unavailable": 4, "writes": writes}
    assert (9, 7) == (totals(counts)["writes"], totals(counts)["failed"])
