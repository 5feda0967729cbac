"""What is said of a router whose reads are slower than they may be: by health, a metric, and `explain`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from rocket import Limits, Node, Policy, Reason, Role, Router, explain
from rocket.health import Code, examine, known
from rocket.metrics import RouterMetrics
from rocket.routing.answer import RecentReads
from tests.routing.test_cut_off import BEAT_S, cut_off, one
from tests.support.servers import dsns, paused, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection, Session
    from rocket.cluster.cluster import LocalCluster


class Watched:
    """A router, and what is said of it."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._registry = CollectorRegistry()
        RouterMetrics(router, registry=self._registry)

    async def findings(self) -> dict[str, str]:
        """Return what health says, by code; the metric has to say the same."""
        assert () == (await examine(self.router)).missing
        while True:
            before, shown, found = self._known(), self._shown(), self._known()
            if before.keys() == found.keys():  # else a moment has just passed by which something is too late
                assert shown == found.keys()
                return found

    def _known(self) -> dict[str, str]:
        return {finding.code: finding.text for finding in known(self.router).degraded}

    def _shown(self) -> set[Code]:
        gauge = "rocket_health_finding"
        return {code for code in Code if self._registry.get_sample_value(gauge, {"code": code.value})}

    async def says(self, *codes: str) -> dict[str, str]:
        """Wait until just these findings are there, and return them."""
        async with asyncio.timeout(10):
            while set(codes) != (found := await self.findings()).keys():
                await asyncio.sleep(0.01)
        return found


@contextlib.asynccontextmanager
async def watched(nodes: dict[str, str | Node], **options: object) -> AsyncIterator[Watched]:
    """Open a router that looks often, on replicas that follow."""
    async with await Router.open(nodes, observer_interval_s=BEAT_S, **options) as router:  # type: ignore[arg-type]
        yield Watched(router)


async def message(db: Connection) -> None:
    """Write WAL, and nothing else."""
    await db.execute("SELECT pg_logical_emit_message(true, 'test', '')")


async def read(session: Session, times: int) -> str:
    """Read as a session that has written; return what explains the last read."""
    await session.write(message)
    for _ in range(times):
        await session.read(one)
    return explain(session.last)


@pytest.mark.vouched
async def test_of_a_router_that_is_well_nothing_is_said(cluster: LocalCluster) -> None:
    """Reads or none."""
    async with watched(dict(dsns(cluster))) as ours:
        await ours.says()
        await read(ours.router.session(), 20)
        await ours.says()


async def test_replicas_that_are_not_listed_are_missed(cluster: LocalCluster) -> None:
    """A list of nodes with the primary alone makes every read go there, and so do replicas of no weight."""
    async with watched(dict(dsns(cluster, "primary"))) as ours:
        assert "(none is listed)" in (await ours.says(Code.NO_REPLICA_FIT))[Code.NO_REPLICA_FIT]
        assert "No replica was observed" in await read(ours.router.session(), 1)
    spare: dict[str, str | Node] = {name: Node(dsn, weight=0) for name, dsn in dsns(cluster).items()}
    async with watched(spare) as ours:
        assert "(none is listed)" in (await ours.says(Code.NO_REPLICA_FIT))[Code.NO_REPLICA_FIT]


@pytest.mark.vouched
async def test_a_replica_that_is_cut_off_is_named_beside_one_that_serves(cluster: LocalCluster) -> None:
    """Once it lies beyond the bound; afterwards no more is said."""
    async with watched(dict(dsns(cluster)), policy=Policy(max_lag_s=6 * BEAT_S)) as ours:
        await ours.says()
        async with cut_off(cluster, "replica0"):
            text = (await ours.says(Code.REPLICA_UNFIT))[Code.REPLICA_UNFIT]
            assert "replica0: too-far-behind" in text
            assert "replica1" not in text
        await ours.says()


@pytest.mark.vouched
async def test_a_replica_out_of_reach_is_named_with_what_it_says(cluster: LocalCluster) -> None:
    """A name that leads nowhere, a port that is closed."""
    nodes = dsns(cluster)
    nodes["replica1"] = "postgresql://127.0.0.1:1/nowhere"
    async with watched(dict(nodes)) as ours:
        text = (await ours.says(Code.REPLICA_UNFIT))[Code.REPLICA_UNFIT]
        assert "replica1: no-status (" in text
        assert "onnect" in text  # connection refused


