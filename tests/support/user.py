"""A user of the API, as a client with or without tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.inspected import Client

TOKEN = "Rocket-Session"  # noqa: S105 - the header's name


class User:
    """A user who sends the session token back, or never sends one."""

    def __init__(self, client: Client, email: str, *, tokens: bool = True) -> None:
        self.token: str | None = None
        self._client = client
        self._email = email
        self._tokens = tokens

    async def join(self) -> None:
        """Create the user."""
        async with self._client.post("/users", json={"email": self._email}) as response:
            assert response.ok
            self.token = response.headers.get(TOKEN)

    async def write(self, distance: float = 1.5) -> int:
        """Write a ride; return its id."""
        async with self._client.post(
            "/rides", json={"distance": distance}, headers=self._headers(self.token)
        ) as response:
            assert 201 == response.status
            self.token = response.headers.get(TOKEN, self.token)
            return int((await response.json())["id"])

    async def read(self, ride: int, token: str | None = None) -> int:
        """Read a ride, perhaps with another token; return the status."""
        async with self._client.get(f"/rides/{ride}", headers=self._headers(token or self.token)) as response:
            if token is None:
                self.token = response.headers.get(TOKEN, self.token)
            return response.status

    async def page(self, **query: int) -> int:
        """Read a page; return the status."""
        async with self._client.get("/rides", params=query, headers=self._headers(self.token)) as response:
            self.token = response.headers.get(TOKEN, self.token)
            return response.status

    def _headers(self, token: str | None) -> dict[str, str]:
        headers = {"Authorization": self._email}
        return headers | {TOKEN: token} if self._tokens and token else headers
