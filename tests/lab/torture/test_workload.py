"""Sessions against a real API: what they record is what happened."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import pytest
import pytest_asyncio
from aiohttp import web
from msgspec import structs

from rocket import Router
from rocket.cluster.binaries import SUPERUSER
from rocket.lab.app import DATABASE
from rocket.lab.checker.check import check
from rocket.lab.checker.history import READS, HistoryWriter, Op, Outcome, Request, Role, Run, read_history
from rocket.lab.client import Api
from rocket.lab.torture import clients
from rocket.lab.torture.clients import LibrarySessions
from rocket.lab.torture.workload import MOST_RIDES, Job, Workload
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp.test_utils import TestClient
    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.routing.observer import Observer

    Client = TestClient[web.Request, web.Application]


WANTED = ((Request.JOIN, Outcome.OK), (Request.WRITE, Outcome.OK), (Request.WRITE, Outcome.FAIL))
RUN = Run(seed=1, duration_s=1, routing="never-stale", sessions=8, faults=(), nodes=("primary",), started_at="now")


def job_for(url: str, history: Path, *, sessions: int = 8, freshness: str = "session") -> Job:
    """Return the job of the only client process of a run."""
    return Job(
        url=url, history=str(history), zero=time.monotonic(), seed=1, process=0, processes=1, sessions=sessions,
        freshness=freshness,
    )  # fmt: skip


async def recorded(
    client: Client, kept_dir: Path, seconds: float, *, freshness: str = "session"
) -> tuple[Op, ...]:
    """Make traffic for a while and return what it recorded."""
    path = kept_dir / "history.jsonl"
    url = str(client.make_url("/"))
    with HistoryWriter.create(path, RUN) as history:
        async with Api(url, retries=False) as api:
            workload = Workload(job_for(url, path, freshness=freshness), api, api, history)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await workload.run()
    return read_history(path).ops


async def test_sessions_record_what_they_wrote_and_read(
    client: Client, observer: Observer, kept_dir: Path
) -> None:
    """Each write has a distance of its own, each own ride is found again, sessions do one thing at a time."""
    await observer.run_once()

    ops = await recorded(client, kept_dir, 2)

    writes = [op for op in ops if op.request is Request.WRITE]
    assert len({op.distance for op in writes}) == len(writes) > 5
    written = {op.ride: op.distance for op in writes if op.outcome is Outcome.OK}
    reads = [op for op in ops if op.request is Request.READ and op.outcome is Outcome.OK]
    assert len(reads) > 20
    assert all(written.get(op.ride or 0, op.distance) == op.distance for op in reads)
    assert {Role.PRIMARY} == {op.role for op in writes if op.outcome is Outcome.OK}
    for session in {op.session for op in ops}:
        own = [op for op in ops if op.session == session]
        assert all(earlier.done <= later.at for earlier, later in itertools.pairwise(own))
        assert 1 == len({op.user for op in own})


async def test_tokens_are_sent_back_by_most_sessions(client: Client, observer: Observer, kept_dir: Path) -> None:
    """The rest have none, some send an earlier one beside the newest, and users are shared."""
    await observer.run_once()

    ops = await recorded(client, kept_dir, 2)

    assert {True, False} == {op.tokens for op in ops}
    assert not any(op.sent for op in ops if not op.tokens)
    assert any("," in op.sent for op in ops if op.sent)
    sessions_of = {op.user: {other.session for other in ops if other.user == op.user} for op in ops}
    assert 1 < max(map(len, sessions_of.values()))
    assert (
        max(sum(op.user == user and op.request is Request.WRITE for op in ops) for user in sessions_of)
        <= MOST_RIDES
    )


async def test_reads_ask_for_what_the_run_says(aiohttp_client: AiohttpClient, kept_dir: Path) -> None:
    """By a header, which the history repeats; writes ask for nothing. Most of a mixture are as usual."""
    asked: list[tuple[bool, str | None]] = []

    async def note(request: web.Request) -> web.StreamResponse:
        asked.append((request.method == "GET", request.headers.get("Rocket-Freshness")))
        if request.path == "/users":
            return web.json_response({}, status=201)
        if request.method == "POST":
            return web.json_response({"id": len(asked)}, status=201)
        if request.path == "/rides":
            return web.json_response({"rides": [], "next": None})
        return web.json_response({"error": "as told"}, status=404)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", note)
    ops = await recorded(await aiohttp_client(app), kept_dir, 1, freshness="mixed")

    said = Counter(op.freshness for op in ops if op.request in READS and op.error is None)
    sent = Counter(freshness for is_read, freshness in asked if is_read)
    assert {None, "global", "within 2s", "any"} == set(said)
    assert said[None] > said["global"] > said["within 2s"] > said["any"]
    assert all(count <= sent[freshness] for freshness, count in said.items())
    assert {None} == {freshness for is_read, freshness in asked if not is_read}
    assert {None} == {op.freshness for op in ops if op.request not in READS}


async def test_sessions_of_several_processes_share_a_user(
    client: Client, observer: Observer, kept_dir: Path
) -> None:
    """They read what the other ones wrote, and write no more together than a list shows."""
    await observer.run_once()
    path = kept_dir / "history.jsonl"
    url = str(client.make_url("/"))
    job = job_for(url, path, sessions=40, freshness="global")
    jobs = [replace(job, process=number, processes=2) for number in range(2)]
    with HistoryWriter.create(path, RUN) as history, contextlib.suppress(TimeoutError):
        async with Api(url, retries=False) as api, asyncio.timeout(2), asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(Workload(job, api, api, history).run(), name="sessions")
    ops = read_history(path).ops

    processes: dict[str, set[str]] = {}
    for op in ops:
        processes.setdefault(op.user, set()).add(op.session.partition(".")[0])
    shared = {user for user, by in processes.items() if len(by) > 1}
    assert shared
    written = {op.ride: op for op in ops if op.acknowledged_write and op.user in shared}
    assert any(
        op.distance is not None and written[op.ride].session.partition(".")[0] != op.session.partition(".")[0]
        for op in ops
        if op.request is Request.READ and op.ride in written
    )
    for user in shared:
        assert sum(op.user == user and op.request is Request.WRITE for op in ops) <= MOST_RIDES
    assert {True, False} == {op.tokens for op in ops if op.user in shared}
    recorded_run = read_history(path)
    of_them = tuple(op for op in recorded_run.ops if op.user in shared)
    assert not check(structs.replace(recorded_run, ops=of_them)).counts


async def test_a_client_that_hangs_up_knows_nothing(client: Client, kept_dir: Path) -> None:
    """Neither of writes nor of reads, and its requests are recorded all the same."""
    path = kept_dir / "history.jsonl"
    url = str(client.make_url("/"))
    with HistoryWriter.create(path, RUN) as history:
        async with Api(url, retries=False) as api:
            workload = Workload(job_for(url, path), api, api, history)
            workload.hang_up_until = 1e9
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await workload.run()
    hung_up = [op for op in read_history(path).ops if (op.error or "").startswith("hung up")]

    assert hung_up
    assert {Outcome.UNKNOWN} == {op.outcome for op in hung_up}


async def test_a_refused_connection_is_a_failure(kept_dir: Path, unused_tcp_port: int) -> None:
    """Nothing can have been written."""
    path = kept_dir / "history.jsonl"
    url = f"http://127.0.0.1:{unused_tcp_port}"
    with HistoryWriter.create(path, RUN) as history:
        async with Api(url, retries=False) as api:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await Workload(job_for(url, path), api, api, history).run()

    refused = [op for op in read_history(path).ops if op.error != "cut off"]  # by the end of the test
    assert {(Request.JOIN, Outcome.FAIL)} == {(op.request, op.outcome) for op in refused}


async def test_a_read_whose_connection_is_lost_is_sent_again(
    aiohttp_client: AiohttpClient, kept_dir: Path
) -> None:
    """On a new connection, once, as clients of HTTP do; a write is not: it may have been done."""
    asked: Counter[str] = Counter()

    async def lose_every_other(request: web.Request) -> web.Response:
        asked[request.path] += 1
        if asked[request.path] % 2 == 0 and request.transport is not None:
            request.transport.abort()
        if request.path == "/users":
            return web.json_response({}, status=201)
        return web.json_response({"rides": [], "next": None})

    app = web.Application()
    app.router.add_route("*", "/users", lose_every_other)
    app.router.add_get("/rides", lose_every_other)
    ops = await recorded(await aiohttp_client(app), kept_dir, 0.5)
    lists = [op for op in ops if op.request is Request.LIST and op.error != "cut off"]

    assert {True, False} == {op.again for op in lists if op.outcome is Outcome.OK}
    assert not any(op.again for op in ops if op.request is not Request.LIST)
    assert {Outcome.OK, Outcome.UNKNOWN} == {op.outcome for op in ops if op.request is Request.JOIN}


async def test_client_processes_flood_and_end(client: Client, observer: Observer, kept_dir: Path) -> None:
    """They receive commands while they run, send their counts, and are gone at the end."""
    await observer.run_once()
    path = kept_dir / "history.jsonl"
    job = job_for(str(client.make_url("/")), path, sessions=2)
    HistoryWriter.create(path, RUN).close()
    async with clients.running([job]) as running, asyncio.timeout(20):
        watching = asyncio.create_task(running.watch(), name="watching")
        while not running.counts["read ok"]:
            await asyncio.sleep(0.05)
        running.flood(time.monotonic() - job.zero + 0.5)
        while len({op.session for op in read_history(path).ops}) < 50:
            await asyncio.sleep(0.1)
        while running.counts["read ok"] <= 50:
            await asyncio.sleep(0.1)
        (pid,) = running.pids
    await watching
    assert not psutil.pid_exists(pid)


NO_TENANTS = """
    DROP POLICY of_tenant ON rides;
    ALTER TABLE rides DISABLE ROW LEVEL SECURITY;
    DROP OWNED BY torture_tenant;
    DROP ROLE torture_tenant;
