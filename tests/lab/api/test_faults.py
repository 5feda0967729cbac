"""The API when something is broken: what clients are told, what is logged, and that it ends gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import aiohttp
import pytest
import pytest_asyncio

from rocket.lab.api.app import build_app, serve
from rocket.lab.api.limits import Bounds
from rocket.lab.app import DATABASE
from rocket.lab.comparison import ComparisonRouter
from tests.support.raw_http import connection

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator
    from pathlib import Path

    import asyncpg
    from aiohttp import ClientResponse, web
    from aiohttp.test_utils import TestClient
    from pytest_aiohttp.plugin import AiohttpClient

    from rocket import Answer, Connection, Work
    from rocket.cluster.cluster import LocalCluster
    from rocket.consistency import Board

    Client: TypeAlias = TestClient[web.Request, web.Application]

DEADLINE_S = 5.0
"""For whatever a test waits for: much longer than it takes."""

SECRET = "a detail of the inside"  # noqa: S105 - nothing is guarded by it

LOCK_USER = "SELECT FROM users WHERE email = $1 FOR UPDATE"
WAITS_FOR_LOCK = """
    SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'rocket'
                      AND datname = current_database())
"""
AT_COMMIT = """
    CREATE TEMP TABLE fuse ();
    CREATE FUNCTION pg_temp.burn() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM {what}; RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER burning AFTER INSERT ON fuse DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION pg_temp.burn();
    INSERT INTO fuse DEFAULT VALUES;
"""
"""Has something done when the transaction is told to commit, and not before."""


class BrokenRouter(ComparisonRouter):
    """Work fails in an unexpected way."""

    async def read(self, work: Work[Any], **options: Any) -> Answer[Any]:
        """Fail a read after it was asked."""

        async def broken(node: Connection) -> None:
            raise LookupError(f"{SECRET}: {await work(node)}")

        return await super().read(broken, **options)

    async def write(self, work: Work[Any], **options: Any) -> Answer[Any]:
        """Fail a write before its commit."""

        async def broken(primary: Connection) -> None:
            await work(primary)
            raise LookupError(SECRET)

        return await super().write(broken, **options)


class RouterWithFuse(ComparisonRouter):
    """Has the server do something at COMMIT."""

    what: ClassVar[str] = ""

    async def write(self, work: Work[Any], **options: Any) -> Answer[Any]:
        """Lay the fuse within the write."""

        async def fused(primary: Connection) -> Any:
            value = await work(primary)
            await primary.execute(AT_COMMIT.format(what=self.what))
            return value

        return await super().write(fused, **options)


def with_fuse(what: str) -> type[RouterWithFuse]:
    """Return a kind of router that has the server do this at COMMIT."""
    return type("RouterWithFuse", (RouterWithFuse,), {"what": what})


@contextlib.asynccontextmanager
async def api(
    dsn: str,
    kind: type[ComparisonRouter],
    board: Board,
    aiohttp_client: AiohttpClient,
    bounds: Bounds | None = None,
) -> AsyncIterator[Client]:
    """Run an API on a primary alone."""
    async with await kind.open({"primary": dsn}, board=board) as router:
        yield await aiohttp_client(build_app(router, bounds=bounds))


async def refusal(response: ClientResponse) -> tuple[int, str]:
    """Return the status and the text of an error, which is JSON, holds nothing else and is not cached."""
    body = await response.json()
    assert set(body) == {"error"}
    assert response.headers["Cache-Control"] == "no-store"
    return response.status, body["error"]


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages that were logged together with a traceback."""
    return [record.getMessage() for record in caplog.records if record.exc_info]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged as an error."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest_asyncio.fixture
async def user(client: Client, email: str) -> str:
    """Return the e-mail address of a user."""
    await client.post("/users", json={"email": email})
    return email


@pytest.fixture
def dsn(cluster: LocalCluster) -> str:
    """Return the address of a primary that works."""
    return cluster.primary.dsn(DATABASE)


@pytest.fixture
def dsn_of_nothing(tmp_path: Path) -> str:
    """Return an address at which there is no server, nor a directory to look for its socket in."""
    return f"postgresql://postgres@/rocket?host={tmp_path / 'nowhere'}"


