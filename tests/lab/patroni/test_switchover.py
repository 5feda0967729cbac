"""rocket on a cluster that a real Patroni runs; longer failovers are for `torture --patroni`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import time
from typing import TYPE_CHECKING

import aiohttp
import pytest

from rocket.lab import app
from rocket.lab.settings import Settings
from rocket.lab.shutdown import Shutdown, ShutdownStack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.lab.patroni.cluster import PatroniCluster

USER = {"Authorization": "patroni@example.com"}
BACK_S = 30.0


@contextlib.asynccontextmanager
async def api(patroni: PatroniCluster) -> AsyncIterator[aiohttp.ClientSession]:
    """Serve the API on a Patroni cluster, as `run-all --patroni` does, for a user that exists."""
    task = asyncio.current_task()
    assert task is not None
    shutdown = Shutdown(task)
    settings = Settings(
        api_port=0, no_inspector=True, patroni=tuple(patroni.urls), patroni_dsn=patroni.dsn_template
    )
    async with ShutdownStack(shutdown) as stack:
        url = await app.attached(settings, shutdown, stack)
        client = await stack.enter_async_context(aiohttp.ClientSession(url, headers=USER))
        async with client.post("/users", data={"email": USER["Authorization"]}) as answer:
            assert answer.status in {200, 201}
        yield client


async def write(client: aiohttp.ClientSession) -> tuple[int, str, str] | None:
    """Write a ride; return its id, the token and the node that took it, or None if none did."""
    async with client.post("/rides", data={"distance": "1.5"}) as answer:
        if answer.status != 201:
            return None
        ride = await answer.json()
        return ride["id"], answer.headers["Rocket-Session"], answer.headers["Rocket-Served-By"]


async def seen_on_a_replica(client: aiohttp.ClientSession, written: tuple[int, str, str]) -> None:
    """Wait until a ride is read from a replica: no status covers yet what one has only just received."""
    async with asyncio.timeout(BACK_S):
        while True:
            async with client.get(f"/rides/{written[0]}", headers={"Rocket-Session": written[1]}) as answer:
                assert 200 == answer.status
                if answer.headers["Rocket-Served-As"] == "replica":
                    return


async def control(patroni: PatroniCluster, *words: str) -> None:
    """Run a command of `patronictl`."""
    process = await asyncio.create_subprocess_exec(*patroni.control.split(), *words, stdout=subprocess.DEVNULL)
    assert 0 == await process.wait()


@pytest.mark.long
async def test_a_primary_goes_on_while_patroni_is_paused_and_its_own_is_stopped(patroni: PatroniCluster) -> None:
    """As when Patroni itself is upgraded: its lock is gone, and no other member takes over."""
    leader = await patroni.leader()
    async with api(patroni) as client:
        await control(patroni, "pause", "--wait")
        try:
            await leader.patroni.stop()
            other = next(node for node in patroni.nodes.values() if node is not leader)
            async with asyncio.timeout(BACK_S):
                while LEADS.search(await text_of(f"{other.url}/cluster")):
                    await asyncio.sleep(0.1)
            for _ in range(30):  # as long as it takes to look several times
                assert await write(client) is not None
                await asyncio.sleep(0.1)
        finally:
            await leader.start()
            await control(patroni, "resume", "--wait")
    async with asyncio.timeout(BACK_S):
        while not await patroni.is_whole():
            await asyncio.sleep(0.1)


LEADS = re.compile('"role": *"leader"')


async def text_of(url: str) -> str:
    """Return the text of a page."""
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        return await answer.text()


@pytest.mark.long
async def test_a_switchover_is_followed_and_no_read_is_stale(patroni: PatroniCluster) -> None:
    """Reads with a token go on meanwhile, on replicas that take reads; writes go on with the new leader."""
    before = await patroni.leader()
    async with api(patroni) as client, asyncio.TaskGroup() as group:
        first = await write(client)
        assert first is not None
        assert before.name == first[2]
        await seen_on_a_replica(client, first)
        switch = group.create_task(patroni.request(before, "switchover", leader=before.name), name="switchover")
        served, taken_by = set(), before.name
        deadline = time.monotonic() + BACK_S
        while taken_by == before.name:
            assert time.monotonic() < deadline
            ride, token, _ = first
            async with client.get(f"/rides/{ride}", headers={"Rocket-Session": token}) as answer:
                assert answer.status in {200, 503}
                if answer.headers.get("Rocket-Served-As") == "replica":
                    served.add(answer.headers["Rocket-Served-By"])
            if (written := await write(client)) is not None:
                taken_by = written[2]
                async with client.get(f"/rides/{written[0]}", headers={"Rocket-Session": written[1]}) as answer:
                    assert answer.status in {200, 503}  # the node that has it may just be losing its role
        await switch

    assert taken_by == (await patroni.leader()).name
    assert "node3" not in {taken_by, *served}
    assert served
