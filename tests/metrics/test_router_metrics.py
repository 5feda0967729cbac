"""The metrics of a router, in a registry of its user."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from rocket import Answer, Freshness, Limits, OutcomeUnknown, Policy, Reason, Role, Router, Unavailable
from rocket.consistency import Board, Epoch
from rocket.lab.shutdown import background
from rocket.metrics import RouterMetrics
from rocket.metrics.router import BOUNDS_S, Tally, as_histogram
from rocket.routing.answer import RecentReads
from rocket.routing.observer import Observer
from tests.metrics.test_files import PROMTOOL, promtool
from tests.support.races import write_ride
from tests.support.servers import dsns, paused, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster


class Watched:
    """A router with metrics, as a service other than our API may have it."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(router, registry=self.registry)

    async def read(self, email: str, answer: Answer[Any] | None = None) -> Answer[int]:
        """Read for a session that brings the token of an earlier answer."""
        token = None if answer is None else answer.token
        return await self.router.read(_one, subject=email, token=token)

    def seen(self, name: str, **labels: str) -> float | None:
        """Return one sample; None if it is not there."""
        return self.registry.get_sample_value(name, labels)


async def _one(node: Connection) -> int:
    return int(await node.fetchval("SELECT 1"))


@pytest_asyncio.fixture
async def watched(cluster: LocalCluster) -> AsyncIterator[Watched]:
    """A router whose observer samples on demand, or else every ten seconds."""
    await cluster.wait_for_catchup()
    observer = Observer(dsns(cluster), Board(), interval_s=10.0)
    async with background(observer.run(), "observer"):
        await until(lambda: len(observer.board.replicas) == 2 and observer.board.primary is not None)
        async with await Router.open(
            dsns(cluster),
            policy=Policy(lease_s=60.0, primary_lease_s=60.0, max_wait_s=5.0),
            observer=observer,
            limits=Limits(attempt_s=0.2),
        ) as router:
            yield Watched(router)


async def test_a_read_that_waits_is_counted_with_its_wait(
    watched: Watched, cluster: LocalCluster, email: str
) -> None:
    """Once it was worth it, once in vain; both are reads like others besides."""
    await write_ride(watched.router, email)
    found = await watched.read(email)
    assert found.reason is Reason.WAITED
    assert watched.seen("rocket_read_wait_duration_seconds_count", outcome="caught-up") == 1
    assert watched.seen("rocket_read_wait_duration_seconds_count", outcome="in-vain") == 0

    watched.router.policy = dataclasses.replace(watched.router.policy, max_wait_s=0.05)
    async with paused(cluster):
        await write_ride(watched.router, email)
        fallen_back = await watched.read(email)
    assert fallen_back.reason is Reason.NOT_CAUGHT_UP
    assert watched.seen("rocket_read_wait_duration_seconds_count", outcome="in-vain") == 1
    waited_s = watched.seen("rocket_read_wait_duration_seconds_sum", outcome="in-vain")
    assert waited_s is not None
    assert waited_s >= 0.04  # counted from the decision on, by a clock that ticks in its own way
    for answer in (found, fallen_back):
        labels = {"node": answer.node, "role": answer.role, "reason": answer.reason}
        assert watched.seen("rocket_reads_total", **labels) == 1


async def test_a_replica_that_fails_a_read_is_counted(watched: Watched, cluster: LocalCluster, email: str) -> None:
    """By its name, whichever node answers in the end."""
    await write_ride(watched.router, email)
    answer = await watched.read(email)  # by a replica, which has a connection from now on
    cluster.node(answer.node).freeze()
    try:
        answer_elsewhere = await watched.read(email, answer)
    finally:
        cluster.node(answer.node).thaw()
    assert answer_elsewhere.node != answer.node
    assert watched.seen("rocket_replica_failures_total", node=answer.node) == 1
    assert watched.seen("rocket_replica_failures_total", node=answer_elsewhere.node) is None


async def test_reads_are_counted_by_what_they_ask_for(watched: Watched, cluster: LocalCluster, email: str) -> None:
    """However many seconds some may be old; and by who answered, if any node did."""
    session = watched.router.session(email)
    await session.write(_one)
    await cluster.wait_for_catchup()
    for freshness in (Freshness.SESSION, Freshness.within(10), Freshness.within(20.5), Freshness.ANY):
        await session.read(_one, freshness=freshness)
    await asyncio.gather(*(session.read(_one, freshness=Freshness.GLOBAL) for _ in range(5)))
    await session.read(_one, freshness=Freshness.GLOBAL, on="primary")
    asked = {"session": 1, "global": 5, "within": 2, "any": 1}
    for name, count in asked.items():
        assert count == watched.seen("rocket_read_freshness_total", freshness=name, role="replica")
    assert 1 == watched.seen("rocket_read_freshness_total", freshness="global", role="primary")
    questions = watched.seen("rocket_flush_questions_total")
    assert questions is not None
    assert 1 <= questions < 5

    watched.router.board.forget("primary")
    with pytest.raises(Unavailable):
        await session.read(_one, freshness=Freshness.GLOBAL)
    assert 1 == watched.seen("rocket_read_freshness_total", freshness="global", role="none")
    samples = generate_latest(watched.registry).decode().splitlines()
    assert 12 == sum(line.startswith("rocket_read_freshness_total{") for line in samples)


