"""Session tokens over HTTP: what a client brings back binds every node that may answer it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import pytest_asyncio
from multidict import CIMultiDict

from rocket import Lsn, Policy
from rocket.consistency import Board, SessionToken, merged
from rocket.lab.api.app import build_app
from rocket.lab.api.rides import INSERT_RIDE
from rocket.lab.app import DATABASE
from rocket.lab.comparison import ComparedCommits, ComparisonRouter, Routing
from rocket.routing.commits import Commits
from rocket.routing.observer import Observer
from rocket.web.carriers import HEADER
from tests.support.commits import Unsettled, committing
from tests.support.servers import dsns, paused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from aiohttp import ClientResponse, web
    from aiohttp.test_utils import TestClient
    from pytest_aiohttp.plugin import AiohttpClient

    from rocket.cluster.cluster import LocalCluster

    Client: TypeAlias = TestClient[web.Request, web.Application]
    AnotherApi: TypeAlias = Callable[..., Awaitable[Client]]

REPLICAS = {"replica0", "replica1"}
COMPARISONS = [Routing.ARTICLE, Routing.RANDOM, Routing.PRIMARY]

DEADLINE_S = 5.0
"""For whatever a test waits for: much longer than it takes."""

WRITE_FLOOR = Lsn.parse("0/10")
INVALID = (400, {"error": "The session token in Rocket-Session is invalid."})
UNAVAILABLE = (503, {"error": "No database server can answer this now. Please try again."})

WAITS_FOR_LOCK = """
    SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'rocket'
                      AND datname = current_database())
"""

REQUESTS = [
    ("GET", "/rides/1", None),
    ("GET", "/rides", None),
    ("POST", "/rides", {"distance": 1.5}),
    ("POST", "/users", {"email": "unwritten@example.com"}),
]
"""One for each handler that takes a token."""


def headers(email: str, *tokens: SessionToken | str) -> CIMultiDict[str]:
    """Return what a session sends: who asks, and a header for each token."""
    return CIMultiDict([("Authorization", email), *((HEADER, str(token)) for token in tokens)])


async def ask(
    client: Client, method: str, path: str, email: str, *tokens: SessionToken | str, body: object = None
) -> ClientResponse:
    """Send a request of a session."""
    return await client.request(method, path, headers=headers(email, *tokens), json=body)


async def read(client: Client, email: str, path: str, *tokens: SessionToken | str) -> ClientResponse:
    """Read as a session."""
    return await ask(client, "GET", path, email, *tokens)


async def sign_up(client: Client, email: str) -> SessionToken:
    """Make a user and return the token of that write."""
    response = await client.post("/users", json={"email": email})
    assert response.status == HTTPStatus.CREATED
    return handed(response)


async def write(client: Client, email: str, *tokens: SessionToken | str) -> tuple[str, SessionToken]:
    """Write a ride and return its path, with the session's next token."""
    response = await ask(client, "POST", "/rides", email, *tokens, body={"distance": 12.3})
    assert response.status == HTTPStatus.CREATED
    return f"/rides/{(await response.json())['id']}", handed(response)


def handed(response: ClientResponse) -> SessionToken:
    """Return the one token that an answer hands out."""
    (text,) = response.headers.getall(HEADER)
    return SessionToken.parse(text)


def served_by(response: ClientResponse) -> str:
    """Return which node answered, of an answer that shows what was asked for."""
    assert response.status == HTTPStatus.OK
    return response.headers["Rocket-Served-By"]


def route(response: ClientResponse) -> tuple[str, str]:
    """Return who answered, and why it was that node, of an answer that shows what was asked for."""
    return served_by(response), response.headers["Rocket-Route-Reason"]


async def said(response: ClientResponse) -> tuple[int, Any]:
    """Return the status and the body."""
    return response.status, await response.json()


async def rides_of(client: Client, email: str) -> list[str]:
    """Return the paths of all rides of a user."""
    response = await read(client, email, "/rides?limit=100")
    assert response.status == HTTPStatus.OK
    return [f"/rides/{ride['id']}" for ride in (await response.json())["rides"]]


async def observe(cluster: LocalCluster, observer: Observer) -> None:
    """Fill the board with replicas that have replayed everything so far."""
    await cluster.wait_for_catchup()
    await observer.run_once()


