"""A session: one client's reads and writes, and the token that ties each to those before."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Unpack

from rocket.consistency import Freshness, SessionToken, merged
from rocket.errors import InvalidToken
from rocket.routing.body import run_body

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from rocket.consistency import Tokens
    from rocket.routing.answer import Answer, OnError, ReadOptions, WriteOptions
    from rocket.routing.connection import Connection, Work
    from rocket.routing.epochs import PossibleLoss
    from rocket.routing.limits import Limits

ResultT = TypeVar("ResultT")

_MOST_TOKENS = 16
"""A client with concurrent requests may hold several."""


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
        return run_body(functools.partial(self.read, **options), options["timeout"])

    def writing(self, **options: Unpack[WriteOptions]) -> AbstractAsyncContextManager[Connection]:
        """Have the body of `async with` run in a transaction on the primary; it is given a connection.

        It is committed at its exit, and rolled back if it raises or is cancelled. It runs once: raise as `write`
        does, and `Unavailable` for a serialization failure as well.
        """
        options.setdefault("timeout", self._router.limits.write_s)
        return run_body(functools.partial(self.write, **options), options["timeout"])

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
