"""Which session a request belongs to, told by the tokens alone.

A session is a chain: a token that was handed out belongs to the session of the token that came with the request,
and is used up once it has been brought. Whoever brings a token a second time, or one that nobody knows, begins a
session: what it must see is told by its token, and that is not more than what its own chain has been shown.
Two sessions may be handed the same token, since it holds nothing but floors. Either of them then stands for both.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from rocket.lab.api.recorder import Asked

if TYPE_CHECKING:
    from rocket.consistency import SessionToken
    from rocket.lab.api.recorder import RequestRecord

_MOST = 20_000
"""Tokens that are waited for."""


class Session(NamedTuple):
    """Who asked."""

    name: str
    by_token: bool
    """Whether it is a chain of tokens, and not just a user who sends none."""


class Sessions:
    """Names the session of each request, in the order in which they were done."""

    def __init__(self) -> None:
        self._chains: OrderedDict[tuple[str, SessionToken], tuple[str, float]] = OrderedDict()
        """By subject and token: the session that was handed it last, and when."""

    def of(self, told: RequestRecord, number: int) -> Session:
        """Return the session of a request; `number` names one that begins with it."""
        got = None if told.answer is None else told.answer.token
        name = self._brought(told)
        if name is None:
            # A read without a token is owed what its user wrote, and so is no link of a chain: it may begin one.
            if not told.sent and (got is None or told.request in {Asked.READ, Asked.LIST}):
                if got is not None:
                    self._hand_out(told, got, f"s{number}")
                return Session(f"user {told.subject}", by_token=False)
            name = f"s{number}"
        if got is not None:
            self._hand_out(told, got, name)
        elif len(told.sent) == 1:  # the client goes on with what it has; of several it may go on with any
            self._hand_out(told, told.sent[0], name)
        return Session(name, by_token=True)

    def _brought(self, told: RequestRecord) -> str | None:
        """Use up the tokens that a request brought; return whose the first one is."""
        name: str | None = None
        for token in told.sent:
            known = self._chains.pop((told.subject, token), None)
            # Handed out only after the request had begun, it was not this one that the client brought.
            if name is None and known is not None and known[1] <= told.at:
                name = known[0]
        return name

    def _hand_out(self, told: RequestRecord, token: SessionToken, name: str) -> None:
        key = (told.subject, token)
        self._chains.pop(key, None)
        self._chains[key] = name, told.done
        if len(self._chains) > _MOST:
            self._chains.popitem(last=False)
