"""The API as a server on a socket of its own, for tests that write to it byte by byte."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from rocket.lab.api.limits import Bounds
from tests.support.routers import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from rocket.lab.comparison import ComparisonRouter
    from tests.support.raw_http import Address


@pytest.fixture
def bounds() -> Bounds:
    """The bounds of the API; a test file may have others."""
    return Bounds()


@pytest_asyncio.fixture
async def address(router: ComparisonRouter, bounds: Bounds) -> AsyncIterator[Address]:
    """Run a server that also answers to the name Rides.Example, and return its address."""
    async with serving(router, bounds) as address:
        yield address


@pytest_asyncio.fixture
async def listening() -> AsyncIterator[socket.socket]:
    """Bind a socket to a free port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        yield listening


@pytest.fixture
def nothing_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check that client mistakes are not logged as errors, leave no traceback, and forge no log lines."""
    yield
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert [record.getMessage() for record in records if record.levelno >= logging.ERROR] == []
    assert [record.getMessage() for record in records if not record.getMessage().isprintable()] == []