async def replayed(observer: Observer, board: Board, name: str, floor: Lsn) -> None:
    """Observe until one replica has replayed a floor, whatever the others do."""
    async with asyncio.timeout(DEADLINE_S):
        while (status := board.replica(name)) is None or status.replay_lsn < floor:
            await observer.run_once()


@contextlib.contextmanager
def only(board: Board, name: str) -> Iterator[None]:
    """Show a single replica on the board."""
    hidden = [status for status in board.replicas if status.name != name]
    for status in hidden:
        board.forget(status.name)
    yield
    for status in hidden:
        board.publish(status)


async def read_on(client: Client, board: Board, name: str, email: str, token: SessionToken) -> SessionToken:
    """Read on a certain replica, and return the token that it hands out."""
    with only(board, name):
        response = await read(client, email, "/rides", token)
    assert served_by(response) == name
    return handed(response)


@contextlib.asynccontextmanager
async def write_under_way(cluster: LocalCluster, email: str) -> AsyncIterator[str]:
    """Hold a ride's write before its commit, with the locks that it has then, and return the ride's path."""
    connection = await cluster.primary.connect(DATABASE)
    try:
        async with connection.transaction():
            path = f"/rides/{await connection.fetchval(INSERT_RIDE, email, 1.5, None)}"
            await connection.execute(Commits().statements(email).removesuffix("COMMIT"))
            yield path
    finally:
        await connection.close()


async def waits_for_lock(cluster: LocalCluster, reading: asyncio.Task[ClientResponse]) -> bool:
    """Return whether a read waits for a lock, rather than ends."""
    connection = await cluster.primary.connect(DATABASE)
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not reading.done():
                if await connection.fetchval(WAITS_FOR_LOCK):
                    return True
                await asyncio.sleep(0.01)
        return False
    finally:
        await connection.close()


async def read_during_write(
    client: Client, cluster: LocalCluster, email: str, *tokens: SessionToken
) -> tuple[bool, bool, ClientResponse]:
    """Read a user's rides while one is being written.

    Return whether the read waited, whether it shows that ride, and its answer.
    """
    async with asyncio.TaskGroup() as group, write_under_way(cluster, email) as path:
        reading = group.create_task(read(client, email, "/rides", *tokens), name="read")
        waited = await waits_for_lock(cluster, reading)
    response = reading.result()
    assert response.status == HTTPStatus.OK
    shown = [f"/rides/{ride['id']}" for ride in (await response.json())["rides"]]
    return waited, path in shown, response


@pytest_asyncio.fixture
async def user(client: Client, email: str) -> str:
    """Return the e-mail address of a user who has no rides yet."""
    await sign_up(client, email)
    return email


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    """Return an address at which there is no server, nor a directory to look for its socket in."""
    return f"postgresql://postgres@/rocket?host={tmp_path / 'nowhere'}"


