"""`run-all --nodes-file` follows its file, also by signal."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.program import running
from tests.support.servers import dsns, write_nodes

if TYPE_CHECKING:
    from pathlib import Path

    from rocket.cluster.cluster import LocalCluster


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_hangup_has_the_file_read_again_and_ends_nothing(
    cluster: LocalCluster, kept_dir: Path, workers: str
) -> None:
    """By the program, or by each of its processes; a process that was not sent it does not die of it either."""
    file = kept_dir / "nodes"
    write_nodes(file, dsns(cluster, "primary", "replica0"))
    flags = ("--no-cluster", "--no-simulator", "--api-port", "0", "--api-workers", workers)
    async with running(kept_dir, "-m", "rocket", "run-all", *flags, "--nodes-file", str(file)) as program:
        url = (await program.prints(r"ready after .*: (http://\S+)"))[1]
        write_nodes(file, dsns(cluster))
        program.process.send_signal(signal.SIGHUP)
        await program.prints("SIGHUP: reading files again")
        async with asyncio.timeout(10), aiohttp.ClientSession() as http:
            while True:
                async with http.get(f"{url}/replicas") as response:
                    if "replica1" in await response.text():
                        break
                await asyncio.sleep(0.02)
        program.process.terminate()
        assert 0 == await program.ends()
    assert "died" not in program.output
