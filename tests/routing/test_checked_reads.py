"""Reads where no status can vouch for a connection: each has to check by itself, and is seen to need that."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

import asyncpg
import pytest

from rocket import Lsn, Policy, Reason, Role, Router, Unavailable
from rocket.consistency import Board
from rocket.errors import NodesUnusable
from rocket.health import examine
from rocket.lab.api.rides import SELECT_RIDE
from rocket.lab.app import DATABASE
from rocket.routing import reads
from rocket.routing.observer import Observer
from rocket.routing.opening import connect
from tests.support.between import pgbouncer, pgbouncer_host_list, pgpool, shared_address
from tests.support.races import come_back_behind, lose_a_backend, restart_point_now, write_ride
from tests.support.servers import ROLES, dsns, paused, recorded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Answer
    from rocket.cluster.cluster import LocalCluster
    from rocket.consistency import SessionToken

WAYS = ["hidden", "pooler", "shared address"]
"""To replicas: as a role without pg_monitor; through PgBouncer; by one address for both."""


@contextlib.asynccontextmanager
async def nodes_by(way: str, cluster: LocalCluster) -> AsyncIterator[dict[str, str]]:
    """Give the addresses by which the nodes are reached."""
    direct = dsns(cluster, who=ROLES["plain" if way == "hidden" else "monitor"])
    match way:
        case "hidden":
            yield direct
        case "pooler":
            with pgbouncer(cluster) as behind_it:
                yield behind_it | {"primary": direct["primary"]}
        case _:
            async with shared_address(cluster, "replica0", "replica1") as reader:
                yield {"primary": direct["primary"], "reader": reader}


class Session:
    """A client that sends its token back."""

    def __init__(self, router: Router, observer: Observer, email: str) -> None:
        self.router = router
        self.observer = observer
        self.email = email
        self.token: SessionToken | None = None
        self.ride_id = 0
        self.written: SessionToken | None = None
        """The token of the last write alone."""

    async def write(self) -> None:
        """Write a ride."""
        ride = await write_ride(self.router, self.email)
        self.ride_id, self.written = ride.id, ride.token

    async def read(self) -> Answer[bool]:
        """Look for it; the answer's value says whether it was seen."""

        async def work(node: asyncpg.Connection[asyncpg.Record]) -> bool:
            row = await node.fetchrow(SELECT_RIDE, self.email, self.ride_id)
            return row is not None and row["id"] is not None

        answer = await self.router.read(work, subject=self.email, token=self.token)
        self.token = answer.token
        return answer

    async def reads_from_a_replica(self) -> Answer[bool]:
        """Read until a replica has served, and the board says that reads have to check there."""
        async with asyncio.timeout(15):
            while True:
                await self.observer.run_once()
                answer = await self.read()
                assert answer.value
                if answer.role is Role.REPLICA and all(
                    status.incarnation is None for status in self.router.board.replicas
                ):
                    return answer


@contextlib.asynccontextmanager
async def attached(nodes: dict[str, str], email: str, *, record_statuses: bool = False) -> AsyncIterator[Session]:
    """Give a session on a router for these nodes, whose observer looks only when it is told to."""
    board = Board()
    observer = Observer(nodes, board, interval_s=0.05, record_statuses=record_statuses)
    try:
        await observer.run_once()
        policy = Policy(primary_lease_s=60.0, lease_s=60.0)
        async with await Router.open(nodes, board=board, policy=policy) as router:
            session = Session(router, observer, email)
            await session.write()
            if "reader" in nodes:
                await until_known_to_be_shared(session)
            yield session
    finally:
        observer.close()


async def until_known_to_be_shared(session: Session) -> None:
    """Read, several at a time, until two servers have been found behind one address."""
    async with asyncio.timeout(15):
        while session.router.board.replica("reader") is None or (
            session.router.board.replicas[0].incarnation is not None
        ):
            await session.observer.run_once()
            answers = await asyncio.gather(*(session.read() for _ in range(4)))
            assert all(answer.value for answer in answers)


