"""The router on a real cluster: where reads go, and what a failing node costs."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from rocket import (
    Answer,
    Limits,
    Lsn,
    OutcomeUnknown,
    Policy,
    Reason,
    Role,
    Router,
    Unavailable,
    report_read_bound,
)
from rocket.lab.api.rides import INSERT_RIDE, SELECT_RIDE
from rocket.lab.api.users import INSERT_USER, SELECT_USER
from rocket.lab.app import DATABASE
from tests.support.commits import Unsettled, committing
from tests.support.races import read_ride, write_ride
from tests.support.servers import dsns, paused

if TYPE_CHECKING:
    from pathlib import Path

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster
    from rocket.consistency import Board
    from rocket.routing.observer import Observer


def written(answer: Answer[Any]) -> Lsn:
    """Return the write floor that an answer hands to its session."""
    assert answer.token is not None
    return answer.token.write_floor


async def test_read_goes_to_a_replica_that_is_caught_up(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """A status at or above the floor opens the replica."""
    ride = await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    seen, node, reason = await read_ride(router, email, ride)
    assert (True, Reason.CAUGHT_UP) == (seen, reason)
    assert node in {"replica0", "replica1"}


async def test_reads_spread_over_the_replicas(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """No replica is left out."""
    ride = await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    nodes = {(await read_ride(router, email, ride))[1] for _ in range(50)}
    assert {"replica0", "replica1"} == nodes


async def test_read_leaves_the_replica_that_does_not_replay(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """The other replica serves as long as one is paused."""
    async with paused(cluster, "replica0"):
        ride = await write_ride(router, email)
        async with asyncio.timeout(10):
            while "replica1" != (await read_ride(router, email, ride))[1]:
                await observer.run_once()
        nodes = {(await read_ride(router, email, ride))[1] for _ in range(20)}
    assert {"replica1"} == nodes


async def test_an_answer_tells_its_way(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """What floors there were, what was known of the replicas, and what the node said of itself."""
    async with paused(cluster, "replica0"):
        token = (await write_ride(router, email)).token
        async with asyncio.timeout(10):
            while True:
                await observer.run_once()
                answer = await router.read(
                    lambda node: node.fetchval(SELECT_USER, email), subject=email, token=token
                )
                if answer.role is Role.REPLICA:
                    break
    route = answer.route
    assert route is not None
    assert {"replica0", "replica1"} == {status.name for status in route.statuses}
    (token,) = route.tokens
    behind = [status.name for status in route.statuses if status.replay_lsn < token.write_floor]
    assert ["replica0"] == behind
    assert ("replica1", None, {}) == (answer.node, route.waited_s, route.failed)
    assert route.decided_at < route.deadline
    assert route.bound is not None
    assert route.bound.is_replica


async def test_every_replica_behind_means_the_primary(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """Never wrong, only slower."""
    async with paused(cluster):
        ride = await write_ride(router, email)
        await observer.run_once()
        assert (True, "primary", Reason.NOT_CAUGHT_UP) == await read_ride(router, email, ride)


async def test_replica_beyond_max_lag_serves_nobody(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """Not even one whose floor it has reached."""
    ride = await write_ride(router, email)
    await cluster.wait_for_catchup()
    router.policy = Policy(max_lag_bytes=10_000)
    async with paused(cluster):
        connection = await cluster.primary.connect(DATABASE)
        await connection.execute("SELECT pg_logical_emit_message(true, 'test', repeat('x', 20000))")
        await connection.close()
        await observer.run_once()
        assert (True, "primary", Reason.TOO_FAR_BEHIND) == await read_ride(router, email, ride)


async def test_replica_unheard_of_for_a_lease_serves_nobody(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """What was seen too long ago is not known."""
    ride = await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    router.policy = Policy(lease_s=0.0)
    assert (True, "primary", Reason.NO_STATUS) == await read_ride(router, email, ride)


async def test_replica_that_fails_costs_a_retry_elsewhere(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """The floor stays the same on the way."""
    ride = await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    ended = 0

    async def die_once(node: Connection) -> asyncpg.Record | None:
        nonlocal ended
        if not ended:
            ended += 1
            await node.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return await node.fetchrow(SELECT_RIDE, email, ride.id)

    answer = await router.read(die_once, subject=email, token=ride.token)
    assert answer.value is not None
    assert Reason.RETRIED == answer.reason
    assert answer.node != "primary"


async def test_frozen_replicas_cost_a_bounded_time(
    cluster: LocalCluster, observer: Observer, board: Board, email: str
) -> None:
    """A replica that accepts and says nothing is given up after the attempt's time."""
    limits = Limits(attempt_s=0.2)
    async with await Router.open(dsns(cluster), board=board, limits=limits) as router:
        ride = await write_ride(router, email)
        await cluster.wait_for_catchup()
        await observer.run_once()
        for node in cluster.replicas:
            node.freeze()
        try:
            began = time.monotonic()
            seen, name, reason = await read_ride(router, email, ride)
            took_s = time.monotonic() - began
        finally:
            for node in cluster.replicas:
                node.thaw()
    assert (True, "primary", Reason.REPLICAS_FAILED) == (seen, name, reason)
    assert took_s < 3


