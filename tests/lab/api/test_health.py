"""The endpoints for monitoring."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, TypeAlias

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from rocket import Lsn, Policy
from rocket.consistency import Board
from rocket.lab.api.app import build_app
from rocket.lab.comparison import ComparisonRouter
from tests.support.routers import as_session
from tests.support.servers import dsns, paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp import web
    from aiohttp.test_utils import TestClient
    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.routing.observer import Observer

    Client: TypeAlias = TestClient[web.Request, web.Application]
    Samples: TypeAlias = dict[tuple[str, frozenset[tuple[str, str]]], float]

NODES = ("primary", "replica0", "replica1")
REPLICAS = NODES[1:]


@pytest_asyncio.fixture
async def user(client: Client, email: str) -> str:
    """Return the e-mail address of a user."""
    await client.post("/users", json={"email": email})
    return email


@pytest_asyncio.fixture
async def client_of_nothing(tmp_path: Path, aiohttp_client: AiohttpClient) -> AsyncIterator[Client]:
    """Return an HTTP client of an API whose primary's address leads nowhere, and which has no replicas."""
    dsn = f"postgresql://postgres@/rocket?host={tmp_path / 'nowhere'}"
    async with await ComparisonRouter.open({"primary": dsn}, board=Board()) as router:
        yield await aiohttp_client(build_app(router))


async def samples(client: Client) -> Samples:
    """Read the metrics as Prometheus does."""
    response = await client.get("/metrics")
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(await response.text())
        for sample in family.samples
    }


