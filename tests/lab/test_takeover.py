"""Several processes observe one cluster: one of them writes its table, and any of them may die or fall silent."""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

import aiohttp
import pytest

from rocket import Lsn
from rocket.consistency import SessionToken
from rocket.lab.app import DATABASE
from rocket.lab.serving import listeners, url_of
from rocket.lab.settings import Settings
from rocket.lab.shutdown import Shutdown
from rocket.lab.workers import Worker, table_state, wait_for_takeover, working
from tests.support.races import come_back_behind, restart_point_now, write_ride
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket import Connection, Router
    from rocket.cluster.cluster import LocalCluster

DEADLINE_S = 20.0
TAKEN_OVER_WITHIN_S = 2.0
LEASE_S = 0.5
NEVER_S = 3600.0


@contextlib.asynccontextmanager
async def processes(
    cluster: LocalCluster, interval_s: float, lease_s: float = 5.0, *, observers: int = 0
) -> AsyncIterator[tuple[list[Worker], str]]:
    """Run this many observers, or else one API process; give their handles and the URL of what they serve."""
    task = asyncio.current_task()
    assert task is not None
    settings = Settings(
        api_port=0, observer_interval=interval_s, lease=lease_s, primary_lease=lease_s, max_wait=0.1
    )
    with contextlib.ExitStack() as stack:
        held = [] if observers else stack.enter_context(listeners(settings))
        async with working(settings, dsns(cluster), held, Shutdown(task), observers=observers) as workers:
            yield list(workers), url_of(settings, held)


@contextlib.asynccontextmanager
async def on_primary(cluster: LocalCluster) -> AsyncIterator[Connection]:
    """Connect to the primary."""
    connection = await cluster.primary.connect(DATABASE)
    try:
        yield cast("Connection", connection)
    finally:
        await connection.close()


async def writer_among(workers: list[Worker], primary: Connection) -> Worker:
    """Wait until one of these processes writes the table."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            writer = (await table_state(primary)).writer
            if found := [worker for worker in workers if worker.pid == writer]:
                return found[0]
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("interval_s", [0.05, 0.5])
async def test_another_observer_writes_when_the_one_that_did_is_killed(
    cluster: LocalCluster, interval_s: float
) -> None:
    """Its connection ends with it, and with that its right to write."""
    async with (
        processes(cluster, interval_s, observers=2) as (workers, _),
        on_primary(cluster) as primary,
    ):
        writer = await writer_among(workers, primary)
        before = await table_state(primary)
        writer.crash()
        took_s = await wait_for_takeover(primary, before)
        assert took_s is not None
        assert took_s < TAKEN_OVER_WITHIN_S
        async with asyncio.timeout(DEADLINE_S):  # who was killed is started again, and waits for its turn
            while not all(worker.up for worker in workers):
                await asyncio.sleep(0.02)


async def test_another_observer_writes_when_the_one_that_did_is_halted(cluster: LocalCluster) -> None:
    """Its connection lives, and holds the right to write: the primary ends both. It wakes up as any other."""
    async with (
        processes(cluster, 0.05, observers=2) as (workers, _),
        on_primary(cluster) as primary,
    ):
        writer = await writer_among(workers, primary)
        before = await table_state(primary)
        writer.freeze()
        took_s = await wait_for_takeover(primary, before)
        assert took_s is not None
        assert took_s < TAKEN_OVER_WITHIN_S
        second = (await table_state(primary)).writer
        writer.thaw()
        async with asyncio.timeout(DEADLINE_S):  # it observes again, on a new connection
            name = f"rocket observer, process {writer.pid}"
            while not await primary.fetchval(OBSERVES, name):
                await asyncio.sleep(0.02)
        before = await table_state(primary)
        await next_beat(primary)
        assert (before.writer, second) == (second, (await table_state(primary)).writer)
        assert writer.up


OBSERVES = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"


async def next_beat(primary: Connection) -> None:
    """Wait until the table has been written again."""
    before = await table_state(primary)
    async with asyncio.timeout(DEADLINE_S):
        while (await table_state(primary)).written == before.written:
            await asyncio.sleep(0.01)


# --- an API process that hears nothing ---


async def session_of(router: Router, cluster: LocalCluster, email: str) -> tuple[str, dict[str, str]]:
    """Write a ride that all replicas have; return its path, and the headers of the session that wrote it."""
    ride = await write_ride(router, email)
    async with on_primary(cluster) as primary:
        floor = Lsn.from_wire(await primary.fetchval("SELECT pg_current_wal_flush_lsn()"))
    await cluster.wait_for_catchup()
    assert router.board.epoch is not None
    return f"/rides/{ride.id}", {
        "Authorization": email,
        "Rocket-Session": str(SessionToken(router.board.epoch, floor)),
    }


async def read(http: aiohttp.ClientSession, path: str, headers: dict[str, str]) -> tuple[int, str | None]:
    """Return the status, and the role of the node that answered."""
    async with http.get(path, headers=headers) as response:
        assert (HTTPStatus.SERVICE_UNAVAILABLE == response.status) == ("Retry-After" in response.headers)
        return response.status, response.headers.get("Rocket-Served-As")


@pytest.mark.parametrize("interval_s", [0.05, NEVER_S], ids=["observing", "knowing nothing new"])
async def test_process_that_was_halted_for_longer_than_the_lease_reads_nothing_stale(
    cluster: LocalCluster, router: Router, email: str, interval_s: float
) -> None:
    """What it knew of the replicas was true of lives that are over: they have come back behind."""
    async with restart_point_now(cluster):
        ride, headers = await session_of(router, cluster, email)
        async with (
            processes(cluster, interval_s, LEASE_S) as ((worker,), url),
            aiohttp.ClientSession(url) as http,
        ):
            assert (HTTPStatus.OK, "replica") == await read(http, ride, headers)
            worker.freeze()
            async with come_back_behind(cluster, email):
                await asyncio.sleep(LEASE_S)
                asked = asyncio.ensure_future(read(http, ride, headers))
                await asyncio.sleep(0.05)  # it finds the request when it wakes up
                worker.thaw()
                answer = await asked
                async with asyncio.timeout(DEADLINE_S):
                    while interval_s < NEVER_S and answer[0] == HTTPStatus.SERVICE_UNAVAILABLE:
                        answer = await read(http, ride, headers)
    expected = (HTTPStatus.OK, "primary") if interval_s < NEVER_S else (HTTPStatus.SERVICE_UNAVAILABLE, None)
    assert expected == answer


async def test_process_that_hears_nothing_for_longer_than_the_lease_trusts_nobody(
    cluster: LocalCluster, router: Router, email: str
) -> None:
    """Neither replicas nor the primary, however well they are."""
    ride, headers = await session_of(router, cluster, email)
    async with (
        processes(cluster, NEVER_S, LEASE_S) as (_, url),
        aiohttp.ClientSession(url) as http,
    ):
        assert (HTTPStatus.OK, "replica") == await read(http, ride, headers)
        await asyncio.sleep(LEASE_S)
        for asked in (headers, {"Authorization": email}):
            assert (HTTPStatus.SERVICE_UNAVAILABLE, None) == await read(http, ride, asked)
