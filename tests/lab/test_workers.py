"""Several processes of the API share its port, and come and go as one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import psutil
import pytest
import pytest_asyncio

from rocket.cluster.errors import PortInUse
from rocket.cluster.supervisor import RestartPolicy
from rocket.lab.app import DATABASE
from rocket.lab.serving import listeners, url_of
from rocket.lab.settings import MaxLag, Settings
from rocket.lab.shutdown import Shutdown
from rocket.lab.workers import Job, Worker, WorkerFailedToStart, WorkerKeepsDying, working
from tests.support.program import assert_nothing_left, run_all, servers
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rocket.cluster.cluster import LocalCluster

DEADLINE_S = 20.0


SETTINGS = Settings(api_port=0, max_wait=0.5, observer_interval=0.05)
"""What each worker does."""


@pytest.fixture
def nodes(cluster: LocalCluster) -> dict[str, str]:
    """Return the nodes that the workers read from."""
    return dsns(cluster)


@contextlib.asynccontextmanager
async def serving_by(count: int, nodes: dict[str, str]) -> AsyncIterator[str]:
    """Run this many workers; give the URL of what they serve."""
    task = asyncio.current_task()
    assert task is not None
    settings = replace(SETTINGS, api_workers=count)
    with listeners(settings) as held:
        async with working(settings, nodes, held, Shutdown(task)):
            yield url_of(settings, held)


@pytest_asyncio.fixture
async def url(nodes: dict[str, str]) -> AsyncIterator[str]:
    """The address that three workers serve."""
    async with serving_by(3, nodes) as url:
        yield url


def worker_processes(parent: int | None = None) -> list[psutil.Process]:
    """Return the workers of a program, of this one if none is named."""
    found = []
    for process in psutil.Process(parent).children():
        with contextlib.suppress(psutil.Error):
            if "rocket.lab.workers" in process.cmdline():
                found.append(process)
    return found


def connections() -> dict[int, int]:
    """Return the worker of each connection, by the client's port."""
    return {
        each.raddr.port: process.pid
        for process in worker_processes()
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_ESTABLISHED
    }


async def sessions_with_each(url: str, stack: contextlib.AsyncExitStack) -> dict[int, aiohttp.ClientSession]:
    """Connect again and again until there is one connection to each worker; return it by the worker's id."""
    sessions: dict[int, aiohttp.ClientSession] = {}
    while set(sessions) != {process.pid for process in worker_processes()}:
        known = connections()
        connector = aiohttp.TCPConnector(limit=1)
        session = await stack.enter_async_context(aiohttp.ClientSession(url, connector=connector))
        async with session.get("/livez") as response:
            assert 200 == response.status
        (pid,) = {pid for port, pid in connections().items() if port not in known}
        sessions.setdefault(pid, session)
    return sessions


async def status_by_new_connection(url: str, path: str = "/livez") -> int:
    """Connect, ask and hang up."""
    async with aiohttp.ClientSession() as session, session.get(url + path) as response:
        return response.status


async def test_they_have_no_inspector_and_say_why(url: str) -> None:
    """Each sees only what happens to reach it."""
    for path in ("/inspector", "/inspector/events"):
        async with aiohttp.ClientSession() as session, session.get(url + path) as response:
            assert 404 == response.status
            assert "each process sees its own requests only" in (await response.json())["error"]


async def write_ride(session: aiohttp.ClientSession, url: str, email: str) -> int:
    """Write a ride; return the answer's status."""
    headers = {"Authorization": email}
    async with session.post(f"{url}/rides", json={"distance": 7}, headers=headers) as response:
        return response.status


# --- what they do ---


async def test_write_through_any_worker_is_read_through_any_other(url: str, email: str) -> None:
    """Each observes for itself, and takes the others' tokens."""
    async with asyncio.timeout(DEADLINE_S), contextlib.AsyncExitStack() as stack:
        sessions = await sessions_with_each(url, stack)
        assert 3 == len(sessions)
        async with sessions[min(sessions)].post("/users", json={"email": email}) as response:
            assert 201 == response.status
        replicas = 0
        for writer, reader in itertools.product(sessions.values(), repeat=2):
            headers = {"Authorization": email}
            async with writer.post("/rides", json={"distance": 12.5}, headers=headers) as response:
                written = await response.json()
                headers["Rocket-Session"] = response.headers["Rocket-Session"]
            async with reader.get(f"/rides/{written['id']}", headers=headers) as response:
                assert written == await response.json()
                replicas += response.headers["Rocket-Served-As"] == "replica"
        assert replicas > 0


