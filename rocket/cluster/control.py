"""The one door to a running cluster: the supervisor listens on a private unix socket.

A request is one line of JSON, `{"command": "pause", "node": "replica2"}`, and so is the answer: `{"ok": ...}` or
`{"error": "..."}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocket.cluster import directories, faults, healing
from rocket.cluster.errors import ClusterNotFound
from rocket.cluster.roles import FIRST_PRIMARY
from rocket.errors import RocketError, describe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from rocket.cluster.cluster import LocalCluster
    from rocket.cluster.node import Node

    _Request = dict[str, Any]

_REQUEST_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 90.0  # a start may have to recover
_LONGEST_DELAY_MS = 3_600_000
_FAULTS = ("pause", "delay", "cut", "kill")
"""What may act only once it has got through to a server, and so after a `heal` that came later."""

_log = logging.getLogger("rocket.control")


class Refused(RocketError):
    """The running cluster did not do what it was asked to."""


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """A command that has changed something, or should have."""

    command: str
    node: str | None
    """None: all of them."""
    began: float
    """Monotonic seconds."""
    said: str
    """What came of it."""
    ok: bool
    delay_ms: int | None = None


@contextlib.asynccontextmanager
async def listening(
    cluster: LocalCluster, down: Callable[[], None], *, api: Mapping[str, object] | None = None
) -> AsyncIterator[None]:
    """Take commands for a cluster for as long as the context lasts.

    `down` ends the program; `api` is what it tells of the API that it serves, where it does.
    """
    controller = _Controller(cluster, down, api)
    server = await asyncio.start_unix_server(controller.answer, cluster.control_socket)
    cluster.control_socket.chmod(0o600)
    try:
        yield
    finally:
        server.close()
        await controller.drop()


class _Controller:
    def __init__(self, cluster: LocalCluster, down: Callable[[], None], api: Mapping[str, object] | None) -> None:
        self._cluster = cluster
        self._down = down
        self._api = api
        self._at_work: dict[asyncio.Task[None], str | None] = {}
        """With the command that each carries out; None until it has been read."""

    async def drop(self) -> None:
        """Drop the commands that are being carried out: none acts on a cluster that is going down."""
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry out the one request that a connection brings."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._at_work[task] = None
        try:
            await self._answer(task, reader, writer)
        finally:
            del self._at_work[task]
            writer.close()

    async def _answer(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                request = json.loads(await reader.readline())
            self._at_work[task] = request["command"]
            answer = {"ok": await self._carry_out(request)}
        except (RocketError, ValueError, KeyError, TypeError, TimeoutError) as error:
            answer = {"error": str(error) or type(error).__name__}
        except Exception:  # noqa: BLE001 - logged with its traceback
            _log.exception("a command failed")
            answer = {"error": "internal error: see the program's log"}
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(json.dumps(answer).encode() + b"\n")
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                await writer.drain()

    async def _carry_out(self, request: dict[str, Any]) -> object:
        command = request["command"]
        match command:
            case "status":
                return await faults.describe_nodes(self._cluster)
            case "addresses":
                return self._addresses(by_tcp=bool(request.get("by_tcp")))
            case "api":
                return self._api
            case "down":
                self._down()
                return "going down"
        if command != "heal" and command not in _NODE_COMMANDS:
            raise Refused(f"there is no command {command!r}")
        began = time.monotonic()
        try:
            said = await self._change(command, request)
        except Exception as error:
            self._tell(request, began, describe(error), ok=False)
            raise
        self._tell(request, began, said, ok=True)
        return said

    async def _change(self, command: str, request: _Request) -> str:
        if command == "heal":
            _log.info("heal")
            faults_under_way = [task for task, command in self._at_work.items() if command in _FAULTS]
            return await healing.heal(self._cluster, faults_under_way)
        node = self._cluster.node(request["node"])
        _log.info("%s %s", command, node.name)
        done = await _NODE_COMMANDS[command](self._cluster, node, request)
        return f"{_named(self._cluster, node)} {done}"

    def _tell(self, request: _Request, began: float, said: str, *, ok: bool) -> None:
        command = "kill-backend" if request.get("backend") else str(request["command"])
        done = CarriedOut(command, request.get("node"), began, said, ok, request.get("delay_ms"))
        for tell in self._cluster.on_command:
            tell(done)

    def _addresses(self, *, by_tcp: bool) -> dict[str, object]:
        database, nodes = self._cluster.settings.database, self._cluster.nodes
        if by_tcp:
            password = self._cluster.password_file.read_text().rpartition(":")[2]
            return {"nodes": {name: node.tcp_dsn(database, password) for name, node in nodes.items()}}
        return {"nodes": {name: node.dsn(database) for name, node in nodes.items()}}


def _named(cluster: LocalCluster, node: Node) -> str:
    """Name a node so that its name is not taken for its role."""
    former = node.name == FIRST_PRIMARY and node is not cluster.primary
    return f"{node.name} (now a replica)" if former else node.name


async def _pause(_cluster: LocalCluster, node: Node, _request: _Request) -> str:
    await faults.pause(node)
    return "does not replay until it is resumed"


async def _resume(_cluster: LocalCluster, node: Node, _request: _Request) -> str:
    await faults.resume(node)
    return "replays"


async def _delay(cluster: LocalCluster, node: Node, request: _Request) -> str:
    delay_ms = int(request["delay_ms"])
    if not 0 <= delay_ms <= _LONGEST_DELAY_MS:
        raise Refused(f"a delay lies between 0 and {_LONGEST_DELAY_MS} ms")
    await faults.delay(node, delay_ms, cluster.upstream_port(node))
    return f"applies commits {delay_ms} ms late" if delay_ms else "applies commits at once again"


async def _kill(_cluster: LocalCluster, node: Node, request: _Request) -> str:
    if request.get("backend"):
        await faults.kill_backend(node)
        return "lost a backend, and recovers by itself"
    node.kill()
    return "was killed, and comes back by itself"


async def _stop(_cluster: LocalCluster, node: Node, _request: _Request) -> str:
    await node.stop()
    return "is stopped until it is started"


async def _start(cluster: LocalCluster, node: Node, _request: _Request) -> str:
    await cluster.bring_up(node)
    return "is up"


async def _restart(cluster: LocalCluster, node: Node, request: _Request) -> str:
    await node.stop()
    return await _start(cluster, node, request)


async def _freeze(_cluster: LocalCluster, node: Node, _request: _Request) -> str:
    node.freeze()
    return "is frozen until it is thawed"


async def _thaw(_cluster: LocalCluster, node: Node, _request: _Request) -> str:
    killed = node.frozen and node.suspect
    node.thaw()
    return "missed a promotion: it was killed, and is made to fit the new primary" if killed else "goes on"


async def _cut(cluster: LocalCluster, node: Node, _request: _Request) -> str:
    await faults.cut(node, cluster.upstream_port(node))
    return "gets no WAL until its link is mended"


async def _mend(cluster: LocalCluster, node: Node, _request: _Request) -> str:
    await faults.mend(node, cluster.upstream_port(node))
    return f"reaches {cluster.primary.name} again, and follows it"


async def _promote(cluster: LocalCluster, node: Node, _request: _Request) -> str:
    return await cluster.promote(node.name)


_NODE_COMMANDS: Mapping[str, Callable[[LocalCluster, Node, _Request], Awaitable[str]]] = {
    "pause": _pause,
    "resume": _resume,
    "delay": _delay,
    "kill": _kill,
    "stop": _stop,
    "start": _start,
    "restart": _restart,
    "freeze": _freeze,
    "thaw": _thaw,
    "cut": _cut,
    "mend": _mend,
    "promote": _promote,
}


async def ask(run_dir: Path, command: str, timeout_s: float | None = None, /, **details: object) -> Any:
    """Send a command to a running cluster and return what it says.

    Raise `Refused` if it says no, or nothing in time, which is as long as a start may take unless told otherwise;
    and `ClusterNotFound`.
    """
    timeout_s = _ANSWER_TIMEOUT_S if timeout_s is None else timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(directories.control_socket(run_dir), limit=2**20)
            try:
                writer.write(json.dumps({"command": command, **details}).encode() + b"\n")
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
    except TimeoutError:
        raise Refused(f"no answer to {command!r} within {timeout_s:g} s") from None
    except (OSError, ValueError) as error:
        raise ClusterNotFound(f"the cluster in {run_dir} does not take commands: {error}") from None
    if "error" in answer:
        raise Refused(answer["error"])
    return answer["ok"]


def find(data_dir: Path | None, port: int | None) -> Path:
    """Return the run directory of the one running cluster that fits; raise `ClusterNotFound`."""
    runs = list(directories.running())
    fitting = [
        path
        for path, description in runs
        if (data_dir is None or Path(description.data_dir) == data_dir.resolve())
        and (port is None or port in description.ports.values())
    ]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(
        f"port {min(description.ports.values())}, data directory {description.data_dir}" for _, description in runs
    )
    if not runs:
        raise ClusterNotFound("no cluster of this user is running: start one with `rocket cluster up`")
    if not fitting:
        raise ClusterNotFound(f"no such cluster is running; there are: {known}")
    raise ClusterNotFound(f"several clusters are running, name one by --postgres-port or --data-dir: {known}")
