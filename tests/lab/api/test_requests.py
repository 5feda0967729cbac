"""Requests with ids, as `--log-format json` has them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import pytest_asyncio

from rocket import Limits, Policy
from rocket.lab.api.app import build_app
from rocket.lab.comparison import ComparisonRouter
from tests.lab.test_logs import entries, logged
from tests.support.routers import as_session
from tests.support.servers import dsns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import web
    from aiohttp.test_utils import TestClient
    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.consistency import Board
    from rocket.routing.observer import Observer

    Client: TypeAlias = TestClient[web.Request, web.Application]

HEADER = "X-Request-ID"


@pytest_asyncio.fixture
async def numbered(cluster: LocalCluster, board: Board, aiohttp_client: AiohttpClient) -> AsyncIterator[Client]:
    """An HTTP client of an API whose requests have ids."""
    async with await ComparisonRouter.open(
        dsns(cluster), board=board, policy=Policy(primary_lease_s=60.0), limits=Limits(attempt_s=0.2)
    ) as router:
        yield await aiohttp_client(build_app(router, request_ids=True))


@pytest_asyncio.fixture
async def user(numbered: Client, email: str) -> str:
    """Return the e-mail address of a user who has written a ride."""
    await numbered.post("/users", json={"email": email})
    await numbered.post("/rides", json={"distance": 1}, headers={"Authorization": email})
    return email


def about(lines: list[dict[str, Any]], *fields: str) -> list[tuple[Any, ...]]:
    """Return some fields of each line."""
    return [tuple(line.get(field) for field in fields) for line in lines]


async def test_every_line_of_a_request_carries_its_id_the_routers_too(
    numbered: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board
) -> None:
    """From the retry of a read, which the router tells of, to the line that says how it was answered."""
    session = await as_session(numbered, user)
    await cluster.wait_for_catchup()
    await observer.run_once()
    board.forget("replica1")
    first = await numbered.get("/rides", headers=session)
    assert first.headers["Rocket-Served-By"] == "replica0"
    cluster.node("replica0").freeze()
    try:
        with logged("json") as output:
            headers = session | {HEADER: "checkout-17"}
            response = await numbered.get("/rides", headers=headers)
    finally:
        cluster.node("replica0").thaw()
    assert (response.status, response.headers[HEADER]) == (200, "checkout-17")
    assert about(entries(output), "part", "request_id") == [
        ("router", "checkout-17"),
        ("api", "checkout-17"),
        ("access", "checkout-17"),
    ]
    assert "replica0 failed a read" in entries(output)[0]["message"]


async def test_the_last_line_of_a_request_says_how_it_was_answered(numbered: Client, user: str) -> None:
    """By route and not by path, and nothing of who asked."""
    with logged("json") as output:
        await numbered.get("/rides/123456789", headers={"Authorization": user})
        await numbered.get("/rides-of/someone@example.com")
    known, unknown = (line for line in entries(output) if line["part"] == "access")
    ms = known.pop("ms")
    assert 0 < ms < 60_000
    del known["time"], known["request_id"]
    assert known == {
        "level": "info",
        "part": "access",
        "message": "GET /rides/{id}: 404",
        "method": "GET",
        "path": "/rides/{id}",
        "status": 404,
        "node": "primary",
        "reason": "no-status",
    }
    assert (unknown["status"], "path" in unknown, "node" in unknown) == (404, False, False)
    assert "example.com" not in output.getvalue()


async def test_what_goes_wrong_can_be_found_by_its_id(numbered: Client, board: Board) -> None:
    """The answer that says too little to the client, and the line that says more, have the same one."""
    board.forget("primary")
    with logged("json") as output:
        response = await numbered.get("/rides", headers={"Authorization": "a@example.com"})
    assert response.status == 503
    warning, access = entries(output)
    assert warning["level"] == "warning"
    assert {response.headers[HEADER]} == {warning["request_id"], access["request_id"]}


@pytest.mark.parametrize("given", ["", "two words", "a" * 129, "caf\xe9", "tab\there"])
async def test_an_id_that_no_log_should_hold_is_replaced(numbered: Client, given: str) -> None:
    """It is printable, without spaces, and short; who sends another one gets one of ours."""
    made = [(await numbered.get("/livez", headers={HEADER: given})).headers[HEADER] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in made)
    assert made[0] != made[1]


async def test_without_ids_nothing_is_added(client: Client) -> None:
    """As with `--log-format text`."""
    with logged("text") as output:
        response = await client.get("/livez", headers={HEADER: "mine"})
    assert HEADER not in response.headers
    assert output.getvalue() == ""