async def test_killed_worker_comes_back_and_nobody_is_refused(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Who connects to it meanwhile waits for the next one."""
    caplog.set_level(logging.INFO, "rocket.workers")
    before = worker_processes()
    before[0].kill()
    async with asyncio.timeout(DEADLINE_S):
        while "is back after" not in caplog.text:
            assert 200 == await status_by_new_connection(url)
    after = {process.pid for process in worker_processes()}
    assert 3 == len(after)
    assert before[0].pid not in after
    assert "died (by signal 9, SIGKILL)" in caplog.text
    async with asyncio.timeout(DEADLINE_S), contextlib.AsyncExitStack() as stack:
        assert after == set(await sessions_with_each(url, stack))


async def test_worker_that_cannot_be_started_again_ends_the_program(
    nodes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After five attempts, like a server; those that live are taken down."""

    async def lose_one() -> None:
        async with serving_by(2, nodes):
            monkeypatch.setattr("sys.executable", "false")
            worker_processes()[0].kill()
            await asyncio.sleep(DEADLINE_S)

    monkeypatch.setattr(RestartPolicy, "FIRST_PAUSE_S", 0.001)
    with pytest.raises(WorkerKeepsDying, match=r"^worker \d keeps dying \(while starting\)$"):
        await lose_one()
    assert [] == worker_processes()


async def test_worker_that_does_not_come_up_is_an_error_at_once(
    nodes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no point in another attempt, and the others are not left behind."""
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(WorkerFailedToStart, match=r"^worker \d failed to start: exit code 1$"):
        async with serving_by(2, nodes):
            pass
    assert [] == worker_processes()


async def test_worker_that_takes_too_long_to_come_up_is_killed(nodes: dict[str, str]) -> None:
    """It would be there twice once it is started again."""
    with listeners(SETTINGS) as (listener,):
        with pytest.raises(WorkerFailedToStart, match=r"^worker 1 failed to start: no answer within 0.1 s$"):
            await Worker(Job(1, nodes, SETTINGS), listener, ready_s=0.1).start()
        assert [] == worker_processes()


async def test_end_answers_what_is_in_flight_and_tells_who_comes_after(
    cluster: LocalCluster, nodes: dict[str, str], email: str
) -> None:
    """A write that waits for a lock gets its answer; until then its worker says that it is not ready any more."""
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asked = asyncio.Event()

    async def serve() -> None:
        async with serving_by(2, nodes) as url:
            started.set_result(url)
            await asked.wait()

    lock = await cluster.primary.connect(DATABASE)
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group, aiohttp.ClientSession() as session:
        group.create_task(serve(), name="serve")
        url = await started
        async with session.post(f"{url}/users", json={"email": email}) as response:
            assert 201 == response.status
        async with lock.transaction():
            await lock.fetch("SELECT FROM users WHERE email = $1 FOR UPDATE", email)
            write = group.create_task(write_ride(session, url, email), name="write")
            while not await lock.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.005)
            asked.set()
            status = 200
            while status != 503:
                with contextlib.suppress(aiohttp.ClientError):  # the other one has ended, and its connections
                    status = await status_by_new_connection(url, "/readyz")
            assert not write.done()
        assert 201 == await write
    with pytest.raises(aiohttp.ClientConnectorError):
        await status_by_new_connection(url)
    await lock.close()
    assert [] == worker_processes()


# --- the port ---


@pytest.mark.parametrize("ours", [1, 2])
@pytest.mark.parametrize("theirs", [1, 2])
def test_port_of_another_rocket_is_refused(ours: int, theirs: int) -> None:
    """Sharing is for workers of one program, from its first moment on; the error says who has the port."""
    with listeners(Settings(api_port=0, api_workers=theirs)) as held:
        port = held[0].getsockname()[1]
        with (
            pytest.raises(PortInUse, match=f"port {port}: Address already in use by process {os.getpid()}"),
            listeners(Settings(api_port=port, api_workers=ours)),
        ):
            pass
    with listeners(Settings(api_port=port, api_workers=ours)) as held:
        assert [port] * ours == [listener.getsockname()[1] for listener in held]


def test_job_arrives_as_it_was_given(nodes: dict[str, str]) -> None:
    """Whatever the command line sets reaches the workers."""
    settings = Settings(
        max_lag=MaxLag(None, 5.0), nodes_file=Path("nodes"), patroni=("http://10.0.0.1:8008",),
        replica=(("replica0", "postgresql://db1/rides"),), log_format="json", given=frozenset({"max_lag"}),
    )  # fmt: skip
    job = Job(2, nodes, settings, observe=False, log_levels={"rocket.api": 40}, listener=17)
    assert job == Job.read(json.loads(json.dumps(job.message())))


# --- the whole program ---


async def test_run_with_workers_shows_all_of_them_at_work_and_ends_clean(kept_dir: Path) -> None:
    """The simulator comes to each, and reads by one what it wrote by another."""
    async with run_all(kept_dir, "--api-workers", "2", "--simulator-rate", "40") as program:
        for worker in (1, 2):
            await program.prints(f"api/{worker} .*Reading ride")
        pids = [process.pid for process in worker_processes(program.process.pid)]
        assert 2 == len(pids)
        # The terminal's Ctrl-C is for the program alone.
        assert {os.getpgid(pid) for pid in pids}.isdisjoint({os.getpgid(program.process.pid)})
        program.process.send_signal(signal.SIGINT)
        assert 0 == await program.ends(timeout_s=5)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert " 0 stale reads" in program.output
    assert "" == program.errors
    stopped = [line.split()[1] for line in program.lines if "stopped in" in line]
    assert ["workers", "cluster"] == stopped
    assert_nothing_left(kept_dir)


async def test_workers_end_at_once_when_the_program_is_killed(kept_dir: Path) -> None:
    """Nothing else could take them down; the port is free for the next start."""
    async with run_all(kept_dir, "--api-workers", "2", "--no-simulator") as program:
        url = (await program.prints(r"ready after .* (http://\S+)"))[1]
        workers = worker_processes(program.process.pid)
        assert 2 == len(workers)
        workers[0].suspend()  # it would read of no end
        program.process.kill()
        try:
            await program.ends(timeout_s=5)  # its output lasts as long as one of them lives
        finally:
            for worker in workers:
                with contextlib.suppress(psutil.Error):
                    worker.kill()
    with pytest.raises(aiohttp.ClientConnectorError):
        await status_by_new_connection(url)
    async with asyncio.timeout(DEADLINE_S):
        while servers(kept_dir):
            await asyncio.sleep(0.02)