@pytest_asyncio.fixture
async def another_api(cluster: LocalCluster, aiohttp_client: AiohttpClient) -> AsyncIterator[AnotherApi]:
    """Make clients of further APIs on the same cluster, each with a router of its own."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            board: Board, *, primary: str | None = None, commits: type[Commits] = ComparedCommits
        ) -> Client:
            router = await committing(ComparisonRouter, commits).open(
                dsns(cluster) if primary is None else dsns(cluster) | {"primary": primary},
                board=board,
                policy=Policy(lease_s=60.0, primary_lease_s=60.0),  # boards of these tests grow old
            )
            await stack.enter_async_context(router)
            return await aiohttp_client(build_app(router))

        yield make


@pytest_asyncio.fixture
async def old_board(cluster: LocalCluster) -> Board:
    """Return a board with what was seen of the caught-up replicas just now, and of nothing later."""
    board = Board()
    observer = Observer(
        dsns(cluster),
        board,
        interval_s=1.0,
    )
    await observe(cluster, observer)
    observer.close()
    return board


class TestHandingOut:
    """Which answers carry a token."""

    async def answers(self, client: Client, cluster: LocalCluster, email: str) -> list[ClientResponse]:
        """Return one answer of every kind that tells of users or rides."""
        responses = [
            await client.post("/users", json={"email": email}),
            await client.post("/users", json={"email": email}),
            await ask(client, "POST", "/rides", email, body={"distance": 1.5}),
        ]
        await cluster.wait_for_catchup()
        ride_id = (await responses[-1].json())["id"]
        responses += [await read(client, email, path) for path in (f"/rides/{ride_id}", "/rides/0", "/rides")]
        assert [response.status for response in responses] == [201, 200, 201, 200, 404, 200]
        return responses

    @pytest.mark.parametrize("observed", [True, False])
    async def test_every_answer_of_a_never_stale_api_carries_one(
        self, client: Client, cluster: LocalCluster, observer: Observer, email: str, *, observed: bool
    ) -> None:
        """Writes, reads on replicas and on the primary, and even what was not found hand out a sound token."""
        if observed:
            await observe(cluster, observer)
        for response in await self.answers(client, cluster, email):
            assert handed(response).write_floor < Lsn.PENDING

    @pytest.mark.parametrize("routing", COMPARISONS)
    async def test_no_answer_of_another_routing_carries_one(
        self, client: Client, router: ComparisonRouter, cluster: LocalCluster, email: str, routing: Routing
    ) -> None:
        """What guarantees nothing promises nothing, also to a client that sends a token."""
        token = await sign_up(client, f"other-{email}")
        await router.switch(routing)
        responses = await self.answers(client, cluster, email)
        responses.append(await read(client, email, "/rides", token))
        responses.append(await ask(client, "POST", "/rides", email, token, body={"distance": 1.5}))
        assert [HEADER in response.headers for response in responses] == [False] * 8

    async def test_a_token_names_the_replica_that_was_read(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board
    ) -> None:
        """After a replica read it names the replica; after a read on the primary it names none."""
        path, token = await write(client, user)
        assert (None, Lsn(0)) == (token.node, token.read_floor)
        on_primary = await read(client, user, path, token)
        assert ("primary", None) == (served_by(on_primary), handed(on_primary).node)
        await observe(cluster, observer)
        on_replica = await read(client, user, path, token)
        status = board.replica(served_by(on_replica))
        assert status is not None
        after = handed(on_replica)
        assert (status.name, status.incarnation) == (after.node, after.incarnation)
        assert after.write_floor == token.write_floor <= status.replay_lsn <= after.highest_floor < Lsn.PENDING


class TestReadYourWrites:
    """The token alone, wherever the next request goes."""

    @pytest.mark.parametrize("kind", ["ride", "page", "not found"])
    async def test_a_read_on_a_replica_costs_the_primary_nothing(
        self,
        *,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        board: Board,
        another_api: AnotherApi,
        nowhere: str,
        kind: str,
    ) -> None:
        """A caught-up replica answers a session while there is no primary to ask."""
        ride, token = await write(client, user)
        await observe(cluster, observer)
        path = {"ride": ride, "page": "/rides", "not found": "/rides/0"}[kind]
        lonely = await another_api(board, primary=nowhere)
        response = await read(lonely, user, path, token)
        assert response.status == (404 if kind == "not found" else 200)
        assert response.headers["Rocket-Served-By"] in REPLICAS
        assert await said(await read(lonely, user, path)) == UNAVAILABLE

    async def test_a_session_that_goes_on_reading_costs_the_primary_nothing(
        self,
        *,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        board: Board,
        another_api: AnotherApi,
        nowhere: str,
    ) -> None:
        """Each answer's token is good for the next read."""
        path, token = await write(client, user)
        await observe(cluster, observer)
        lonely = await another_api(board, primary=nowhere)
        for _ in range(5):
            response = await read(lonely, user, path, token)
            assert served_by(response) in REPLICAS
            token = handed(response)

    async def test_a_write_is_read_through_another_api_whose_board_is_old(
        self, *, client: Client, user: str, cluster: LocalCluster, old_board: Board, another_api: AnotherApi
    ) -> None:
        """It cannot know who has caught up, so the primary answers, and not with a 404."""
        other = await another_api(old_board)
        async with paused(cluster):
            path, token = await write(client, user)
            assert route(await read(other, user, path, token)) == ("primary", "not-caught-up")
        await cluster.wait_for_catchup()
        assert route(await read(other, user, path, token)) == ("primary", "not-caught-up")

    async def test_a_write_is_read_on_the_replica_that_the_other_api_knows_to_have_it(
        self,
        *,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        board: Board,
        old_board: Board,
        another_api: AnotherApi,
    ) -> None:
        """One replica is behind and one status is old: the read goes to the other replica."""
        other = await another_api(old_board)
        async with paused(cluster, "replica1"):
            path, token = await write(client, user)
            await replayed(observer, board, "replica0", token.write_floor)
            status = board.replica("replica0")
            assert status is not None
            old_board.publish(status)
            for _ in range(10):
                assert served_by(await read(other, user, path, token)) == "replica0"

    async def test_without_its_write_floor_the_token_would_be_stale(
        self, *, client: Client, user: str, cluster: LocalCluster, old_board: Board, another_api: AnotherApi
    ) -> None:
        """The control: on the same steps, a token from before the write lets a replica say 404."""
        other = await another_api(old_board)
        before = await write(client, user)
        await cluster.wait_for_catchup()
        async with paused(cluster):
            path, token = await write(client, user)
            early = replace(token, write_floor=WRITE_FLOOR)
            response = await read(other, user, path, early)
        assert before[1].write_floor < token.write_floor
        assert response.status == HTTPStatus.NOT_FOUND
        assert response.headers["Rocket-Served-By"] in REPLICAS


