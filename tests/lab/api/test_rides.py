"""Rides over HTTP, as the API's contract has them: writing, reading back, paging, writing once."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import pytest_asyncio

from tests.support.routers import as_session
from tests.support.servers import paused

if TYPE_CHECKING:
    from aiohttp import ClientResponse, web
    from aiohttp.test_utils import TestClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.routing.observer import Observer

    Client: TypeAlias = TestClient[web.Request, web.Application]

REPLICAS = {"replica0", "replica1"}

NO_CREDENTIALS = "Please specify credentials in the Authorization header."
INVALID_CREDENTIALS = "Credentials in Authorization were invalid."
NO_DISTANCE = "Please specify parameter 'distance'."
WRONG_DISTANCE = "Parameter 'distance' must be a floating-point number."


def no_ride(given_id: object) -> str:
    """Return the wording for a ride that is not there, or not for this user to see."""
    return f"Object of type 'ride' with ID '{given_id}' was not found."


async def refusal(response: ClientResponse) -> tuple[int, str]:
    """Return the status and the text of an error, which holds nothing else."""
    body = await response.json()
    assert set(body) == {"error"}
    return response.status, body["error"]


def route(response: ClientResponse) -> tuple[str, str]:
    """Return who answered, and why it was that node."""
    return response.headers["Rocket-Served-By"], response.headers["Rocket-Route-Reason"]


async def sign_up(client: Client, email: str) -> int:
    """Make a user and return its ID."""
    response = await client.post("/users", json={"email": email})
    assert response.status == HTTPStatus.CREATED
    user_id = (await response.json())["id"]
    assert isinstance(user_id, int)
    return user_id


async def post(client: Client, email: str, encoding: str, values: dict[str, str]) -> ClientResponse:
    """Ask for a ride to be written, by form or JSON."""
    headers = {"Authorization": email}
    if encoding == "form":
        return await client.post("/rides", data=values, headers=headers)
    return await client.post("/rides", json=values, headers=headers)


async def write(client: Client, email: str, distance: object = 12.3, key: str | None = None) -> ClientResponse:
    """Ask for a ride to be written."""
    headers = {"Authorization": email} | ({} if key is None else {"Idempotency-Key": key})
    return await client.post("/rides", json={"distance": distance}, headers=headers)


async def new_ride(client: Client, email: str, distance: object = 12.3) -> dict[str, Any]:
    """Write a ride and return it as answered."""
    response = await write(client, email, distance)
    assert response.status == HTTPStatus.CREATED
    ride: dict[str, Any] = await response.json()
    return ride


async def read(client: Client, email: str, path: str) -> ClientResponse:
    """Read as a user."""
    return await client.get(path, headers={"Authorization": email})


async def page(client: Client, email: str, query: str = "") -> dict[str, Any]:
    """Read a page of a user's rides."""
    response = await read(client, email, f"/rides{query}")
    assert response.status == HTTPStatus.OK
    answer: dict[str, Any] = await response.json()
    assert set(answer) == {"rides", "next"}
    return answer


async def walk(client: Client, email: str, limit: int) -> list[list[int]]:
    """Follow `next` to the end and return the IDs on each page."""
    pages: list[list[int]] = []
    query = f"?limit={limit}"
    while True:
        answer = await page(client, email, query)
        pages.append([ride["id"] for ride in answer["rides"]])
        if answer["next"] is None:
            return pages
        query = f"?limit={limit}&before={answer['next']}"


async def observe(cluster: LocalCluster, observer: Observer) -> None:
    """Fill the board with replicas that have replayed everything so far."""
    await cluster.wait_for_catchup()
    await observer.run_once()


@pytest_asyncio.fixture
async def user(client: Client, email: str) -> str:
    """Return the e-mail address of a user who has no rides yet."""
    await sign_up(client, email)
    return email