async def test_query_that_is_wrong_is_raised_and_not_retried(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """It speaks against the work, not against the node."""
    await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    ran = 0

    async def wrong(node: Connection) -> None:
        nonlocal ran
        ran += 1
        await node.execute("SELECT 1 / 0")

    with pytest.raises(asyncpg.DivisionByZeroError):
        await router.read(wrong, subject=email)
    assert 1 == ran


async def test_replica_connection_takes_no_write(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """Not even on the primary's side of a promotion: the session itself is read-only."""
    ride = await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    answer = await router.read(
        lambda node: node.fetchval("SHOW default_transaction_read_only"), subject=email, token=ride.token
    )
    assert answer.node != "primary"
    assert "on" == answer.value


async def test_the_floor_of_a_write_lies_after_its_commit(router: Router, email: str) -> None:
    """It covers the commit record, and so what was inserted before."""
    inside = Lsn(0)

    async def work(primary: Connection) -> None:
        nonlocal inside
        await primary.execute(INSERT_USER, email)
        inside = Lsn.from_wire(await primary.fetchval("SELECT pg_current_wal_insert_lsn()"))

    answer = await router.write(work, subject=email)
    assert inside < written(answer) < Lsn.PENDING


async def test_servers_that_end_first_do_not_keep_a_router_from_closing(
    cluster: LocalCluster, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster and an API that are stopped at the same moment: no server is left to say goodbye to."""

    async def gone(_self: asyncpg.Pool) -> None:
        raise BrokenPipeError

    async with await Router.open(dsns(cluster), board=board):
        monkeypatch.setattr(asyncpg.Pool, "close", gone)


async def test_what_work_leaves_in_a_session_on_the_primary_reaches_nobody_else(
    cluster: LocalCluster, observer: Observer, board: Board, email: str
) -> None:
    """One that was only asked for the flush LSN is not reset, which must not keep it from that for good."""

    async def settings(primary: Connection) -> str:
        await primary.execute(INSERT_USER, email)
        found: str = await primary.fetchval("SHOW application_name")
        await primary.execute("SET application_name = 'left behind'")
        return found

    async with await Router.open(dsns(cluster), board=board, limits=Limits(connections=1)) as router:
        await observer.run_once()
        for _ in range(2):
            assert "rocket" == (await router.write(settings, subject=email)).value
            await router.read(lambda node: node.fetchval("SELECT 1"), subject=email)
        assert "rocket" == (await router.write(settings, subject=email)).value


@pytest.mark.usefixtures("observer")
async def test_commit_is_flushed_whatever_the_session_says(
    cluster: LocalCluster, board: Board, email: str
) -> None:
    """With synchronous_commit off the flush LSN would not cover the commit (design fact F2)."""
    inside = Lsn(0)

    async def work(primary: Connection) -> None:
        nonlocal inside
        await primary.execute("SET LOCAL synchronous_commit = off")
        await primary.execute(INSERT_USER, email)
        inside = Lsn.from_wire(await primary.fetchval("SELECT pg_current_wal_insert_lsn()"))

    async with await Router.open(dsns(cluster), board=board) as router:
        answer = await router.write(work, subject=email)
    assert inside < written(answer)


async def test_a_write_whose_floor_is_not_known_is_acknowledged_and_covered(
    cluster: LocalCluster, observer: Observer, board: Board, router: Router, email: str
) -> None:
    """For its session only the primary will do; one without a token goes by what the primary has flushed."""
    async with await committing(Router, Unsettled).open(dsns(cluster), board=board) as forgetful:
        answer = await forgetful.write(lambda primary: primary.fetchval(INSERT_USER, email), subject=email)
    assert Lsn.PENDING == written(answer)
    await cluster.wait_for_catchup()
    await observer.run_once()
    own = await router.read(lambda node: node.fetchval(SELECT_USER, email), subject=email, token=answer.token)
    assert (Role.PRIMARY, Reason.NOT_CAUGHT_UP) == (own.role, own.reason)
    other = await router.read(lambda node: node.fetchval(SELECT_USER, email), subject=email)
    assert own.value == other.value is not None


async def test_concurrent_writes_of_one_user_have_floors_that_cover_them(router: Router, email: str) -> None:
    """Each of them lies above its own commit."""
    await write_ride(router, email)

    async def write() -> None:
        inside = Lsn(0)

        async def work(primary: Connection) -> None:
            nonlocal inside
            await primary.fetchrow(INSERT_RIDE, email, 1.0, None)
            inside = Lsn.from_wire(await primary.fetchval("SELECT pg_current_wal_insert_lsn()"))

        assert inside < written(await router.write(work, subject=email)) < Lsn.PENDING

    await asyncio.gather(*(write() for _ in range(30)))


async def test_serialization_failure_is_tried_again(router: Router, email: str) -> None:
    """The caller never sees it."""
    runs = 0

    async def work(primary: Connection) -> None:
        nonlocal runs
        runs += 1
        await primary.execute(INSERT_USER, email)
        if runs < 3:
            await primary.execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

    await router.write(work, subject=email)
    assert 3 == runs


async def test_error_in_the_work_rolls_everything_back(router: Router, email: str) -> None:
    """Neither the write nor its mark stays."""

    async def work(primary: Connection) -> None:
        await primary.execute(INSERT_USER, email)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await router.write(work, subject=email)
    assert (await router.read(lambda node: node.fetchval(SELECT_USER, email), subject=email)).value is None


async def test_connection_lost_during_commit_is_an_unknown_outcome(router: Router, email: str) -> None:
    """Never reported as failed, never retried."""
    runs = 0

    async def work(primary: Connection) -> None:
        nonlocal runs
        runs += 1
        await primary.execute("""
            CREATE FUNCTION pg_temp.die() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END';
            CREATE TEMPORARY TABLE doomed (id int);
            CREATE CONSTRAINT TRIGGER die AFTER INSERT ON doomed
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pg_temp.die();
            INSERT INTO doomed VALUES (1);
        """)

    with pytest.raises(OutcomeUnknown):
        await router.write(work, subject=email)
    assert 1 == runs


async def test_connection_lost_before_commit_is_known_to_have_changed_nothing(router: Router, email: str) -> None:
    """The caller may ask again."""

    async def work(primary: Connection) -> None:
        await primary.execute(INSERT_USER, email)
        await primary.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(Unavailable):
        await router.write(work, subject=email)


async def test_write_that_waits_too_long_is_unavailable(cluster: LocalCluster, board: Board, email: str) -> None:
    """A lock held elsewhere ends in the deadline, and leaves the pool usable."""
    limits = Limits(write_s=0.3)
    async with await Router.open(dsns(cluster, "primary"), board=board, limits=limits) as router:
        ride = await write_ride(router, email)
        connection = await cluster.primary.connect(DATABASE)
        async with connection.transaction():
            await connection.execute("SELECT FROM users WHERE email = $1 FOR UPDATE", email)
            with pytest.raises(Unavailable):
                await write_ride(router, email)
        await connection.close()
        assert (await read_ride(router, email, ride))[0]


async def test_router_without_a_primary_refuses_at_once(board: Board, email: str, tmp_path: Path) -> None:
    """No time-out is waited for where no server listens."""
    dsn = f"postgresql://postgres@/nowhere?host={tmp_path}&port=1"
    async with await Router.open({"primary": dsn}, board=board) as router:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await router.read(lambda node: node.fetchval("SELECT 1"), subject=email)
        with pytest.raises(Unavailable):
            await router.write(lambda node: node.fetchval("SELECT 1"), subject=email)
        assert time.monotonic() - began < 1
        assert not await router.primary_answers()


async def test_pool_recovers_from_a_crash_of_the_primary(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """Dead connections in the pool cost no read an error once the primary is back, and was observed.

    Until then nothing is read there: it may have been set back to a snapshot.
    """
    ride = await write_ride(router, email)
    assert (await read_ride(router, email, ride))[0]
    died = cluster.primary.process
    cluster.primary.kill()
    async with asyncio.timeout(20):
        while cluster.primary.process is died:
            await asyncio.sleep(0.01)
        await cluster.primary.up.wait()
    with pytest.raises(Unavailable, match="has not been observed since"):
        await read_ride(router, email, ride)
    await observer.run_once()
    assert (await read_ride(router, email, ride))[0]
    await cluster.wait_for_catchup()


async def test_misuse_of_a_connection_is_raised_as_what_it_is(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """A missing argument is the application's mistake, not an outage of every node."""
    await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    with pytest.raises(asyncpg.InterfaceError, match="expects 1 argument"):
        await router.read(lambda node: node.fetchval("SELECT $1::int"), subject=email)
    with pytest.raises(asyncpg.InterfaceError, match="expects 1 argument"):
        await router.write(lambda primary: primary.fetchval("SELECT $1::int"), subject=email)


async def test_replica_without_the_database_costs_a_retry(
    cluster: LocalCluster, observer: Observer, board: Board, email: str
) -> None:
    """What goes wrong in connecting speaks against the node, whatever the server says (it may lie far behind)."""
    elsewhere = {node.name: node.dsn("not_replayed_yet") for node in cluster.replicas}
    async with await Router.open(dsns(cluster) | elsewhere, board=board) as router:
        ride = await write_ride(router, email)
        await cluster.wait_for_catchup()
        await observer.run_once()
        seen, node, reason = await read_ride(router, email, ride)
        assert (True, "primary") == (seen, node)
        assert reason in {Reason.REPLICAS_FAILED, Reason.UNREACHABLE}  # warming up may have found it before


async def test_read_longer_than_an_attempt_ends_on_the_primary(
    cluster: LocalCluster, observer: Observer, board: Board, email: str
) -> None:
    """Replicas get no more than a share of the time, however many there are."""
    many = {f"replica{number}": cluster.replicas[0].dsn(DATABASE) for number in range(6)}
    limits = Limits(read_s=3.0, attempt_s=0.2)
    async with await Router.open(dsns(cluster) | many, board=board, limits=limits) as router:
        ride = await write_ride(router, email)
        await cluster.wait_for_catchup()
        await observer.run_once()
        status = board.replica("replica0")
        assert status is not None
        for name in many:
            board.publish(dataclasses.replace(status, name=name))
        answer = await router.read(
            lambda node: node.fetchval("SELECT pg_sleep(0.5)::text"), subject=email, token=ride.token
        )
    assert ("primary", Reason.REPLICAS_FAILED) == (answer.node, answer.reason)


async def test_connection_lost_after_the_write_does_not_undo_the_answer(
    cluster: LocalCluster, board: Board, email: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure to give a connection back does not reach the work that had it."""

    async def lost(*_: object, **__: object) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 12")

    async with await Router.open(dsns(cluster, "primary"), board=board) as router:
        ride = await write_ride(router, email)
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "reset", lost)
            second = await write_ride(router, email)
        assert second.id > ride.id
        assert (await read_ride(router, email, second))[0]


async def test_primary_that_freezes_before_the_commit_is_known_to_have_changed_nothing(
    cluster: LocalCluster, board: Board, email: str
) -> None:
    """A time-out before COMMIT was sent is no unknown outcome, and does not wait for the frozen server."""
    limits = Limits(write_s=0.5)
    async with await Router.open(dsns(cluster, "primary"), board=board, limits=limits) as router:
        await write_ride(router, email)

        async def work(primary: Connection) -> None:
            cluster.primary.freeze()
            await primary.execute("SELECT 1")

        began = time.monotonic()
        try:
            with pytest.raises(Unavailable):
                await router.write(work, subject=email)
            assert time.monotonic() - began < 1
        finally:
            cluster.primary.thaw()
    await cluster.wait_for_catchup()


async def test_connection_that_is_ended_before_the_work_has_reported_its_bound_costs_a_retry(
    cluster: LocalCluster, observer: Observer, router: Router, email: str
) -> None:
    """A node's pool may be emptied at any moment, when the observer finds it in another role."""
    ride = await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    ran = 0

    async def work(node: Connection) -> int:
        nonlocal ran
        ran += 1
        row = await node.fetchrow(SELECT_RIDE, email, ride.id)
        assert row is not None
        if 1 == ran:
            for pool in router.pools:
                pool.drop()
        report_read_bound(node, row["shown"])
        return int(row["id"])

    answer = await router.read(work, subject=email, token=ride.token)
    assert (ride.id, Reason.RETRIED, 2) == (answer.value, answer.reason, ran)


async def test_what_an_earlier_statement_said_is_not_what_the_work_has_shown(
    cluster: LocalCluster, observer: Observer, board: Board, router: Router, email: str
) -> None:
    """Only the last statement's word covers all of the work; else the node is asked once more."""
    ride = await write_ride(router, email)
    await cluster.wait_for_catchup()
    await observer.run_once()

    async def work(node: Connection) -> None:
        report_read_bound(node, f"replica 0/1 0/2 1 {board.epoch}")
        await node.fetchval("SELECT 1")

    answer = await router.read(work, subject=email, token=ride.token)
    assert answer.token is not None
    assert answer.token.highest_floor > Lsn(2)