"""


@pytest_asyncio.fixture
async def tenants(cluster: LocalCluster) -> AsyncIterator[None]:
    """Row-level security on the rides, for a role of tenants."""
    admin = await cluster.primary.connect(DATABASE)
    await admin.execute(clients.TENANTS)
    yield
    await admin.execute(NO_TENANTS)
    await admin.close()


@pytest.mark.usefixtures("tenants")
async def test_sessions_of_the_library_record_what_errors_show(
    cluster: LocalCluster, observer: Observer, kept_dir: Path
) -> None:
    """Work of each kind ends as it should: what is rolled back never shows, what is set is gone, tokens rise."""
    await observer.run_once()
    path = kept_dir / "history.jsonl"
    router = await Router.open(dsns(cluster, who=SUPERUSER))
    with HistoryWriter.create(path, RUN) as history:
        async with router, Api("http://127.0.0.1:1", retries=False) as api:
            workload = Workload(job_for("", path), api, api, history)
            sessions = asyncio.create_task(LibrarySessions(workload, router, 4).run(), name="sessions")
            async with asyncio.timeout(30):
                while not {f"{request} {outcome}" for request, outcome in WANTED} <= workload.counts.keys() or (
                    workload.counts["list ok"] < 200
                ):
                    await asyncio.sleep(0.02)
            sessions.cancel()
            await asyncio.wait([sessions])
    recorded_run = read_history(path)
    ops = recorded_run.ops

    assert not [op for op in ops if op.status not in {None, 200, 201, 404}]
    assert {"error", "cancelled"} == {op.raised for op in ops if op.raised is not None}
    written = {op.distance for op in ops if op.acknowledged_write}
    refused = {op.distance for op in ops if op.request is Request.WRITE and op.work in {"raises", "swallows"}}
    assert written
    assert refused
    assert not written & refused
    assert {Outcome.FAIL, Outcome.UNKNOWN} >= {op.outcome for op in ops if op.distance in refused}
    assert {"tenant", "tenant in a write"} <= {op.work for op in ops if op.rides}
    by_error = [op for op in ops if op.raised == "error"]
    assert {Role.PRIMARY, Role.REPLICA} == {op.role for op in by_error}
    assert any(op.got != op.sent for op in by_error)
    assert not check(recorded_run).counts
