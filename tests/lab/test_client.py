"""The client of the API, against a server that answers, breaks off, or is not there."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from aiohttp import web

from rocket.lab.client import AnswerTimeout, Api, ConnectionLost, NoAnswer, NotConnected, UnexpectedAnswer

if TYPE_CHECKING:
    from pytest_aiohttp.plugin import AiohttpServer

DEADLINE_S = 10.0


class Stub:
    """Notes what it is asked, and answers by the path."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, list[str], list[str], str]] = []
        self.ports: list[int] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request."""
        assert request.transport is not None
        self.ports.append(request.transport.get_extra_info("peername")[1])
        headers = request.headers
        self.requests.append(
            (
                request.method,
                headers.getall("Authorization", []),
                headers.getall("Rocket-Session", []),
                await request.text(),
            )
        )
        match request.path:
            case "/drop":
                request.transport.abort()
            case "/break-off":
                response = web.StreamResponse()
                response.content_length = 100
                await response.prepare(request)
                await response.write(b"half")
                request.transport.abort()
                return response
            case "/wait":
                await asyncio.sleep(DEADLINE_S)
            case "/echo":
                return web.json_response(dict(headers))
            case "/garble":
                return web.Response(body=b'{"distance": \xff')
        answered = {
            "Rocket-Session": "t", "Rocket-Served-By": "replica0", "Rocket-Served-As": "replica",
            "Rocket-Route-Reason": "caught-up", "Rocket-Lost": "perhaps",
        }  # fmt: skip
        return web.json_response({"id": 1}, status=201 if request.method == "POST" else 200, headers=answered)


@pytest.fixture
def stub() -> Stub:
    """Return what the server does."""
    return Stub()


@pytest_asyncio.fixture
async def url(stub: Stub, aiohttp_server: AiohttpServer) -> str:
    """Serve, and return where."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", stub.answer)
    return str((await aiohttp_server(app)).make_url("/"))


async def test_requests_carry_user_tokens_and_body(stub: Stub, url: str) -> None:
    """Several tokens are several headers, since each may be another session's."""
    async with Api(url) as api:
        await api.get("/rides/1")
        await api.get("/rides/1", user="a@b", tokens=["t", "u"])
        await api.post("/rides", user="a@b", form={"distance": "1.5"})
        await api.post("/users", json={"email": "a@b"})
    assert [
        ("GET", [], [], ""),
        ("GET", ["a@b"], ["t", "u"], ""),
        ("POST", ["a@b"], [], "distance=1.5"),
        ("POST", [], [], '{"email": "a@b"}'),
    ] == stub.requests


async def test_a_read_says_what_it_asks_for(url: str) -> None:
    """By a header, which there is not where it asks for nothing else than its session's."""
    async with Api(url) as api:
        for asked in ("global", None):
            sent = (await api.get("/echo", freshness=asked)).json()
            assert asked == sent.get("Rocket-Freshness")


async def test_answer_shows_what_the_api_says_of_the_read(url: str) -> None:
    """Each header has a name here."""
    async with Api(url) as api:
        answer = await api.post("/rides")
    assert (201, True, {"id": 1}, '{"id": 1}') == (answer.status, answer.ok, answer.json(), answer.text)
    assert ("t", "replica0", "replica", "caught-up") == (answer.token, answer.node, answer.role, answer.reason)
    assert "perhaps" == answer.possible_loss
    assert answer is answer.expect(HTTPStatus.CREATED)
    with pytest.raises(UnexpectedAnswer, match=r'^201 \{"id": 1\}$'):
        answer.expect(HTTPStatus.OK)


async def test_a_whole_url_may_stand_for_the_path(url: str) -> None:
    """Where there is no one server that all is asked of."""
    async with Api() as api:
        assert (await api.get(f"{url}rides/1")).ok


async def test_a_body_that_is_no_json_is_a_value_error(url: str) -> None:
    """Its text is still there, for a log line."""
    async with Api(url) as api:
        answer = await api.get("/garble")
    with pytest.raises(ValueError, match="decode"):
        answer.json()
    assert '{"distance": \N{REPLACEMENT CHARACTER}' == answer.text


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        ("/drop", ConnectionLost, "ServerDisconnectedError"),
        ("/break-off", ConnectionLost, "ClientPayloadError"),
        ("/wait", AnswerTimeout, r"^no answer within 0.3 s$"),
    ],
)
async def test_each_way_to_get_no_answer_has_an_error(
    url: str, path: str, error: type[NoAnswer], text: str
) -> None:
    """What is known of the request differs."""
    async with Api(url, timeout_s=0.3) as api:
        with pytest.raises(error, match=text):
            await api.post(path)


async def test_a_server_that_does_not_listen_has_an_error_of_its_own() -> None:
    """Nothing was sent; the system's words say why."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        async with Api(f"http://127.0.0.1:{unheard.getsockname()[1]}") as api:
            with pytest.raises(NotConnected, match=r"^Connection refused$"):
                await api.get("/")


async def test_an_address_that_is_none_is_no_answer() -> None:
    """As a name without a host."""
    async with Api("http://") as api:
        with pytest.raises(NoAnswer, match="InvalidUrl"):
            await api.get("/")


@pytest.mark.parametrize(("reconnect", "connections"), [(False, 1), (True, 3)])
async def test_connections_are_kept_unless_each_request_shall_have_its_own(
    stub: Stub, url: str, reconnect: bool, connections: int
) -> None:
    """One after the other, three requests need one."""
    async with Api(url, reconnect=reconnect) as api:
        for _ in range(3):
            await api.get("/")
    assert connections == len(set(stub.ports))


@pytest.mark.parametrize(("retries", "asked"), [(True, 3), (False, 2)])
async def test_a_read_is_sent_again_only_where_that_is_wanted(
    stub: Stub, url: str, retries: bool, asked: int
) -> None:
    """A kept connection that is lost: aiohttp tries another one, unless what is sent again has to be counted."""
    async with Api(url, retries=retries) as api:
        await api.get("/")
        with pytest.raises(ConnectionLost):
            await api.get("/drop")
    assert asked == len(stub.requests)
