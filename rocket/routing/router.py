"""The router: each write to the primary, each read to a replica that has replayed what it must see."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, Unpack

from rocket.consistency import Board, Freshness, Policy
from rocket.dsn import Node
from rocket.errors import InvalidToken, Unavailable, describe
from rocket.routing.commits import Commits
from rocket.routing.epochs import store_cover
from rocket.routing.failures import REFUSED, NotAsObserved
from rocket.routing.heartbeat import beat
from rocket.routing.limits import Limits
from rocket.routing.nodes import Nodes
from rocket.routing.observer import Observer
from rocket.routing.reads import Reads
from rocket.routing.session import Session
from rocket.routing.writes import Writes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from rocket.consistency import Epoch, Lsn, SessionToken, Tokens
    from rocket.routing.answer import Answer, OnEnd, OnError, ReadOptions, RecentReads, WriteOptions
    from rocket.routing.connection import Work
    from rocket.routing.pool import NodePool
    from rocket.routing.watch import MayBePrimary

ResultT = TypeVar("ResultT")

_IS_PRIMARY = "SELECT pg_current_wal_flush_lsn()"
"""Fails on a server that is not the primary."""

_OBSERVER_INTERVAL_S = 0.5
"""Between two questions to a node, where nothing else is said."""

_log = logging.getLogger("rocket.router")


class Router:
    """Sends work to the primary or to a replica, so that no read is stale.

    Work is a coroutine function that is given an asyncpg connection. It may be run more than once, so it must
    keep its effects inside the database. `session` is the usual way in; `read` and `write` are the same for
    callers that keep the token themselves.

    A router belongs to the event loop on which it was opened. Close it with `aclose`, or use it as an asynchronous
    context manager.
    """

    _commits_type: ClassVar[type[Commits]] = Commits

    def __init__(
        self,
        nodes: Nodes,
        *,
        limits: Limits,
        observer: Observer | None = None,
        owns_observer: bool = False,
    ) -> None:
        self.board = nodes.board
        """The latest statuses: which node is the primary, and how far each replica is."""
        self.on_read: list[OnEnd] = []
        """Called at the end of each read, however it came here, with its answer or error and the time it took.

        An error of what is called is logged, the first time, and hurts no read; so it is with the others, too.
        """
        self.on_write: list[OnEnd] = []
        """Called at the end of each write."""
        self.on_invalid_token: list[Callable[[InvalidToken], None]] = []
        """Called with the `InvalidToken` that `session` raises; others reach `on_read` and `on_write`."""
        self._failed_hooks: list[object] = []
        self._nodes = nodes
        self.limits = limits
        """How long reads and writes may take by default, and how many there may be."""
        self._observer = observer
        self._owns_observer = owns_observer
        commits = self._commits_type()
        self._reads = Reads(nodes, commits, limits, None if observer is None else observer.catch_up)
        self._writes = Writes(nodes, commits, limits)
        self._closed = False
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(
        cls,
        nodes: Mapping[str, str | Node] | str | Node,
        *,
        board: Board | None = None,
        policy: Policy | None = None,
        limits: Limits | None = None,
        observe: bool = True,
        observer_interval_s: float = _OBSERVER_INTERVAL_S,
        record_statuses: bool = False,
        may_be_primary: MayBePrimary | None = None,
        init: Work[None] | None = None,
        observer: Observer | None = None,
    ) -> Self:
        """Return a router for nodes by name, each given as a DSN or as a `Node`, whatever their roles are.

        One DSN, or one `Node`, in place of these gives a node for each of its hosts, named after the host.

        It observes them, every `observer_interval_s` seconds and once before this returns; with `observe` false it
        only finds out which one is the primary, where then every read goes. Nodes may be down, all of them even.
        `may_be_primary` may veto that a node becomes the primary; with it, `nodes` may be empty. `init` is called
        with each new connection that work is given, for what asyncpg keeps with it: type codecs, for example.
        With `record_statuses` what is observed is written into the table `replica_statuses` as well, for people to
        read; its dead rows conflict with long queries on replicas.

        With an `observer` that is run elsewhere the router starts none. With a `board` alone it goes by that, and
        no read waits for a replica.

        Raise `ValueError` for a name that a token cannot hold, for an address that cannot be one (it is never
        repeated) and where there is no node to observe; `TablesUnusable`; and `NodesUnusable` if no primary is
        found and each node fails for a lasting reason: a wrong password or database, for example.
        """
        limits = limits or Limits()
        given = Node.by_name(nodes)
        owns_observer = False
        if observer is not None:
            board = observer.board
        elif board is None:
            if not given and may_be_primary is None:
                raise ValueError("there must be a node, at the least")
            board = Board()
            observer = Observer(
                given,
                board,
                interval_s=observer_interval_s,
                roles_only=not observe,
                record_statuses=record_statuses,
                may_be_primary=may_be_primary,
            )
            owns_observer = True
        failures = dict if observer is None else observer.failures
        anew = None if observer is None else observer.observe_anew
        policy = policy or Policy()
        router = cls(
            await Nodes.open(given, board, policy, limits, init=init, failures=failures, observe_anew=anew),
            limits=limits,
            observer=observer,
            owns_observer=owns_observer,
        )
        try:
            router._nodes.warm_up()  # meanwhile: to far nodes it takes long
            if observer is not None and owns_observer:
                await observer.start()
                router._nodes.warm_up()  # to the primary, whose epoch may have had no name
        except BaseException:
            await router.aclose()
            raise
        return router

    async def add(self, name: str, node: str | Node) -> None:
        """Add a node, or change the address of one; no read fails because of it.

        Raise `ValueError` as `open` does. An address
        that leads nowhere is logged, like a node that is down.
        """
        node = Node.of(node)
        await self._nodes.add(name, node)
        if self._observer is not None:
            self._observer.add(name, node)

    async def remove(self, name: str) -> None:
        """Remove a node; raise `KeyError` if there is none of that name.

        Reads under way there finish, later ones go elsewhere. Without the primary nothing is written.
        """
        if self._observer is not None:
            self._observer.remove(name)
        await self._nodes.remove(name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop the observer and close every connection; later reads and writes raise `RuntimeError`.

        Closing twice is harmless.
        """
        if not self._closed:
            self._closed = True
            if self._observer is not None and self._owns_observer:
                await self._observer.stop()
            await self._reads.close()
            await self._nodes.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("the router is closed")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("the router was opened on another event loop: each loop needs one of its own")

    async def observing(self) -> None:
        """Wait until the router is closed; raise the error that ended its observer, if that happens before.

        Without an observer nothing is read or written once `Policy`'s leases are over. No failure of a node ends
        it. If it ends by an error, that is logged, too.
        """
        if self._observer is not None and self._owns_observer:
            await self._observer.wait_stopped()

    def session(
        self,
        subject: str | None = None,
        token: str | SessionToken | Iterable[str | SessionToken] | None = None,
        *,
        lenient: bool = False,
        freshness: Freshness = Freshness.SESSION,
    ) -> Session:
        """Return a session that goes on from `token`, as `Session.token` gave it out, or a new one.

        A client may bring several tokens, also in one text with commas between them: they are merged. `subject`
        names the owner of the writes, if there is one: a session that comes from a replica to the primary waits
        there for the subject's commits, and without one for all that named none. Raise `InvalidToken` for what no
        router gave out. With `lenient` an invalid token is dropped instead,
        now or once the primary finds it foreign: for cookies, which a browser keeps sending. `freshness` is what
        its reads ask for that say nothing themselves.
        """
        try:
            return self._session_type(self, subject, token, lenient=lenient, freshness=freshness)
        except InvalidToken as error:
            self._call(self.on_invalid_token, error)
            raise

    @property
    def _session_type(self) -> type[Session]:
        return Session

    async def wait_ready(
        self,
        primaries: int = 1,
        replicas: int = 1,
        timeout: float = 10.0,  # noqa: ASYNC109 - the word that asyncpg has for it
    ) -> None:
        """Return once the primary answers, and that number of replicas may serve and have a connection.

        `primaries` is 0 where only replicas are waited for. Raise `TimeoutError` if that takes longer than
        `timeout` seconds: it says what is missing, and why.
        """
        self._check_usable()
        if primaries not in {0, 1}:
            raise ValueError("a cluster has one primary: `primaries` must be 1 or 0")
        changed = asyncio.Event()

        def note(*_: object) -> None:
            changed.set()

        self.board.on_status.append(note)
        self._nodes.on_open.append(note)
        answers = not primaries
        try:
            async with asyncio.timeout(timeout):
                while True:
                    answers = not primaries or await self.primary_answers()
                    if not self._what_lacks(replicas, answers=answers):
                        return
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            why = self._what_lacks(replicas, answers=answers) or self._what_lacks(replicas, answers=False)
            raise TimeoutError(f"not ready after {timeout:g} s: {why}") from None
        finally:
            self.board.on_status.remove(note)
            self._nodes.on_open.remove(note)

    async def cover(
        self,
        timeout: float = 10.0,  # noqa: ASYNC109 - as above
        beat_s: float = 2 * _OBSERVER_INTERVAL_S,
    ) -> Lsn:
        """Have every read from now on, of every process and with older tokens too, see what is committed now.

        That is the last step of a migration. What is committed is stored on the primary, where all observers find
        it when they next ask. This returns its LSN once this router knows it and `beat_s` have passed since it was
        stored: two intervals of the slowest observer, at the least. A process that cannot reach the primary does
        not get to know it. `Freshness.ANY` is not covered.

        Raise `Unavailable` if nothing was stored, `OutcomeUnknown` if that is not known, and `TimeoutError` if
        this router did not see it within `timeout` seconds. To call it again does no harm.
        """
        self._check_usable()
        changed = asyncio.Event()

        def note(*_: object) -> None:
            changed.set()

        self.board.on_status.append(note)
        try:
            while True:
                epoch, lsn, stored_at = await self._store_cover(timeout)
                async with asyncio.timeout(timeout):
                    while self.board.epoch == epoch and self.board.covered_lsn < lsn:
                        await changed.wait()
                        changed.clear()
                await asyncio.sleep(stored_at + beat_s - time.monotonic())
                if self.board.epoch == epoch:
                    return lsn  # else another primary was promoted, perhaps without what was stored
        except TimeoutError:
            raise TimeoutError(f"the cover was stored, and not seen within {timeout:g} s") from None
        finally:
            self.board.on_status.remove(note)

    async def _store_cover(self, within_s: float) -> tuple[Epoch, Lsn, float]:
        options: WriteOptions = {"timeout": within_s}
        # Its commit flushes what others have committed without flushing it.
        await self._writes.write(beat, None, None, options=options)
        answer = await self._writes.write(store_cover, None, None, options=options)
        return *answer.value, time.monotonic()

    def _what_lacks(self, replicas: int, *, answers: bool) -> str:
        """Return what `wait_ready` waits for, of a primary that answers or not; "" for nothing."""
        lacks = []
        if not answers:
            try:
                primary = self._nodes.current_primary()
            except Unavailable as error:
                lacks.append(str(error))
            else:
                why = self.left_alone.get(primary.name)
                lacks.append(f"the primary, {primary.name}, does not answer" + (f" ({why})" if why else ""))
        against = {name: self._nodes.why_not_ready(name) for name in self._nodes.replicas()}
        ready = list(against.values()).count("")
        if ready < replicas:
            why = ", ".join(f"{name}: {reason}" for name, reason in against.items() if reason)
            lacks.append(f"{ready} of {replicas} replicas may serve" + (f" ({why})" if why else ""))
        return "; ".join(lacks)

    @property
    def left_alone(self) -> Mapping[str, str]:
        """Why no connection to a node can be opened, by its name: reads go elsewhere, without trying it."""
        return self._nodes.left_alone()

    @property
    def unobserved(self) -> Mapping[str, str]:
        """What kept nodes from being observed when they were last asked, by name."""
        failures = {} if self._observer is None else self._observer.failures()
        return {name: describe(failure) for name, failure in failures.items()}

    @property
    def recent_reads(self) -> RecentReads:
        """Who answered the reads of the last seconds."""
        return self._reads.recent

    @property
    def policy(self) -> Policy:
        """How old and how far behind a replica may be and still serve. May be set at any time."""
        return self._nodes.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._nodes.policy = policy

    @property
    def pools(self) -> Sequence[NodePool]:
        """The connections to each node."""
        return self._nodes.pools

    @property
    def flush_questions(self) -> int:
        """How often the primary was asked what is committed, each time for all global reads that waited for it."""
        return self._reads.flush_questions

    @property
    def primary_reads_waiting(self) -> int:
        """How many reads wait until the primary may take them (see `Limits.primary_reads`).

        With the writes that may not wait yet, on a connection, for what a replica has shown.
        """
        return self._reads.waiting_for_primary + self._writes.waiting_for_primary

    async def primary_answers(self) -> bool:
        """Return whether the primary takes statements now."""
        try:
            async with asyncio.timeout(self.limits.attempt_s), self._nodes.primary() as (connection, _):
                await connection.execute(_IS_PRIMARY)
        except (Unavailable, NotAsObserved, *REFUSED):
            return False
        return True

    async def write(
        self,
        work: Work[ResultT],
        *,
        subject: str | None,
        token: Tokens = None,
        on_error: OnError | None = None,
        **options: Unpack[WriteOptions],
    ) -> Answer[ResultT]:
        """Run `work` in a transaction on the primary, on behalf of `subject`, whose next reads will see it.

        Serialization failures and deadlocks are tried again, and what failed since the schema has changed; one
        that `work` raises by itself, a few times. Raise `Unavailable` when nothing was written, `OutcomeUnknown`
        when that is not known, or when another primary may have been promoted meanwhile, `TransactionEnded` when
        `work` has committed or rolled back by itself, and `InvalidToken`. An error of `work` rolls back and is
        raised as it is; `on_error` is as for `read`.
        """
        self._check_usable()
        writing = self._writes.write(work, subject, token, on_error, options)
        return await (self._with_hooks(writing, self.on_write) if self.on_write else writing)

    async def read(
        self,
        work: Work[ResultT],
        *,
        subject: str | None,
        token: Tokens = None,
        on_error: OnError | None = None,
        **options: Unpack[ReadOptions],
    ) -> Answer[ResultT]:
        """Run `work` on a node that shows every acknowledged write, and all that earlier reads have shown.

        With the session's token that is what the session wrote and read; without one it is all that anybody was
        told is committed, for which the primary is asked, once for all reads that wait for that. `options`
        (`ReadOptions`) may ask for something else. `work` must not write, on no node: raise `WriteInRead` if it
        does.

        Raise `Unavailable` if no node that may serve it answers in time, and `InvalidToken`. An error of `work` is
        raised as it is; one that may come from a replica, or from its being late, only if the primary agrees.

        What `work` saw may be told by an error as well, or by work that is cancelled: `on_error` is called with an
        answer that has it for its value before it is raised. Bring the token of that answer from then on, beside
        those that the session has. A `Session` does this by itself.
        """
        self._check_usable()
        reading = self._reads.read(work, subject, token, on_error, options)
        return await (self._with_hooks(reading, self.on_read) if self.on_read else reading)

    async def _with_hooks(self, asked: Awaitable[Answer[ResultT]], hooks: Sequence[OnEnd]) -> Answer[ResultT]:
        """Await a read or write, and call the hooks with how it ends."""
        began = time.monotonic()
        try:
            answer = await asked
        except BaseException as error:
            self._call(hooks, error, time.monotonic() - began)
            raise
        self._call(hooks, answer, time.monotonic() - began)
        return answer

    def _call(self, hooks: Sequence[Callable[..., None]], *what: Any) -> None:
        for hook in tuple(hooks):
            try:
                hook(*what)
            except Exception:  # noqa: BLE001 - logged, the first time
                if hook not in self._failed_hooks:
                    self._failed_hooks.append(hook)
                    _log.exception("what was registered with a router has failed, which is logged once: %r", hook)
