"""A real cluster for the whole run, and the router and API on top of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import pytest_asyncio
import uvloop

from rocket import Board, Observer, Policy, Router, Routing
from rocket.cluster import faults
from rocket.cluster.cluster import ClusterSettings, LocalCluster, local_cluster
from rocket.cluster.installation import SUPERUSER
from rocket.cluster.supervisor import supervise
from rocket.lab.api.app import build_app
from rocket.lab.api.users import UserFloors
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.schema import tables

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aiohttp import web
    from aiohttp.test_utils import TestClient
    from pytest_aiohttp.plugin import AiohttpClient

REPLICAS = 2

ROLES = {"monitor": "rocket_monitor", "plain": "rocket_plain"}
"""Of no more than `pg_monitor`, and of less, by the words that `--role` takes."""

_MAKE_ROLES = """
    CREATE ROLE rocket_monitor LOGIN;
    CREATE ROLE rocket_plain LOGIN;
"""
_TAKE_BACK = "REVOKE pg_monitor FROM rocket_plain;"

MEMORY = Path("/dev/shm")  # noqa: S108 - private directories are made in it
ROOM_BYTES = 4 * 2**30
"""Clusters are made in memory if there is that much room: a disk takes its time over a thousand files each."""

if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_BYTES:
    tempfile.tempdir = str(MEMORY)
TEMPORARY = tempfile.gettempdir()

# Real servers share the machine with the tests: how long an example takes says nothing.
hypothesis.settings.register_profile("rocket", deadline=None)
hypothesis.settings.load_profile("rocket")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests of the router be run as a role with few rights."""
    parser.addoption("--role", choices=list(ROLES), help="who the router is to the servers (default: a superuser)")


def pytest_configure(config: pytest.Config) -> None:
    """Keep what `dsns` has to know."""
    global _role  # noqa: PLW0603 - one for the whole run
    _role = ROLES.get(config.getoption("--role"))
    config.addinivalue_line("markers", "vouched: is about statuses that vouch, for which it takes pg_monitor")
    config.addinivalue_line("markers", "superuser: needs a role that may do anything")
    config.addinivalue_line("markers", "long: takes half a minute by itself; run by `pytest -m long`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a role that may not see enough has other rules for."""
    role = config.getoption("--role")
    for item in items:
        if role == "plain" and item.get_closest_marker("vouched"):
            item.add_marker(pytest.mark.skip("needs a role that sees which life of its server a replica is in"))
        if role is not None and item.get_closest_marker("superuser"):
            item.add_marker(pytest.mark.skip("needs a role that may do anything"))


_role: str | None = None


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test on the loop that the program runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture(scope="session")
async def cluster() -> AsyncIterator[LocalCluster]:
    """A primary and two replicas that stream, kept alive for the whole run."""
    settings = ClusterSettings(replicas=REPLICAS, port=0, database=DATABASE, schema=schema())
    async with local_cluster(settings) as cluster, background(supervise(cluster), "supervisor"):
        yield cluster


@contextlib.contextmanager
def fresh_dir() -> Iterator[Path]:
    """Make a place for directories that the servers' account can enter, with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="rocket-test-", dir=TEMPORARY))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def kept_dir() -> Iterator[Path]:
    """A fresh directory."""
    with fresh_dir() as path:
        yield path


@pytest.fixture
def email() -> str:
    """An address that no other test uses."""
    return f"{secrets.token_hex(6)}@example.com"


def schema() -> str:
    """Return what makes the tables, and roles with the rights that `rocket schema` gives them, or less."""
    granted = (tables(role, demonstration=True) for role in ("rocket_monitor", "rocket_plain"))
    return "".join((_MAKE_ROLES, *granted, _TAKE_BACK))


def role() -> str:
    """Return who the router is to the servers."""
    return _role or SUPERUSER


def dsns(cluster: LocalCluster, *names: str, who: str | None = None) -> dict[str, str]:
    """Return the addresses of a cluster's nodes (all, if none is named), for `who`, else for `role`."""
    who = f"//{who or role()}@"
    return {
        name: cluster.node(name).dsn(DATABASE).replace(f"//{SUPERUSER}@", who) for name in names or cluster.nodes
    }


@pytest_asyncio.fixture
async def board(cluster: LocalCluster) -> Board:
    """A board that knows the primary, and no replica."""
    board = Board()
    finder = Observer(dsns(cluster), board, interval_s=1, roles_only=True)
    await finder.run_once()
    finder.close()
    assert board.primary is not None
    return board


@pytest_asyncio.fixture
async def observer(cluster: LocalCluster, board: Board) -> AsyncIterator[Observer]:
    """An observer of the cluster that looks only when it is told to: `await observer.run_once()`."""
    observer = Observer(dsns(cluster), board, interval_s=0.05)
    yield observer
    observer.close()


@pytest_asyncio.fixture
async def router(cluster: LocalCluster, board: Board) -> AsyncIterator[Router[str]]:
    """A never-stale router on `board`; a test may change its `routing`."""
    async with await Router.open(
        dsns(cluster),
        UserFloors(),
        board,
        policy=Policy(primary_lease_s=60.0),  # nobody observes unless a test does
        routing=Routing.NEVER_STALE,
    ) as router:
        yield router


@pytest_asyncio.fixture
async def client(router: Router[str], aiohttp_client: AiohttpClient) -> TestClient[web.Request, web.Application]:
    """An HTTP client of an API on `router`."""
    return await aiohttp_client(build_app(router))


@contextlib.asynccontextmanager
async def paused(cluster: LocalCluster, *names: str) -> AsyncIterator[None]:
    """Keep replicas (all, if none is named) from replaying."""
    nodes = [cluster.node(name) for name in names] or cluster.replicas
    for node in nodes:
        await faults.pause(node)
    try:
        yield
    finally:
        for node in nodes:
            await faults.resume(node)


async def table(cluster: LocalCluster) -> dict[str, int]:
    """Return what `replica_statuses` holds."""
    connection = await cluster.primary.connect(DATABASE)
    rows = await connection.fetch("SELECT name, last_lsn FROM replica_statuses")
    await connection.close()
    return {row["name"]: row["last_lsn"] for row in rows}


async def recorded(observer: Observer, cluster: LocalCluster, names: set[str]) -> None:
    """Look until the table holds just these replicas.

    An observer of an earlier test may hold the right to write it for a moment longer.
    """
    async with asyncio.timeout(5):
        await observer.run_once()
        while names != set(await table(cluster)):
            await observer.run_once()
