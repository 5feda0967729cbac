"""The nodes of a cluster as the router uses them: each lends connections that are proved to be what is needed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from typing import TYPE_CHECKING, Self

from rocket.consistency import NODE_NAME, Lsn, Preferences, Reason, SessionToken, obstacle, timeline_of
from rocket.dsn import check_files, parse_dsn
from rocket.errors import Unavailable, describe
from rocket.routing.connection import discard, in_one_piece, unwrap
from rocket.routing.epochs import check_epoch
from rocket.routing.failures import NotAsObserved, Unanswered, describe_failures
from rocket.routing.pool import NodePool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from rocket.consistency import Board, Epoch, Policy, PrimaryStatus, ReplicaStatus
    from rocket.dsn import Node
    from rocket.routing.connection import Connection, NodeConnection, Work
    from rocket.routing.limits import Limits
    from rocket.routing.pool import Lease


_log = logging.getLogger("rocket.router")


_ANSWERED_S = 0.5
"""How long the first statement on a connection to the primary may take, beyond the way there."""


class Nodes:
    """A pool for each node, and the proof that goes with each connection which they lend.

    The board says which node is the primary. When a node is found in another role, its connections end.
    """

    def __init__(
        self,
        board: Board,
        policy: Policy,
        limits: Limits,
        *,
        init: Work[None] | None = None,
        failures: Callable[[], Mapping[str, Exception]] = dict,
        observe_anew: Callable[[str, float], None] | None = None,
    ) -> None:
        """Begin without any node; `failures` says what keeps nodes from being observed, by name.

        `observe_anew` is called with a name that led to another server than was observed, and since when.
        """
        self.board = board
        self.policy = policy
        """How old and how far behind a node may be: read anew for each read and write."""
        self._limits = limits
        self._init = init
        self._failures = failures
        self._observe_anew = observe_anew
        self._pools: dict[str, NodePool] = {}
        self._refusing: dict[str, str] = {}
        self._is_warm = False
        self._dropped: set[str] = set()
        self.on_open: list[Callable[[], None]] = []
        """Called when a connection was opened in the background."""
        self.preferences = Preferences()
        """Which replicas are preferred to others."""
        for status in board.replicas:
            self.preferences.note(status)
        board.on_status.append(self.preferences.note)
        board.on_gone.append(self.preferences.forget)
        board.on_new_role.append(self._drop)
        board.on_status.append(self._warm_again)

    @classmethod
    async def open(
        cls,
        nodes: Mapping[str, Node],
        board: Board,
        policy: Policy,
        limits: Limits,
        *,
        init: Work[None] | None = None,
        failures: Callable[[], Mapping[str, Exception]] = dict,
        observe_anew: Callable[[str, float], None] | None = None,
    ) -> Self:
        """Make a pool for each node; raise `ValueError` for a name or an address that cannot be one."""
        for name, node in nodes.items():
            _check_name_and_dsn(name, node.dsn)
        opened = cls(board, policy, limits, init=init, failures=failures, observe_anew=observe_anew)
        for name, node in nodes.items():
            await opened.add(name, node)
        return opened

    async def add(self, name: str, node: Node) -> None:
        """Add a node, or change the address of one; raise `ValueError` as `open` does."""
        _check_name_and_dsn(name, node.dsn)
        pool = NodePool(
            name,
            node,
            self._limits,
            on_shared_address=lambda: self._distrust(name),
            init=self._init,
            refusing=self._refusing,
            on_open=self._announce_open,
        )
        before = self._pools.get(name)
        self._pools[name] = pool
        self.preferences.add(name, node.zone, node.weight)
        self._refusing.pop(name, None)
        if self._is_warm:
            pool.warm_up()
        if before is not None:
            self.board.trust(name)
            await before.close(self._limits.attempt_s + self._limits.close_s)

    def _announce_open(self) -> None:
        for notify in self.on_open:
            notify()

    def warm_up(self) -> None:
        """Open the connections that are kept ready, in the background, to later nodes as well."""
        self._is_warm = True
        for pool in self.pools:
            pool.warm_up()

    def _warm_again(self, status: ReplicaStatus | PrimaryStatus) -> None:
        """Keep connections ready to a node that was dropped, now that it may serve in its new role."""
        if status.name in self._dropped:
            self._dropped.discard(status.name)
            if self._is_warm and (pool := self._pools.get(status.name)) is not None:
                pool.warm_up()

    async def remove(self, name: str) -> None:
        """Remove a node; what runs there is finished. Raise `KeyError` if there is none of that name."""
        pool = self._pools.pop(name)
        self.preferences.remove(name)
        self._refusing.pop(name, None)
        self.board.trust(name)
        await pool.close(self._limits.attempt_s + self._limits.close_s)

    def _distrust(self, name: str) -> None:
        _log.warning(
            "several servers share the address of %s: each read there checks by itself, in a transaction "
            "(an address for each of them spares that)",
            name,
        )
        self.board.distrust(name)

    async def close(self) -> None:
        """Close every connection."""
        self.board.on_new_role.remove(self._drop)
        self.board.on_status.remove(self._warm_again)
        self.board.on_gone.remove(self.preferences.forget)
        self.board.on_status.remove(self.preferences.note)
        await asyncio.gather(*(pool.close(self._limits.close_s) for pool in self.pools))

    @property
    def pools(self) -> list[NodePool]:
        """The connections to each node."""
        return list(self._pools.values())

    def load(self, name: str) -> int:
        """Return how many reads and writes use a node's connections, or wait for one."""
        pool = self._pools.get(name)
        return 0 if pool is None else pool.limiter.inside + pool.limiter.waiting

    def round_trip_s(self, name: str) -> float:
        """Return how long the way to a node and back takes, in seconds; 0.0 where that is unknown."""
        pool = self._pools.get(name)
        return 0.0 if pool is None else pool.round_trip_s

    def left_alone(self) -> Mapping[str, str]:
        """Return why no connection to a node can be opened, by name, for those that have no idle one either."""
        if not self._refusing:
            return self._refusing
        return {name: why for name, why in self._refusing.copy().items() if not self._pools[name].has_idle}

    def is_open(self, name: str) -> bool:
        """Return whether there is a connection to a node; if there is none, have one opened in the background."""
        pool = self._pools[name]
        pool.want_one()
        return pool.is_open

    def why_not_ready(self, name: str) -> str:
        """Return what keeps a replica from serving reads; "" if nothing does."""
        board, epoch, status = self.board, self.board.epoch, self.board.replica(name)
        if (failure := self._failures().get(name)) is not None:
            return describe(failure)
        if status is None or epoch is None:
            return board.refused.get(name, Reason.NO_STATUS)
        if why := obstacle(status, SessionToken(epoch, Lsn(0)), board, self.policy, time.monotonic()):
            return why
        return "" if self.is_open(name) else self._refusing.get(name, "a connection is being opened")

    def replicas(self) -> list[str]:
        """Return the nodes that may serve as replicas, by name, whether they are fit for that or not."""
        primary = self.board.primary
        holder = None if primary is None else primary.name
        return [pool.name for pool in self.pools if pool.node.weight > 0 and pool.name != holder]

    def _drop(self, name: str) -> None:
        self.preferences.forget(name)
        if (pool := self._pools.get(name)) is not None:
            pool.drop()
            self._dropped.add(name)

    # --- replicas ---

    def replica(self, name: str, status: ReplicaStatus | None, within_s: float | None = None) -> Lease:
        """Lend a connection of the incarnation that `status` was taken in, or any one without a status.

        It is ended if it is not given back soon after `within_s`. Raise `NotAsObserved` if it is of another
        incarnation, and `ConnectionError` if none can be opened.
        """
        check = None if status is None else functools.partial(self._check_incarnation, status)
        return self._lease(name, within_s, check)

    def _check_incarnation(self, status: ReplicaStatus, connection: NodeConnection) -> None:
        """Raise `NotAsObserved` unless a connection is of the incarnation that `status` was taken in."""
        if status.vouches_for(connection.incarnation):
            return
        if connection.opened_at < status.observed_at:
            # A later incarnation was seen after it was opened: its own is over, though the network may not have
            # told us yet. Or the observer's connection is older, and to another server.
            self._note_other(status.name, connection)
            discard(connection)
            raise NotAsObserved("the pooled connection is of an earlier incarnation")
        raise NotAsObserved("it has restarted since it was last observed")

    def _note_other(self, name: str, connection: NodeConnection) -> None:
        if self._observe_anew is not None:
            self._observe_anew(name, connection.opened_at)

    def _lease(
        self,
        name: str,
        within_s: float | None,
        check: Callable[[NodeConnection], None] | None = None,
        *,
        read_only: bool | None = None,
    ) -> Lease:
        pool = self._pools.get(name)
        if pool is None:
            raise NotAsObserved(f"{name} is not one of this router's nodes")
        return pool.lease(within_s, check, read_only=read_only)

    # --- the primary ---

    def current_primary(self) -> PrimaryStatus:
        """Return the primary that may be used; raise `Unavailable` at once where there is none."""
        primary = self.board.current_primary(time.monotonic(), self.policy.primary_lease_s)
        if primary is None:
            failures = self._failures()
            refused = (f"{name}: {why}" for name, why in self.board.refused.items() if name not in failures)
            why = "; ".join(filter(None, (describe_failures(failures), *refused)))
            raise Unavailable("no current primary is known" + (f" ({why})" if why else ""))
        return primary

    @contextlib.asynccontextmanager
    async def primary(
        self, within_s: float | None = None, *, read_only: bool | None = False
    ) -> AsyncIterator[tuple[Connection, PrimaryStatus]]:
        """Lend a connection to the primary, of its current epoch, with its status; else raise `NotAsObserved`.

        Its transactions are `read_only`, or not, or for None as they happen to be.

        Behind a pooler it is lent inside a transaction, which may write in any case. Raise `Unavailable` where no
        current primary is known.
        """
        async with (
            self.primary_for_write(within_s, read_only=read_only) as (connection, primary),
            in_epoch(connection, primary.epoch),
        ):
            yield connection, primary

    @contextlib.asynccontextmanager
    async def primary_for_write(
        self, within_s: float | None = None, *, read_only: bool | None = False
    ) -> AsyncIterator[tuple[Connection, PrimaryStatus]]:
        """Do the same outside of any transaction: behind a pooler, `in_epoch` has to prove the server in each."""
        primary = self.current_primary()
        async with self._lease(primary.name, within_s, read_only=read_only) as connection:
            opened = unwrap(connection)
            # Where the epoch cannot be read the server is known by its start, as `started` below.
            unread = primary.started is not None and opened.timeline == timeline_of(primary.epoch)
            if opened.direct and opened.epoch != primary.epoch and not unread:
                if not opened.lacks_epoch or opened.opened_at > primary.observed_at:
                    self._note_other(primary.name, opened)
                discard(connection)
                raise NotAsObserved(f"the connection is not to a primary of epoch {primary.epoch}")
            if opened.direct and primary.started not in {None, opened.server_started}:
                self._note_other(primary.name, opened)
                discard(connection)  # whether it still has all that it had is for the observer to find out
                raise NotAsObserved("the primary was restarted, and has not been observed since")
            if opened.direct and read_only not in {None, opened.read_only}:
                await self.answered_first(opened, opened.set_read_only(bool(read_only)))
            yield connection, primary

    async def answered_first(self, connection: Connection, statement: Awaitable[None]) -> None:
        """Await the first statement on a connection; raise `Unanswered`, and discard it, if no answer comes soon.

        A firewall may have forgotten it, or its server may be gone; nothing was begun, so another one may do.
        """
        opened = unwrap(connection)
        try:
            async with asyncio.timeout(_ANSWERED_S + opened.round_trip_s):
                await statement
        except TimeoutError:
            self._pools[self.current_primary().name].suspect_idle()
            discard(opened)
            raise Unanswered("a connection has fallen silent") from None

    def knows_no_later_epoch(self) -> bool:
        """Return whether each node was observed lately, and none follows a later primary than the current one."""
        now = time.monotonic()
        primary = self.board.current_primary(now, self.policy.primary_lease_s)
        return primary is not None and all(
            name == primary.name
            or (
                (status := self.board.replica(name)) is not None
                and now - status.observed_at <= self.policy.lease_s
            )
            for name in self._pools
        )

    def check_still_current(self, epoch: Epoch) -> None:
        """Raise `NotAsObserved` unless the primary of `epoch`, which has answered, is still the current one."""
        if not self.board.is_current_epoch(epoch, time.monotonic(), self.policy.primary_lease_s):
            raise NotAsObserved(f"the primary of epoch {epoch} was replaced, or not observed, meanwhile")


def in_epoch(connection: Connection, epoch: Epoch) -> AbstractAsyncContextManager[None]:
    """Have the primary of `epoch` answer the body's statements, or no server; else raise `NotAsObserved`.

    A connection to the server itself has proved that when it was opened.
    """
    return contextlib.nullcontext() if unwrap(connection).direct else _proved(connection, epoch)


@contextlib.asynccontextmanager
async def _proved(connection: Connection, epoch: Epoch) -> AsyncIterator[None]:
    async with in_one_piece(connection, read_only=False):
        await check_epoch(connection, epoch)
        yield


def _check_name_and_dsn(name: str, dsn: str) -> None:
    """Raise `ValueError` for a name that a token cannot hold, and for a wrong address, which is never repeated."""
    if not NODE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a node: 1 to 63 of A-Z a-z 0-9 _ . -")
    try:
        check_files(parse_dsn(dsn))
    except ValueError as error:
        raise ValueError(f"{name}: its address {error}") from None