class TestMonotonicReads:
    """What a session has seen stays seen."""

    async def test_a_replica_behind_the_one_that_was_read_is_not_read(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board
    ) -> None:
        """With the replica that was ahead gone, the primary shows the ride; the one behind would not."""
        _, before = await write(client, user)
        await observe(cluster, observer)
        async with paused(cluster, "replica1"):
            path, ahead = await write(client, user)
            await replayed(observer, board, "replica0", ahead.write_floor)
            after = await read_on(client, board, "replica0", user, before)
            assert ahead.write_floor <= after.highest_floor
            with only(board, "replica1"):
                moved = await read(client, user, path, after)
                unbound = await read(client, user, path, before)
        assert route(moved) == ("primary", "not-caught-up")
        assert unbound.status == HTTPStatus.NOT_FOUND
        assert unbound.headers["Rocket-Served-By"] == "replica1"

    @pytest.mark.parametrize("name", sorted(REPLICAS))
    async def test_a_session_stays_on_its_replica_while_others_write(
        self,
        *,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        board: Board,
        name: str,
    ) -> None:
        """Its read floor lies beyond that replica's last status, but does not bind there."""
        path, token = await write(client, user)
        await observe(cluster, observer)
        other = f"other-{user}"
        await sign_up(client, other)
        for _ in range(5):
            await write(client, other)
            await cluster.wait_for_catchup()
            token = await read_on(client, board, name, user, token)
            status = board.replica(name)
            assert status is not None
            assert status.replay_lsn < token.highest_floor < Lsn.PENDING
            assert route(await read(client, user, path, token)) == (name, "caught-up")
        elsewhere = replace(token, node=None, incarnation=None)
        assert route(await read(client, user, path, elsewhere)) == ("primary", "not-caught-up")

    async def test_a_token_of_an_earlier_incarnation_binds_on_the_same_replica(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board
    ) -> None:
        """A replica that came back may have come back behind."""
        path, token = await write(client, user)
        await observe(cluster, observer)
        await write(client, user)
        await cluster.wait_for_catchup()
        token = await read_on(client, board, "replica0", user, token)
        earlier = SessionToken.parse(str(token).rpartition("~")[0] + "~1@1")
        assert route(await read(client, user, path, earlier)) == ("primary", "not-caught-up")

    async def test_a_write_keeps_the_session_on_its_replica(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board
    ) -> None:
        """The next write's token still names the replica, with the floors of both."""
        _, token = await write(client, user)
        await observe(cluster, observer)
        before = await read_on(client, board, "replica0", user, token)
        _, after = await write(client, user, before)
        assert after == replace(before, write_floor=after.write_floor)
        assert after.write_floor > before.write_floor

    async def test_a_user_whom_the_replica_lacks_is_confirmed_on_the_primary(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """A token that does not cover the user's making is no 401; the next token covers both."""
        _, token = await write(client, user)
        await observe(cluster, observer)
        newcomer = f"new-{user}"
        async with paused(cluster):
            made = await sign_up(client, newcomer)
            await observer.run_once()
            response = await read(client, newcomer, "/rides", token)
            ride = await read(client, newcomer, "/rides/0", token)
        assert served_by(response) == "primary"
        assert await response.json() == {"rides": [], "next": None}
        assert ride.status == HTTPStatus.NOT_FOUND
        for after in (handed(response), handed(ride)):
            assert after.highest_floor >= max(made.write_floor, token.write_floor)

    async def test_confirming_a_user_loses_nothing_that_was_read(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board
    ) -> None:
        """The read floor of the session's token binds wherever the next read goes."""
        _, token = await write(client, user)
        await observe(cluster, observer)
        newcomer = f"new-{user}"
        async with paused(cluster):
            made = await sign_up(client, newcomer)
            token = await read_on(client, board, "replica0", user, token)
            after = handed(await read(client, newcomer, "/rides", token))
        assert after.highest_floor >= made.write_floor
        assert after.floor_on("replica0", token.incarnation) >= token.highest_floor > token.write_floor

    async def test_a_user_whom_the_primary_does_not_know_is_refused(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """With a token as well as without."""
        _, token = await write(client, user)
        await observe(cluster, observer)
        response = await read(client, f"unknown-{user}", "/rides", token)
        assert await said(response) == (401, {"error": "Credentials in Authorization were invalid."})

    async def test_a_user_whom_the_replica_lacks_is_no_401_without_a_primary(
        self,
        *,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        board: Board,
        another_api: AnotherApi,
        nowhere: str,
    ) -> None:
        """Without the confirmation there is no 401."""
        _, token = await write(client, user)
        await observe(cluster, observer)
        lonely = await another_api(board, primary=nowhere)
        assert await said(await read(lonely, f"unknown-{user}", "/rides", token)) == UNAVAILABLE


class TestSeveralTokens:
    """What a client with concurrent requests brings."""

    @pytest.mark.parametrize("joined", [True, False])
    async def test_tokens_of_two_replicas_bind_everywhere(
        self,
        *,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        board: Board,
        joined: bool,
    ) -> None:
        """Repeated or joined by commas, neither replica serves before it has what the other one showed."""
        path, token = await write(client, user)
        await observe(cluster, observer)
        await write(client, user)
        await cluster.wait_for_catchup()
        both = [await read_on(client, board, name, user, token) for name in sorted(REPLICAS)]
        tokens = [", ".join(map(str, both))] if joined else both
        for alone in both:
            assert served_by(await read(client, user, path, alone)) == alone.node
        merged = await read(client, user, path, *tokens)
        assert route(merged) == ("primary", "not-caught-up")
        assert handed(merged).highest_floor >= max(alone.highest_floor for alone in both)
        await observe(cluster, observer)
        assert served_by(await read(client, user, path, *tokens)) in REPLICAS

    async def test_tokens_of_two_writes_cover_both(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """The order in which they are sent does not matter."""
        _, first = await write(client, user)
        await observe(cluster, observer)
        async with paused(cluster):
            path, second = await write(client, user)
            for tokens in ([first, second], [second, first]):
                assert served_by(await read(client, user, path, *tokens)) == "primary"

    async def test_sixteen_are_taken_and_more_are_not(self, client: Client, user: str) -> None:
        """There is a bound to what a client can have us read."""
        path, token = await write(client, user)
        assert served_by(await read(client, user, path, *[token] * 16)) == "primary"
        assert await said(await read(client, user, path, *[token] * 17)) == INVALID
        assert await said(await read(client, user, path, ",".join([str(token)] * 17))) == INVALID

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
    def test_of_several_epochs_the_latest_counts(self, order: tuple[int, int, int]) -> None:
        """LSNs of an earlier epoch are not compared with those of a later one, whichever comes first."""
        texts = ("9-aaaaaaaaaa~F/0~F/0~replica0~1@1", "10-bbbbbbbbbb~0/1~0/2", "10-bbbbbbbbbb~0/2~0/1")
        tokens = merged(SessionToken.parse(f"1~{texts[index]}") for index in order)
        assert [str(token) for token in tokens] == ["1~10-bbbbbbbbbb~0/2~0/2", f"1~{texts[0]}"]

    async def test_of_two_epochs_on_one_timeline_none_counts(self, client: Client, user: str) -> None:
        """They cannot both be of this cluster."""
        path, token = await write(client, user)
        other = f"1~{token.timeline}-aaaaaaaaaa~0/1~0/1"
        assert await said(await read(client, user, path, token, other)) == INVALID

    async def test_a_later_epoch_beside_the_current_one_counts(self, client: Client, user: str) -> None:
        """A session that has seen a later primary is not served by this one, whatever else it brings."""
        path, token = await write(client, user)
        later = f"1~{token.timeline + 1}-aaaaaaaaaa~0/1~0/1"
        assert await said(await read(client, user, path, token, later)) == UNAVAILABLE


class TestRefusal:
    """Tokens that no primary of this cluster has given out."""

    @pytest_asyncio.fixture(autouse=True)
    async def _epoch_of_this_start(self, cluster: LocalCluster) -> None:
        """Have no epoch that was named before the primary was started, which some test may have done again.

        What a token claims beyond a primary that was restarted since may be right: it may have been set back.
        """
        primary = await cluster.primary.connect(DATABASE)
        await primary.execute("UPDATE epochs SET began_at = clock_timestamp()")
        await primary.close()

    async def nothing_is_written(self, client: Client, user: str) -> None:
        """Check that no POST of `REQUESTS` left anything."""
        assert await rides_of(client, user) == []
        unwritten = await read(client, "unwritten@example.com", "/rides")
        assert unwritten.status == HTTPStatus.UNAUTHORIZED

    @pytest.mark.parametrize(
        "text",
        [
            "x", "1", "1~", "null", "٣", "a" * 4000, "1~1-aaaaaaaaaa", "1~1-aaaaaaaaaa~0/1",
            "2~1-aaaaaaaaaa~0/1~0/1", "1~0-aaaaaaaaaa~0/1~0/1", "1~1-aaaa~0/1~0/1", "1~1~0/1~0/1",
            "1~1-AAAAAAAAAA~0/1~0/1", "1~1-aaaaaaaaaa~0~0", "1~1-aaaaaaaaaa~g/1~0/1", "1~1-aaaaaaaaaa~-1/1~0/1",
            "1~1-aaaaaaaaaa~0/123456789~0/1", "1~1-aaaaaaaaaa~0/1~0/1~replica0", "1~1-aaaaaaaaaa~0/1~0/1~~",
            "1~1-aaaaaaaaaa~0/1~0/1~a b~1@1", "1~1-aaaaaaaaaa~0/1~0/1~replica0~x", "1~1-aaaaaaaaaa~0/1~0/1~",
            "1~1-aaaaaaaaaa~0/1~0/1;1~1-aaaaaaaaaa~0/1~0/1", "1~1-aaaaaaaaaa~0/1~0/1~'; DROP TABLE rides; --~1",
        ],
    )  # fmt: skip
    async def test_malformed_tokens(self, *, client: Client, user: str, text: str) -> None:
        """What is not in a token's form is a 400 on each path, and writes nothing."""
        for method, path, body in REQUESTS:
            assert await said(await ask(client, method, path, user, text, body=body)) == INVALID, path
        await self.nothing_is_written(client, user)

    @pytest.mark.parametrize("observed", [True, False])
    @pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
    async def test_tokens_of_another_cluster(
        self,
        *,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        method: str,
        path: str,
        body: object,
        observed: bool,
    ) -> None:
        """An epoch of the same timeline and another name is a 400, with observed replicas and without."""
        if observed:
            await observe(cluster, observer)
        token = await sign_up(client, f"other-{user}")
        for floor in ("0/0", "FFFFFFFF/FFFFFFFF", "FFFFFFFF/FFFFFFFE"):
            foreign = f"1~{token.timeline}-aaaaaaaaaa~{floor}~{floor}~replica0~1@1"
            assert await said(await ask(client, method, path, user, foreign, body=body)) == INVALID
        await self.nothing_is_written(client, user)

    @pytest.mark.parametrize("observed", [True, False])
    @pytest.mark.parametrize(
        "forge",
        [
            lambda token, beyond: replace(token, write_floor=beyond),
            lambda token, beyond: replace(token, read_floor=beyond),
        ],
        ids=["write floor", "read floor"],
    )
    @pytest.mark.parametrize("path", ["/rides/0", "/rides"])
    async def test_reads_beyond_all_that_was_written(
        self,
        *,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        path: str,
        forge: Callable[[SessionToken, Lsn], SessionToken],
        observed: bool,
    ) -> None:
        """The primary's flush LSN bounds what anybody can have been given."""
        _, token = await write(client, user)
        if observed:
            await observe(cluster, observer)
        for beyond in (Lsn(token.write_floor + (1 << 30)), Lsn(Lsn.PENDING - 1)):
            forged = forge(token, beyond)
            assert await said(await read(client, user, path, forged)) == INVALID

    async def test_a_write_with_a_token_beyond_all_that_was_written_gets_a_sound_one(
        self, client: Client, user: str
    ) -> None:
        """A write depends on nothing that was read, so it begins the session anew."""
        _, token = await write(client, user)
        beyond = Lsn(token.write_floor + (1 << 30))
        for forged in (replace(token, write_floor=beyond), replace(token, read_floor=beyond)):
            path, after = await write(client, user, forged)
            assert token.write_floor < after.write_floor < beyond
            assert served_by(await read(client, user, path, after)) == "primary"

    @pytest.mark.parametrize("observed", [True, False])
    @pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
    @pytest.mark.parametrize("timeline", ["next", "9999999999"])
    async def test_tokens_of_a_later_epoch_are_a_503_where_there_may_be_one(
        self,
        *,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        method: str,
        path: str,
        body: object,
        timeline: str,
        observed: bool,
    ) -> None:
        """Unless every node was heard of lately: this server may no longer be the primary. Nothing is written."""
        if observed:
            await observe(cluster, observer)
        current = (await sign_up(client, f"other-{user}")).timeline
        later = f"1~{current + 1 if timeline == 'next' else timeline}-aaaaaaaaaa~0/1~0/1"
        response = await ask(client, method, path, user, later, body=body)
        if observed:
            assert await said(response) == INVALID
        else:
            assert await said(response) == UNAVAILABLE
            assert response.headers["Retry-After"] == "1"
        await self.nothing_is_written(client, user)

    async def test_a_token_of_an_earlier_epoch_is_exchanged(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """The primary answers once, and the next token is of its own epoch."""
        path, token = await write(client, user)
        await observe(cluster, observer)
        earlier = "1-earlier0000"
        connection = await cluster.primary.connect(DATABASE)
        await connection.execute("INSERT INTO epochs (timeline, epoch) VALUES (0, $1)", earlier)
        try:
            # Positions in an earlier epoch say nothing here, not even ones beyond all of this one.
            response = await read(client, user, path, f"1~{earlier}~F0/0~F0/0~replica0~1@1")
            _, written = await write(client, user, f"1~{earlier}~F0/0~F0/0~replica0~1@1")
        finally:
            await connection.execute("DELETE FROM epochs WHERE timeline = 0")
            await connection.close()
        assert route(response) == ("primary", "other-epoch")
        after = handed(response)
        assert (token.epoch, None) == (after.epoch, after.node)
        assert token.write_floor <= after.highest_floor
        assert (token.epoch, None, Lsn(0)) == (written.epoch, written.node, written.read_floor)
        await observe(cluster, observer)
        assert served_by(await read(client, user, path, after)) in REPLICAS

    @pytest.mark.parametrize("node", ["replica99~1@1", "replica0~1@1", "primary~1@1", f"{'n' * 63}~{'9' * 40}"])
    async def test_nodes_that_are_not_there_do_no_harm(
        self, *, client: Client, user: str, cluster: LocalCluster, observer: Observer, node: str
    ) -> None:
        """A replica may have been removed since: any other that has caught up serves."""
        path, token = await write(client, user)
        gone = f"1~{token.epoch}~{token.write_floor}~{token.write_floor}~{node}"
        assert served_by(await read(client, user, path, gone)) == "primary"
        await observe(cluster, observer)
        assert served_by(await read(client, user, path, gone)) in REPLICAS


class TestFallingBackToThePrimary:
    """A replica can show a commit before the primary does (design fact F13)."""

    async def test_a_session_that_read_on_a_replica_waits_for_the_users_writes(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board
    ) -> None:
        """The replica may have shown the write that is under way, so the primary's answer shows it too."""
        _, token = await write(client, user)
        await observe(cluster, observer)
        token = await read_on(client, board, "replica0", user, token)
        for name in REPLICAS:
            board.forget(name)
        waited, shown, response = await read_during_write(client, cluster, user, token)
        assert (True, True) == (waited, shown)
        assert route(response) == ("primary", "no-status")

    async def test_a_session_that_read_on_two_replicas_waits_too(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board
    ) -> None:
        """Merged tokens vouch for no replica, and yet one was read."""
        _, token = await write(client, user)
        await observe(cluster, observer)
        both = [await read_on(client, board, name, user, token) for name in sorted(REPLICAS)]
        for name in REPLICAS:
            board.forget(name)
        waited, shown, _ = await read_during_write(client, cluster, user, *both)
        assert (True, True) == (waited, shown)

    async def test_a_session_that_has_read_nothing_does_not_wait(
        self, client: Client, user: str, cluster: LocalCluster
    ) -> None:
        """No replica can have shown it anything."""
        _, token = await write(client, user)
        waited, shown, response = await read_during_write(client, cluster, user, token)
        assert (False, False) == (waited, shown)
        assert served_by(response) == "primary"

    async def test_the_writes_of_others_are_not_waited_for(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board
    ) -> None:
        """One user's long transaction holds up no other user."""
        path, token = await write(client, user)
        await observe(cluster, observer)
        token = await read_on(client, board, "replica0", user, token)
        for name in REPLICAS:
            board.forget(name)
        other = f"other-{user}"
        await sign_up(client, other)
        async with write_under_way(cluster, other), asyncio.timeout(DEADLINE_S):
            assert served_by(await read(client, user, path, token)) == "primary"


class TestUnrecordedFloors:
    """A writer that lost its connection after COMMIT."""

    async def test_only_the_primary_serves_until_the_floor_is_known(
        self, *, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board,
        another_api: AnotherApi,
    ) -> None:  # fmt: skip
        """The token says that the floor is unknown; a read on the primary makes it as good as any."""
        forgetful = await another_api(board, commits=Unsettled)
        path, token = await write(forgetful, user)
        assert Lsn.PENDING == token.write_floor
        await observe(cluster, observer)
        response = await read(client, user, path, token)
        assert route(response) == ("primary", "not-caught-up")
        after = handed(response)
        assert after.write_floor < Lsn.PENDING
        await observe(cluster, observer)
        assert route(await read(client, user, path, after))[0] in REPLICAS

    async def test_a_later_write_does_not_hide_it(
        self, *, client: Client, user: str, cluster: LocalCluster, observer: Observer, board: Board,
        another_api: AnotherApi,
    ) -> None:  # fmt: skip
        """With or without a floor of its own, the next write's token is never wrong."""
        forgetful = await another_api(board, commits=Unsettled)
        path, token = await write(forgetful, user)
        await cluster.wait_for_catchup()
        async with paused(cluster):
            later, token = await write(client, user, token)
            await observer.run_once()
            for each in (path, later):
                assert served_by(await read(client, user, each, token)) == "primary"


class TestFreshness:
    """A request may say how fresh its answer has to be."""

    @staticmethod
    async def get(client: Client, email: str, path: str, freshness: str, *tokens: SessionToken) -> ClientResponse:
        """Read with the header."""
        sent = headers(email, *tokens)
        sent["Rocket-Freshness"] = freshness
        return await client.get(path, headers=sent)

    async def test_another_device_sees_the_write(
        self, client: Client, cluster: LocalCluster, observer: Observer, user: str
    ) -> None:
        """Without a token, by `global`; what is late is shown by `any`, and by `within` as long as it says."""
        await observe(cluster, observer)
        async with paused(cluster):
            path, token = await write(client, user)
            assert "primary" == served_by(await self.get(client, user, path, "global"))
            for freshness in ("any", "within 3600s"):
                response = await self.get(client, user, path, freshness, token)
                assert HTTPStatus.NOT_FOUND == response.status
                assert response.headers["Rocket-Served-By"] in REPLICAS
            assert "primary" == served_by(await self.get(client, user, path, "session", token))

    async def test_what_is_no_freshness_is_refused(self, client: Client, user: str) -> None:
        """With a word on what there is."""
        answer = await said(await self.get(client, user, "/rides", "newest"))
        allowed = "must be session, global, any, or within some seconds: within 10s"
        assert (400, {"error": f"Header 'Rocket-Freshness' {allowed}."}) == answer
