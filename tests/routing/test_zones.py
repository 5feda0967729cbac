"""Real servers that are far, in other zones, or of less weight: where reads go."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rocket import Node, Policy, Role, Router
from rocket.lab.app import DATABASE
from rocket.lab.torture.proxy import Mode, Proxy, socket_path
from tests.support.servers import dsns, paused, role

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection
    from rocket.cluster.cluster import LocalCluster

ROUND_TRIP_S, BEAT_S = 0.02, 0.1
TRIES, SLACK = 8, 60


async def one(db: Connection) -> object:
    """Read."""
    return await db.fetchval("SELECT 1")


async def something(db: Connection) -> object:
    """Write what a replica has to replay."""
    return await db.fetchval("SELECT pg_logical_emit_message(true, 'test', '')")


@contextlib.asynccontextmanager
async def far(cluster: LocalCluster, name: str, directory: Path) -> AsyncIterator[tuple[str, Proxy]]:
    """Give the address of a node that is 20 ms away, and the link that makes it so."""
    port = cluster.node(name).port
    link = Proxy(socket_path(directory, port), functools.partial(Path, socket_path(cluster.socket_dir, port)))
    async with link.listening():
        link.turn(Mode.DELAYED, delay_s=ROUND_TRIP_S / 2)
        yield f"postgresql://{role()}@/{DATABASE}?host={directory}&port={port}", link


async def served(router: Router, token: str | None, reads: int) -> Counter[str]:
    """Read so often, each time as a session that has read nowhere yet; return how often each node served."""
    nodes: Counter[str] = Counter()
    for _ in range(reads):
        session = router.session(token=token)
        await session.read(one)
        assert session.last is not None
        nodes["primary" if session.last.role is Role.PRIMARY else session.last.node] += 1
    return nodes


async def written(router: Router) -> str | None:
    """Return the token of a session that has written."""
    session = router.session()
    await session.write(something)
    return session.token


async def all_serve(router: Router, *names: str) -> str | None:
    """Read until these nodes, and no others, serve a session that has written; return its token."""
    token = await written(router)
    async with asyncio.timeout(10):
        while set(await served(router, token, 40)) != set(names):
            await asyncio.sleep(BEAT_S)
    return token


@pytest.mark.vouched
async def test_reads_go_to_the_near_one_of_two_replicas(cluster: LocalCluster, tmp_path: Path) -> None:
    """A few go to the far one; and when that is near, too, as many as to the other."""
    async with far(cluster, "replica0", tmp_path) as (dsn, link):
        nodes = dsns(cluster) | {"replica0": dsn}
        async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
            token = await all_serve(router, "replica1")
            nodes_served = await served(router, token, 200)
            assert nodes_served["replica1"] >= 0.95 * 200
            assert 0 == nodes_served["primary"]

            link.turn(Mode.PASS)
            async with asyncio.timeout(30):
                while (await served(router, token, 100))["replica0"] < 30:
                    await asyncio.sleep(BEAT_S)


@pytest.mark.vouched
async def test_reads_stay_in_a_zone_while_a_replica_there_is_fit(cluster: LocalCluster, tmp_path: Path) -> None:
    """However far that is; then the other zone's serve, and never the primary, whose zone is the same."""
    async with far(cluster, "replica0", tmp_path) as (dsn, _):
        addresses = dsns(cluster)
        nodes = {
            "primary": Node(addresses["primary"], zone="a"),
            "replica0": Node(dsn, zone="a"),
            "replica1": Node(addresses["replica1"], zone="b"),
        }
        async with await Router.open(nodes, policy=Policy(zone="a"), observer_interval_s=BEAT_S) as router:
            token = await all_serve(router, "replica0")
            assert {"replica0": 40} == await served(router, token, 40)
            async with paused(cluster, "replica0"):
                token = await all_serve(router, "replica1")
                assert {"replica1": 40} == await served(router, token, 40)
            token = await all_serve(router, "replica0")
            router.policy = Policy(zone="b")
            assert {"replica1": 40} == await served(router, token, 40)


@pytest.mark.vouched
async def test_reads_are_shared_by_weight(cluster: LocalCluster) -> None:
    """One to three, also when a node is given anew while the router runs."""
    addresses = dsns(cluster)
    nodes = {
        "primary": Node(addresses["primary"], weight=9),
        "replica0": Node(addresses["replica0"], weight=1),
        "replica1": Node(addresses["replica1"], weight=3),
    }
    async with await Router.open(nodes, observer_interval_s=BEAT_S) as router:
        token = await all_serve(router, "replica0", "replica1")
        assert pytest.approx(150, abs=SLACK) == await share(router, token, 150)

        await router.add("replica0", Node(addresses["replica0"], weight=9))
        await all_serve(router, "replica0", "replica1")
        assert pytest.approx(450, abs=SLACK) == await share(router, token, 450)


async def share(router: Router, token: str | None, expected: int) -> int:
    """Return how many of 600 reads replica0 serves, the nearest of a few tries: speed counts as well."""
    found: list[int] = []
    while len(found) < TRIES and min((abs(each - expected) for each in found), default=600) > SLACK:
        nodes_served = await served(router, token, 600)
        assert 0 == nodes_served["primary"]
        found.append(nodes_served["replica0"])
    return min(found, key=lambda each: abs(each - expected))