async def test_rejected_reads_are_counted_apart_from_those_without_a_node(
    watched: Watched, cluster: LocalCluster, email: str
) -> None:
    """More clients than may wait, and no primary at all, are not the same trouble."""
    limits = Limits(connections=1, primary_reads=1, queue=0)
    async with await Router.open(dsns(cluster), board=watched.router.board, limits=limits) as router:
        narrow = Watched(router)
        await asyncio.gather(*(narrow.read(email) for _ in range(4)), return_exceptions=True)
        assert (narrow.seen("rocket_reads_unavailable_total", reason="overloaded") or 0) >= 1
        assert narrow.seen("rocket_reads_unavailable_total", reason="no-node") == 0
        router.board.forget("primary")
        with pytest.raises(Unavailable):
            await narrow.read(email)
        assert narrow.seen("rocket_reads_unavailable_total", reason="no-node") == 1
        assert narrow.seen("rocket_primary_in_office") == 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "committed"), (OutcomeUnknown, "unknown"), (Unavailable, "unavailable"), (ValueError, "failed")],
)
async def test_a_write_is_counted_by_how_it_ends(
    watched: Watched, email: str, error: type[Exception] | None, outcome: str
) -> None:
    """What it raises is raised as it is."""

    async def work(_primary: Connection) -> None:
        if error is not None:
            raise error

    with contextlib.nullcontext() if error is None else pytest.raises(error):
        await watched.router.write(work, subject=email)
    outcomes = ("committed", "failed", "unknown", "unavailable")
    assert {each: int(each == outcome) for each in outcomes} == {
        each: watched.seen("rocket_writes_total", outcome=each) for each in outcomes
    }


async def test_nodes_are_reported_as_the_board_has_them(watched: Watched) -> None:
    """Who is the primary, who may serve, how long ago each was heard; and that a lost one was heard once."""
    roles = {"primary": 1, "replica0": 0, "replica1": 0}
    assert roles == {name: watched.seen("rocket_node_primary", node=name) for name in roles}
    assert watched.seen("rocket_primary_in_office") == 1
    assert watched.seen("rocket_replica_fit", node="primary") is None
    watched.router.board.forget("replica1")
    assert watched.seen("rocket_replica_fit", node="replica0") == 1
    assert watched.seen("rocket_replica_fit", node="replica1") == 0
    assert watched.seen("rocket_replica_lag_bytes", node="replica1") is None


async def test_a_node_has_an_age_also_when_it_is_lost(watched: Watched) -> None:
    """Since it was last heard; where it never was, since the start."""
    board = watched.router.board
    for name in ("replica0", "replica1"):
        status = board.replica(name)
        assert status is not None
        board.publish(dataclasses.replace(status, observed_at=time.monotonic() - 100))
    board.forget("replica1")
    for name in ("replica0", "replica1"):
        assert 100 <= (watched.seen("rocket_node_status_age_seconds", node=name) or 0) < 160
    unheard = Watched(watched.router)
    assert 100 <= (unheard.seen("rocket_node_status_age_seconds", node="replica0") or 0) < 160
    assert 0 < (unheard.seen("rocket_node_status_age_seconds", node="replica1") or 0) < 60


async def test_promotions_are_counted(watched: Watched) -> None:
    """Another epoch of the same node counts as well; the first one seen does not."""
    board = watched.router.board
    assert board.primary is not None
    assert watched.seen("rocket_epoch_changes_total") == 0
    for epoch in ("2-aaaaaaaaaa", "2-aaaaaaaaaa", "3-bbbbbbbbbb"):
        board.publish_primary(dataclasses.replace(board.primary, epoch=Epoch(epoch)))
    assert watched.seen("rocket_epoch_changes_total") == 2


