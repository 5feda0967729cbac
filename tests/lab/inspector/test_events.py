"""What viewers receive: thinned statuses, explanations of requests, and totals."""

from __future__ import annotations

import pytest

from rocket import Answer, Lsn, Reason, Role
from rocket.consistency import Incarnation, ReplicaStatus
from rocket.errors import Unavailable
from rocket.lab.api.recorder import Asked, RequestRecord
from rocket.lab.comparison import Routing
from rocket.lab.inspector.event_log import RecordedError
from rocket.lab.inspector.events import StatusSampler, explain_read, totals
from rocket.routing.explain import Candidate, sentences_of

# --- statuses ---


def sampled(sampler: StatusSampler, *statuses: tuple[float, int]) -> list[float]:
    """Sample statuses of a replica, by time and replayed position; return the times of those that are sent."""
    sent = []
    for at, replayed in statuses:
        status = ReplicaStatus("replica0", Lsn(replayed), Incarnation("1"), observed_at=at)
        sent += [moment for moment, _ in sampler.sample(status, at)]
    return sent


def test_a_change_is_sent_together_with_the_last_status_before_it() -> None:
    """The change lies between the two; of the unchanged statuses, one in a tenth of a second is enough."""
    assert [0.0, 0.03, 0.04] == sampled(StatusSampler(), (0.0, 1), (0.01, 1), (0.02, 1), (0.03, 1), (0.04, 2))
    assert [0.0, 0.15] == sampled(StatusSampler(), (0.0, 1), (0.05, 1), (0.15, 1), (0.2, 1))


def test_a_thousand_changes_a_second_are_not_all_sent() -> None:
    """A batch has room for some; the next one begins with the latest status."""
    sampler = StatusSampler()
    assert len(sampled(sampler, *((number / 1000, number) for number in range(50)))) <= 21
    sampler.refill()
    assert [0.049, 0.05] == sampled(sampler, (0.05, 50))


# --- explanations ---


def test_a_replica_is_as_far_behind_as_its_vouched_position() -> None:
    """Without a WAL receiver, what it has replayed may be of another epoch."""
    error = RecordedError(Unavailable("no node answered"), Asked.READ)
    read = RequestRecord(Asked.READ, 0.0, 1.0, "a@example.com", (), 1, None, error)
    vouched = Candidate("replica0", Lsn(90), Lsn(90), 10, None)
    unvouched = Candidate("replica1", Lsn(120), Lsn(80), 20, None)
    explanation = explain_read(read, Routing.NEVER_STALE, Lsn(100), [unvouched, vouched])
    assert "replica0 was at 0/5A, 10 bytes behind." in explanation
    assert "replica1 was at 0/50 for certain (0/78 as it said itself), 20 bytes behind." in explanation


def test_further_replicas_behind_are_counted_in_the_right_number() -> None:
    """One in the singular, several in the plural."""
    behind = [Candidate(f"replica{number}", Lsn(90), Lsn(90), 10 + number, None) for number in range(4)]
    assert "1 more was further behind." in sentences_of(None, None, None, behind[:3])
    assert "2 more were further behind." in sentences_of(None, None, None, behind)


@pytest.mark.parametrize(("name", "subject"), [("primary", "the primary"), ("replica2", "replica2, the primary,")])
def test_a_primary_of_that_name_is_not_named_twice(name: str, subject: str) -> None:
    """A primary with another name is named with its role."""
    answer = Answer(None, name, Role.PRIMARY, Reason.ASKED, None)
    assert [f"It was to go to the primary: {subject} served the read."] == sentences_of(answer, None, None, [])


def test_a_replica_named_primary_is_not_taken_for_the_primary() -> None:
    """It keeps its name after a promotion."""
    answer = Answer(None, "primary", Role.REPLICA, Reason.CAUGHT_UP, None)
    assert ["primary (now a replica) had replayed that far, and served the read."] == sentences_of(
        answer, None, None, []
    )


# --- totals ---


def test_an_invalid_request_has_not_failed() -> None:
    """The API counts an invalid write as 'failed'; no node is to blame for it."""
    writes = {"committed": 9, "unavailable": 2, "unknown": 1, "failed": 5}
    counts = {"reads": {}, "reasons": {}, "fallbacks": {}, "reads_unavailable": 4, "writes": writes}
    assert (9, 7) == (totals(counts)["writes"], totals(counts)["failed"])
