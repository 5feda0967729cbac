"""A session: one client's reads and writes, and the token that ties each to those before."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Unpack

from rocket.consistency import Freshness, SessionToken, merged
from rocket.errors import InvalidToken, RocketError, Unavailable, describe
from rocket.routing.connection import is_lost
from rocket.routing.failures import speaks_against_node
from rocket.routing.limits import HELD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from rocket.consistency import Tokens
    from rocket.routing.answer import Answer, OnError, ReadOptions, WriteOptions
    from rocket.routing.connection import Connection, Work
    from rocket.routing.epochs import PossibleLoss
    from rocket.routing.limits import Limits, Place

ResultT = TypeVar("ResultT")

_MOST_TOKENS = 16
"""A client with concurrent requests may hold several."""
_LATER_S = 1.0
"""How much longer than its body a read or write may take: the body is what is ended in time."""


class ReadsAndWrites(Protocol):
    """What a session needs of a router."""

    limits: Limits
    """How long reads and writes may take by default."""

    async def read(
        self,
        work: Work[ResultT],
        *,
        subject: str | None,
        token: Tokens = None,
        on_error: OnError | None = None,
        **options: Unpack[ReadOptions],
    ) -> Answer[ResultT]:
        """Run work on a node that has reached the token's floors."""

    async def write(
        self,
        work: Work[ResultT],
        *,
        subject: str | None,
        token: Tokens = None,
        on_error: OnError | None = None,
        **options: Unpack[WriteOptions],
    ) -> Answer[ResultT]:
        """Run work in a transaction on the primary."""


class Session:
    """What one client wrote and saw, so that its next read shows all of that.

    `Router.session` makes one, mostly for a request or a job. Several tasks may use it at once: once one of them
    has an answer, every read that begins afterwards shows what that answer shows. An error that work raises, and
    work that is cancelled, count as answers: they may tell what work saw.
    """

    def __init__(
        self,
        router: ReadsAndWrites,
        subject: str | None,
        token: str | SessionToken | Iterable[str | SessionToken] | None,
        *,
        lenient: bool = False,
        freshness: Freshness = Freshness.SESSION,
    ) -> None:
        self.subject = subject
        """The owner of its writes; may be set once that is known, before the first read or write."""
        self.last: Answer[Any] | None = None
        """The last answer: which node gave it, and why; `rocket.explain` explains it in sentences.

        Its value is what `read` or `write` returned, or the error that work raised.
        """
        self.lost: PossibleLoss | None = None
        """Set if a promotion may have cost the session what it was promised. The client should be informed."""
        self._router = router
        self._lenient = lenient
        self._options: ReadOptions = {} if freshness is Freshness.SESSION else {"freshness": freshness}
        self._tokens: Sequence[SessionToken] = tokens_from(token, lenient=lenient)

    @property
    def token(self) -> str | None:
        """The text that the client must bring next time: printable ASCII without spaces; None if nothing yet."""
        tokens = self._tokens
        return str(tokens[0]) if len(tokens) == 1 else ",".join(map(str, tokens)) or None

    async def read(self, work: Work[ResultT], **options: Unpack[ReadOptions]) -> ResultT:
        """Run `work` where it sees all that the session has written and seen; return what it returns.

        With `freshness` it sees something else, and with `timeout` it may take longer, or less: see `ReadOptions`.
        It may be run again, on another node, if one fails, and it may write on none. Raise as `Router.read` does.
        By then the session has a token for what work had seen.
        """
        while True:
            sent = self._tokens
            try:
                answer = await self._router.read(
                    work, subject=self.subject, token=sent, on_error=self._take_over, **self._options | options
                )
            except InvalidToken as error:
                if not self._drops(sent, error.token):
                    raise
            else:
                return self._advance(sent, answer)

    async def write(self, work: Work[ResultT], **options: Unpack[WriteOptions]) -> ResultT:
        """Run `work` in a transaction on the primary; return what it returns, once it is committed.

        It may be run again, in a new transaction, if it was rolled back. The session's next reads see what it
        wrote, on whichever node: nothing has to be done for that. It need not write anything. Raise as
        `Router.write` does. By then the session has a token for what work had seen.
        """
        while True:
            sent = self._tokens
            try:
                answer = await self._router.write(
                    work, subject=self.subject, token=sent, on_error=self._take_over, **options
                )
            except InvalidToken as error:
                if not self._drops(sent, error.token):
                    raise
            else:
                return self._advance(sent, answer)

    def reading(self, **options: Unpack[ReadOptions]) -> AbstractAsyncContextManager[Connection]:
        """Have the body of `async with` read where it sees what `read` would show it; it is given a connection.

        It runs once, so what it reads may be passed on as it comes. It may take `Limits.read_s`, or its `timeout`:
        then it is cancelled. Raise as `read` does, and `Unavailable` if the node fails meanwhile. At its exit,
        however it is left, the session has a token for what the body had seen.
        """
        options.setdefault("timeout", self._router.limits.read_s)
        return _run_body(functools.partial(self.read, **options), options["timeout"])

    def writing(self, **options: Unpack[WriteOptions]) -> AbstractAsyncContextManager[Connection]:
        """Have the body of `async with` run in a transaction on the primary; it is given a connection.

        It is committed at its exit, and rolled back if it raises or is cancelled. It runs once: raise as `write`
        does, and `Unavailable` for a serialization failure as well.
        """
        options.setdefault("timeout", self._router.limits.write_s)
        return _run_body(functools.partial(self.write, **options), options["timeout"])

    def _drops(self, sent: Sequence[SessionToken], refused: SessionToken | None) -> bool:
        """Drop all tokens of the epoch of a foreign one, where that is allowed; return whether to try again."""
        if not self._lenient:
            return False
        if self._tokens is sent:
            self._tokens = tuple(token for token in sent if refused is not None and token.epoch != refused.epoch)
        return len(self._tokens) < len(sent) or self._tokens is not sent

    def _advance(self, sent: Sequence[SessionToken], answer: Answer[ResultT]) -> ResultT:
        """Take over what an answer says of the session; return its value."""
        self.last = answer
        self._note_loss(answer)
        if answer.token is None:
            pass  # from one of the lab's wrong routings, which promise nothing
        elif self._tokens is sent:
            self._tokens = (answer.token,)
        else:  # another request was answered meanwhile
            self._tokens = merged((*self._tokens, answer.token))
        return answer.value

    def _take_over(self, left: Answer[BaseException]) -> None:
        """Take over what work has told by an error."""
        if left.token is not None:
            self._tokens = merged((*self._tokens, left.token))
            left = left._replace(token=self._tokens[0])
        self.last = left
        self._note_loss(left)

    def _note_loss(self, answer: Answer[Any]) -> None:
        if answer.lost is not None and (self.lost is None or answer.lost.writes):
            self.lost = answer.lost


