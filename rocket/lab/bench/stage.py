"""The cluster that it happens on: one of its own, or one that is there already, reached by its control socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from rocket.cluster import control, directories
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.errors import ClusterNotFound
from rocket.cluster.supervisor import local_cluster, supervise
from rocket.errors import RocketError, describe
from rocket.lab import app
from rocket.lab.shutdown import background
from rocket.schema import schema_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.lab.bench.settings import BenchSettings
    from rocket.lab.shutdown import Shutdown

_SETTLED_S = 30.0
_DESERTED_S = 2.0
_ANSWER_S = 5.0
_POLL_S = 0.05

_VERSION = "SELECT current_setting('server_version')"
_TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1"
_SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"

_log = logging.getLogger("rocket.bench")


class NotSettled(RocketError):
    """The cluster did not come to rest between two measurements."""


@dataclass(frozen=True, slots=True)
class Testbed:
    """A running cluster, and where what runs on it may leave its log."""

    run_dir: Path
    logs: Path
    data_dir: str
    port: int
    """One of the cluster's."""
    replicas: tuple[str, ...]
    postgres_version: str
    _primary: asyncpg.Connection[asyncpg.Record]
    """To another database than the one whose transactions are counted."""

    async def transactions(self) -> int:
        """Return how many transactions the primary has counted in the API's database.

        A server process counts for all once a second while it is busy, and for the last time when it ends: so the
        figure is exact only when nobody is connected.
        """
        return await self._count(_TRANSACTIONS)

    async def sessions(self) -> int:
        """Return how many are connected to the API's database on the primary."""
        return await self._count(_SESSIONS)

    async def deserted(self, sessions: int) -> None:
        """Wait until no more than so many are connected; where others come and go, only for a while."""
        deadline = time.monotonic() + _DESERTED_S
        while await self.sessions() > sessions:
            if time.monotonic() > deadline:
                _log.warning("others use this cluster too: what the primary counts is not the API's alone")
                return
            await asyncio.sleep(_POLL_S)

    async def caught_up(self) -> None:
        """Wait until every replica has replayed all there is."""
        deadline = time.monotonic() + _SETTLED_S
        while any(node["lag_bytes"] != 0 for node in await self._nodes() if node["role"] == "replica"):
            if time.monotonic() > deadline:
                raise NotSettled("the replicas do not catch up: does somebody else write?")
            await asyncio.sleep(_POLL_S)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Keep every replica from replaying for as long as the context lasts, and have them catch up after."""
        pausing = asyncio.ensure_future(self._have_all("pause"))
        try:
            await asyncio.shield(pausing)
            yield
        finally:
            await asyncio.wait([pausing])  # one that is under way would come after what undoes it
            await self._have_all("resume")
        await self.caught_up()

    async def _have_all(self, command: str) -> None:
        """Ask for something on every replica; raise the first failure when all are done."""
        said = await asyncio.gather(
            *(control.ask(self.run_dir, command, node=name) for name in self.replicas), return_exceptions=True
        )
        for failure in said:
            if isinstance(failure, BaseException):
                raise failure

    async def _count(self, query: str) -> int:
        try:
            return int(await self._primary.fetchval(query, app.DATABASE, timeout=_ANSWER_S))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise ClusterNotFound(f"the primary does not answer: {describe(error)}") from None

    async def _nodes(self) -> list[dict[str, object]]:
        nodes: list[dict[str, object]] = await control.ask(self.run_dir, "status")
        return nodes


@contextlib.asynccontextmanager
async def staged(settings: BenchSettings, ending: Shutdown) -> AsyncIterator[Testbed]:
    """Run a cluster, or find the one that was named, for as long as the context lasts."""
    async with contextlib.AsyncExitStack() as stack:
        if settings.attach:
            run_dir = control.find(settings.data_dir, settings.postgres_port)
        else:
            run_dir = await _own_cluster(settings, ending, stack)
        description = dict(directories.running()).get(run_dir)
        if description is None:
            raise ClusterNotFound("the cluster has ended")
        nodes = await control.ask(run_dir, "status")
        primary = next(node["name"] for node in nodes if node["role"] == "primary")
        dsn = (await control.ask(run_dir, "addresses"))["nodes"][primary]
        try:
            connection = await asyncpg.connect(dsn, database="postgres", timeout=_ANSWER_S)
        except (OSError, asyncpg.PostgresError) as error:
            raise ClusterNotFound(f"the primary does not answer: {describe(error)}") from None
        stack.callback(connection.terminate)
        # Inside the run's directory: whoever clears up after a killed run finds it there.
        logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=run_dir))
        yield Testbed(
            run_dir=run_dir,
            logs=Path(logs),
            data_dir=description.data_dir,
            port=next(iter(description.ports.values())),
            replicas=tuple(node["name"] for node in nodes if node["role"] == "replica"),
            postgres_version=str(await connection.fetchval(_VERSION)),
            _primary=connection,
        )


async def _own_cluster(settings: BenchSettings, ending: Shutdown, stack: contextlib.AsyncExitStack) -> Path:
    cluster = await stack.enter_async_context(
        local_cluster(
            ClusterSettings(
                replicas=settings.replicas,
                port=0,
                postgres_bin=settings.postgres_bin,
                database=app.DATABASE,
                schema=schema_sql(),
            )
        )
    )
    ending.on_force.append(cluster.force_stop)
    await stack.enter_async_context(background(supervise(cluster), "supervisor"))
    await stack.enter_async_context(control.listening(cluster, lambda: ending.ask("down was asked for")))
    return cluster.run_dir
