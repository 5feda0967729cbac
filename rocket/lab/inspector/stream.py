"""The events as they come, to each who looks (Server-Sent Events).

A viewer has no queue: it knows the number of the last event that it was sent. One that takes no more is dropped.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING, NoReturn

from aiohttp import web
from aiohttp.payload import Payload

from rocket.lab.api.problems import Problem
from rocket.lab.inspector.access import SECURITY_HEADERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.abc import AbstractStreamWriter

    from rocket.lab.inspector.events import Event
    from rocket.lab.inspector.feed import Feed

_MOST_VIEWERS = 8
_WRITE_S = 2.0
"""How long a viewer may take no more."""
_HEARTBEAT_S = 5.0
_PAST = 1000
"""Events that who comes is told of the time before, if somebody looked then."""
_RETRY_MS = 1000
_HEADERS = {**SECURITY_HEADERS, "Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
_LAST_ID = re.compile(r"([0-9]{1,15})-([0-9a-f]+)")


class Stream:
    """Everybody who looks."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._viewers: set[_Viewer] = set()
        self._run = secrets.token_hex(4)
        """Tells the events of this program from those of one before it."""

    def open(self, request: web.Request, hello: Callable[[], Event]) -> web.Response:
        """Return the answer that goes on for as long as its client takes it; `hello` says what is so by then."""
        if len(self._viewers) >= _MOST_VIEWERS:
            raise Problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{_MOST_VIEWERS} viewers look at the inspector already.",
                {"Retry-After": "5"},
            )
        viewer = _Viewer(self._feed, self._run, hello, request)
        return web.Response(body=_Endless(viewer, self._viewers), headers=_HEADERS)

    async def close(self, _app: web.Application) -> None:
        """End every stream, so that the server need not wait for one."""
        for viewer in self._viewers:
            viewer.close()
        self._feed.wake()


class _Endless(Payload):
    """The body of a stream: written when the handler has returned, and so beyond the time that a handler has."""

    def __init__(self, viewer: _Viewer, viewers: set[_Viewer]) -> None:
        super().__init__(None)
        self._viewer = viewer
        self._viewers = viewers

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> NoReturn:  # noqa: ARG002
        """Refuse: it has no end."""
        raise TypeError("a stream has no text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send events for as long as the client takes them."""
        self._viewers.add(self._viewer)
        try:
            await self._viewer.send_to(writer)
        finally:
            self._viewers.discard(self._viewer)


class _Viewer:
    """One who looks."""

    def __init__(self, feed: Feed, run: str, hello: Callable[[], Event], request: web.Request) -> None:
        self._feed = feed
        self._run = run
        self._hello = hello
        self._last_id = request.headers.get("Last-Event-ID", "")
        self._transport = request.transport
        self._writing = False
        self._closed = False

    async def send_to(self, writer: AbstractStreamWriter) -> None:
        """Send events until the client is gone, takes no more, or `close`."""
        self._feed.look()
        try:
            await self._send_all(writer)
        except TimeoutError:
            self._abort()
        finally:
            self._feed.look_away()

    async def _send_all(self, writer: AbstractStreamWriter) -> None:
        sent = self._resumes_after()
        await self._write(writer, f"retry: {_RETRY_MS}\n{self._greeting(resumed=sent is not None)}")
        if sent is None:
            sent = max(self._feed.first - 1, self._feed.last - _PAST)
        while not self._closed:
            if sent < self._feed.first - 1:
                sent = self._feed.first - 1
                await self._write(writer, self._greeting(resumed=False))
            last = self._feed.last
            if batch := self._feed.after(sent):
                sent = last
                text = f"id: {last}-{self._run}\nevent: batch\ndata: [{','.join(batch)}]\n\n"
                await self._write(writer, text)
            elif not await self._feed.news(_HEARTBEAT_S):
                await self._write(writer, ": nothing new\n\n")

    def _greeting(self, *, resumed: bool) -> str:
        return f"event: hello\ndata: {json.dumps({**self._hello(), 'resumed': resumed})}\n\n"

    def _resumes_after(self) -> int | None:
        """Return the number of the event that the client had last, if all behind it can be told."""
        match = _LAST_ID.fullmatch(self._last_id)
        if match is None or match[2] != self._run or not self._feed.first - 1 <= int(match[1]) <= self._feed.last:
            return None
        return int(match[1])

    async def _write(self, writer: AbstractStreamWriter, text: str) -> None:
        """Hand on a text; raise `TimeoutError` if it is not taken, and `ConnectionError`."""
        self._writing = True
        async with asyncio.timeout(_WRITE_S):
            await writer.write(text.encode())
            await writer.drain()
        self._writing = False

    def close(self) -> None:
        """End the stream; who does not take what was sent, at once."""
        self._closed = True
        if self._writing:
            self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
