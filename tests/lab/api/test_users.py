"""Users over HTTP: how they come into being, and that they may ride at once."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeAlias

import pytest

from tests.support.routers import as_session

if TYPE_CHECKING:
    from aiohttp import ClientResponse, web
    from aiohttp.test_utils import TestClient

    from rocket.cluster.cluster import LocalCluster
    from rocket.routing.observer import Observer

    Client: TypeAlias = TestClient[web.Request, web.Application]

NO_EMAIL = "Please specify parameter 'email'."
WRONG_EMAIL = "Parameter 'email' must be an e-mail address of at most 255 characters."

LONGEST_EMAIL = f"{'a' * 243}@example.com"


async def sign_up(client: Client, encoding: str, values: dict[str, str]) -> ClientResponse:
    """Ask for a user to be made, by form or JSON."""
    if encoding == "form":
        return await client.post("/users", data=values)
    return await client.post("/users", json=values)


@pytest.mark.parametrize("encoding", ["form", "JSON"])
async def test_a_new_user_is_created(client: Client, email: str, encoding: str) -> None:
    """Form and JSON alike answer 201 with the address and an ID."""
    response = await sign_up(client, encoding, {"email": email})
    user = await response.json()
    assert response.status == HTTPStatus.CREATED
    assert user == {"email": email, "id": user["id"]}
    assert type(user["id"]) is int


async def test_a_user_who_exists_is_answered_with_200(client: Client, email: str) -> None:
    """A second request creates no user, and gives the same one."""
    first = await client.post("/users", json={"email": email})
    second = await client.post("/users", json={"email": email})
    assert (first.status, second.status) == (HTTPStatus.CREATED, HTTPStatus.OK)
    assert await second.json() == await first.json()


async def test_concurrent_requests_for_one_address_make_one_user(client: Client, email: str) -> None:
    """Of many at the same time one is told that it made the user, and all get the same ID."""
    responses = await asyncio.gather(*(client.post("/users", json={"email": email}) for _ in range(8)))
    users = [await response.json() for response in responses]
    assert sorted(response.status for response in responses) == [200] * 7 + [201]
    assert users == [users[0]] * 8


async def test_creating_a_user_is_a_write(client: Client, email: str) -> None:
    """The primary takes it, and the answer is not cached."""
    response = await client.post("/users", json={"email": email})
    assert response.headers["Rocket-Served-By"] == "primary"
    assert response.headers["Rocket-Route-Reason"] == "write"
    assert response.headers["Cache-Control"] == "no-store"


async def test_a_new_user_may_ride_at_once(client: Client, email: str) -> None:
    """The address is good as credentials as soon as it has been answered."""
    user = await (await client.post("/users", json={"email": email})).json()
    response = await client.post("/rides", data={"distance": "1"}, headers={"Authorization": email})
    assert response.status == HTTPStatus.CREATED
    assert (await response.json())["user_id"] == user["id"]


async def test_a_new_user_has_a_floor_and_is_read_from_replicas(
    client: Client, email: str, cluster: LocalCluster, observer: Observer
) -> None:
    """Making a user is a write like any other: a replica that has caught up with it may serve."""
    headers = await as_session(client, email)
    await cluster.wait_for_catchup()
    await observer.run_once()
    response = await client.get("/rides", headers=headers)
    assert response.status == HTTPStatus.OK
    assert response.headers["Rocket-Served-By"] in {"replica0", "replica1"}


async def test_a_user_needs_no_credentials_to_be_made(client: Client, email: str) -> None:
    """Signing up needs no credentials, and ignores them."""
    response = await client.post("/users", json={"email": email}, headers={"Authorization": "unknown"})
    assert response.status == HTTPStatus.CREATED


@pytest.mark.parametrize("address", ["ä@example.com", "o'hara+x@example.com", "A@B", LONGEST_EMAIL])
async def test_an_unusual_address_is_kept_as_it_is(client: Client, email: str, address: str) -> None:
    """Whatever may be an address makes a user, who may then ride under it."""
    address = address if address == LONGEST_EMAIL else f"{email.partition('@')[0]}{address}"
    user = await (await client.post("/users", json={"email": address})).json()
    assert user["email"] == address
    response = await client.post("/rides", data={"distance": "1"}, headers={"Authorization": address})
    assert response.status == HTTPStatus.CREATED


@pytest.mark.parametrize("encoding", ["form", "JSON"])
@pytest.mark.parametrize("given", [{}, {"email": ""}, {"e-mail": "a@example.com"}])
async def test_a_user_without_address_is_refused(client: Client, encoding: str, given: dict[str, str]) -> None:
    """A missing address is a 422 that names the parameter."""
    response = await sign_up(client, encoding, given)
    assert (response.status, await response.json()) == (422, {"error": NO_EMAIL})


@pytest.mark.parametrize("encoding", ["form", "JSON"])
@pytest.mark.parametrize(
    "address",
    [
        "unknown",
        "@example.com",
        "unknown@",
        "a@b@c",
        "a b@example.com",
        "a@b\n",
        "a@b\t",
        "\u2028@b",
        f"a{LONGEST_EMAIL}",
    ],
)
async def test_what_cannot_be_an_address_is_refused(client: Client, encoding: str, address: str) -> None:
    """What is no address, or too long, or not printable, is a 422 that says what is wanted."""
    response = await sign_up(client, encoding, {"email": address})
    assert (response.status, await response.json()) == (422, {"error": WRONG_EMAIL})


@pytest.mark.parametrize("address", [1, True, ["a@b"], {"a@b": "a@b"}])
async def test_an_address_that_is_no_text_is_refused(client: Client, address: object) -> None:
    """JSON that holds something else than a string is a 422."""
    response = await client.post("/users", json={"email": address})
    assert (response.status, await response.json()) == (422, {"error": WRONG_EMAIL})


async def test_a_user_who_was_refused_does_not_exist(client: Client) -> None:
    """A refused request creates no user: the address is no credential."""
    await client.post("/users", json={"email": "refused@"})
    response = await client.get("/rides", headers={"Authorization": "refused@"})
    assert response.status == HTTPStatus.UNAUTHORIZED