class TestWriting:
    """`POST /rides`."""

    @pytest.mark.parametrize("encoding", ["form", "JSON"])
    async def test_a_ride_is_acknowledged_with_what_was_written(
        self, client: Client, email: str, encoding: str
    ) -> None:
        """Form and JSON alike answer 201 with distance, ID and user, and nothing else."""
        user_id = await sign_up(client, email)
        response = await post(client, email, encoding, {"distance": "123.4"})
        ride = await response.json()
        assert response.status == HTTPStatus.CREATED
        assert ride == {"distance": 123.4, "id": ride["id"], "user_id": user_id}
        assert type(ride["id"]) is int

    @pytest.mark.parametrize(
        ("given", "shown"),
        [
            (123.44, "123.4"), ("123.46", "123.5"), (5, "5.0"), ("-3.26", "-3.3"), ("1e3", "1000.0"),
            (" 7 ", "7.0"), (".5", "0.5"), ("+2.", "2.0"), ("0", "0.0"), (1e300, "1e+300"),
        ],
    )  # fmt: skip
    async def test_distances_are_shown_with_one_decimal(
        self, client: Client, user: str, given: object, shown: str
    ) -> None:
        """Whatever the notation, a distance is answered as a number with one decimal."""
        response = await write(client, user, given)
        assert response.status == HTTPStatus.CREATED
        assert f'"distance": {shown},' in await response.text()

    async def test_a_write_is_served_by_the_primary(self, client: Client, user: str) -> None:
        """The answer to a write names the primary, and must not be cached."""
        response = await write(client, user)
        assert route(response) == ("primary", "write")
        assert response.headers["Cache-Control"] == "no-store"
        assert response.content_type == "application/json"

    @pytest.mark.parametrize("encoding", ["form", "JSON"])
    async def test_a_ride_without_distance_is_refused(self, client: Client, user: str, encoding: str) -> None:
        """A missing distance is a 422 that names the parameter."""
        response = await post(client, user, encoding, {"to": "x"})
        assert await refusal(response) == (422, NO_DISTANCE)

    @pytest.mark.parametrize("given", ["abc", "nan", "NaN", "inf", "-inf", "Infinity", "1,5", "0x10", "1e999"])
    @pytest.mark.parametrize("encoding", ["form", "JSON"])
    async def test_a_distance_that_is_no_finite_number_is_refused(
        self, client: Client, user: str, encoding: str, given: str
    ) -> None:
        """What is not a finite number is a 422, and nothing is written."""
        response = await post(client, user, encoding, {"distance": given})
        assert await refusal(response) == (422, WRONG_DISTANCE)
        assert (await page(client, user))["rides"] == []


