"""Who may view the inspector, and who may send commands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from rocket.cluster import control
from rocket.lab.api.app import build_app
from rocket.lab.api.limits import ADMISSION, Backoff
from rocket.lab.inspector import access
from rocket.lab.inspector.controls import Targets
from rocket.lab.inspector.inspector import Inspector
from tests.support.inspected import HEADERS, viewing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.lab.comparison import ComparisonRouter
    from tests.support.inspected import Client, Inspected

SECRET = "open-sesame"  # noqa: S105 - nothing is behind it
FAR = {"X-Forwarded-For": "192.0.2.1"}
PAUSE = {"command": "pause", "node": "replica0"}


@pytest_asyncio.fixture
async def by_token(
    router: ComparisonRouter, cluster: LocalCluster, aiohttp_client: AiohttpClient
) -> AsyncIterator[Client]:
    """A client of an inspector that has a token and a host name."""
    inspector = Inspector(router, Targets("", cluster, token=SECRET), list(cluster.nodes), 0.5)
    app = build_app(router, allowed_hosts=("rides.example.com",))
    async with control.listening(cluster, lambda: None), inspector.serving(app):
        yield await aiohttp_client(app)


async def status_of(client: Client, path: str, headers: dict[str, str] | None = None) -> int:
    """Return the status of a path."""
    async with client.get(path, headers=headers, allow_redirects=False) as response:
        return response.status


async def test_the_address_with_a_slash_leads_to_the_page(inspected: Inspected, by_token: Client) -> None:
    """It keeps the token."""
    assert 200 == (await inspected.client.get("/inspector/")).status
    async with by_token.get("/inspector/", params={"token": SECRET}, allow_redirects=False) as response:
        assert (308, f"/inspector?token={SECRET}") == (response.status, response.headers["Location"])


async def command(client: Client, headers: dict[str, str], body: object = PAUSE) -> tuple[int, dict[str, Any]]:
    """Send a command with just these headers; return status and answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    async with client.post("/inspector/control", data=data, headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/inspector", 200), ("/inspector/events", 200), ("/inspector/control", 200),
        ("/inspector/inspector.css", 200),
        ("/inspector/history", 503), ("/inspector/nothing", 503), ("/rides/1", 503),
    ],
)  # fmt: skip
async def test_viewers_are_not_refused_during_an_overload(inspected: Inspected, path: str, status: int) -> None:
    """An overload is worth viewing; a history is not served during one."""
    app = inspected.client.app
    assert app is not None
    app[ADMISSION].inside += app[ADMISSION].most

    async def handle(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    answer = await app[ADMISSION].rationed(make_mocked_request("GET", path), handle, Backoff())
    assert status == answer.status


@pytest.mark.parametrize(
    ("headers", "part"),
    [
        ({}, "header 'Rocket-Inspector'"),
        ({"Rocket-Inspector": "2"}, "has to be '1'"),
        (HEADERS | {"Origin": "http://evil.example"}, "own page only"),
        (HEADERS | {"Origin": "http://127.0.0.1:1"}, "own page only"),
        (HEADERS | {"Origin": "null"}, "own page only"),
        (HEADERS | {"Sec-Fetch-Site": "cross-site"}, "own page only"),
        (HEADERS | {"Sec-Fetch-Site": "same-site"}, "own page only"),
        (HEADERS | FAR, "on this machine only"),
        (HEADERS | {"Forwarded": "for=192.0.2.1"}, "on this machine only"),
        (HEADERS | {"Via": "1.1 proxy.example"}, "on this machine only"),
    ],
)
async def test_a_command_from_elsewhere_is_refused(
    inspected: Inspected, headers: dict[str, str], part: str
) -> None:
    """From a page of another site, from a client of a proxy, or without the header."""
    status, answer = await command(inspected.client, headers)
    assert (403, True) == (status, part in answer["error"])
    assert not list(inspected.event_log.since(inspected.event_log.end))


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        (HEADERS | {"Content-Type": "text/plain"}, PAUSE, 415),
        (HEADERS, b"{", 400),
        (HEADERS, b"[" * 2000, 400),
        (HEADERS, [], 422),
        (HEADERS, b" " * 5000, 413),
        (HEADERS, {}, 422),
        (HEADERS, {"command": "explode"}, 422),
        (HEADERS, {"command": ["pause"]}, 422),
        (HEADERS, {"command": "pause"}, 422),
        (HEADERS, {"command": "pause", "node": 7}, 422),
        (HEADERS, {"command": "pause", "node": "replica9"}, 409),
        (HEADERS, {"command": "pause", "node": "primary"}, 409),
        (HEADERS, {"command": "delay", "node": "replica0"}, 422),
        (HEADERS, {"command": "delay", "node": "replica0", "delay_ms": True}, 422),
        (HEADERS, {"command": "delay", "node": "replica0", "delay_ms": -1}, 409),
        (HEADERS, {"command": "routing", "routing": "luck"}, 422),
        (HEADERS, {"command": "simulator", "rate": 20}, 409),
        (HEADERS, {"command": "scenario", "name": ["race"]}, 422),
    ],
)
async def test_an_invalid_command_is_refused_with_a_reason(
    inspected: Inspected, headers: dict[str, str], body: object, status: int
) -> None:
    """One sentence says why, and nothing is done."""
    got, answer = await command(inspected.client, headers, body)
    assert status == got
    assert answer["error"].endswith((".", "replica9", "replica1", "replays", "ms")) or "one of" in answer["error"]


