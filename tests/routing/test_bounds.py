"""What a read may have shown, on real servers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import pytest

from rocket import Lsn, Reason, Router, Unavailable
from rocket.consistency import Epoch, SessionToken
from rocket.lab.api.users import SELECT_USER
from rocket.lab.app import DATABASE
from rocket.routing.bound import READ_BOUND, EpochChanged, NoLongerReplica, ReadBound, ask_bound
from tests.support.races import come_back_behind, restart_point_now, write_ride
from tests.support.servers import paused

if TYPE_CHECKING:
    from rocket import Answer, Connection
    from rocket.cluster.cluster import LocalCluster
    from rocket.consistency import Board
    from rocket.routing.observer import Observer


ASK = f"SELECT {READ_BOUND}"


async def read(router: Router, email: str, token: SessionToken) -> Answer[Any]:
    """Read the user of a session."""
    return await router.read(lambda node: node.fetchval(SELECT_USER, email), subject=email, token=token)


def token_of(answer: Answer[Any]) -> SessionToken:
    """Return what the answer hands to its session."""
    assert answer.token is not None
    return answer.token


async def test_streaming_replica_bounds_by_what_it_has_received(
    cluster: LocalCluster, observer: Observer, board: Board
) -> None:
    """Also while it does not replay: what it shows is at most what it has."""
    await observer.run_once()
    await cluster.wait_for_catchup()
    assert board.epoch is not None
    async with paused(cluster, "replica0"):
        primary = await cluster.primary.connect(DATABASE)
        await primary.execute("SELECT pg_logical_emit_message(true, 'test', 'received')")
        flushed = ReadBound.parse(await primary.fetchval(ASK)).on_primary(board.epoch)
        replica = await cluster.node("replica0").connect(DATABASE)
        bound = ReadBound.parse(await replica.fetchval(ASK)).on_replica(board.epoch)
        while bound is None or bound < flushed:
            bound = ReadBound.parse(await replica.fetchval(ASK)).on_replica(board.epoch)
        assert bound > Lsn.from_wire(await replica.fetchval("SELECT pg_last_wal_replay_lsn()"))
        await replica.close()
        await primary.close()


async def test_server_that_is_no_replica_bounds_nothing(
    cluster: LocalCluster, observer: Observer, board: Board
) -> None:
    """A connection that outlived its server's promotion leaves the pool (design fact F14)."""
    await observer.run_once()
    assert board.epoch is not None
    primary = await cluster.primary.connect(DATABASE)
    with pytest.raises(NoLongerReplica):
        ReadBound.parse(await primary.fetchval(ASK)).on_replica(board.epoch)
    await primary.close()


async def test_replica_that_went_on_to_another_epoch_fails_the_read(
    cluster: LocalCluster, observer: Observer, board: Board, router: Router, email: str
) -> None:
    """What its status said may be a lease old; its LSNs are none of the token's epoch."""
    await write_ride(router, email)
    await observer.run_once()
    earlier = Epoch("1-" + "z" * 10)
    await cluster.wait_for_catchup()
    await observer.run_once()
    for status in board.replicas:
        board.publish(dataclasses.replace(status, epoch=earlier))
    answer = await read(router, email, SessionToken(board.epoch or earlier, Lsn(0)))
    assert ("primary", Reason.OTHER_EPOCH) == (answer.node, answer.reason)

    primary = board.primary
    assert primary is not None
    later = Epoch("2-" + "z" * 10)
    board.publish_primary(dataclasses.replace(primary, epoch=later))
    for status in board.replicas:
        board.publish(dataclasses.replace(status, epoch=later))
    with pytest.raises(Unavailable):  # the replicas fail it, and the primary is not of that epoch
        await read(router, email, SessionToken(later, Lsn(0)))


EPOCH = Epoch("2-" + "a" * 10)


def read_bound(text: str) -> ReadBound:
    """Return what a column says, with the newest epoch shown, if one follows it."""
    column, epoch = " ".join(text.split()[:4]), text.split()[4:]
    bound = ReadBound.parse(column)
    return dataclasses.replace(bound, epoch=Epoch(epoch[0])) if epoch and epoch != ["-"] else bound


@pytest.mark.parametrize(
    ("said", "bound"),
    [
        pytest.param("replica 0/10 0/20 2", Lsn(0x20), id="what has been received"),
        pytest.param("replica 0/20 0/20 2", Lsn(0x20), id="all of it replayed"),
        pytest.param("replica 0/21 0/20 2", None, id="more than was received"),
        pytest.param("replica 0/20 - 2", None, id="nothing received yet"),
        pytest.param(f"replica 0/10 0/20 0 {EPOCH}", None, id="not streaming"),
    ],
)
def test_a_replica_of_the_epoch_has_shown_at_most_what_it_streamed(said: str, bound: Lsn | None) -> None:
    """The end of what has been received is a bound, unless it replays what did not come from the stream."""
    assert bound == read_bound(said).on_replica(EPOCH)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param("replica 0/10 0/20 3", id="streams a later timeline"),
        pytest.param("replica 0/10 0/20 1", id="streams an earlier one"),
        pytest.param(f"replica 0/10 0/20 0 3-{'b' * 10}", id="shows a later epoch"),
        pytest.param(f"replica 0/10 0/20 0 2-{'b' * 10}", id="shows another epoch of the timeline"),
        pytest.param("replica 0/10 0/20 0 -", id="shows none"),
    ],
)
def test_a_replica_of_another_epoch_fails_the_read(said: str) -> None:
    """Its LSNs are none of the token's."""
    with pytest.raises(EpochChanged):
        read_bound(said).on_replica(EPOCH)


@pytest.mark.vouched
async def test_read_that_cannot_be_bounded_ties_the_session_to_its_replica(
    cluster: LocalCluster, observer: Observer, board: Board, router: Router, email: str
) -> None:
    """A replica that replays its own files after a crash shows more than any LSN says (design fact F6)."""
    await write_ride(router, "earlier-" + email)
    async with restart_point_now(cluster):
        await write_ride(router, email)
        await cluster.wait_for_catchup()
        async with come_back_behind(cluster, email):
            await observer.run_once()
            epoch = board.epoch
            assert epoch is not None
            # Low enough for a replica that lies far behind.
            first = await read(router, "earlier-" + email, SessionToken(epoch, Lsn(0)))
            assert Reason.CAUGHT_UP == first.reason
            token = token_of(first)
            assert (first.node, None) == (token.node, token.read_floor)

            again = [await read(router, "earlier-" + email, token) for _ in range(20)]
            assert {first.node} == {answer.node for answer in again}

            board.forget(first.node)
            elsewhere = await read(router, "earlier-" + email, token)
            assert "primary" == elsewhere.node
            assert token_of(elsewhere).read_floor is not None


class DoesNotStream:
    """A connection to a replica whose upstream is away."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def fetchval(self, query: str) -> object:
        """Answer as a replica does that does not stream."""
        return "replica 0/10 - 0" if query == ASK else await self._connection.fetchval(query)


@pytest.mark.parametrize("state", ["SET search_path = pg_catalog", "SET ROLE pg_monitor"])
async def test_what_work_has_set_is_not_the_callers_error(cluster: LocalCluster, state: str) -> None:
    """If it hides which epoch the replica shows, another node answers."""
    replica = await cluster.node("replica0").connect(DATABASE)
    try:
        await replica.execute(state)
        with pytest.raises(EpochChanged, match="what work has set"):
            await ask_bound(cast("Connection", DoesNotStream(replica)))
    finally:
        await replica.close()