def tokens_from(
    given: str | SessionToken | Iterable[str | SessionToken] | None, *, lenient: bool = False
) -> Sequence[SessionToken]:
    """Read the tokens that a client brings, several in one text with commas; raise `InvalidToken`.

    With `lenient`, what is no token is left out, and there may be any number of them.
    """
    tokens: list[SessionToken] = []
    for each in (given,) if isinstance(given, str | SessionToken) else given or ():
        if isinstance(each, SessionToken):
            tokens.append(each)
            continue
        for text in each.split(","):
            try:
                if stripped := text.strip():  # a list may have empty elements
                    tokens.append(SessionToken.parse(stripped))
            except ValueError as error:
                if not lenient:
                    raise InvalidToken(str(error)) from None
    if len(tokens) > _MOST_TOKENS and not lenient:
        raise InvalidToken(f"more than {_MOST_TOKENS} session tokens")
    return tokens


# --- the body of an `async with` as the work of one read or write ---


class _Run(Protocol):
    """Runs work: a session's `read` or `write`, with its options."""

    def __call__(self, work: Work[None], *, timeout: float) -> Awaitable[Any]:
        """Run it within that many seconds."""


class _RunsOnce(RocketError):
    """The router would run again what cannot be."""


class _Body:
    """Work that lends its connection to the task which has the body, until that is left."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[tuple[Connection, tuple[Place, ...]]] = loop.create_future()
        """The connection, and the places that come with it."""
        self.left: asyncio.Future[None] = loop.create_future()

    async def work(self, node: Connection) -> None:
        """Lend the connection, and end as the body does; raise `_RunsOnce` the second time."""
        if self.begun.done():
            raise _RunsOnce
        self.begun.set_result((node, HELD.get()))
        await asyncio.shield(self.left)  # it may be left later than the time for work is over


@contextlib.asynccontextmanager
async def _run_body(run: _Run, timeout_s: float) -> AsyncIterator[Connection]:
    """Lend the body the connection that `run` gives to work, and have that end as the body does.

    The body is cancelled after `timeout_s`. Raise what `run` raises, and `Unavailable` where that would run work
    again, and when the time is over.
    """
    body = _Body()
    running = asyncio.ensure_future(run(body.work, timeout=timeout_s + _LATER_S))
    running.add_done_callback(_note_retrieved)
    timer, node_failed = asyncio.timeout(timeout_s), False
    try:
        async with timer:
            await asyncio.wait({running, body.begun}, return_when=asyncio.FIRST_COMPLETED)
            if body.begun.done():
                connection, places = body.begun.result()
                outside = HELD.set(places)
                try:
                    yield connection
                finally:
                    HELD.reset(outside)
        body.left.set_result(None)
    except BaseException as error:
        if timer.expired() or not isinstance(error, Exception):
            running.cancel()
        else:
            node_failed = speaks_against_node(error) or (body.begun.done() and is_lost(body.begun.result()[0]))
            body.left.set_exception(error)
        await asyncio.wait({running})
        if timer.expired():
            raise Unavailable(f"it was not over within {timeout_s:g} s") from error
        if isinstance(error, Exception):
            _raise_instead_of(error, running, node_failed=node_failed)
        raise
    try:
        await running
    except _RunsOnce:
        raise Unavailable("it was refused at COMMIT, and cannot run again by itself") from None


def _raise_instead_of(error: Exception, running: asyncio.Future[Any], *, node_failed: bool) -> None:
    """Raise what became of a read or write whose body has raised, if that is not the body's own error."""
    outcome = None if running.cancelled() else running.exception()
    if isinstance(outcome, _RunsOnce):
        if node_failed:
            raise Unavailable(f"it failed, and cannot run again by itself: {describe(error)}") from error
    elif outcome is not None and outcome is not error:
        raise outcome from error


def _note_retrieved(running: asyncio.Future[Any]) -> None:
    if not running.cancelled():
        running.exception()
