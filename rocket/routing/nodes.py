"""The nodes of a cluster as the router uses them: each lends connections that are proved to be what is needed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Self

from rocket.consistency import NODE_NAME
from rocket.dsn import parse_dsn
from rocket.errors import Unavailable
from rocket.routing.admittance import all_told
from rocket.routing.connection import discard, in_one_piece, unwrap
from rocket.routing.epochs import check_epoch
from rocket.routing.failures import NotAsObserved
from rocket.routing.pool import NodePool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from rocket.consistency import Board, Epoch, Policy, PrimaryStatus, ReplicaStatus
    from rocket.routing.connection import Connection, Work
    from rocket.routing.limits import Limits


_log = logging.getLogger("rocket.router")


class Nodes:
    """A pool for each node, and the proof that goes with each connection which they lend.

    Which node is the primary is the board's to say. When a node is found in another role, its connections end.
    """

    def __init__(self, board: Board, policy: Policy, limits: Limits, init: Work[None] | None) -> None:
        self._pools: dict[str, NodePool] = {}
        self._init = init
        self._always_reset = False
        self._board = board
        self._policy = policy
        self._limits = limits
        self.failures: Callable[[], Mapping[str, Exception]] = dict
        """What keeps nodes from being observed, by name: nothing is known of it unless somebody tells."""
        board.on_new_role.append(self._drop)

    @classmethod
    async def open(
        cls, dsns: Mapping[str, str], board: Board, policy: Policy, limits: Limits, init: Work[None] | None = None
    ) -> Self:
        """Make a pool for each node; raise `ValueError` for a name or an address that cannot be one."""
        for name, dsn in dsns.items():
            _must_be_right(name, dsn)
        nodes = cls(board, policy, limits, init)
        for name, dsn in dsns.items():
            await nodes.add(name, dsn)
        return nodes

    async def add(self, name: str, dsn: str) -> None:
        """Have one more node, or another address for one that is there; raise `ValueError` as `open` does."""
        _must_be_right(name, dsn)
        pool = await NodePool.to(name, dsn, self._limits, lambda: self._doubt(name), self._init)
        pool.resets_always = self._always_reset
        before = self._pools.get(name)
        self._pools[name] = pool
        if before is not None:
            self._board.trust(name)
            await before.close(self._limits.attempt_s + self._limits.close_s)

    async def remove(self, name: str) -> None:
        """Have a node no more; what runs there is finished. Raise `KeyError` if there is none of that name."""
        pool = self._pools.pop(name)
        self._board.trust(name)
        await pool.close(self._limits.attempt_s + self._limits.close_s)

    def _doubt(self, name: str) -> None:
        _log.warning(
            "several servers share the address of %s: each read there checks by itself, in a transaction "
            "(an address for each of them spares that)",
            name,
        )
        self._board.doubt(name)

    async def close(self) -> None:
        """Close every connection."""
        self._board.on_new_role.remove(self._drop)
        await asyncio.gather(*(pool.close(self._limits.close_s) for pool in self.pools))

    @property
    def pools(self) -> list[NodePool]:
        """The connections to each node."""
        return list(self._pools.values())

    async def expire(self) -> None:
        """Have each connection that is open now end, at the latest when it is given back."""
        for pool in self.pools:
            await pool.expire()

    def reset_always(self, always: bool) -> None:
        """Say whether every connection is reset when it is given back, or only where that is needed."""
        self._always_reset = always
        for pool in self.pools:
            pool.resets_always = always

    @property
    def names_but_primary(self) -> list[str]:
        """Every node that is not known to be the primary."""
        primary = self._board.primary
        return [name for name in self._pools if primary is None or name != primary.name]

    def in_use(self, name: str) -> int:
        """How many connections to a node are at work."""
        pool = self._pools.get(name)
        return 0 if pool is None else pool.gate.inside

    def _drop(self, name: str) -> None:
        if (pool := self._pools.get(name)) is not None:
            pool.drop()

    # --- replicas ---

    @contextlib.asynccontextmanager
    async def replica(self, name: str, status: ReplicaStatus | None) -> AsyncIterator[Connection]:
        """Lend a connection of the incarnation that `status` was taken in; of whatever there is without one.

        Raise `NotAsObserved` where it is of another one, and `ConnectionError` when there is none to be had.
        """
        async with self._lease(name) as connection:
            if status is not None and not status.vouches_for((opened := unwrap(connection)).incarnation):
                if opened.opened_at < status.observed_at:
                    # Another life was seen after it was opened: its own is over, whatever the network pretends.
                    discard(connection)
                    raise NotAsObserved("the pooled connection is of an earlier incarnation")
                raise NotAsObserved("it has restarted since it was last observed")
            yield connection

    def _lease(self, name: str) -> AbstractAsyncContextManager[Connection]:
        pool = self._pools.get(name)
        if pool is None:
            raise NotAsObserved(f"{name} is not one of this router's nodes")
        return pool.lease()

    # --- the primary ---

    def current_primary(self) -> PrimaryStatus:
        """Return the primary that may be used; raise `Unavailable` at once where there is none."""
        primary = self._board.current_primary(time.monotonic(), self._policy.primary_lease_s)
        if primary is None:
            why = all_told(self.failures())
            raise Unavailable("no primary is known to be in office" + (f" ({why})" if why else ""))
        return primary

    @contextlib.asynccontextmanager
    async def primary(self) -> AsyncIterator[tuple[Connection, PrimaryStatus]]:
        """Lend a connection to the primary, of its present reign, with its status; else raise `NotAsObserved`.

        Behind a pooler it is lent inside a transaction. Raise `Unavailable` where no primary is known to be in
        office.
        """
        primary = self.current_primary()
        async with self._lease(primary.name) as connection:
            _must_not_be_of_another_reign(connection, primary.epoch)
            if unwrap(connection).direct:
                yield connection, primary
            else:
                async with in_epoch(connection, primary.epoch):
                    yield connection, primary

    @contextlib.asynccontextmanager
    async def primary_for_write(self) -> AsyncIterator[tuple[Connection, PrimaryStatus]]:
        """Do the same outside of any transaction: behind a pooler, each is to prove by `in_epoch` where it is."""
        primary = self.current_primary()
        async with self._lease(primary.name) as connection:
            _must_not_be_of_another_reign(connection, primary.epoch)
            yield connection, primary

    def knows_no_later_epoch(self) -> bool:
        """Tell whether every node was heard of lately, and none follows a later primary than the one in office."""
        now = time.monotonic()
        primary = self._board.current_primary(now, self._policy.primary_lease_s)
        return primary is not None and all(
            name == primary.name
            or (
                (status := self._board.replica(name)) is not None
                and now - status.observed_at <= self._policy.lease_s
            )
            for name in self._pools
        )

    def check_still_current(self, epoch: Epoch) -> None:
        """Raise `NotAsObserved` unless what the primary of `epoch` has answered is the current primary's word."""
        if not self._board.is_current_epoch(epoch, time.monotonic(), self._policy.primary_lease_s):
            raise NotAsObserved(f"the primary of epoch {epoch} was replaced, or not observed, meanwhile")


def _must_be_right(name: str, dsn: str) -> None:
    """Raise `ValueError` for a name that a token cannot hold, and a wrong address, which it never repeats."""
    if not NODE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a node: 1 to 63 of A-Z a-z 0-9 _ . -")
    try:
        parse_dsn(dsn)
    except ValueError as error:
        raise ValueError(f"{name}: its address {error}") from None


def _must_not_be_of_another_reign(connection: Connection, epoch: Epoch) -> None:
    if (opened := unwrap(connection)).direct and opened.epoch != epoch:
        discard(connection)
        raise NotAsObserved(f"the connection is not to a primary of epoch {epoch}")


@contextlib.asynccontextmanager
async def _proved(connection: Connection, epoch: Epoch) -> AsyncIterator[None]:
    async with in_one_piece(connection, read_only=False):
        await check_epoch(connection, epoch)
        yield


def in_epoch(connection: Connection, epoch: Epoch) -> AbstractAsyncContextManager[None]:
    """Have the body's statements answered by the primary of `epoch`, or none of them; else raise `NotAsObserved`.

    A connection to the server itself has proved that when it was opened.
    """
    return contextlib.nullcontext() if unwrap(connection).direct else _proved(connection, epoch)
