"""A proxy between two servers, such as a replica and its primary, that can fail as a network does."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

_PIECE = 64 * 1024
_PIECES_UNDER_WAY = 256
"""How many pieces a delayed link holds before it slows down the sender."""
_CONNECT_S = 2.0


class Mode(enum.StrEnum):
    """What a link does with connections and bytes."""

    PASS = "pass"  # noqa: S105 - not a secret
    """Everything goes through."""
    CUT = "cut"
    """Connections are dropped, new ones at once."""
    DELAYED = "delayed"
    """Everything goes through, later."""
    SILENT_PRIMARY = "silent-primary"
    """Half open: connections stand, and nothing comes from the primary."""
    SILENT_REPLICA = "silent-replica"
    """Half open: connections stand, and nothing comes from the replica."""
    SILENT = "silent"
    """Connections stand, new ones are accepted, and nothing goes through."""
    REFUSING = "refusing"
    """New connections are dropped at once; those that stand go on."""


class _Link(abc.ABC):
    """A link, from a client to the server that is upstream when the client connects.

    Half open, it holds bytes back and does not drop them: as with TCP, they arrive once the link passes again.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.mode = Mode.PASS
        self._delay_s = 0.0
        self._forgotten = 0
        self._changed = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()

    @abc.abstractmethod
    async def _listen(self) -> asyncio.Server: ...

    @abc.abstractmethod
    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]: ...

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Accept connections for as long as the context lasts, then drop them."""
        server = await self._listen()
        try:
            yield
        finally:
            server.close()
            await self._drop()

    def turn(self, mode: Mode, *, delay_s: float = 0.0) -> None:
        """Switch the link to a mode; `delay_s` is for each direction of a delayed one."""
        self.mode, self._delay_s = mode, delay_s
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if mode is Mode.CUT:
            for connection in self._connections:
                connection.cancel()

    def forget(self) -> None:
        """Let nothing more through on the connections that there are, as a firewall that has forgotten them.

        New ones are as good as ever.
        """
        self._forgotten += 1

    async def _drop(self) -> None:
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of the replica."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        task.set_name(f"link {self.name}")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        with _closing(writer), contextlib.suppress(asyncio.CancelledError):
            if self.mode in {Mode.CUT, Mode.REFUSING}:
                return
            try:
                async with asyncio.timeout(_CONNECT_S):
                    up_reader, up_writer = await self._connect()
            except OSError:  # of which a TimeoutError is one
                return
            with _closing(up_writer):
                await self._both_ways((reader, writer), (up_reader, up_writer))

    async def _both_ways(
        self,
        replica: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        primary: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Carry bytes until one side has ended."""
        since = self._forgotten
        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                for source, target, silence in (
                    (replica[0], primary[1], Mode.SILENT_REPLICA),
                    (primary[0], replica[1], Mode.SILENT_PRIMARY),
                ):
                    under_way: _UnderWay = asyncio.Queue(_PIECES_UNDER_WAY)
                    group.create_task(self._take(source, under_way, since), name=f"{self.name} from {silence}")
                    group.create_task(
                        self._hand_on(under_way, target, silence, since), name=f"{self.name} of {silence}"
                    )

    async def _take(self, source: asyncio.StreamReader, under_way: _UnderWay, since: int) -> None:
        loop = asyncio.get_running_loop()
        while piece := await source.read(_PIECE):
            await under_way.put((loop.time(), piece))
        if since != self._forgotten:  # the server notices by itself, some day
            raise ConnectionResetError("one side has given up")
        await under_way.put((loop.time(), b""))

    async def _hand_on(
        self, under_way: _UnderWay, target: asyncio.StreamWriter, silence: Mode, since: int
    ) -> None:
        loop = asyncio.get_running_loop()
        target.transport.set_write_buffer_limits(0)  # what is drained is the kernel's, and survives our end
        while True:
            taken_at, piece = await under_way.get()
            if since != self._forgotten:
                await asyncio.Event().wait()
            while self.mode in {silence, Mode.SILENT}:
                await self._changed.wait()
            if self.mode is Mode.DELAYED and (late_s := taken_at + self._delay_s - loop.time()) > 0:
                await asyncio.sleep(late_s)
            if not piece:
                raise ConnectionResetError("one side has ended")
            target.write(piece)
            await target.drain()


class Proxy(_Link):
    """A link by unix socket, from one replica to the node that is the primary when it connects.

    Or from clients to a node.
    """

    def __init__(self, path: Path, upstream: Callable[[], Path]) -> None:
        super().__init__(path.name)
        self.path = path
        self.upstream = upstream
        """Where new connections lead."""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Accept connections for as long as the context lasts, then drop them."""
        async with super().listening():
            try:
                yield
            finally:
                self.path.unlink(missing_ok=True)

    async def _listen(self) -> asyncio.Server:
        server = await asyncio.start_unix_server(self._pass, self.path)
        # The directory, which is the servers' own, restricts access; their account need not be ours.
        self.path.chmod(0o777)
        return server

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.upstream())


class TcpProxy(_Link):
    """A link by TCP: from a port of one address to the same port of another."""

    def __init__(self, host: str, port: int, upstream: str) -> None:
        super().__init__(f"{host}:{port}")
        self._host, self._port = host, port
        self._upstream = upstream

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._pass, self._host, self._port)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._upstream, self._port)


_UnderWay = asyncio.Queue[tuple[float, bytes]]
"""Pieces with the time at which they were taken; the empty one is the end."""


@contextlib.contextmanager
def _closing(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    finally:
        writer.transport.abort()


def socket_path(directory: Path, port: int) -> Path:
    """Return the path at which Postgres' programs look for a server with that port."""
    return directory / f".s.PGSQL.{port}"
