"""The API as a program of its own, on a cluster of its own."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rocket.cluster import control
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.supervisor import local_cluster, supervise
from rocket.lab.app import DATABASE
from rocket.lab.bench.testbed import Server, serving
from rocket.lab.shutdown import Shutdown, ShutdownStack, background, shutdown_on_signals
from rocket.schema import schema_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@contextlib.asynccontextmanager
async def running_api(
    replicas: int = 2, settle: Callable[[], None] | None = None
) -> AsyncIterator[tuple[Server, Path]]:
    """Run both for as long as the context lasts; yield the server and the file that has its log.

    A signal ends the context, as it ends rocket itself. The server's process calls `record_floor` first.
    """
    with shutdown_on_signals() as shutdown:
        async with ShutdownStack(shutdown) as stack:
            yield await _up(replicas, settle, shutdown, stack)


async def _up(
    replicas: int, settle: Callable[[], None] | None, shutdown: Shutdown, stack: contextlib.AsyncExitStack
) -> tuple[Server, Path]:
    cluster = await stack.enter_async_context(
        local_cluster(ClusterSettings(replicas=replicas, port=0, database=DATABASE, schema=schema_sql()))
    )
    shutdown.on_force.append(cluster.force_stop)
    await stack.enter_async_context(background(supervise(cluster), "supervisor"))
    await stack.enter_async_context(control.listening(cluster, lambda: shutdown.ask("down was asked for")))
    await cluster.wait_for_catchup()
    log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rocket-fuzz-"))) / "api.log"
    command = ["rocket", "run-all", "--no-cluster", "--no-simulator", "--api-port", "0"]
    found_by = ["--postgres-port", str(cluster.primary.port)]
    return await stack.enter_async_context(serving([*command, *found_by], log, settle)), log


def errors_in(log: Path) -> list[str]:
    """Return the lines of a log that tell of an error of ours."""
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if " ERROR: " in line or line.startswith("Traceback")]