async def test_a_command_from_the_page_is_executed_and_reported(inspected: Inspected) -> None:
    """It is sent as a browser sends it; the cluster reports its commands from whatever client."""
    client = inspected.client
    origin = {"Origin": f"http://127.0.0.1:{client.port}", "Sec-Fetch-Site": "same-origin"}
    async with viewing(client) as viewer:
        assert (200, "replica0 does not replay until it is resumed") == (
            (answer := await command(client, HEADERS | origin))[0],
            answer[1]["said"],
        )
        paused = await viewer.until("fault", name="pause")
        tick = await viewer.until("tick")
        while not (tick["states"] or {}).get("replica0", {}).get("paused"):
            viewer.events.clear()
            tick = await viewer.until("tick")
        assert 200 == (await command(client, HEADERS, {"command": "heal"}))[0]
        await viewer.until("fault", name="heal", ok=True)
    assert ("replica0", True) == (paused["node"], paused["ok"])


async def test_a_program_without_a_cluster_executes_no_command(
    router: ComparisonRouter, aiohttp_client: AiohttpClient
) -> None:
    """It only views the cluster, and the page shows why."""
    inspector = Inspector(router, Targets(""), [], 0.5)
    app = build_app(router)
    async with inspector.serving(app):
        client = await aiohttp_client(app)
        status, answer = await command(client, HEADERS, {"command": "routing", "routing": "random"})
        async with viewing(client) as viewer:
            hello = viewer.hellos[0]
    assert (403, hello["no_controls"]) == (status, answer["error"])
    assert not hello["controls"]


@pytest.mark.parametrize(
    "path", ["/inspector", "/inspector/events", "/inspector/history", "/inspector/index.html"]
)
async def test_only_clients_on_this_machine_may_view(inspected: Inspected, path: str) -> None:
    """A forwarded request is from elsewhere."""
    assert 403 == await status_of(inspected.client, path, FAR)


async def test_a_page_of_another_site_receives_no_requests(inspected: Inspected) -> None:
    """It may link to the page, and fetch nothing else."""
    elsewhere, own = {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-origin"}
    for path in ("/inspector/events", "/inspector/history"):
        assert [403, 200] == [await status_of(inspected.client, path, headers) for headers in (elsewhere, own)]
    assert 200 == await status_of(inspected.client, "/inspector", elsewhere)


@pytest.mark.parametrize("headers", [FAR, {"Host": "rides.example.com"}])
async def test_a_token_admits_clients_elsewhere(by_token: Client, headers: dict[str, str]) -> None:
    """In a header, or once in the address and then in a cookie for this path only."""
    wrong = headers | {"Rocket-Inspector": SECRET + "!"}
    assert [403, 403, 403] == [
        await status_of(by_token, "/inspector", headers),
        await status_of(by_token, "/inspector?token=no", headers),
        await status_of(by_token, "/inspector", wrong),
    ]
    assert 200 == await status_of(by_token, "/inspector", headers | {"Rocket-Inspector": SECRET})
    path = f"/inspector?token={SECRET}"
    async with by_token.get(path, headers=headers, allow_redirects=False) as response:
        assert (303, "/inspector") == (response.status, response.headers["Location"])
        cookie = response.headers["Set-Cookie"]
    assert {"HttpOnly", "Path=/inspector", "SameSite=Strict"} <= set(cookie.split("; "))
    assert 200 == await status_of(by_token, "/inspector", headers | {"Cookie": cookie.split(";")[0]})


async def test_with_a_token_every_command_needs_it(by_token: Client) -> None:
    """Also on this machine, which other people may use; a cookie is not enough."""
    heal = {"command": "heal"}
    assert 403 == (await command(by_token, HEADERS, heal))[0]
    assert 403 == (await command(by_token, HEADERS | {"Cookie": f"{access.COOKIE}={SECRET}"}, heal))[0]
    assert 200 == (await command(by_token, {"Rocket-Inspector": SECRET}, heal))[0]
    assert 200 == (await command(by_token, FAR | {"Rocket-Inspector": SECRET}, heal))[0]


async def test_the_page_may_load_only_its_own_files(inspected: Inspected) -> None:
    """Nothing from other hosts, no frames, no guessed types, no cached copies."""
    async with inspected.client.get("/inspector") as response:
        assert "text/html; charset=utf-8" == response.headers["Content-Type"]
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "unsafe" not in response.headers["Content-Security-Policy"]
        assert ("nosniff", "no-store", "no-referrer") == tuple(
            response.headers[name] for name in ("X-Content-Type-Options", "Cache-Control", "Referrer-Policy")
        )


@pytest.mark.parametrize("name", ["..", "%2e%2e%2faccess.py", "access.py", "page", "index.html%00"])
async def test_only_the_page_is_served(inspected: Inspected, name: str) -> None:
    """Other files do not exist for clients."""
    assert 404 == await status_of(inspected.client, f"/inspector/{name}")
