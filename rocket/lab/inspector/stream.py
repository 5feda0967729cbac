"""The events as a stream to each viewer (Server-Sent Events).

A viewer has no queue, only the number of the last event that was sent to it. One that stops reading is dropped.
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

_EARLIER_EVENTS = 1000
"""Events of the time before that a new viewer receives, if they are kept."""
_RETRY_MS = 1000
_HEADERS = {**SECURITY_HEADERS, "Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
_LAST_ID = re.compile(r"([0-9]{1,15})-([0-9a-f]+)")


class Stream:
    """All viewers."""

    def __init__(self, feed: Feed, *, max_viewers: int, write_timeout_s: float, heartbeat_s: float) -> None:
        """Prepare to send `feed` to viewers, and a comment every `heartbeat_s` while there is nothing new."""
        self.write_timeout_s = write_timeout_s
        """A viewer that does not read for this long is dropped."""
        self.heartbeat_s = heartbeat_s
        self.feed = feed
        self.run_id = secrets.token_hex(4)
        """Distinguishes the events of this process from those of an earlier one."""
        self._max_viewers = max_viewers
        self._viewers: set[_Viewer] = set()

    def open(self, request: web.Request, hello: Callable[[], Event]) -> web.Response:
        """Return the answer that goes on for as long as its client reads; `hello` returns the present state."""
        if len(self._viewers) >= self._max_viewers:
            raise Problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"The inspector has {self._max_viewers} viewers already.",
                {"Retry-After": "5"},
            )
        return web.Response(body=_StreamBody(_Viewer(self, hello, request), self._viewers), headers=_HEADERS)

    async def close(self, _app: web.Application) -> None:
        """End every stream, so that the server need not wait for one."""
        for viewer in self._viewers:
            viewer.close()
        self.feed.wake()


class _StreamBody(Payload):
    """The body of a stream, written after the handler has returned, and so beyond the time limit for handlers."""

    def __init__(self, viewer: _Viewer, viewers: set[_Viewer]) -> None:
        super().__init__(None)
        self._viewer = viewer
        self._viewers = viewers

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> NoReturn:  # noqa: ARG002
        """Refuse: it has no end."""
        raise TypeError("a stream has no text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send events for as long as the client reads."""
        self._viewers.add(self._viewer)
        try:
            await self._viewer.send_to(writer)
        finally:
            self._viewers.discard(self._viewer)


class _Viewer:
    """One client of the stream."""

    def __init__(self, stream: Stream, hello: Callable[[], Event], request: web.Request) -> None:
        self._stream = stream
        self._feed = stream.feed
        self._hello = hello
        self._last_id = request.headers.get("Last-Event-ID", "")
        self._transport = request.transport
        self._writing = False
        self._closed = False

    async def send_to(self, writer: AbstractStreamWriter) -> None:
        """Send events until the client is gone, stops reading, or `close`."""
        self._feed.add_viewer()
        try:
            await self._send_all(writer)
        except TimeoutError:
            self._abort()
        finally:
            self._feed.remove_viewer()

    async def _send_all(self, writer: AbstractStreamWriter) -> None:
        sent = self._last_received()
        await self._write(writer, f"retry: {_RETRY_MS}\n{self._greeting(resumed=sent is not None)}")
        if sent is None:
            sent = max(self._feed.first - 1, self._feed.last - _EARLIER_EVENTS)
        while not self._closed:
            if sent < self._feed.first - 1:
                sent = self._feed.first - 1
                await self._write(writer, self._greeting(resumed=False))
            last = self._feed.last
            if batch := self._feed.after(sent):
                sent = last
                text = f"id: {last}-{self._stream.run_id}\nevent: batch\ndata: [{','.join(batch)}]\n\n"
                await self._write(writer, text)
            elif not await self._feed.wait_for_events(self._stream.heartbeat_s):
                await self._write(writer, ": nothing new\n\n")

    def _greeting(self, *, resumed: bool) -> str:
        return f"event: hello\ndata: {json.dumps({**self._hello(), 'resumed': resumed})}\n\n"

    def _last_received(self) -> int | None:
        """Return the number of the event that the client received last, if all later ones are kept."""
        match = _LAST_ID.fullmatch(self._last_id)
        if match is None or match[2] != self._stream.run_id:
            return None
        number = int(match[1])
        return number if self._feed.first - 1 <= number <= self._feed.last else None

    async def _write(self, writer: AbstractStreamWriter, text: str) -> None:
        """Send a text; raise `TimeoutError` if the client does not read it, and `ConnectionError`."""
        self._writing = True
        async with asyncio.timeout(self._stream.write_timeout_s):
            await writer.write(text.encode())
            await writer.drain()
        self._writing = False

    def close(self) -> None:
        """End the stream; at once, if the client has not read what was sent."""
        self._closed = True
        if self._writing:
            self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