async def test_routers_share_a_registry_by_names(watched: Watched, cluster: LocalCluster, email: str) -> None:
    """Each metric is there once, with the samples of each; what has no name cannot be told from others."""
    with pytest.raises(ValueError, match="name of its own"):
        RouterMetrics(watched.router, registry=watched.registry, name="users")
    assert 1 == len(watched.router.on_read)  # what was refused is gone
    watched.metrics.unregister()
    assert "" == generate_latest(watched.registry).decode()
    async with await Router.open(dsns(cluster), board=watched.router.board) as other:
        first, second = (
            RouterMetrics(router, registry=watched.registry, name=name)
            for router, name in ((watched.router, "users"), (other, "notes"))
        )
        for taken in ("notes", None):
            with pytest.raises(ValueError, match="name of its own"):
                RouterMetrics(other, registry=watched.registry, name=taken)
        for router in (watched.router, other, other):
            await router.session(email).write(_one)
        written = {
            name: watched.seen("rocket_writes_total", outcome="committed", router=name)
            for name in ("users", "notes")
        }
        text = generate_latest(watched.registry).decode()
        first.unregister()
        assert watched.seen("rocket_writes_total", outcome="committed", router="users") is None
        assert watched.seen("rocket_writes_total", outcome="committed", router="notes") == 2
        second.unregister()
        RouterMetrics(other, registry=watched.registry)
    assert {"users": 1, "notes": 2} == written
    assert 1 == text.count("# TYPE rocket_reads_total counter")
    assert 1 == text.count("\nrocket_build_info{")
    if PROMTOOL is not None:
        promtool("check", "metrics", stdin=text)


async def test_a_hook_that_fails_hurts_no_read(
    watched: Watched, email: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and the hooks after it are called as before."""
    calls: list[tuple[Answer[Any] | BaseException, float]] = []

    def fails(_ended: Answer[Any] | BaseException, _took_s: float) -> None:
        raise RuntimeError("on purpose")

    await write_ride(watched.router, email)
    watched.router.on_read += [fails, lambda ended, took_s: calls.append((ended, took_s))]
    answers = [await watched.router.read(_one, subject=email) for _ in range(3)]
    assert answers == [ended for ended, _ in calls]
    assert all(0 < took_s < 60 for _, took_s in calls)
    assert 1 == sum("on purpose" in str(record.exc_info) for record in caplog.records)


async def test_a_read_that_fails_by_itself_is_counted(watched: Watched, email: str) -> None:
    """An error of work, and a read that is cancelled: neither was answered, and neither is a node's fault."""

    async def wrong(node: Connection) -> None:
        await node.fetchval("SELECT 1 / 0")

    await write_ride(watched.router, email)
    with pytest.raises(asyncpg.DivisionByZeroError):
        await watched.router.session(email).read(wrong)
    reading = asyncio.ensure_future(watched.router.session(email).read(lambda node: node.execute("SELECT 1")))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert watched.seen("rocket_reads_failed_total") == 2
    assert {} == watched.metrics.reads()


def test_most_reads_are_counted_like_the_others() -> None:
    """The short way of those that were caught up leads to the same figures."""
    router: Any = type("Router", (), {"board": Board(), "policy": Policy(), "pools": []})()
    router.primary_reads_waiting, router.left_alone, router.recent_reads = 0, {}, RecentReads()
    router.flush_questions = 0
    router.on_read, router.on_write, router.on_invalid_token = [], [], []
    metrics = RouterMetrics(router, registry=CollectorRegistry())
    for reason in (Reason.CAUGHT_UP, Reason.RETRIED, Reason.CAUGHT_UP):
        router.on_read[0](Answer(None, "replica0", Role.REPLICA, reason), 0.002)
    assert metrics.reads() == {
        ("replica0", Role.REPLICA, Reason.CAUGHT_UP): 2,
        ("replica0", Role.REPLICA, Reason.RETRIED): 1,
    }
    samples = {
        sample.labels.get("le"): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name == "rocket_read_duration_seconds_bucket"
    }
    assert (samples["0.001"], samples["0.0025"], samples["+Inf"]) == (0, 3, 3)


@given(st.lists(st.sampled_from([0.0, *BOUNDS_S, 7.0]) | st.floats(0, 10)))
def test_a_tally_is_what_a_histogram_of_prometheus_is(durations_s: list[float]) -> None:
    """The buckets' names, what falls on a bound, and the sum: as the client library has them."""
    registry = CollectorRegistry()
    theirs = Histogram("took_seconds", "Time.", buckets=BOUNDS_S, registry=registry)
    ours = Tally()
    for duration_s in durations_s:
        theirs.observe(duration_s)
        ours.add(duration_s)
    buckets, total_s = as_histogram([ours])
    assert buckets == [(le, registry.get_sample_value("took_seconds_bucket", {"le": le})) for le, _ in buckets]
    assert len(buckets) == len(BOUNDS_S) + 1
    assert total_s == registry.get_sample_value("took_seconds_sum")
    assert ours.count == len(durations_s)