class TestUnforeseen:
    """Unexpected errors."""

    @pytest.mark.parametrize(("method", "path"), [("GET", "/rides/1"), ("GET", "/rides"), ("POST", "/rides")])
    async def test_it_is_a_500_that_tells_nothing(
        self,
        *,
        dsn: str,
        user: str,
        board: Board,
        aiohttp_client: AiohttpClient,
        caplog: pytest.LogCaptureFixture,
        method: str,
        path: str,
    ) -> None:
        """The client learns that it happened; what it was stands in the log, once."""
        async with api(dsn, BrokenRouter, board, aiohttp_client) as client:
            data = {"distance": "1"} if method == "POST" else None
            response = await client.request(method, path, data=data, headers={"Authorization": user})
            assert await refusal(response) == (500, "Internal error.")
        assert SECRET not in str(response.headers)
        assert tracebacks(caplog) == [f"{method} {path} failed"]
        assert SECRET in caplog.text

    async def test_the_connection_serves_on(
        self, dsn: str, user: str, board: Board, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """One request that failed is no reason to fail others."""
        async with api(dsn, BrokenRouter, board, aiohttp_client) as client:
            await client.get("/rides", headers={"Authorization": user})
            assert (await client.get("/readyz")).status == 200
        assert len(errors(caplog)) == 1

    async def test_a_path_writes_no_lines_of_its_own_into_the_log(
        self, dsn: str, user: str, board: Board, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What the client chose is logged as it was encoded."""
        async with api(dsn, BrokenRouter, board, aiohttp_client) as client:
            await client.get("/rides/1%0Aforged", headers={"Authorization": user})
        assert tracebacks(caplog) == ["GET /rides/1%0Aforged failed"]


class TestPrimaryAway:
    """No server at the primary's address."""

    @pytest.mark.parametrize(
        ("method", "path", "data"),
        [
            ("GET", "/rides/1", None),
            ("GET", "/rides", None),
            ("POST", "/rides", {"distance": "1"}),
            ("POST", "/users", {"email": "a@example.com"}),
        ],
    )
    async def test_requests_are_refused_at_once(
        self,
        *,
        dsn_of_nothing: str,
        board: Board,
        aiohttp_client: AiohttpClient,
        caplog: pytest.LogCaptureFixture,
        method: str,
        path: str,
        data: dict[str, str] | None,
    ) -> None:
        """A 503 with Retry-After comes without waiting for anything, and is no error of ours."""
        async with api(dsn_of_nothing, ComparisonRouter, board, aiohttp_client) as client, asyncio.timeout(1):
            response = await client.request(method, path, data=data, headers={"Authorization": "a@example.com"})
            assert await refusal(response) == (503, "No database server can answer this now. Please try again.")
        assert response.headers["Retry-After"] == "1"
        assert errors(caplog) == []

    async def test_the_log_says_what_was_wrong(
        self, dsn_of_nothing: str, board: Board, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A warning without a traceback tells which request failed, and why; the client is not told."""
        async with api(dsn_of_nothing, ComparisonRouter, board, aiohttp_client) as client:
            response = await client.get("/rides", headers={"Authorization": "a@example.com"})
        assert any(message.startswith("GET /rides: the primary does not answer") for message in caplog.messages)
        assert tracebacks(caplog) == []
        assert "nowhere" not in await response.text()


class TestOutcomeUnknown:
    """Writes that may have happened, or not."""

    async def test_a_connection_lost_during_commit_is_a_504(
        self, dsn: str, user: str, board: Board, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The client is told that it cannot be told, rather than to try again."""
        fuse = with_fuse("pg_terminate_backend(pg_backend_pid())")
        async with api(dsn, fuse, board, aiohttp_client) as client:
            response = await client.post("/rides", data={"distance": "1"}, headers={"Authorization": user})
            assert await refusal(response) == (504, "The outcome of this write is unknown.")
            metrics = await (await client.get("/metrics")).text()
        assert "Retry-After" not in response.headers
        assert errors(caplog) == []
        assert 'rocket_writes_total{outcome="unknown"} 1.0' in metrics

    async def test_an_error_at_commit_is_not_in_doubt(
        self, dsn: str, client: Client, user: str, board: Board, aiohttp_client: AiohttpClient
    ) -> None:
        """A COMMIT that the server refuses has not happened: nothing is written."""
        async with api(dsn, with_fuse("1 / 0"), board, aiohttp_client) as failing:
            response = await failing.post("/rides", data={"distance": "1"}, headers={"Authorization": user})
        assert response.status == 500
        page = await client.get("/rides", headers={"Authorization": user})
        assert (await page.json())["rides"] == []

    async def test_a_request_cut_off_during_commit_is_a_504(
        self, dsn: str, user: str, board: Board, aiohttp_client: AiohttpClient
    ) -> None:
        """The last resort against slow requests does not claim that nothing was written when that is not known."""
        fuse, bounds = with_fuse("pg_sleep(1)"), Bounds(request_s=0.2)
        async with api(dsn, fuse, board, aiohttp_client, bounds) as client:
            response = await client.post("/rides", data={"distance": "1"}, headers={"Authorization": user})
            assert await refusal(response) == (504, "The outcome of this write is unknown.")


class TestBodyThatDoesNotCome:
    """Requests that announce a body and keep it."""

    @pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded"])
    @pytest.mark.parametrize("length", ["Content-Length: 20", "Transfer-Encoding: chunked"])
    async def test_it_is_a_408(
        self,
        *,
        router: ComparisonRouter,
        listening: socket.socket,
        caplog: pytest.LogCaptureFixture,
        content_type: str,
        length: str,
    ) -> None:
        """No client is waited for without end."""
        head = f"POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n{length}\r\n\r\n"
        app = build_app(router, bounds=Bounds(body_s=0.05, drain_s=0.1))
        async with serve(app, listening), connection(listening.getsockname()) as (reader, writer):
            writer.write(head.encode())
            answer = await reader.readuntil(b"}")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert answer.endswith(b'\r\n\r\n{"error": "The request body did not arrive in time."}')
        assert errors(caplog) == []


class TestIdleConnections:
    """Connections on which nothing is asked."""

    @pytest.mark.parametrize("requests", [0, 1])
    async def test_they_are_closed_after_a_while(
        self, router: ComparisonRouter, listening: socket.socket, requests: int
    ) -> None:
        """A client that has gone silent, before its first request or after it, keeps no connection for good."""
        async with (
            serve(build_app(router, bounds=Bounds(keepalive_s=0.1)), listening),
            connection(listening.getsockname()) as (reader, writer),
            asyncio.timeout(1),
        ):
            for _ in range(requests):
                writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await reader.readuntil(b"}")
            assert await reader.read() == b""


@contextlib.asynccontextmanager
async def user_locked(cluster: LocalCluster, email: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Hold a lock on a user's row, which every write of that user waits for."""
    holder = await cluster.primary.connect(DATABASE)
    try:
        await holder.execute("BEGIN")
        await holder.fetch(LOCK_USER, email)
        yield holder
    finally:
        holder.terminate()


async def until_a_lock_is_waited_for(connection: asyncpg.Connection[Any]) -> None:
    """Wait until a request stands before a lock."""
    while not await connection.fetchval(WAITS_FOR_LOCK):
        await asyncio.sleep(0.01)


async def said_by(address: tuple[str, int], path: str) -> tuple[int, Any]:
    """Ask on a connection of its own."""
    async with (
        aiohttp.ClientSession(f"http://{address[0]}:{address[1]}") as session,
        session.get(path) as response,
    ):
        return response.status, await response.json()


class TestDraining:
    """`serve` at its end."""

    async def test_a_request_in_flight_is_still_answered(
        self, router: ComparisonRouter, cluster: LocalCluster, user: str, listening: socket.socket
    ) -> None:
        """A request that waits for the database is answered; meanwhile `/readyz` reports the shutdown."""
        address = listening.getsockname()
        async with (
            asyncio.timeout(DEADLINE_S),
            asyncio.TaskGroup() as group,
            aiohttp.ClientSession(f"http://127.0.0.1:{address[1]}") as session,
            user_locked(cluster, user) as holder,
            contextlib.AsyncExitStack() as server,
        ):
            await server.enter_async_context(serve(build_app(router), listening))
            request = group.create_task(_ride(session, user), name="request")
            await until_a_lock_is_waited_for(holder)
            shutdown = group.create_task(server.aclose(), name="shutdown")
            while (await said_by(address, "/readyz"))[0] != 503:
                await asyncio.sleep(0.01)
            status, body = await said_by(address, "/readyz")
            assert (status, body["ready"], body["missing"][0]["code"]) == (503, False, "draining")
            assert (await said_by(address, "/livez"))[0] == 200
            assert not request.done()
            assert not shutdown.done()
            await holder.execute("ROLLBACK")
            assert await request == 201
            await shutdown
            with pytest.raises(aiohttp.ClientConnectorError):
                await said_by(address, "/livez")

    async def test_a_request_that_never_ends_does_not_hold_up_the_end(
        self,
        router: ComparisonRouter,
        cluster: LocalCluster,
        user: str,
        listening: socket.socket,
    ) -> None:
        """What outlasts the time to drain is cut off."""
        async with (
            asyncio.timeout(DEADLINE_S),
            asyncio.TaskGroup() as group,
            aiohttp.ClientSession(f"http://127.0.0.1:{listening.getsockname()[1]}") as session,
            user_locked(cluster, user) as holder,
        ):
            async with serve(build_app(router, bounds=Bounds(drain_s=0.1)), listening):
                request = group.create_task(_outcome(session, user), name="request")
                await until_a_lock_is_waited_for(holder)
            assert await request == "ServerDisconnectedError"

    async def test_an_idle_connection_does_not_hold_up_the_end(
        self, router: ComparisonRouter, listening: socket.socket
    ) -> None:
        """A client that keeps its connection open is not waited for."""
        async with aiohttp.ClientSession(f"http://127.0.0.1:{listening.getsockname()[1]}") as session:
            async with serve(build_app(router), listening):
                response = await session.get("/livez")
                await response.read()
                began = asyncio.get_running_loop().time()
            assert asyncio.get_running_loop().time() - began < 1


async def _ride(session: aiohttp.ClientSession, email: str) -> int:
    async with session.post("/rides", data={"distance": "1"}, headers={"Authorization": email}) as response:
        return response.status


async def _outcome(session: aiohttp.ClientSession, email: str) -> str:
    try:
        return str(await _ride(session, email))
    except aiohttp.ClientError as error:
        return type(error).__name__
