"""A server with the API's responses and no database: what HTTP alone costs (`python -m rocket.lab.bench.bare`)."""

from __future__ import annotations

import asyncio
import socket
import sys
from http import HTTPStatus

from aiohttp import web

from rocket.lab.shutdown import run


class _Bare:
    def __init__(self) -> None:
        self._rides: list[dict[str, object]] = []

    async def user(self, request: web.Request) -> web.Response:
        form = await request.post()
        return web.json_response({"email": form["email"], "id": 1}, status=HTTPStatus.CREATED)

    async def write(self, request: web.Request) -> web.Response:
        form = await request.post()
        self._rides.append({"distance": float(str(form["distance"])), "id": len(self._rides), "user_id": 1})
        return web.json_response(self._rides[-1], status=HTTPStatus.CREATED)

    async def read(self, request: web.Request) -> web.Response:
        return web.json_response(self._rides[int(request.match_info["id"])])


async def serve() -> None:
    """Serve on a free port of this machine, print the URL, and run until a signal ends the process."""
    bare, app = _Bare(), web.Application()
    app.add_routes(
        [web.post("/users", bare.user), web.post("/rides", bare.write), web.get("/rides/{id}", bare.read)]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        await web.SockSite(runner, listener).start()
        sys.stdout.write(f"ready: http://127.0.0.1:{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    run(serve())  # on the API's event loop
