"""The service in the README, as it is printed, under uvicorn: paused and killed replicas make nothing stale.

Needs FastAPI and uvicorn; `.ci/run` installs them, and sets WEB_REQUIRED so that nothing is skipped there.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.servers import dsns, fresh_dir, paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import LocalCluster

README = Path(__file__).parent.parent.parent / "README.md"
HEADER = "Rocket-Session"
DEADLINE_S = 30.0

MISSING = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING) and not os.environ.get("WEB_REQUIRED"),
    reason=f"{', '.join(MISSING)} not installed: uv sync --group web",
)


def service() -> str:
    """Return the service's text, as the README has it."""
    (text,) = re.findall(r"```python\n(# notes\.py\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return str(text)


@contextlib.asynccontextmanager
async def served(cluster: LocalCluster) -> AsyncIterator[aiohttp.ClientSession]:
    """Run the service in a process of its own, with its DSNs in the environment."""
    nodes = dsns(cluster)
    primary = nodes.pop("primary")
    environment = os.environ | {
        "ROCKET_PRIMARY": primary,
        "ROCKET_REPLICAS": " ".join(f"{name}={dsn}" for name, dsn in nodes.items()),
    }
    with fresh_dir() as home:
        (home / "notes.py").write_text(service(), encoding="utf-8")
        address = str(home / "http")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "uvicorn", "--uds", address, "--log-level", "warning", "notes:app",
            cwd=home, env=environment,
        )  # fmt: skip
        try:
            connector = aiohttp.UnixConnector(address)
            async with aiohttp.ClientSession("http://notes", connector=connector) as client:
                async with asyncio.timeout(DEADLINE_S):
                    while not await _answers(client):
                        assert process.returncode is None
                        await asyncio.sleep(0.02)
                yield client
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await asyncio.wait_for(process.wait(), DEADLINE_S)


async def _answers(client: aiohttp.ClientSession) -> bool:
    try:
        return (await client.get("/notes/0")).status == 404
    except aiohttp.ClientConnectionError:
        return False


async def write_and_read(client: aiohttp.ClientSession, text: str, token: str) -> tuple[str, str]:
    """Write a note and read it back at once; return who showed it, and the session's next token."""
    written = await client.post("/notes", params={"text": text}, headers={HEADER: token})
    assert 201 == written.status
    note = (await written.json())["id"]
    seen = await client.get(f"/notes/{note}", headers={HEADER: written.headers[HEADER]})
    assert 200 == seen.status
    body = await seen.json()
    assert text == body["text"]
    return body["from"], seen.headers[HEADER]


async def test_the_service_in_the_readme_is_never_stale(cluster: LocalCluster) -> None:
    """Its reads come from replicas, and show what was written just before: also from the one that is left."""
    async with served(cluster) as client:
        nodes, token = set(), ""
        for number in range(40):
            node, token = await write_and_read(client, f"calm {number}", "")
            nodes.add(node)
        assert {"replica0", "replica1"} <= nodes
        async with paused(cluster, "replica0"):
            for number in range(20):
                node, token = await write_and_read(client, f"paused {number}", token)
                assert node != "replica0"
        cluster.node("replica1").kill()
        for number in range(20):
            node, token = await write_and_read(client, f"killed {number}", token)
        missing = await client.get("/notes/0", headers={HEADER: token})
        assert (404, True) == (missing.status, HEADER in missing.headers)
        wrong = await client.get("/notes/1", headers={HEADER: "garbage"})
        assert (400, {"error": "The session token is invalid."}) == (wrong.status, await wrong.json())
