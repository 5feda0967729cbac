"""Records of requests: a log line with an id for each, and what the inspector is given."""

from __future__ import annotations

import contextlib
import enum
import logging
import random
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from aiohttp import web

from rocket.lab.logs import REQUEST_ID
from rocket.web.aiohttp import SESSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aiohttp.typedefs import Handler

    from rocket import Answer, Session

    Recorder: TypeAlias = Callable[["RequestRecord"], None]

_REQUEST_ID_HEADER = "X-Request-ID"
_VALID_ID = re.compile(r"[!-~]{1,128}")
"""A client's id for its request: printable, without spaces, and short."""

_log = logging.getLogger("rocket.access")

# --- the inspector's records ---


class Asked(enum.StrEnum):
    """The kinds of requests that go to the router."""

    JOIN = "join"
    """`POST /users`"""
    WRITE = "write"
    """`POST /rides`"""
    READ = "read"
    """`GET /rides/{id}`"""
    LIST = "list"
    """`GET /rides`"""


class RequestRecord(NamedTuple):
    """One request, unprocessed: a recorder formats what it needs of it."""

    request: Asked
    at: float
    """Monotonic seconds: when the request went to the router."""
    done: float
    """Monotonic seconds: when its outcome was known, before it was sent to anyone."""
    subject: str
    sent: Sequence[str]
    """The session tokens that it brought."""
    detail: Any
    """WRITE: the distance; READ: the ride's id; LIST: the page's limit, and the id that its rides lie below."""
    answer: Answer[Any] | None
    """Its value holds what the query returned; None if it failed."""
    error: BaseException | None


class RequestRecorder:
    """Holds the function that is given each request's record. Without one, no records are made."""

    __slots__ = ("record",)

    def __init__(self) -> None:
        self.record: Recorder | None = None
        """Called on the event loop."""


RECORDER = web.AppKey("recorder", RequestRecorder)


class Started(NamedTuple):
    """A request that is about to go to the router, and will be recorded."""

    recorder: RequestRecorder
    request: Asked
    at: float
    sent: Sequence[str]
    detail: Any

    def end(self, session: Session, error: BaseException | None = None) -> None:
        """Record it; `session` has its answer, if there is one."""
        if self.recorder.record is not None:
            done = time.monotonic()
            subject = session.subject or ""
            record = RequestRecord(
                self.request, self.at, done, subject, self.sent, self.detail, session.last, error
            )
            self.recorder.record(record)


def started(app: web.Application, session: Session, asked: Asked, detail: object) -> Started | None:
    """Return what begins the record of a request; None if there is nothing to record it."""
    recorder = app[RECORDER]
    if recorder.record is None:
        return None
    token = session.token
    return Started(recorder, asked, time.monotonic(), () if token is None else token.split(","), detail)


@contextlib.contextmanager
def recorded(request: web.Request, asked: Asked, detail: object) -> Iterator[None]:
    """Record the request's write in the body, whatever comes of it."""
    record = started(request.app, request[SESSION], asked, detail)
    try:
        yield
    except BaseException as error:
        if record is not None:
            record.end(request[SESSION], error)
        raise
    if record is not None:
        record.end(request[SESSION])


# --- request ids and the access log ---


@web.middleware
async def log_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take the client's id for the request, or make one; send it back, and log the response.

    The line names the route rather than the path, which may hold anything, and not the client.
    """
    given = request.headers.get(_REQUEST_ID_HEADER, "")
    request_id = given if _VALID_ID.fullmatch(given) else f"{random.getrandbits(64):016x}"
    REQUEST_ID.set(request_id)  # each request has a context of its own
    began = time.monotonic()
    response = await handler(request)
    took_s = time.monotonic() - began
    if not response.prepared:
        response.headers[_REQUEST_ID_HEADER] = request_id
    route = request.match_info.route.resource
    path = None if route is None else route.canonical
    session = request.get(SESSION)
    answer = None if session is None else session.last
    fields = {
        "method": request.method,
        "path": path,
        "status": response.status,
        "node": None if answer is None else answer.node,
        "reason": None if answer is None else answer.reason,
        "ms": round(took_s * 1000, 3),
    }
    known = {name: value for name, value in fields.items() if value is not None}
    _log.info("%s %s: %d", request.method, path or "(no route)", response.status, extra={"fields": known})
    return response