def named(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """Name one sample."""
    return name, frozenset(labels.items())


async def read_as(client: Client, headers: dict[str, str], times: int = 1) -> list[str]:
    """Read as a session and return the names of the nodes that served."""
    responses = [await client.get("/rides", headers=headers) for _ in range(times)]
    assert {response.status for response in responses} == {200}
    return [response.headers["Rocket-Served-By"] for response in responses]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/replicas", "/metrics"])
async def test_nothing_about_health_is_cached(client: Client, path: str) -> None:
    """Each answer is about now."""
    response = await client.get(path)
    assert response.status == 200
    assert response.headers["Cache-Control"] == "no-store"


async def test_it_is_alive_without_a_database(client_of_nothing: Client) -> None:
    """Being alive needs no database."""
    response = await client_of_nothing.get("/livez")
    assert (response.status, await response.json()) == (200, {"status": "alive"})


async def test_it_is_ready_with_a_primary(client: Client) -> None:
    """With the primary alone everything can be answered, observed replicas or not."""
    response = await client.get("/readyz")
    assert response.status == 200
    body = await response.json()
    assert (body["ready"], body["missing"], body["replicas_observed"]) == (True, [], 0)


async def test_readiness_counts_the_replicas_observed(client: Client, observer: Observer) -> None:
    """How many replicas may serve is said beside."""
    await observer.run_once()
    response = await client.get("/readyz")
    assert await response.json() == {"ready": True, "missing": [], "degraded": [], "replicas_observed": 2}


async def findings(client: Client) -> tuple[int, list[str], list[str]]:
    """Ask for readiness; return the status, and the codes of what is missing and of what makes it slow."""
    response = await client.get("/readyz")
    body = await response.json()
    assert all(finding["text"] for finding in (*body["missing"], *body["degraded"]))
    return (
        response.status,
        [finding["code"] for finding in body["missing"]],
        [finding["code"] for finding in body["degraded"]],
    )


async def test_replicas_that_may_not_serve_make_it_slow_and_not_unready(
    client: Client, observer: Observer, board: Board
) -> None:
    """Reads go to the primary then; where one replica is fit, they do not, and the other one is named."""
    await observer.run_once()
    board.forget("replica0")
    assert await findings(client) == (200, [], ["replica-unfit"])
    board.forget("replica1")
    assert await findings(client) == (200, [], ["no-replica-fit"])


async def test_a_primary_that_the_observer_lost_is_named(client: Client, board: Board) -> None:
    """It may still answer: nothing may be asked of it until the observer has found it again."""
    board.forget("primary")
    assert await findings(client) == (503, ["primary-lost"], ["no-replica-fit"])


async def test_an_observer_that_says_nothing_any_more_is_noticed(
    cluster: LocalCluster, board: Board, aiohttp_client: AiohttpClient
) -> None:
    """The primary was not lost; it was not looked at for longer than its lease."""
    policy = Policy(primary_lease_s=0.001)
    async with await ComparisonRouter.open(dsns(cluster), board=board, policy=policy) as router:
        client = await aiohttp_client(build_app(router))
        assert (await findings(client))[:2] == (503, ["observer-silent"])


async def test_a_primary_that_has_frozen_is_noticed_in_time(client: Client, cluster: LocalCluster) -> None:
    """The observer has not found out yet; the answer comes in time all the same."""
    assert await findings(client) == (200, [], ["no-replica-fit"])
    cluster.primary.freeze()
    try:
        async with asyncio.timeout(1.5):
            assert await findings(client) == (503, ["primary-silent"], ["no-replica-fit"])
    finally:
        cluster.primary.thaw()


async def test_a_primary_that_is_busy_is_not_taken_for_dead(client: Client, router: ComparisonRouter) -> None:
    """All its connections are at work: the observer, which has its own, is believed."""
    (pool,) = (pool for pool in router.pools if pool.name == "primary")
    async with contextlib.AsyncExitStack() as leases:
        for _ in range(pool.limiter.width):
            await leases.enter_async_context(pool.lease())
        assert await findings(client) == (200, [], ["no-replica-fit"])
        seen = await samples(client)
    assert seen[named("rocket_pool_connections", node="primary", state="in_use")] == pool.limiter.width
    assert seen[named("rocket_pool_connections_max", node="primary")] == pool.limiter.width


async def test_without_a_primary_it_is_not_ready(client_of_nothing: Client) -> None:
    """A 503 says what is missing, and is not cached either."""
    response = await client_of_nothing.get("/readyz")
    assert response.status == 503
    assert await response.json() == {
        "ready": False,
        "missing": [{"code": "primary-unknown", "text": "no primary has been found yet"}],
        "degraded": [],
        "replicas_observed": 0,
    }
    assert response.headers["Cache-Control"] == "no-store"


class TestReplicas:
    """`GET /replicas`."""

    async def test_before_any_observation_nothing_is_known(self, client_of_nothing: Client) -> None:
        """Nothing is made up."""
        response = await client_of_nothing.get("/replicas")
        assert await response.json() == {
            "pid": os.getpid(),
            "routing": "never-stale",
            "primary": None,
            "replicas": [],
            "findings": [{"code": "primary-unknown", "text": "no primary has been found yet"}],
            "reads": {},
            "reasons": {},
            "fallbacks": {},
            "reads_unavailable": 0,
            "writes": {},
            "connections": {"primary": {"in_use": 0, "idle": 0}},
        }

    async def test_each_replica_is_described(
        self, client: Client, cluster: LocalCluster, observer: Observer
    ) -> None:
        """Replicas that have caught up stream, lag by nothing, and were seen just now."""
        await cluster.wait_for_catchup()
        await observer.run_once()
        body = await (await client.get("/replicas")).json()
        flush_lsn = Lsn.parse(body["primary"]["flush_lsn"])
        assert {replica["name"] for replica in body["replicas"]} == set(REPLICAS)
        for replica in body["replicas"]:
            assert replica["streaming"] is True
            assert Lsn.parse(replica["replay_lsn"]) <= Lsn.parse(replica["receive_lsn"])
            assert replica["lag_bytes"] == max(0, flush_lsn - Lsn.parse(replica["replay_lsn"]))
            assert replica["incarnation"]
            assert replica["lag_seconds"] >= 0
            assert 0 <= replica["status_age_seconds"] < 5

    async def test_a_lagging_replica_differs_from_the_others(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """The one that does not replay lags, in bytes and in seconds."""
        await cluster.wait_for_catchup()
        async with paused(cluster, "replica1"):
            await client.post("/rides", data={"distance": "1"}, headers={"Authorization": user})
            await observer.run_once()
            body = await (await client.get("/replicas")).json()
        lagging = next(replica for replica in body["replicas"] if replica["name"] == "replica1")
        assert lagging["lag_bytes"] > 0
        assert lagging["lag_seconds"] > 0

    async def test_reads_are_counted_as_in_the_metrics(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """By node, by reason, and by reason those that the primary answered."""
        session = await as_session(client, user)
        await read_as(client, session, 2)
        await cluster.wait_for_catchup()
        await observer.run_once()
        served = await read_as(client, session, 10)
        body = await (await client.get("/replicas")).json()
        assert body["reads"] == {"primary": 2, **{name: served.count(name) for name in set(served)}}
        assert body["reasons"] == {"no-status": 2, "caught-up": 10}
        assert body["fallbacks"] == {"no-status": 2}

    async def test_what_no_node_could_do_is_counted_too(self, client_of_nothing: Client) -> None:
        """Apart from what was answered."""
        await client_of_nothing.get("/rides", headers={"Authorization": "a@example.com"})
        body = await (await client_of_nothing.get("/replicas")).json()
        assert (body["reads"], body["reads_unavailable"]) == ({}, 1)


class TestMetrics:
    """`GET /metrics`."""

    async def test_reads_are_counted_by_node_and_reason(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """Each read adds one to the node that served it and to the reason why."""
        session = await as_session(client, user)
        await read_as(client, session, 2)
        await cluster.wait_for_catchup()
        await observer.run_once()
        served = await read_as(client, session, 20)
        seen = await samples(client)
        assert seen[named("rocket_reads_total", node="primary", role="primary", reason="no-status")] == 2
        for name in REPLICAS:
            assert seen.get(
                named("rocket_reads_total", node=name, role="replica", reason="caught-up"), 0
            ) == served.count(name)
        timed = [count for (name, _), count in seen.items() if name == "rocket_read_duration_seconds_count"]
        assert sum(timed) == 22

    async def test_a_ride_that_is_not_there_is_a_read_too(self, client: Client, user: str) -> None:
        """A 404 was answered by a node, and counts as any other read."""
        await client.get("/rides/0", headers={"Authorization": user})
        seen = await samples(client)
        assert seen[named("rocket_reads_total", node="primary", role="primary", reason="no-status")] == 1

    async def test_writes_are_counted_by_outcome(self, client: Client, user: str) -> None:
        """Writes that were committed are told from those that came to nothing."""
        for email in (user, user, "unknown@example.com"):
            await client.post("/rides", data={"distance": "1"}, headers={"Authorization": email})
        seen = await samples(client)
        assert seen[named("rocket_writes_total", outcome="committed")] == 3  # with the user
        assert seen[named("rocket_writes_total", outcome="failed")] == 1
        assert seen[named("rocket_write_duration_seconds_count")] == 4

    async def test_what_no_node_could_do_is_counted(self, client_of_nothing: Client) -> None:
        """Refused reads and writes are counted."""
        headers = {"Authorization": "a@example.com"}
        await client_of_nothing.get("/rides", headers=headers)
        await client_of_nothing.post("/rides", data={"distance": "1"}, headers=headers)
        seen = await samples(client_of_nothing)
        assert seen[named("rocket_reads_unavailable_total", reason="no-node")] == 1
        assert seen[named("rocket_writes_total", outcome="unavailable")] == 1

    @pytest.mark.parametrize("token", ["1~1-aaaaaaaaaa~0/1~0/0", "nonsense"])
    async def test_tokens_that_are_refused_are_counted(self, client: Client, user: str, token: str) -> None:
        """Those of another cluster, and those that are none."""
        headers = {"Authorization": user, "Rocket-Session": token}
        assert (await client.get("/rides", headers=headers)).status == 400
        assert (await samples(client))[named("rocket_session_tokens_refused_total")] == 1

    @pytest.mark.parametrize(
        "gauge", ["rocket_replica_lag_bytes", "rocket_replica_lag_seconds", "rocket_node_status_age_seconds"]
    )
    async def test_replicas_are_gauged(self, client: Client, observer: Observer, gauge: str) -> None:
        """Lag and age are there for each replica observed."""
        await observer.run_once()
        seen = await samples(client)
        assert all(seen[named(gauge, node=name)] >= 0 for name in REPLICAS)

    async def test_connections_are_gauged(self, client: Client, user: str) -> None:
        """Connections are counted by node and state, and one to each node is kept ready."""
        await read_as(client, {"Authorization": user})
        wanted = {(name, "idle") for name in NODES}
        async with asyncio.timeout(10):  # they are opened in the background
            while True:
                seen = await samples(client)
                connections = {
                    (name, state): seen[named("rocket_pool_connections", node=name, state=state)]
                    for name in NODES
                    for state in ("in_use", "idle")
                }
                if {which for which, count in connections.items() if count} == wanted:
                    break
                await asyncio.sleep(0.01)

    async def test_no_address_appears_in_the_metrics(self, client: Client, user: str) -> None:
        """Monitoring needs no addresses, which would make a label for each user."""
        await client.post("/rides", data={"distance": "1"}, headers={"Authorization": user})
        await read_as(client, {"Authorization": user})
        await client.get("/rides", headers={"Authorization": "unknown@example.com"})
        text = await (await client.get("/metrics")).text()
        assert user.partition("@")[0] not in text
        assert "@" not in text

    async def test_applications_count_for_themselves(
        self, client: Client, user: str, router: ComparisonRouter, aiohttp_client: AiohttpClient
    ) -> None:
        """Two applications in one process do not share their counters."""
        await read_as(client, {"Authorization": user})
        other = await aiohttp_client(build_app(router))
        seen = await samples(other)
        assert named("rocket_reads_total", node="primary", role="primary", reason="no-status") not in seen
