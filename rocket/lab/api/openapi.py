"""The API's description of itself: OpenAPI 3.1, kept by hand in `openapi.json`."""

from __future__ import annotations

import functools
import json
from importlib import metadata, resources
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from typing import Any


def description() -> dict[str, Any]:
    """Return the description, of this version."""
    told: dict[str, Any] = json.loads(resources.files("rocket.lab.api").joinpath("openapi.json").read_bytes())
    told["info"]["version"] = metadata.version("rocket")
    return told


@functools.cache
def _text() -> bytes:
    return json.dumps(description(), ensure_ascii=False).encode()


async def describe(_request: web.Request) -> web.Response:
    """`GET /openapi.json`: what can be asked, and what can be answered."""
    return web.Response(body=_text(), content_type="application/json", charset="utf-8")
