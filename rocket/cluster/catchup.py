"""Waiting for replicas to have what the primary has."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import asyncpg

from rocket.cluster.errors import ServerFailedToStart
from rocket.errors import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rocket.cluster.node import Node

_STREAMING_TIMEOUT_S = 60.0
_POLL_S = 0.01
_FLUSHED = "SELECT pg_current_wal_flush_lsn()::text"
_STREAMING = """
    SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn
       AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')
"""


async def flushed_by(primary: Node) -> str:
    """Return the primary's flush LSN; raise `ServerFailedToStart` if it does not answer."""
    with said_plainly("the primary does not answer"):
        connection = await primary.connect()
        try:
            return str(await connection.fetchval(_FLUSHED))
        finally:
            connection.terminate()


async def replayed_by(replica: Node, lsn: str) -> None:
    """Wait until a replica is up, receives WAL and has replayed `lsn`, or raise `ServerFailedToStart`."""
    try:
        async with asyncio.timeout(_STREAMING_TIMEOUT_S):
            while not await _has_replayed(replica, lsn):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise ServerFailedToStart(
            f"{replica.name} does not stream from the primary: see {replica.log_path}"
        ) from None


async def _has_replayed(replica: Node, lsn: str) -> bool:
    """Wait until a replica is up, streams and has replayed `lsn`; False if it is restarted meanwhile."""
    try:
        connection = await replica.connect()
        try:
            # It may stream before whoever starts it has seen that it answers, and could yet take it down.
            while not (await connection.fetchval(_STREAMING, lsn) and replica.up.is_set()):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
        finally:
            connection.terminate()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
        return False
    return True


@contextlib.contextmanager
def said_plainly(what: str) -> Iterator[None]:
    """Raise what a server says, or does not say, as `ServerFailedToStart`."""
    try:
        yield
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        raise ServerFailedToStart(f"{what}: {describe(error)}") from None
