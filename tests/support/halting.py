"""A link to a server that halts after a given number of pieces, in either direction."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class HaltingLink:
    """Counts what it passes, a piece for each message or bunch of messages, and holds back all after `pieces`."""

    def __init__(self, upstream: Path, user: str, database: str) -> None:
        self.halts_at: int | None = None
        """How many more pieces get through."""
        self.passed = 0
        self.dsn = ""
        self._upstream, self._user, self._database = upstream, user, database
        self._healed = asyncio.Event()
        self._remembered = 0
        self._pipes: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, dsn: str = "") -> AsyncIterator[HaltingLink]:
        """Accept connections for as long as the context lasts, at an earlier address if one is given."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", urlsplit(dsn).port or 0)
        port = server.sockets[0].getsockname()[1]
        self.dsn = f"postgresql://{self._user}@127.0.0.1:{port}/{self._database}"
        try:
            yield self
        finally:
            server.close()
            for pipe in self._pipes:
                pipe.cancel()
            await asyncio.gather(*self._pipes, return_exceptions=True)

    def halt_after(self, pieces: int) -> None:
        """Let that number of pieces through from now on, and then nothing."""
        self.passed, self.halts_at = 0, pieces
        self._healed.clear()

    def forget(self) -> None:
        """Let nothing through on the connections that there are, as a firewall does; new ones are passed."""
        self._remembered += 1

    def heal(self) -> None:
        """Let everything through, what was held back first."""
        self.halts_at = None
        self._healed.set()

    @property
    def halted(self) -> bool:
        """Whether nothing gets through."""
        return self.halts_at is not None and self.passed >= self.halts_at

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_unix_connection(self._upstream)
        for source, target in ((reader, to_there), (there, writer)):
            pipe = asyncio.create_task(self._pipe(source, target), name="a halting link")
            self._pipes.add(pipe)
            pipe.add_done_callback(self._pipes.discard)

    async def _pipe(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        since = self._remembered
        with contextlib.suppress(OSError):
            try:
                while True:
                    piece = await source.read(2**16)
                    if since != self._remembered:
                        await asyncio.Event().wait()
                    if self.halted:
                        await self._healed.wait()
                    self.passed += 1
                    if not piece:
                        break
                    target.write(piece)
                    await target.drain()
            finally:
                target.close()
