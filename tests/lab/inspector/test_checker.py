"""The live checker finds stale reads, and accuses nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from rocket import Answer, Lsn, Reason, Role
from rocket.consistency import Epoch, SessionToken
from rocket.lab.api.recorder import Asked, RequestRecord
from rocket.lab.comparison import Routing
from rocket.lab.inspector.checker import Checker
from rocket.lab.inspector.sessions import Sessions
from tests.support.inspected import looking
from tests.support.servers import paused
from tests.support.user import User

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.comparison import ComparisonRouter
    from rocket.routing.observer import Observer
    from tests.support.inspected import Inspected

FIRST, SECOND = Epoch("1-aaaaaaaa"), Epoch("2-bbbbbbbb")


async def stale_after(inspected: Inspected, *reads: tuple[User, int]) -> list[dict[str, Any]]:
    """Read rides while somebody looks; return what was found stale."""
    async with looking(inspected.client) as viewer:
        for user, ride in reads:
            await user.read(ride)
        checked = (await viewer.until("tick"))["checked"]
        assert len(reads) <= checked
    return [event for event in viewer.events if event["kind"] == "stale"]


@pytest.mark.parametrize("routing", Routing)
@pytest.mark.parametrize("tokens", [True, False])
async def test_it_finds_just_the_reads_that_miss_what_was_written(
    inspected: Inspected,
    router: ComparisonRouter,
    cluster: LocalCluster,
    email: str,
    routing: Routing,
    *,
    tokens: bool,
) -> None:
    """A replica that does not replay is stale where nobody looks at that."""
    user = User(inspected.client, email, tokens=tokens)
    await user.join()
    await cluster.wait_for_catchup()
    await router.switch(routing)
    async with looking(inspected.client) as viewer, paused(cluster):
        ride = await user.write()
        status = await user.read(ride)
        read = await viewer.until("read", ride=ride)
        checked = await viewer.until("tick", checked=1)
    assert (404 if routing is Routing.RANDOM else 200) == status
    found = [event["read"] for event in viewer.events if event["kind"] == "stale"]
    assert ([read["id"]] if routing is Routing.RANDOM else []) == found
    assert len(found) == checked["stale"]


async def test_an_old_token_is_owed_what_it_covers_and_no_more(
    inspected: Inspected, observer: Observer, cluster: LocalCluster, email: str
) -> None:
    """Whoever sends an old token again may be shown the past: the guarantee is the token's."""
    user = User(inspected.client, email)
    await user.join()
    async with looking(inspected.client) as viewer:
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


def told(
    request: Asked,
    at: float,
    ride: int,
    sent: SessionToken | None,
    got: SessionToken | None,
    *,
    found: bool = True,
) -> RequestRecord:
    """Return a request of half a second for one ride."""
    row = {"id": ride if found else None, "distance": 1.5}
    role = Role.PRIMARY if request is Asked.WRITE else Role.REPLICA
    answer = Answer(row, "replica0", role, Reason.CAUGHT_UP, got)
    detail = 1.5 if request is Asked.WRITE else ride
    return RequestRecord(
        request, at, at + 0.5, "a@example.com", () if sent is None else (sent,), detail, answer, None
    )


def verdicts(checker: Checker, *requests: RequestRecord, epoch: Epoch = FIRST) -> list[bool]:
    """Tell of each request whether it is found stale."""
    sessions = Sessions()
    return [
        checker.look_at(one, sessions.of(one, number), epoch) is not None for number, one in enumerate(requests)
    ]


def stale(*requests: RequestRecord, epoch: Epoch = FIRST) -> list[int]:
    """Return the places of those that are found stale."""
    return [place for place, verdict in enumerate(verdicts(Checker(), *requests, epoch=epoch)) if verdict]


def test_a_session_goes_on_by_its_token() -> None:
    """It is owed what it wrote, and what it was shown."""
    write = told(Asked.WRITE, 0, 1, None, token(10))
    read = told(Asked.READ, 1, 1, token(10), token(11))
    blind = told(Asked.READ, 2, 1, token(11), token(12), found=False)
    assert [2] == stale(write, read, blind)
    assert [1] == stale(read, blind)


def test_a_request_under_way_is_owed_nothing_that_came_later() -> None:
    """Neither without a token nor with one that another was handed meanwhile."""
    write = told(Asked.WRITE, 1, 1, None, token(10))
    early = told(Asked.READ, 1.2, 1, None, None, found=False)
    same_token = told(Asked.READ, 1.2, 1, token(10), token(10), found=False)
    assert [] == stale(write, early, same_token)
    assert [1] == stale(write, told(Asked.READ, 2, 1, None, None, found=False))


def test_a_token_that_is_brought_twice_begins_another_session() -> None:
    """What the first one was shown is not owed to the second."""
    write = told(Asked.WRITE, 0, 1, None, token(10))
    reads = [
        told(Asked.READ, 1, ride, token(10), token(20), found=found) for ride, found in ((2, True), (2, False))
    ]
    assert [] == stale(write, *reads)


def test_requests_of_one_session_never_overlap() -> None:
    """A token that was handed out only after a request had begun is another's, which looks the same."""
    write = told(Asked.WRITE, 0, 1, None, token(10))
    read = told(Asked.READ, 1, 1, token(10), token(20))
    beside = told(Asked.READ, 1.2, 1, token(20), token(30))
    sessions = Sessions()
    names = [sessions.of(one, number).name for number, one in enumerate((write, read, beside))]
    assert ["s0", "s0", "s2"] == names


def test_what_was_told_under_one_primary_is_not_owed_by_the_next() -> None:
    """It may have been lost, and that is reported in another way."""
    write = told(Asked.WRITE, 0, 1, None, token(10))
    read = told(Asked.READ, 1, 1, token(10), token(11, SECOND), found=False)
    assert [] == stale(write, read)


@pytest.mark.parametrize(("begun", "found"), [(0.9, False), (1.1, True)])
def test_what_a_read_under_way_at_a_switch_shows_is_not_owed(begun: float, *, found: bool) -> None:
    """It may have been routed by the rule before, under which a token covers nothing that was shown."""
    checker = Checker()
    checker.forget_what_was_shown(1.0)
    read = told(Asked.READ, begun, 1, token(10), token(10))
    blind = told(Asked.READ, 2, 1, token(10), token(10), found=False)
    assert [False, found] == verdicts(checker, read, blind)