def believe_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have reads check, and go on whatever they find: the wrong rule."""
    monkeypatch.setattr(reads, "obstacle", lambda *_: None)


@pytest.mark.parametrize("way", WAYS)
async def test_replicas_serve_and_the_token_names_no_life(cluster: LocalCluster, email: str, way: str) -> None:
    """Slower, and right; what was read there binds on every node."""
    async with nodes_by(way, cluster) as nodes, attached(nodes, email) as session:
        await cluster.wait_for_catchup()
        answer = await session.reads_from_a_replica()
        assert answer.token is not None
        assert (answer.node, None) == (answer.token.node, answer.token.incarnation)
        assert answer.token.write_floor <= answer.token.highest_floor < Lsn.PENDING
        assert answer.token.read_floor == answer.token.floor_on(answer.node, None)


@pytest.mark.parametrize("checked", [False, True], ids=["unchecked", "checked"])
@pytest.mark.parametrize("way", WAYS)
async def test_servers_that_come_back_behind_are_not_read_stale(
    cluster: LocalCluster, email: str, monkeypatch: pytest.MonkeyPatch, way: str, *, checked: bool
) -> None:
    """What was seen of them was of another life (design fact F3); the pooler's connections outlive it."""
    if not checked:
        believe_everything(monkeypatch)
    async with restart_point_now(cluster), nodes_by(way, cluster) as nodes, attached(nodes, email) as session:
        await session.write()
        await cluster.wait_for_catchup()
        await session.reads_from_a_replica()
        async with come_back_behind(cluster, email):
            answers = []
            for _ in range(6):  # the first ones may meet connections that the crash has ended
                session.token = session.written
                answers.append(await session.read())
    if checked:
        assert {(True, Role.PRIMARY)} == {(answer.value, answer.role) for answer in answers}
    else:
        assert (False, Role.REPLICA) in {(answer.value, answer.role) for answer in answers}