class TestReading:
    """`GET /rides/{id}`."""

    async def test_a_ride_is_read_back_from_a_replica(
        self,
        client: Client,
        user: str,
        cluster: LocalCluster,
        observer: Observer,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A replica that has caught up serves the ride as it was written, and the log says which one."""
        caplog.set_level(logging.INFO, "rocket.api")
        ride = await new_ride(client, user)
        headers = await as_session(client, user)
        await observe(cluster, observer)
        response = await client.get(f"/rides/{ride['id']}", headers=headers)
        node, reason = route(response)
        assert (response.status, await response.json()) == (200, ride)
        assert node in REPLICAS
        assert reason == "caught-up"
        assert f"Reading ride {ride['id']} from server '{node}'" in caplog.messages

    async def test_without_an_observation_the_primary_is_read(
        self, client: Client, user: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With nothing known of any replica the primary serves, and header and log say so."""
        caplog.set_level(logging.INFO, "rocket.api")
        ride = await new_ride(client, user)
        response = await read(client, user, f"/rides/{ride['id']}")
        assert (response.status, await response.json()) == (200, ride)
        assert route(response) == ("primary", "no-status")
        assert f"Reading ride {ride['id']} from server 'primary'" in caplog.messages

    async def test_while_every_replica_lags_the_primary_is_read(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """A ride that no replica has replayed is never a 404: the primary answers."""
        await observe(cluster, observer)
        async with paused(cluster):
            ride = await new_ride(client, user)
            await observer.run_once()
            response = await read(client, user, f"/rides/{ride['id']}")
        assert (response.status, await response.json()) == (200, ride)
        assert route(response) == ("primary", "not-caught-up")

    async def test_reads_spread_over_the_replicas(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """With all caught up, each replica serves some of many reads."""
        ride = await new_ride(client, user)
        headers = await as_session(client, user)
        await observe(cluster, observer)
        responses = [await client.get(f"/rides/{ride['id']}", headers=headers) for _ in range(40)]
        assert {route(response)[0] for response in responses} == REPLICAS

    @pytest.mark.parametrize(
        "given_id",
        [
            "0", "9223372036854775807", "9223372036854775808", "9" * 30, "abc", "-1", "+1", "1.0", "1e3", "0x1",
            "1_0", "٣", "null", "1 or 1=1",
        ],
    )  # fmt: skip
    async def test_what_is_no_ride_is_not_found(self, client: Client, user: str, given_id: str) -> None:
        """An ID that is unknown, not a number or beyond bigint is a 404 that repeats it."""
        response = await read(client, user, f"/rides/{given_id}")
        assert await refusal(response) == (404, no_ride(given_id))

    async def test_not_found_says_who_answered(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """A 404 names its node and reason too, and is not cached."""
        headers = await as_session(client, user)
        await observe(cluster, observer)
        response = await client.get("/rides/0", headers=headers)
        node, reason = route(response)
        assert node in REPLICAS
        assert reason == "caught-up"
        assert response.headers["Cache-Control"] == "no-store"

    async def test_another_users_ride_is_not_found(self, client: Client, user: str) -> None:
        """A ride is there for its own user alone."""
        ride = await new_ride(client, user)
        other = f"other-{user}"
        await sign_up(client, other)
        response = await read(client, other, f"/rides/{ride['id']}")
        assert await refusal(response) == (404, no_ride(ride["id"]))


class TestCredentials:
    """`Authorization`, which every request about rides needs."""

    @pytest.mark.parametrize(("method", "path"), [("POST", "/rides"), ("GET", "/rides/1"), ("GET", "/rides")])
    @pytest.mark.parametrize(
        ("credentials", "text"),
        [
            (None, NO_CREDENTIALS),
            ("", NO_CREDENTIALS),
            ("unknown@example.com", INVALID_CREDENTIALS),
            ("no address", INVALID_CREDENTIALS),
            ("Bearer a@b", INVALID_CREDENTIALS),
            ("a" * 250 + "@b.example", INVALID_CREDENTIALS),
        ],
    )
    async def test_requests_without_valid_credentials_are_refused(
        self, client: Client, method: str, path: str, credentials: str | None, text: str
    ) -> None:
        """Missing or unknown credentials are a 401 on each path of rides."""
        headers = {} if credentials is None else {"Authorization": credentials}
        data = {"distance": "1"} if method == "POST" else None
        response = await client.request(method, path, headers=headers, data=data)
        assert await refusal(response) == (401, text)
        assert response.headers["Cache-Control"] == "no-store"

    @pytest.mark.parametrize("credentials", ["no address", "unknown@example.com"])
    async def test_a_refused_write_is_no_error(
        self, client: Client, caplog: pytest.LogCaptureFixture, credentials: str
    ) -> None:
        """A client's mistake is rolled back, and is not logged as an error."""
        await write(client, credentials)
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []

    async def test_an_unknown_user_is_refused_by_replicas_too(
        self, client: Client, cluster: LocalCluster, observer: Observer
    ) -> None:
        """An observed cluster makes no difference to an unknown user."""
        await observe(cluster, observer)
        response = await read(client, "unknown@example.com", "/rides/1")
        assert await refusal(response) == (401, INVALID_CREDENTIALS)


class TestPaging:
    """`GET /rides`."""

    async def test_paging_walks_through_all_rides_newest_first(self, client: Client, user: str) -> None:
        """Pages hold every ride once, the newest first, and the last one says that it is the last."""
        written = [(await new_ride(client, user))["id"] for _ in range(7)]
        newest = written[::-1]
        assert await walk(client, user, limit=3) == [newest[:3], newest[3:6], newest[6:]]

    async def test_a_full_last_page_has_no_next(self, client: Client, user: str) -> None:
        """As many rides as the limit make one page, not a second, empty one."""
        written = [(await new_ride(client, user))["id"] for _ in range(4)]
        assert await walk(client, user, limit=2) == [written[:1:-1], written[1::-1]]

    async def test_rides_written_meanwhile_do_not_shift_pages(self, client: Client, user: str) -> None:
        """What is new while a client pages appears on no later page."""
        written = [(await new_ride(client, user))["id"] for _ in range(4)]
        first = await page(client, user, "?limit=2")
        await new_ride(client, user)
        second = await page(client, user, f"?limit=2&before={first['next']}")
        assert [ride["id"] for ride in (*first["rides"], *second["rides"])] == written[::-1]

    async def test_a_page_holds_twenty_rides_by_default(self, client: Client, user: str) -> None:
        """Without a limit a page ends after twenty rides."""
        written = [(await new_ride(client, user))["id"] for _ in range(21)]
        answer = await page(client, user)
        assert [ride["id"] for ride in answer["rides"]] == written[:0:-1]
        assert answer["next"] == written[1]

    async def test_pages_show_rides_as_they_are_shown_alone(self, client: Client, user: str) -> None:
        """A ride on a page looks like the ride itself."""
        ride = await new_ride(client, user, 123.46)
        assert await page(client, user) == {"rides": [ride], "next": None}

    async def test_a_user_without_rides_gets_an_empty_page(self, client: Client, user: str) -> None:
        """No rides are no error."""
        assert await page(client, user) == {"rides": [], "next": None}

    async def test_pages_hold_no_others_rides(self, client: Client, user: str) -> None:
        """The rides of others are left out."""
        await new_ride(client, user)
        other = f"other-{user}"
        await sign_up(client, other)
        assert (await page(client, other, "?limit=100"))["rides"] == []

    async def test_pages_come_from_replicas(
        self, client: Client, user: str, cluster: LocalCluster, observer: Observer
    ) -> None:
        """A page is a read like any other: a replica that has caught up serves it, and is named."""
        ride = await new_ride(client, user)
        headers = await as_session(client, user)
        await observe(cluster, observer)
        response = await client.get("/rides", headers=headers)
        node, reason = route(response)
        assert node in REPLICAS
        assert reason == "caught-up"
        assert await response.json() == {"rides": [ride], "next": None}
        assert response.headers["Cache-Control"] == "no-store"

    @pytest.mark.parametrize("limit", [1, 100])
    async def test_the_smallest_and_the_largest_limit_are_taken(
        self, client: Client, user: str, limit: int
    ) -> None:
        """Limits reach from 1 to 100."""
        ride = await new_ride(client, user)
        assert (await page(client, user, f"?limit={limit}"))["rides"] == [ride]

    @pytest.mark.parametrize("limit", ["0", "101", "-1", "", "abc", "1.5", "9" * 30, "+5", "٣"])
    async def test_other_limits_are_refused(self, client: Client, user: str, limit: str) -> None:
        """A limit that is not a whole number from 1 to 100 is a 422."""
        response = await client.get("/rides", params={"limit": limit}, headers={"Authorization": user})
        assert await refusal(response) == (422, "Parameter 'limit' must be a whole number from 1 to 100.")

    @pytest.mark.parametrize("before", ["0", "-1", "", "abc", "1.5", "9223372036854775808"])
    async def test_a_before_that_is_no_id_is_refused(self, client: Client, user: str, before: str) -> None:
        """A page can begin only below something that may be a ride."""
        response = await client.get("/rides", params={"before": before}, headers={"Authorization": user})
        assert await refusal(response) == (422, "Parameter 'before' must be the ID of a ride.")


class TestIdempotency:
    """`Idempotency-Key`."""

    async def test_the_same_key_gives_the_same_ride(self, client: Client, user: str) -> None:
        """A request sent again is answered as before, and writes no second row."""
        first = await write(client, user, 12.3, key="once")
        second = await write(client, user, 12.3, key="once")
        assert (first.status, second.status) == (HTTPStatus.CREATED, HTTPStatus.CREATED)
        assert await second.json() == await first.json()
        assert (await page(client, user))["rides"] == [await first.json()]

    async def test_the_same_key_with_another_distance_is_a_conflict(self, client: Client, user: str) -> None:
        """A key stands for one ride: another one under it is a 409, and the first remains."""
        ride = await (await write(client, user, 12.3, key="once")).json()
        response = await write(client, user, 45.6, key="once")
        assert await refusal(response) == (409, "Idempotency-Key was used before with other parameters.")
        assert (await page(client, user))["rides"] == [ride]

    async def test_a_conflict_is_no_error(
        self, client: Client, user: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A conflict is rolled back without a word in the log that calls it an error."""
        await write(client, user, 12.3, key="once")
        await write(client, user, 45.6, key="once")
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []

    async def test_concurrent_requests_with_one_key_give_one_ride(self, client: Client, user: str) -> None:
        """The first request writes; the concurrent ones are given that ride."""
        responses = await asyncio.gather(*(write(client, user, key="once") for _ in range(8)))
        rides = [await response.json() for response in responses]
        assert {response.status for response in responses} == {HTTPStatus.CREATED}
        assert rides == [rides[0]] * 8
        assert (await page(client, user))["rides"] == rides[:1]

    async def test_different_keys_give_different_rides(self, client: Client, user: str) -> None:
        """Equal rides under two keys are two rides."""
        one = await (await write(client, user, key="one")).json()
        two = await (await write(client, user, key="two")).json()
        assert one["id"] < two["id"]

    async def test_without_a_key_every_request_is_a_ride(self, client: Client, user: str) -> None:
        """Equal rides without a key are two rides."""
        one, two = await new_ride(client, user), await new_ride(client, user)
        assert one["id"] < two["id"]

    async def test_users_do_not_share_keys(self, client: Client, user: str) -> None:
        """The same key of another user is another key."""
        other = f"other-{user}"
        await sign_up(client, other)
        mine = await (await write(client, user, 1.0, key="once")).json()
        theirs = await write(client, other, 2.0, key="once")
        assert theirs.status == HTTPStatus.CREATED
        assert (await theirs.json())["id"] != mine["id"]

    @pytest.mark.parametrize("key", ["k" * 255, "ä€😀", "'; DROP TABLE rides; --", "a key with spaces"])
    async def test_any_printable_key_is_kept(self, client: Client, user: str, key: str) -> None:
        """Up to 255 printable characters are taken as they are."""
        first = await (await write(client, user, key=key)).json()
        assert await (await write(client, user, key=key)).json() == first

    @pytest.mark.parametrize("key", ["", "k" * 256, "a\tb"])
    async def test_other_keys_are_refused(self, client: Client, user: str, key: str) -> None:
        """An empty, too long or unprintable key is a 400, and nothing is written."""
        response = await write(client, user, key=key)
        assert await refusal(response) == (400, "Idempotency-Key must be 1 to 255 printable characters.")
        assert (await page(client, user))["rides"] == []
