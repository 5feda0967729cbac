"""Routers that commit in another way: writes that are held on the server with their locks, or lose their floor."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

from rocket import Router
from rocket.lab.app import DATABASE
from rocket.routing.commits import Commits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg

    from rocket import Connection, Lsn
    from rocket.cluster.cluster import LocalCluster

RouterT = TypeVar("RouterT", bound=Router)

GATES = 0x67617465
"""The first key of the advisory locks that hold writes up."""
MOST = 4
DEADLINE_S = 15.0

_WAITING = f"SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory' AND classid = {GATES} AND NOT granted"  # noqa: S608


def committing(kind: type[RouterT], commits: type[Commits]) -> type[RouterT]:
    """Return a kind of router that commits in a way of its own."""
    return type(kind.__name__, (kind,), {"_commits_type": commits})


class Gates:
    """Holds each write between its locks and its COMMIT, until its gate is opened."""

    def __init__(self, admin: asyncpg.Connection[asyncpg.Record]) -> None:
        self._admin = admin
        self._next = iter(range(MOST))

    def on(self, kind: type[RouterT], commits: type[Commits] = Commits) -> type[RouterT]:
        """Return a kind of router whose writes are held, the first at gate 0."""
        numbers = self._next

        def statements(self: Commits, subject: str | None) -> str:
            gate = f"SELECT pg_advisory_xact_lock_shared({GATES}, {next(numbers)}); COMMIT"
            return commits.statements(self, subject).replace("COMMIT", gate)

        return committing(kind, type("HeldCommits", (commits,), {"statements": statements}))

    async def wait(self, count: int) -> None:
        """Wait until that number of writes is held."""
        async with asyncio.timeout(DEADLINE_S):
            while count != await self._admin.fetchval(_WAITING):
                await asyncio.sleep(0.005)

    async def open(self, *numbers: int) -> None:
        """Let writes go on, these and those that come to these gates later."""
        for number in numbers:
            await self._admin.execute("SELECT pg_advisory_unlock($1, $2)", GATES, number)


@contextlib.asynccontextmanager
async def gates(cluster: LocalCluster) -> AsyncIterator[Gates]:
    """Make gates, all of them closed; in the end all are open."""
    admin = await cluster.primary.connect(DATABASE)
    try:
        for number in range(MOST):
            await admin.execute("SELECT pg_advisory_lock($1, $2)", GATES, number)
        yield Gates(admin)
    finally:
        await admin.close()


class Unsettled(Commits):
    """Loses the connection after COMMIT, and so the floor."""

    async def floor(self, primary: Connection) -> Lsn:
        """Have the server end the connection."""
        await primary.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return await super().floor(primary)