@pytest.mark.parametrize("checked", [False, True], ids=["unchecked", "checked"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_status_is_no_more_than_a_hint(
    cluster: LocalCluster, email: str, monkeypatch: pytest.MonkeyPatch, way: str, *, checked: bool
) -> None:
    """Behind a shared address it is that of another server; so it may say whatever it likes."""
    if not checked:
        believe_everything(monkeypatch)
    async with nodes_by(way, cluster) as nodes, attached(nodes, email) as session:
        await cluster.wait_for_catchup()
        await session.reads_from_a_replica()
        async with paused(cluster):
            await session.write()
            session.token = None
            board = session.router.board
            for status in board.replicas:
                far = Lsn(status.replay_lsn + 2**20)
                board.publish(dataclasses.replace(status, replay_lsn=far, streaming=True, answered_at=math.inf))
            answer = await session.read()
    expected = (True, Role.PRIMARY, Reason.REPLICAS_FAILED) if checked else (False, Role.REPLICA, Reason.CAUGHT_UP)
    assert expected == (answer.value, answer.role, answer.reason)


async def test_behind_a_shared_address_only_those_that_are_caught_up_serve(
    cluster: LocalCluster, email: str
) -> None:
    """One of the two is paused, and the observer looks at the other one."""
    async with nodes_by("shared address", cluster) as nodes, attached(nodes, email) as session:
        await cluster.wait_for_catchup()
        await session.reads_from_a_replica()
        async with paused(cluster, "replica1"):
            await session.write()
            session.token = None
            async with asyncio.timeout(15):
                served: set[Role] = set()
                while {Role.PRIMARY, Role.REPLICA} != served:
                    session.observer.close()  # so that it looks at the other one next time
                    await session.observer.run_once()
                    answers = await asyncio.gather(*(session.read() for _ in range(8)))
                    assert all(answer.value for answer in answers)
                    served |= {answer.role for answer in answers}


async def test_it_is_said_once_and_what_would_help(
    cluster: LocalCluster, email: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not at every beat, nor whenever a node comes back."""
    caplog.set_level(logging.WARNING, "rocket")
    nodes = dsns(cluster, "primary", "replica0", who=ROLES["plain"])
    async with attached(nodes, email) as session:
        for _ in range(3):
            session.observer.close()
            await session.observer.run_once()
    assert ["replica0 hides"] == [line[:14] for line in caplog.messages if "pg_monitor" in line]


async def test_many_at_a_time_through_a_pooler_that_has_few_connections(cluster: LocalCluster, email: str) -> None:
    """Its clients' statements do not get mixed up; nor is anything left in sessions that others get."""
    async with nodes_by("pooler", cluster) as nodes, attached(nodes, email) as session:
        await cluster.wait_for_catchup()
        await session.reads_from_a_replica()
        for _ in range(5):
            answers = await asyncio.gather(*(session.read() for _ in range(20)))
            assert all(answer.value for answer in answers)
        left = await asyncpg.connect(nodes["replica0"], statement_cache_size=0)
        assert "off" == await left.fetchval("SHOW default_transaction_read_only")
        assert 0 == await left.fetchval("SELECT count(*) FROM pg_prepared_statements")
        await left.close()


async def test_without_a_pooler_statements_stay_prepared(cluster: LocalCluster, email: str) -> None:
    """Whatever is opened without asyncpg's cache gets it as soon as it is known to be direct."""
    async with attached(dsns(cluster, who=ROLES["monitor"]), email) as session:
        prepared = "SELECT count(*) FROM pg_prepared_statements"

        async def work(node: asyncpg.Connection[asyncpg.Record]) -> int:
            await node.fetchval(prepared)
            return int(await node.fetchval(prepared))

        answer = await session.router.read(work, subject=email)
        assert answer.value > 0


async def test_a_replica_that_was_promoted_behind_the_pooler_is_left(cluster: LocalCluster, email: str) -> None:
    """Not in recovery any more: a connection to it is none to a replica (design fact F14)."""
    with pgbouncer(cluster) as behind_it:
        direct = dsns(cluster, who=ROLES["monitor"])
        nodes = {"primary": direct["primary"], "replica0": behind_it["replica0"]}
        async with attached(nodes, email) as session:
            await cluster.wait_for_catchup()
            await session.reads_from_a_replica()
            status = session.router.board.replica("replica0")
            assert status is not None
            elsewhere = nodes | {"replica0": behind_it["primary"]}  # the same role as if it had been promoted
            async with await Router.open(elsewhere, board=session.router.board) as router:
                session.router = router
                answer = await session.read()
    assert (True, Role.PRIMARY) == (answer.value, answer.role)


async def test_a_primary_behind_a_pooler_serves_and_takes_writes(cluster: LocalCluster, email: str) -> None:
    """Slower, and right: the table of statuses is written, too."""
    with pgbouncer(cluster) as nodes:
        async with attached(nodes, email, record_statuses=True) as session:
            for _ in range(5):
                session.token = None
                await asyncio.gather(*(session.write() for _ in range(4)))
                answers = await asyncio.gather(*(session.read() for _ in range(10)))
                assert all(answer.value for answer in answers)
            await cluster.wait_for_catchup()
            await session.reads_from_a_replica()
            await recorded(session.observer, cluster, {"replica0", "replica1"})


async def test_behind_the_pooler_the_primary_is_restarted(cluster: LocalCluster, email: str) -> None:
    """Its clients keep their connections, and what was acknowledged is there."""
    with pgbouncer(cluster) as nodes:
        async with attached(nodes, email) as session:
            await lose_a_backend(cluster.primary)
            async with asyncio.timeout(15):
                while True:
                    await session.observer.run_once()
                    session.token = None
                    with contextlib.suppress(Unavailable):
                        assert (await session.read()).value
                        await session.write()
                        break
            assert (await session.read()).value


async def test_another_server_behind_the_pooler_takes_nothing(cluster: LocalCluster, email: str) -> None:
    """Where the primary was there is a replica now, which no observer has seen yet."""
    with pgbouncer(cluster) as nodes:
        async with attached(nodes, email) as session:
            board = session.router.board
            for status in board.replicas:
                board.forget(status.name)
            turned = nodes | {"primary": nodes["replica0"]}
            async with await Router.open(turned, board=board) as router:
                session.router = router
                with pytest.raises(Unavailable, match="behind the pooler there is no primary"):
                    await session.write()
                with pytest.raises(Unavailable, match="behind the pooler there is no primary"):
                    await session.read()


@pytest.mark.parametrize("writes", ["off", "dml_adaptive"])
async def test_through_pgpool_nothing_is_read_or_written(cluster: LocalCluster, email: str, writes: str) -> None:
    """It splits transactions: the proof goes to the primary, and the SELECT after it to a replica that is late."""
    with pgpool(cluster, "replica0", writes=writes) as behind_it:
        async with attached(dsns(cluster, who=ROLES["monitor"]), email) as session:
            await cluster.wait_for_catchup()
            async with paused(cluster, "replica0"):
                await session.write()
                through = {"primary": behind_it}
                async with await Router.open(through, board=session.router.board) as session.router:
                    seen: set[bool | str] = set()

                    async def look(node: asyncpg.Connection[asyncpg.Record]) -> bool:
                        return (
                            await node.fetchval("SELECT id FROM rides WHERE id = $1", session.ride_id) is not None
                        )

                    for _ in range(10):
                        try:
                            seen.add((await session.router.read(look, subject=email)).value)
                        except Unavailable as error:
                            seen.add("refused" if "pgpool-II answers at its address" in str(error) else str(error))
                    assert {"refused"} == seen
                    with pytest.raises(Unavailable, match="pgpool-II answers at its address"):
                        await session.write()


@pytest.mark.parametrize("others", [[], ["replica0"]], ids=["primary alone", "with a replica"])
async def test_pgpool_is_refused_by_name(cluster: LocalCluster, others: list[str]) -> None:
    """It announces the backend of its last server: if it is what answers, there seems to be no pooler."""
    refused = pytest.raises(NodesUnusable, match="primary: pgpool-II answers at its address")
    with pgpool(cluster, *others) as behind_it, refused:
        await Router.open({"primary": behind_it})


@pytest.mark.parametrize("by", ["socket", "TCP"])
async def test_the_server_itself_is_not_asked_whether_it_is_pgpool(cluster: LocalCluster, by: str) -> None:
    """For Postgres that is an error, which its log would show for each connection."""
    dsn = dsns(cluster, who=ROLES["monitor"])["primary"]
    if by == "TCP":
        password = quote(cluster.password(), safe="")
        dsn = f"postgresql://postgres:{password}@127.0.0.1:{cluster.primary.port}/{DATABASE}"
    log = cluster.primary.directory
    begin = log.log_size
    connection = await connect(dsn)
    connection.terminate()
    assert connection.direct
    assert "pool_version" not in "".join(log.log_lines(begin))


async def test_a_poolers_list_of_a_primary_and_a_replica_is_refused(cluster: LocalCluster, email: str) -> None:
    """Each transaction may reach the other one: it is no address of a primary, though each use proves itself."""
    with pgbouncer_host_list(cluster, "primary", "replica0") as listed:
        observer = Observer({"listed": listed}, board := Board(), interval_s=0.05)
        other = await asyncpg.connect(listed, statement_cache_size=0)
        try:
            async with asyncio.timeout(15):
                while "listed" not in board.refused:
                    async with other.transaction():
                        await other.fetchval("SELECT pg_is_in_recovery()")  # from here on it has one of both
                        await observer.run_once()
                    await observer.run_once()
            for _ in range(10):
                await observer.run_once()
                assert (None, []) == (board.current_primary(time.monotonic(), 60.0), list(board.replicas))
            assert "a primary and a replica answer at its address" in str(observer.failures()["listed"])
            async with await Router.open({"listed": listed}, board=board, observer=observer) as router:
                with pytest.raises(Unavailable, match="listed: a primary and a replica answer at its address"):
                    await write_ride(router, email)
                assert ["node-refused"] == [finding.code for finding in (await examine(router)).degraded]
        finally:
            observer.close()
            other.terminate()
