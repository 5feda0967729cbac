"""The testbed: the cluster of a benchmark, the server under measurement, and the processor core it gets.

As a program (`python -m rocket.lab.bench.testbed`) it is a server with the API's responses and no database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import psutil
from aiohttp import web

from rocket.cluster import control, directories
from rocket.cluster.cluster import ClusterSettings
from rocket.cluster.errors import ClusterNotFound
from rocket.cluster.supervisor import local_cluster, supervise
from rocket.errors import RocketError, describe
from rocket.lab import app
from rocket.lab.shutdown import background, run
from rocket.lab.subprocesses import SubprocessFailed, child_process
from rocket.schema import schema_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from rocket.lab.shutdown import Shutdown
    from rocket.lab.subprocesses import Subprocess

_CATCHUP_S = 30.0
_DISCONNECT_S = 2.0
_ANSWER_S = 5.0
_READY_S = 30.0
_POLL_S = 0.05
_READY_POLL_S = 0.02
_TAIL = 2000
_URL = re.compile(r"http://[0-9.]+:[0-9]+")

_VERSION = "SELECT current_setting('server_version')"
_TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1"
_SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"

_log = logging.getLogger("rocket.bench")


# --- the cluster ---


class NotCaughtUp(RocketError):
    """The replicas did not catch up between two measurements."""


@dataclass(frozen=True, slots=True)
class Testbed:
    """A running cluster, and a directory for the logs of the servers that use it."""

    run_dir: Path
    logs: Path
    data_dir: str
    port: int
    """The port of one of its nodes."""
    replicas: tuple[str, ...]
    nodes: Mapping[str, str]
    """The DSNs of its nodes."""
    postgres_version: str
    _primary: asyncpg.Connection[asyncpg.Record]
    """To another database than the one whose transactions are counted."""

    async def transactions(self) -> int:
        """Return how many transactions the primary has counted in the API's database.

        A busy backend reports its transactions once a second, and the rest when it ends: so the figure is exact
        only while no client is connected.
        """
        return await self._count(_TRANSACTIONS)

    async def sessions(self) -> int:
        """Return the number of sessions in the API's database on the primary."""
        return await self._count(_SESSIONS)

    async def wait_for_sessions(self, most: int) -> None:
        """Wait until at most that many sessions are left; give up with a warning if other programs connect."""
        deadline = time.monotonic() + _DISCONNECT_S
        while await self.sessions() > most:
            if time.monotonic() > deadline:
                _log.warning("other programs use this cluster: the primary's count includes their transactions")
                return
            await asyncio.sleep(_POLL_S)

    async def wait_for_catchup(self) -> None:
        """Wait until every replica has replayed everything; raise `NotCaughtUp`."""
        deadline = time.monotonic() + _CATCHUP_S
        while any(node["lag_bytes"] != 0 for node in await self._nodes() if node["role"] == "replica"):
            if time.monotonic() > deadline:
                raise NotCaughtUp(
                    f"the replicas did not catch up within {_CATCHUP_S:g} s: does another program write?"
                )
            await asyncio.sleep(_POLL_S)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Pause replay on every replica for as long as the context lasts; then wait until they have caught up."""
        pausing = asyncio.create_task(self._on_each_replica("pause"), name="pause every replica")
        try:
            await asyncio.shield(pausing)
            yield
        finally:
            await asyncio.wait([pausing])  # a pause in flight would take effect after the resume
            await self._on_each_replica("resume")
        await self.wait_for_catchup()

    async def _on_each_replica(self, command: str) -> None:
        """Send a command for each replica; raise the first failure once all have answered."""
        answers = await asyncio.gather(
            *(control.ask(self.run_dir, command, node=name) for name in self.replicas), return_exceptions=True
        )
        for failure in answers:
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
async def own_testbed(replicas: int, postgres_bin: Path | None, shutdown: Shutdown) -> AsyncIterator[Testbed]:
    """Run a cluster for as long as the context lasts."""
    settings = ClusterSettings(
        replicas=replicas, port=0, postgres_bin=postgres_bin, database=app.DATABASE, schema=schema_sql()
    )
    async with local_cluster(settings) as cluster:
        shutdown.on_force.append(cluster.force_stop)
        async with (
            background(supervise(cluster), "supervisor"),
            control.listening(cluster, lambda: shutdown.ask("down was asked for")),
            _testbed(cluster.run_dir) as testbed,
        ):
            yield testbed


@contextlib.asynccontextmanager
async def attached_testbed(data_dir: Path | None, port: int | None) -> AsyncIterator[Testbed]:
    """Use a running cluster, found by its data directory or a port; raise `ClusterNotFound`."""
    async with _testbed(control.find(data_dir, port)) as testbed:
        yield testbed


@contextlib.asynccontextmanager
async def _testbed(run_dir: Path) -> AsyncIterator[Testbed]:
    description = dict(directories.running()).get(run_dir)
    if description is None:
        raise ClusterNotFound("the cluster has ended")
    nodes = await control.ask(run_dir, "status")
    primary = next(node["name"] for node in nodes if node["role"] == "primary")
    addresses = (await control.ask(run_dir, "addresses"))["nodes"]
    try:
        connection = await asyncpg.connect(addresses[primary], database="postgres", timeout=_ANSWER_S)
    except (OSError, asyncpg.PostgresError) as error:
        raise ClusterNotFound(f"the primary does not answer: {describe(error)}") from None
    with contextlib.ExitStack() as stack:
        stack.callback(connection.terminate)
        # Inside the cluster's own directory, which the next cluster removes if this process is killed.
        logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=run_dir))
        yield Testbed(
            run_dir=run_dir,
            logs=Path(logs),
            data_dir=description.data_dir,
            port=next(iter(description.ports.values())),
            replicas=tuple(node["name"] for node in nodes if node["role"] == "replica"),
            nodes=addresses,
            postgres_version=str(await connection.fetchval(_VERSION)),
            _primary=connection,
        )


# --- the server ---


class Server:
    """The server under measurement."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self._process = psutil.Process(pid)

    def cpu_s(self) -> float:
        """Return the processor time that it and its running children have taken so far."""
        with _must_run():
            return sum(times.user + times.system for times in (each.cpu_times() for each in self._processes()))

    def rss_bytes(self) -> int:
        """Return the resident memory of it and its children."""
        with _must_run():
            return sum(each.memory_info().rss for each in self._processes())

    def _processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


