"""HTTP byte by byte: requests that no client library would send, and their responses."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from email.message import Message

Address: TypeAlias = tuple[str, int]
"""Where a server listens: host and port."""

DEADLINE_S = 5.0
"""For one exchange: much longer than it takes."""

UNKNOWN = b"unknown@example.com"
"""Credentials of the right form that no user has: a request that gets as far as the database is a 401."""

JSON = b"Content-Type: application/json"
FORM = b"Content-Type: application/x-www-form-urlencoded"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response."""

    status: int
    headers: Message
    body: bytes


def request(line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    """Return a request, with Host, credentials and the body's length unless `headers` have them."""
    given = {header.partition(b":")[0].lower() for header in headers}
    added = [
        header
        for header, unless in (
            (b"Host: localhost", {b"host"}),
            (b"Authorization: " + UNKNOWN, {b"authorization"}),
            (b"Content-Length: %d" % len(body), {b"content-length", b"transfer-encoding"}),
        )
        if not unless & given
    ]
    return b"\r\n".join([line + b" HTTP/1.1", *added, *headers, b"", body])


def new_ride(*headers: bytes, body: bytes = b"") -> bytes:
    """Return a request for a ride."""
    return request(b"POST /rides", *headers, body=body)


async def answer_from(reader: asyncio.StreamReader) -> Answer:
    """Read one response."""
    line, _, fields = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
    headers = BytesHeaderParser().parsebytes(fields)
    body = await reader.readexactly(int(headers.get("Content-Length", "0")))
    return Answer(int(line.split()[1]), headers, body)


@contextlib.asynccontextmanager
async def connection(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection, and give it up after the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(*address)
        try:
            yield reader, writer
        finally:
            writer.close()


async def ask(address: Address, sent: bytes) -> Answer:
    """Write bytes on a connection of their own, and read the response."""
    async with connection(address) as (reader, writer):
        writer.write(sent)
        return await answer_from(reader)


def refusal(answer: Answer) -> tuple[int, str]:
    """Return the status and the text of an error in the API's own form: JSON that holds nothing else."""
    assert 400 <= answer.status < 500, answer
    assert answer.headers.get_content_type() == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    body = json.loads(answer.body)
    assert set(body) == {"error"}
    assert isinstance(body["error"], str)
    return answer.status, body["error"]
