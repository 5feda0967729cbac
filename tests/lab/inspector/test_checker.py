"""The live checker finds stale reads, without false alarms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rocket import Answer, Lsn, Reason, Role
from rocket.consistency import Epoch, SessionToken
from rocket.lab.api.recorder import Asked, RequestRecord
from rocket.lab.comparison import ComparisonRouter, Routing
from rocket.lab.inspector.checker import Checker
from rocket.lab.inspector.event_log import SessionTracker
from tests.support.inspected import viewing
from tests.support.servers import paused
from tests.support.user import User

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster
    from rocket.routing.observer import Observer
    from tests.support.inspected import Inspected

FIRST, SECOND = Epoch("1-aaaaaaaa"), Epoch("2-bbbbbbbb")


@pytest.mark.parametrize("routing", Routing)
@pytest.mark.parametrize("tokens", [True, False])
async def test_it_finds_exactly_the_reads_that_miss_a_write(
    inspected: Inspected,
    router: ComparisonRouter,
    cluster: LocalCluster,
    email: str,
    routing: Routing,
    *,
    tokens: bool,
) -> None:
    """A replica that does not replay is stale under a routing that ignores that."""
    user = User(inspected.client, email, tokens=tokens)
    await user.join()
    await cluster.wait_for_catchup()
    await router.switch(routing)
    async with viewing(inspected.client) as viewer, paused(cluster):
        ride = await user.write()
        status = await user.read(ride)
        read = await viewer.until("read", ride=ride)
        checked = await viewer.until("tick", checked=1)
    assert (404 if routing is Routing.RANDOM else 200) == status
    found = [event["read"] for event in viewer.events if event["kind"] == "stale"]
    assert ([read["id"]] if routing is Routing.RANDOM else []) == found
    assert len(found) == checked["stale"]


async def test_a_read_with_an_old_token_must_show_what_that_covers_and_no_more(
    inspected: Inspected, observer: Observer, cluster: LocalCluster, email: str
) -> None:
    """A client that sends an old token may be shown the past: the guarantee is the token's."""
    user = User(inspected.client, email)
    await user.join()
    async with viewing(inspected.client) as viewer:
        first = await user.write()
        await cluster.wait_for_catchup()
        old = user.token
        async with paused(cluster):
            second = await user.write()
            await observer.run_once()
            assert (200, 404) == (await user.read(first, old), await user.read(second, old))
            assert 200 == await user.read(second)
        tick = await viewer.until("tick", checked=3)
    assert 0 == tick["stale"]


# --- step by step ---


def token(lsn: int, epoch: Epoch = FIRST) -> SessionToken:
    """Return a token that covers writes up to a position."""
    return SessionToken(epoch, Lsn(lsn))


def record(
    request: Asked,
    at: float,
    ride: int,
    sent: SessionToken | None,
    got: SessionToken | None,
    *,
    found: bool = True,
) -> RequestRecord:
    """Return the record of a request for one ride that took half a second."""
    row = {"id": ride if found else None, "distance": 1.5}
    role = Role.PRIMARY if request is Asked.WRITE else Role.REPLICA
    answer = Answer(row, "replica0", role, Reason.CAUGHT_UP, got)
    detail = 1.5 if request is Asked.WRITE else ride
    return RequestRecord(
        request, at, at + 0.5, "a@example.com", () if sent is None else (str(sent),), detail, answer, None
    )


def verdicts(checker: Checker, *records: RequestRecord, epoch: Epoch = FIRST) -> list[bool]:
    """Return for each request whether it is found stale."""
    sessions = SessionTracker()
    return [
        checker.check(one, sessions.session_of(one, number), epoch) is not None
        for number, one in enumerate(records)
    ]


def stale(*records: RequestRecord, epoch: Epoch = FIRST) -> list[int]:
    """Return the indices of the requests that are found stale."""
    return [index for index, verdict in enumerate(verdicts(Checker(), *records, epoch=epoch)) if verdict]


def test_a_token_continues_its_session() -> None:
    """A session must be shown what it wrote, and what it was shown before."""
    write = record(Asked.WRITE, 0, 1, None, token(10))
    read = record(Asked.READ, 1, 1, token(10), token(11))
    blind = record(Asked.READ, 2, 1, token(11), token(12), found=False)
    assert [2] == stale(write, read, blind)
    assert [1] == stale(read, blind)


def test_a_request_need_not_show_what_was_acknowledged_after_it_began() -> None:
    """Neither without a token nor with an equal token of another session."""
    write = record(Asked.WRITE, 1, 1, None, token(10))
    early = record(Asked.READ, 1.2, 1, None, None, found=False)
    same_token = record(Asked.READ, 1.2, 1, token(10), token(10), found=False)
    assert [] == stale(write, early, same_token)
    assert [1] == stale(write, record(Asked.READ, 2, 1, None, None, found=False))


def test_a_token_that_is_sent_twice_begins_another_session() -> None:
    """The second session need not be shown what the first one was shown."""
    write = record(Asked.WRITE, 0, 1, None, token(10))
    reads = [
        record(Asked.READ, 1, ride, token(10), token(20), found=found) for ride, found in ((2, True), (2, False))
    ]
    assert [] == stale(write, *reads)


def test_requests_of_one_session_never_overlap() -> None:
    """A token that was received only after a request had begun is an equal one, of another session."""
    write = record(Asked.WRITE, 0, 1, None, token(10))
    read = record(Asked.READ, 1, 1, token(10), token(20))
    beside = record(Asked.READ, 1.2, 1, token(20), token(30))
    sessions = SessionTracker()
    names = [sessions.session_of(one, number).name for number, one in enumerate((write, read, beside))]
    assert ["s0", "s0", "s2"] == names


def test_a_write_of_one_epoch_is_not_expected_under_the_next() -> None:
    """It may have been lost, which is reported in another way."""
    write = record(Asked.WRITE, 0, 1, None, token(10))
    read = record(Asked.READ, 1, 1, token(10), token(11, SECOND), found=False)
    assert [] == stale(write, read)


@pytest.mark.parametrize(("begun", "found"), [(0.9, False), (1.1, True)])
def test_what_a_read_shows_during_a_change_of_routing_is_not_expected_later(begun: float, *, found: bool) -> None:
    """It may have been routed by the earlier rule, under which a token covers nothing that was shown."""
    checker = Checker()
    checker.forget_shown(1.0)
    read = record(Asked.READ, begun, 1, token(10), token(10))
    blind = record(Asked.READ, 2, 1, token(10), token(10), found=False)
    assert [False, found] == verdicts(checker, read, blind)
