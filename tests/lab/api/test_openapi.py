"""The API's description says what the API does: its paths, its statuses, its words."""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import rocket
from rocket import Lsn, Reason
from rocket.consistency import Epoch, Incarnation, SessionToken
from rocket.lab.api.app import build_app
from rocket.lab.api.status import description
from rocket.lab.comparison import ComparisonRouter, Routing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web
    from aiohttp.test_utils import TestClient

API = Path(rocket.__file__).parent / "lab" / "api"
METHODS = {"get", "post", "put", "delete", "patch", "head", "options", "trace"}


def operations(described: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Return each operation with its method and path."""
    for path, item in described["paths"].items():
        for method in METHODS & set(item):
            yield method.upper(), path, item[method]


def references(part: object) -> Iterator[str]:
    """Return what a part of the description refers to."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(part, list):
        for each in part:
            yield from references(each)


def found(described: dict[str, Any], reference: str) -> Any:
    """Return what a reference leads to."""
    part: Any = described
    for key in reference.removeprefix("#/").split("/"):
        part = part[key]
    return part


async def test_it_is_served(client: TestClient[web.Request, web.Application]) -> None:
    """It is JSON, of the version that runs."""
    answer = await client.get("/openapi.json")

    described = json.loads(await answer.text())
    assert (200, "application/json", "no-store") == (
        answer.status,
        answer.content_type,
        answer.headers["Cache-Control"],
    )
    assert description() == described
    assert ("3.1.0", rocket.__version__) == (described["openapi"], described["info"]["version"])


async def test_it_has_the_paths_that_are_served(router: ComparisonRouter) -> None:
    """No more, and no fewer."""
    app = build_app(router)

    served = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    assert served == {(method, path) for method, path, _ in operations(description())}


def test_every_status_of_the_api_is_described() -> None:
    """A status that a module names is one that a client may get."""
    named = {
        name for module in API.glob("*.py") for name in re.findall(r"HTTPStatus\.([A-Z_]+)", module.read_text())
    }
    described = {int(status) for _, _, operation in operations(description()) for status in operation["responses"]}

    assert {HTTPStatus[name] for name in named} <= described


def test_every_reference_leads_somewhere() -> None:
    """And nothing is kept without a reference to it."""
    described = description()
    used = set(references(described))

    for reference in used:
        assert found(described, reference)
    kept = {f"#/components/{kind}/{name}" for kind, parts in described["components"].items() for name in parts}
    assert kept - used == {"#/components/securitySchemes/email"}


def test_it_knows_all_reasons_and_routings() -> None:
    """Reasons and rules of routing."""
    described = description()

    assert set(Reason) == set(found(described, "#/components/headers/Rocket-Route-Reason")["schema"]["enum"])
    rules = found(described, "#/components/schemas/Replicas")["properties"]["routing"]["enum"]
    assert set(Routing) == set(rules)


@pytest.mark.parametrize(
    "token",
    [
        SessionToken(Epoch("1-gu8rxrjtrj"), Lsn(0x1B0BC38)),
        SessionToken(
            Epoch("4294967295-" + "z" * 32), Lsn.PENDING, Lsn.PENDING, "a.B_c-d" * 9, Incarnation("28484@17954542")
        ),
        SessionToken(Epoch("2-togprrr7ot"), Lsn(1), Lsn(2), "replica0", None),
    ],
    ids=str,
)
def test_tokens_are_as_it_says(token: SessionToken) -> None:
    """With a node and without, with a life and without."""
    assert re.search(found(description(), "#/components/schemas/Token")["pattern"], str(token))