@contextlib.contextmanager
def _must_run() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        raise SubprocessFailed("server under measurement", "it has ended") from None


@contextlib.asynccontextmanager
async def serving(
    command: Sequence[str],
    log: Path,
    before_exec: Callable[[], None] | None = None,
    python: Path | None = None,
) -> AsyncIterator[Server]:
    """Run a module that prints its URL, with its arguments, for as long as the context lasts.

    Its process calls `before_exec` first. Its output goes to a log file, which is removed at the end. A `python`
    interpreter imports the module from another build. Raise `SubprocessFailed`, with the tail of the log, if the
    server does not get ready or ends by itself.
    """
    with contextlib.ExitStack() as files:
        files.callback(log.unlink, missing_ok=True)
        output = files.enter_context(log.open("wb"))
        async with child_process(
            "server under measurement",
            *(command if python else ("rocket.lab.subprocesses", *command)),  # an older build has no parent watch
            output=output,
            preexec_fn=before_exec,
            python=(str(python), "-P") if python else (),  # -P: not the rocket of this directory
        ) as process:
            yield Server(await _url(process, log), process.pid)
            if process.exit_code is not None:
                raise SubprocessFailed(process.name, f"it has ended: {_tail(log)}")


async def _url(process: Subprocess, log: Path) -> str:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.exit_code is None:
        if found := _URL.search(_text(log)):
            return found[0]
        await asyncio.sleep(_READY_POLL_S)
    raise SubprocessFailed(process.name, f"it did not get ready: {_tail(log) or 'it printed nothing'}")


def _text(log: Path) -> str:
    return log.read_text(errors="replace")


def _tail(log: Path) -> str:
    return _text(log)[-_TAIL:].strip()


# --- its core ---


@contextlib.contextmanager
def reserved_core() -> Iterator[Callable[[], None] | None]:
    """Keep this process and its future children off one core; yield a function that gives a process that core.

    Yield None where cores cannot be assigned, or there is only one. On a machine of its own the API would have a
    core to itself. Here it would share one with Postgres in some runs and not in others, and each read would then
    cost more, because of cold caches.
    """
    if not hasattr(os, "sched_setaffinity"):  # macOS
        yield None
        return
    cores = os.sched_getaffinity(0)
    reserved = min(cores)
    if not cores - {reserved}:
        yield None
        return
    os.sched_setaffinity(0, cores - {reserved})
    try:
        yield lambda: os.sched_setaffinity(0, {reserved})
    finally:
        os.sched_setaffinity(0, cores)


# --- what HTTP alone costs ---


class _Bare:
    """The API's responses without a database."""

    def __init__(self) -> None:
        self._rides: list[dict[str, object]] = []

    async def user(self, request: web.Request) -> web.Response:
        form = await request.post()
        return web.json_response({"email": form["email"], "id": 1}, status=HTTPStatus.CREATED)

    async def write(self, request: web.Request) -> web.Response:
        form = await request.post()
        self._rides.append({"distance": float(str(form["distance"])), "id": len(self._rides), "user_id": 1})
        return web.json_response(self._rides[-1], status=HTTPStatus.CREATED)

    async def read(self, request: web.Request) -> web.Response:
        return web.json_response(self._rides[int(request.match_info["id"])])


async def serve_bare() -> None:
    """Serve them on a free port of this machine, print the URL, and run until a signal ends the process."""
    bare, app = _Bare(), web.Application()
    app.add_routes(
        [web.post("/users", bare.user), web.post("/rides", bare.write), web.get("/rides/{id}", bare.read)]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        await web.SockSite(runner, listener).start()
        sys.stdout.write(f"ready: http://127.0.0.1:{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    run(serve_bare())  # on the API's event loop
