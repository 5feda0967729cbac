"""The API starts on nodes that Patroni lists, or will list."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import aiohttp

from rocket.lab import app
from rocket.lab.settings import Settings
from rocket.lab.shutdown import Shutdown, ShutdownStack
from tests.support.patroni import FakePatroni, listed

if TYPE_CHECKING:
    from rocket.cluster.cluster import LocalCluster


async def test_an_api_that_starts_without_patroni_serves_as_soon_as_it_answers(cluster: LocalCluster) -> None:
    """Until then it answers that it is not ready."""
    patroni = FakePatroni()
    patroni.members = None
    task = asyncio.current_task()
    assert task is not None
    template = f"postgresql://postgres@{{host}}:{{port}}/{app.DATABASE}?passfile={cluster.password_file}"
    shutdown = Shutdown(task)
    async with patroni.serving() as url, ShutdownStack(shutdown) as stack:
        settings = Settings(api_port=0, patroni=(url,), patroni_dsn=template)
        api = await app.attached(settings, shutdown, stack)
        http = await stack.enter_async_context(aiohttp.ClientSession(api))
        assert 503 == (await http.get("/readyz")).status
        assert 200 == (await http.get("/inspector")).status

        patroni.members = listed(cluster, "primary", "replica0")
        patroni.members[0]["role"] = "leader"
        async with asyncio.timeout(10):
            while (await http.get("/readyz")).status != 200:
                await asyncio.sleep(0.05)
            while "replica0" not in await (await http.get("/replicas")).text():
                await asyncio.sleep(0.05)
        async with http.get("/inspector/events") as events:
            *_, hello = [await events.content.readline() for _ in range(3)]
            assert ["primary", "replica0"] == json.loads(hello.removeprefix(b"data: "))["nodes"]
