"""Steps of races between writes, replay and reads: rides written and read, and replicas that come back behind."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, NamedTuple

import asyncpg

from rocket.cluster import faults
from rocket.lab.api.rides import INSERT_RIDE, SELECT_RIDE
from rocket.lab.api.users import INSERT_USER, SELECT_USER
from rocket.lab.app import DATABASE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection, Reason, Router
    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node
    from rocket.consistency import SessionToken

AN_HOUR_MS = 3_600_000


class Ride(NamedTuple):
    """A ride that was written."""

    id: int
    token: SessionToken | None
    """Of that write; None from a routing that guarantees nothing."""


async def write_ride(router: Router, email: str) -> Ride:
    """Write a user with a ride."""

    async def work(primary: Connection) -> int:
        await primary.fetchval(INSERT_USER, email)
        ride = await primary.fetchrow(INSERT_RIDE, email, 1.5, None)
        assert ride is not None
        return int(ride["id"])

    answer = await router.write(work, subject=email)
    return Ride(answer.value, answer.token)


async def read_ride(
    router: Router, email: str, ride: Ride, token: SessionToken | None = None
) -> tuple[bool, str, Reason]:
    """Say whether the ride was seen, on which node, and why there; by the token of its write, or another one."""
    token = token or ride.token
    answer = await router.read(lambda node: node.fetchrow(SELECT_RIDE, email, ride.id), subject=email, token=token)
    return answer.value is not None, answer.node, answer.reason


@contextlib.asynccontextmanager
async def come_back_behind(cluster: LocalCluster, email: str) -> AsyncIterator[None]:
    """Crash every replica so that it comes back without what `email` wrote last, and keep it there."""
    for node in cluster.replicas:
        # Nothing replayed since the last restart point is on its disk, and no commit is applied any more.
        await faults.delay(node, AN_HOUR_MS, cluster.primary.port)
        await lose_a_backend(node)
    try:
        for node in cluster.replicas:
            connection = await node.connect(DATABASE)
            assert await connection.fetchval(SELECT_USER, email) is None
            await connection.close()
        yield
    finally:
        for node in cluster.replicas:
            await faults.delay(node, 0, cluster.primary.port)
        await cluster.wait_for_catchup()


async def lose_a_backend(node: Node) -> None:
    """Kill one of a node's backends; return when it has ended all its sessions for that, and takes new ones."""
    observed = await node.connect()
    await faults.kill_backend(node)
    async with asyncio.timeout(30):
        while not observed.is_closed():  # until then the postmaster may not have noticed
            await asyncio.sleep(0.01)
        while True:
            with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection = await node.connect()
                await connection.fetchval("SELECT 1")
                await connection.close()
                return
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def restart_point_now(cluster: LocalCluster) -> AsyncIterator[None]:
    """Let replicas start again from here, with no page written by the background writer meanwhile."""
    for node in (cluster.primary, *cluster.replicas):
        connection = await node.connect()
        if node.is_replica:
            await connection.execute("ALTER SYSTEM SET bgwriter_lru_maxpages = 0")
            await connection.execute("SELECT pg_reload_conf()")
        await connection.execute("CHECKPOINT")
        await connection.close()
        await cluster.wait_for_catchup()
    try:
        yield
    finally:
        for node in cluster.replicas:
            connection = await node.connect()
            await connection.execute("ALTER SYSTEM RESET bgwriter_lru_maxpages")
            await connection.execute("SELECT pg_reload_conf()")
            await connection.close()
