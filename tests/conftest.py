"""A real cluster for the whole run, and the router and API on top of it."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import pytest_asyncio
import uvloop

from rocket.cluster.cluster import ClusterSettings, LocalCluster
from rocket.cluster.supervisor import local_cluster, supervise
from rocket.lab.api.app import build_app
from rocket.lab.app import DATABASE
from rocket.lab.shutdown import background
from rocket.routing.observer import Observer
from tests.support.routers import board_of_primary, opened
from tests.support.servers import REPLICAS, ROLES, choose_role, dsns, fresh_dir, schema

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterator

    from aiohttp import web
    from aiohttp.test_utils import TestClient
    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.consistency import Board
    from rocket.lab.comparison import ComparisonRouter


# Real servers share the machine with the tests: how long an example takes says nothing.
hypothesis.settings.register_profile(
    "rocket", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("rocket")


LONGEST_FIRST = tuple(
    f"tests/{name}.py"
    for name in (
        "cluster/test_healing", "lab/test_run_all", "consistency/test_simulation", "routing/test_giving_back",
        "lab/inspector/test_page", "cluster/test_promotion", "lab/bench/test_bench",
        "lab/inspector/test_scenarios", "lab/torture/test_torture", "routing/test_histories", "lab/test_workers",
        "test_package", "routing/test_observer", "lab/api/test_sessions",
        "cluster/test_any_postgres", "cluster/test_cluster", "lab/test_takeover", "routing/test_promotion",
        "lab/torture/test_workload", "cluster/test_not_serving", "lab/status/test_status",
        "lab/api/test_hostile_clients", "lab/torture/test_variants", "consistency/test_choice",
    )
)  # fmt: skip
"""Of five seconds and more, so that no process works on one of them when the others are done."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests of the router be run as a role with few rights."""
    parser.addoption("--role", choices=list(ROLES), help="who the router is to the servers (default: a superuser)")


def pytest_configure(config: pytest.Config) -> None:
    """Set the role that `dsns` gives, and declare the markers."""
    choose_role(config.getoption("--role"))
    config.addinivalue_line("markers", "vouched: is about statuses that vouch, for which it takes pg_monitor")
    config.addinivalue_line("markers", "superuser: needs a role that may do anything")
    config.addinivalue_line(
        "markers", "long: takes half a minute by itself, or several seconds of CPU; run by `pytest -m long`"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files, and leave out what a role that may not see enough has other rules for."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))
    role = config.getoption("--role")
    for item in items:
        if role == "plain" and item.get_closest_marker("vouched"):
            item.add_marker(pytest.mark.skip("needs a role that sees which life of its server a replica is in"))
        if role is not None and item.get_closest_marker("superuser"):
            item.add_marker(pytest.mark.skip("needs a role that may do anything"))


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test on the loop that the program runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture(scope="session")
async def cluster() -> AsyncIterator[LocalCluster]:
    """A primary and two replicas that stream, kept alive for the whole run."""
    settings = ClusterSettings(replicas=REPLICAS, port=0, database=DATABASE, schema=schema())
    async with local_cluster(settings) as cluster, background(supervise(cluster), "supervisor"):
        yield cluster


@pytest.fixture(scope="session")
def system_postgres() -> Path:
    """The programs of the newest Postgres that the system has, if it is new enough."""
    found = {int(path.parts[-3]): path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")}
    newest = max(found, default=0)
    if newest < 14:
        pytest.skip("no other Postgres, 14 or newer, is installed on this machine")
    return found[newest]


@pytest_asyncio.fixture(scope="session")
async def system_cluster(system_postgres: Path) -> AsyncIterator[LocalCluster]:
    """A primary and two replicas on the system's Postgres."""
    settings = ClusterSettings(
        replicas=REPLICAS, port=0, postgres_bin=system_postgres, database=DATABASE, schema=schema()
    )
    async with local_cluster(settings) as cluster, background(supervise(cluster), "supervisor"):
        yield cluster


@pytest.fixture
def postgres() -> str:
    """Which Postgres a test's cluster is on: the `wheel`'s, or as it is parametrised."""
    return "wheel"


@pytest.fixture
def kept_dir() -> Iterator[Path]:
    """A fresh directory."""
    with fresh_dir() as path:
        yield path


@pytest.fixture
def email() -> str:
    """An address that no other test uses."""
    return f"{secrets.token_hex(6)}@example.com"


@pytest_asyncio.fixture
async def board(cluster: LocalCluster) -> Board:
    """A board that knows the primary, and no replica."""
    return await board_of_primary(cluster)


@pytest_asyncio.fixture
async def observer(cluster: LocalCluster, board: Board) -> AsyncIterator[Observer]:
    """An observer that looks, and records statuses, only when it is told to: `await observer.run_once()`."""
    observer = Observer(dsns(cluster), board, interval_s=0.05, record_statuses=True)
    yield observer
    observer.close()


@pytest_asyncio.fixture
async def router(cluster: LocalCluster, board: Board) -> AsyncIterator[ComparisonRouter]:
    """A never-stale router on `board`; a test may switch its routing."""
    async with opened(cluster, board) as router:
        yield router


@pytest_asyncio.fixture
async def client(
    router: ComparisonRouter, aiohttp_client: AiohttpClient
) -> TestClient[web.Request, web.Application]:
    """An HTTP client of an API on `router`."""
    return await aiohttp_client(build_app(router))
