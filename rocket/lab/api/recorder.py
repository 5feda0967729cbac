"""Telling somebody of each request that reached the router: who asked for what, and what came of it."""

from __future__ import annotations

import contextlib
import enum
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rocket import Answer
    from rocket.consistency import SessionToken

    Recorder: TypeAlias = Callable[["RequestRecord"], None]


class Asked(enum.StrEnum):
    """What a request was for."""

    JOIN = "join"
    """`POST /users`"""
    WRITE = "write"
    """`POST /rides`"""
    READ = "read"
    """`GET /rides/{id}`"""
    LIST = "list"
    """`GET /rides`"""


class RequestRecord(NamedTuple):
    """One request. It is as it came about; whoever looks at it makes words of it."""

    request: Asked
    at: float
    """Monotonic seconds: it was about to go to the router."""
    done: float
    """Monotonic seconds: its outcome was known, and nobody had been told."""
    subject: str
    sent: Sequence[SessionToken]
    """The tokens that it brought."""
    detail: Any
    """WRITE: the distance; READ: the ride's id; LIST: the most rides that fit, and the id that all lie below."""
    answer: Answer[Any] | None
    """Its value holds what the query brought; None if it failed."""
    error: BaseException | None


class RequestRecorder:
    """Who is told of each request. As long as that is nobody, nothing is made up to be told."""

    __slots__ = ("witness",)

    def __init__(self) -> None:
        self.witness: Recorder | None = None
        """Called on the event loop."""


RECORDER = web.AppKey("audience", RequestRecorder)


def tell(  # noqa: PLR0917 - as `RequestRecord` has them
    app: web.Application,
    request: Asked,
    at: float,
    subject: str,
    sent: Sequence[SessionToken],
    detail: object,
    answer: Answer[Any] | None,
    error: BaseException | None = None,
) -> None:
    """Tell the witness, if there is one."""
    witness = app[RECORDER].witness
    if witness is not None:
        witness(RequestRecord(request, at, time.monotonic(), subject, sent, detail, answer, error))


@dataclass(slots=True)
class PendingRecord:
    """What is told at the end of a write."""

    answer: Answer[Any] | None = None


@contextlib.contextmanager
def telling(
    app: web.Application, request: Asked, subject: str, sent: Sequence[SessionToken], detail: object
) -> Iterator[PendingRecord]:
    """Tell of a write, however it ends."""
    tale, at = PendingRecord(), time.monotonic()
    try:
        yield tale
    except BaseException as error:
        tell(app, request, at, subject, sent, detail, tale.answer, error)
        raise
    tell(app, request, at, subject, sent, detail, tale.answer)
