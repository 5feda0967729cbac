"""A service of some size with what rocket has for one, for type checkers: no cast, and no stubs of asyncpg.

`tests/test_package.py` has it checked against the installed package.
"""

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

from aiohttp import web
from fastapi import Depends, FastAPI, HTTPException, Request, Response, WebSocket
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware

from rocket import (
    READ_BOUND,
    Answer,
    Connection,
    InvalidToken,
    Limits,
    Node,
    OutcomeUnknown,
    Policy,
    Reason,
    Role,
    Router,
    Session,
    Unavailable,
    Work,
    explain,
    nodes_from_environment,
    report_read_bound,
)
from rocket.health import Finding, Health, examine
from rocket.metrics import RouterMetrics
from rocket.web import Cookie
from rocket.web.aiohttp import SESSION, setup
from rocket.web.asgi import RocketMiddleware, session_of

log = logging.getLogger("notes")
registry = CollectorRegistry()


@dataclass(frozen=True)
class Note:
    """What is kept."""

    id: int
    text: str


@dataclass
class Service:
    """What the process holds."""

    notes: Router
    users: Router
    jobs: asyncio.Queue[Mapping[str, str]]


running: list[Service] = []


async def with_json(db: Connection) -> None:
    """Prepare a new connection."""
    await db.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)


async def opened(name: str) -> Router:
    """Open a router that says what it does."""
    nodes = {each: Node(dsn, zone="a", weight=2) for each, dsn in nodes_from_environment().items()}
    limits, policy = Limits(read_s=2.0, connections=20), Policy(max_wait_s=0.5)
    router = await Router.open(nodes, policy=policy, limits=limits, init=with_json)
    RouterMetrics(router, name=name, registry=registry)
    router.on_read.append(note_slow)
    router.on_write.append(note_slow)
    router.on_invalid_token.append(note_invalid)
    return router


def note_slow(ended: Answer[object] | BaseException, took_s: float) -> None:
    """Log what was slow, and what failed."""
    if isinstance(ended, Answer):
        if took_s > 1 and (ended.role is Role.PRIMARY or ended.reason is Reason.WAITED):
            log.warning("%s took %.1f s: %s", ended.node, took_s, explain(ended))
    else:
        log.warning("failed: %r", ended)


def note_invalid(error: InvalidToken) -> None:
    """Log a token that was refused."""
    log.info("%s: %s", error, "" if error.token is None else error.token.epoch)


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Run the service."""
    async with await opened("notes") as notes, await opened("users") as users:
        running.append(Service(notes, users, asyncio.Queue()))
        worker = asyncio.create_task(work_off(running[0]), name="jobs")
        yield
        worker.cancel()


async def work_off(service: Service) -> None:
    """Do each job in the session of the request that it comes from."""
    while True:
        job = await service.jobs.get()
        session = service.notes.session(token=job["token"])
        try:
            words = await session.read(counting(int(job["note"])))
            await session.write(functools.partial(add, words))
        except OutcomeUnknown:
            log.warning("unknown: %s", session.lost)
        except Unavailable as error:
            if error.route is not None:
                log.warning("tried: %s", dict(error.route.failed))


async def add(words: int, db: Connection) -> None:
    """Keep a number."""
    await db.execute("INSERT INTO words VALUES ($1)", words)


def counting(note: int) -> Work[int]:
    """Return work that counts the words of a note."""

    async def count(db: Connection) -> int:
        words: int = await db.fetchval(
            "SELECT cardinality(string_to_array(text, ' ')) FROM notes WHERE id = $1", note
        )
        return words

    return count


async def every_note(db: Connection) -> list[Note]:
    """Return all notes."""
    async with db.transaction():
        return [Note(row["id"], row["text"]) for row in await db.fetch("SELECT id, text FROM notes")]


def finding(note: int) -> Callable[[Connection], Awaitable[Note | None]]:
    """Return work that finds a note, and says itself what it has shown."""

    async def find(db: Connection) -> Note | None:
        row = await db.fetchrow(f"SELECT id, text, {READ_BOUND} AS shown FROM notes WHERE id = $1", note)  # noqa: S608
        if row is None:
            return None
        report_read_bound(db, row["shown"])
        return Note(row["id"], row["text"])

    return find


# --- FastAPI ---


def current(request: Request) -> Session:
    """Return the request's session."""
    return session_of(request)


app = FastAPI(lifespan=lifespan)
app.add_middleware(RocketMiddleware, router=lambda: running[0].notes, carrier=Cookie(), route_headers=True)
app.add_middleware(RocketMiddleware, router=lambda: app.state.router, subject=lambda scope: str(scope["path"]))
other = Starlette(middleware=[Middleware(RocketMiddleware, router=lambda: running[0].users)])


@app.post("/notes", status_code=201)
async def create(text: str, session: Annotated[Session, Depends(current)]) -> dict[str, int]:
    """Write a note."""

    async def insert(db: Connection) -> int:
        new: int = await db.fetchval("INSERT INTO notes (text) VALUES ($1) RETURNING id", text)
        return new

    note = await session.write(insert)
    if session.token is not None:
        await running[0].jobs.put({"note": str(note), "token": session.token})
    return {"id": note}


@app.get("/notes/{note}")
async def show(request: Request, note: int) -> dict[str, str]:
    """Read a note."""
    session = session_of(request)
    found = await session.read(finding(note))
    if found is None:
        raise HTTPException(404)
    last = session.last
    return {"text": found.text, "from": "" if last is None else last.node, "why": last.reason if last else ""}


@app.get("/health")
async def health() -> list[str]:
    """Say what is wrong."""
    found: Health = await examine(running[0].notes)
    worst: list[Finding] = [*found.missing, *found.degraded]
    return [each.text for each in worst]


@app.get("/metrics")
async def metrics() -> Response:
    """Say how much was done."""
    return Response(generate_latest(registry))


@app.websocket("/words/{note}")
async def follow(socket: WebSocket, note: int) -> None:
    """Count words again and again."""
    await socket.accept()
    while True:
        await socket.send_json(await session_of(socket).read(counting(note)))


# --- aiohttp ---


async def listed(request: web.Request) -> web.Response:
    """Show every note."""
    session = request[SESSION]
    session.subject = request.query.get("user")
    return web.json_response([asdict(note) for note in await session.read(every_note)])


async def kept(request: web.Request) -> web.Response:
    """Show a note, with the token in hand."""
    answer = await running[0].users.read(finding(int(request.match_info["note"])), subject=None, token=None)
    token = "" if answer.token is None else str(answer.token)
    note = answer.value
    return web.json_response(None if note is None else note.text, headers={"Rocket-Session": token})


def build() -> web.Application:
    """Return the same as an application of aiohttp's."""
    application = web.Application()
    application.add_routes([web.get("/notes", listed), web.get("/notes/{note}", kept)])
    setup(application, lambda: running[0].notes, subject=lambda request: request.query.get("user"))
    return application
