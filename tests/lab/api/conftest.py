"""The API as a server on a socket of its own, for those who write to it byte by byte."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, TypeAlias

import pytest
import pytest_asyncio

from rocket.lab.api.app import build_app, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from rocket.lab.comparison import ComparisonRouter

    Door: TypeAlias = tuple[str, int]


@pytest_asyncio.fixture
async def door(router: ComparisonRouter) -> AsyncIterator[Door]:
    """Run a server that also answers to the name Rides.Example, and return its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        async with serve(build_app(router, allowed_hosts=["", "Rides.Example"]), listening):
            yield listening.getsockname()


@pytest.fixture
def nothing_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Hold that what others send is no error of ours, leaves no traceback, and writes no lines of its own."""
    yield
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert [record.getMessage() for record in records if record.levelno >= logging.ERROR] == []
    assert [record.getMessage() for record in records if not record.getMessage().isprintable()] == []