@pytest.mark.vouched
async def test_replicas_that_are_never_caught_up_in_time_are_noticed(cluster: LocalCluster) -> None:
    """All are fit for those who have written nothing, and yet each read goes to the primary."""
    async with watched(dict(dsns(cluster)), policy=Policy(max_wait_s=0.001)) as ours:
        session = ours.router.session()
        await ours.says()
        async with paused(cluster):  # as a long query has replay wait, or a disk that is too slow
            explained = await read(session, 12)
            text = (await ours.says(Code.READS_ON_PRIMARY))[Code.READS_ON_PRIMARY]
        assert "No replica was there" in explained
        assert "behind" in explained
        assert text.startswith("12 of the last 12 reads went to the primary (not-caught-up: 12)")
        await cluster.wait_for_catchup()
        async with asyncio.timeout(10):
            while Code.READS_ON_PRIMARY in await ours.findings():
                await session.read(one)
        assert Role.REPLICA is (session.last and session.last.role)


@pytest.mark.vouched
async def test_replicas_that_fail_every_read_are_noticed(cluster: LocalCluster) -> None:
    """They are observed, and what reads do there fails."""

    async def fails(db: Connection) -> int:
        if await db.fetchval("SELECT pg_is_in_recovery()"):
            await db.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return 1

    async with watched(dict(dsns(cluster))) as ours:
        session = ours.router.session()
        await ours.says()
        await read(session, 1)
        for _ in range(30):
            await session.read(fails)
        assert session.last is not None
        assert session.last.role is Role.PRIMARY
        assert " failed it (" in explain(session.last)
        text = (await ours.findings())[Code.READS_ON_PRIMARY]
        assert "replicas-failed: " in text


@pytest.mark.vouched
async def test_a_queue_for_connections_is_noticed(cluster: LocalCluster) -> None:
    """All that there may be to a replica are in use, and more reads are on the way."""
    limits = Limits(connections=1, primary_reads=1)
    async with watched(dict(dsns(cluster, "primary", "replica0")), limits=limits) as ours:
        session = ours.router.session()
        await session.write(one)
        await until(lambda: ours.router.board.replica("replica0") is not None)
        sessions = [ours.router.session(token=session.token) for _ in range(3)]
        begun = asyncio.Event()
        go_on = asyncio.Event()

        async def holds(db: Connection) -> int:
            begun.set()
            await go_on.wait()
            return await one(db)

        async with asyncio.TaskGroup() as group:
            for each in sessions:
                group.create_task(each.read(holds), name="read")
            await begun.wait()
            text = (await ours.says(Code.NODE_BUSY))[Code.NODE_BUSY]
            go_on.set()
        assert "replica0: 2" in text
        await ours.says()


# --- counting ---


@given(
    reads=st.lists(
        st.tuples(st.floats(0.0, 15.0), st.sampled_from([None, Reason.NOT_CAUGHT_UP, Reason.OTHER_EPOCH])),
        max_size=60,
    ),
    since=st.floats(0.0, 30.0),
)
def test_reads_to_the_primary_are_counted_for_ten_seconds_at_least(
    reads: list[tuple[float, Reason | None]], since: float
) -> None:
    """All of the last ten seconds, and none of more than thirty ago."""
    recent, now, fallbacks = RecentReads(), 1_000.0, []
    for gap_s, reason in reads:
        now += gap_s
        if reason is None:
            recent.by_replicas += 1
        else:
            recent.note_fallback(reason, now)
            fallbacks.append(now)
    now += since
    counted = recent.look(now)[1].total()

    assert sum(at > now - 10.0 for at in fallbacks) <= counted <= sum(at > now - 30.0 for at in fallbacks)


def test_reads_by_replicas_count_against_those_to_the_primary() -> None:
    """Of the time in which some went there."""
    recent = RecentReads()
    recent.by_replicas = 5_000  # before
    for at in (1_000.0, 1_003.0):
        recent.note_fallback(Reason.NOT_CAUGHT_UP, at)
        recent.by_replicas += 50

    assert (100, {Reason.NOT_CAUGHT_UP: 2}) == recent.look(1_005.0)
